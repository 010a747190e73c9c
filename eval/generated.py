"""A judge of samples of any generator, by class or without classes, against photographs.

    training photographs, sharp and blurred -> features -> linear probe
    held-out photographs, through the codec -> probe -> A, what the best generator of this codec's images could reach
    samples -> probe -> agreement with the class that was asked for, and its share of A
    features of samples, of held-out photographs, and of other training photographs in the samples' place (control)
            -> Frechet distance, precision, recall, density, coverage; diversity within a class
    nearest training photograph of each sample, and of each held-out one -> is it copied?

Without classes there is no probe, and of the rest all images count as one class. Entry: `judge`. Imports torch.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from codec.errors import UsageError
from eval import class_means, jackknife
from eval.class_folders import UNLABELLED, Photo, by_class, labels_of
from eval.distribution import frechet_of_sets, neighbourhoods
from eval.feature_networks import FeatureNetwork
from eval.jackknife import jackknife as left_out
from eval.probe import BLURS, PENALTIES, Probe, fit, versions

FEWEST = 12
"""Images on each side below which sets are not compared: neighbourhoods need six when a group is left out."""
_BATCH = 64
_SMALL = 32  # pixels a side that images are reduced to where pixels are compared

Codec = Callable[[str, np.ndarray], np.ndarray]
"""(key, pixels) -> the codec's reconstruction, (S, S, 3) uint8."""

SETTINGS = {
    "probe": f"multinomial logistic regression, classes weighted alike, L2 penalty of {PENALTIES} by a fifth of the "
    f"photographs; learned from the training photographs with Gaussian blurs of {tuple(round(b, 5) for b in BLURS)} of "
    "the side, every second mirrored",
    "A": "mean over classes of the probe's accuracy on held-out photographs, through the codec where one is given",
    "agreement": "mean over classes of the share of samples that the probe takes for the class asked for",
    "sets": "against the held-out photographs themselves; control: training photographs through the codec, as many of "
    "each class as there are samples, chosen by hash",
    "diversity": "mean Euclidean distance of the features of two images of a class, mean over classes with two or more",
    "nearest": "smallest Euclidean distance of the features to a training photograph through the codec; pixels: root "
    f"mean square difference of {_SMALL} x {_SMALL} pixels, of a photograph or its mirror, in 8-bit levels; "
    "ratio_by_class: mean over classes of the ratio of medians, whatever the numbers of the classes",
    "intervals": f"{class_means.SETTINGS}; of sets: {jackknife.SETTINGS}",
}


UNCONDITIONAL = "samples without classes: no probe; control, diversity and nearest over all images alike"
"""What the protocol of such a result says beside SETTINGS."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What is judged, and by what.

    Attributes:
        samples: of the generator; their labels are what was asked for.
        training: what it learned from.
        held_out: of the same classes.
        classes: names, in order; those of the samples. `UNLABELLED` alone: there are none.
    """

    samples: Sequence[Photo]
    training: Sequence[Photo]
    held_out: Sequence[Photo]
    classes: Sequence[str]

    @classmethod
    def of(cls, samples: Sequence[Photo], training: Sequence[Photo], held_out: Sequence[Photo]) -> "Images":
        """Check that the classes fit; classes without samples are still told from the others.

        Raises:
            UsageError: a class of samples or held-out photographs has no training photograph, or one of the training no
                held-out one, or there is one class only.
        """
        classes = sorted({photo.label for photo in training})
        for what, photos in (("samples", samples), ("held-out photographs", held_out)):
            if unknown := sorted({photo.label for photo in photos} - set(classes)):
                raise UsageError(
                    f"{what} of class {unknown[0]}, of which there is no training photograph; --unconditional judges "
                    "samples without classes"
                )
        if missing := sorted(set(classes) - {photo.label for photo in held_out}):
            raise UsageError(f"no held-out photograph of class {missing[0]}")
        if len(classes) < 2:
            raise UsageError(f"one class, {classes[0]}: nothing to tell apart")
        return cls(samples=samples, training=training, held_out=held_out, classes=classes)

    @classmethod
    def unconditional(cls, samples: Sequence[Photo], training: Sequence[Photo], held_out: Sequence[Photo]) -> "Images":
        """Return images without classes; all are labelled `UNLABELLED`."""
        return cls(samples=samples, training=training, held_out=held_out, classes=[UNLABELLED])

    @property
    def has_classes(self) -> bool:
        """Whether there is something to tell apart."""
        return len(self.classes) > 1


@dataclass(frozen=True)
class _Looked:
    """Images and their features."""

    photos: Sequence[Photo]
    features: np.ndarray  # (n, D) float64


def judge(
    images: Images, network: FeatureNetwork, codec: Codec | None = None, say: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Judge samples.

    Args:
        images: of one size.
        network: whose features are looked at.
        codec: what photographs go through before they are compared with samples; None = as they are.
        say: told what is being done.

    Returns:
        Numbers, as plain values, with a row for each sample; and the nearest training image of each sample.

    Raises:
        UsageError: the images are smaller than the network takes.
    """
    side = images.samples[0].pixels.shape[0]
    if side < network.least_side:
        raise UsageError(f"{side} pixels: {network.name} takes images from {network.least_side} pixels on")
    probe = None
    if images.has_classes:
        say(f"features of {len(images.training)} training photographs, {len(BLURS)} versions each")
        probe = _probe(images, network)
    say(f"{len(images.training) + len(images.held_out)} photographs through the codec" if codec else "features")
    training, held_out = (_through(part, codec) for part in (images.training, images.held_out))
    known, test = _Looked(training, features(network, training)), _Looked(held_out, features(network, held_out))
    drawn = _Looked(images.samples, features(network, images.samples))
    original = features(network, images.held_out) if codec else test.features
    say("distances")
    nearest, rows = _nearest(drawn, known, test)
    if not images.has_classes:
        for part in nearest.values():
            part["ratio_by_class"] = None
    found = {
        "n_samples": len(images.samples),
        "n_held_out": len(images.held_out),
        **dict.fromkeys(_OF_CLASSES),
        "sets": _sets(original, drawn, known),
        "sets_through_codec": _sets(test.features, drawn, known) if codec else None,
        "diversity": _diversity(drawn, test, images.classes),
        "nearest": nearest,
        "images": rows,
    }
    if probe is not None:
        found |= _told_apart(images, probe, drawn, test, original, rows)
    return found, [known.photos[row["nearest_at"]].pixels for row in rows]


_OF_CLASSES = ("chance", "probe_penalty", "A", "accuracy_on_photographs", "agreement", "agreement_of_A", "by_class")


def _told_apart(
    images: Images, probe: Probe, drawn: _Looked, test: _Looked, original: np.ndarray, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what a probe says of classes, see `_OF_CLASSES`, and add to each sample's row what it is taken for."""
    classes = images.classes
    asked, shares = labels_of(images.samples, classes), probe.shares(drawn.features)
    counts = _counts(shares.argmax(1), images.samples, classes)
    reached = _counts(probe.shares(test.features).argmax(1), test.photos, classes)
    for n, row in enumerate(rows):
        row |= {"asked": images.samples[n].label, "seen_as": classes[int(shares[n].argmax())]}
        row["share_of_asked"] = float(shares[n, asked[n]])
    return {
        "chance": 1 / len(classes),
        "probe_penalty": probe.penalty,
        "A": class_means.class_mean(reached),
        "accuracy_on_photographs": class_means.class_mean(
            _counts(probe.shares(original).argmax(1), images.held_out, classes)
        ),
        "agreement": class_means.class_mean(counts),
        "agreement_of_A": class_means.class_mean_ratio(counts, {name: reached[name] for name in counts}),
        "by_class": _by_class(counts, reached, rows, classes),
    }


def features(network: FeatureNetwork, photos: Sequence[Photo]) -> np.ndarray:
    """Return the features of images of one size, (n, D) float64."""
    return _features(network, [photo.pixels for photo in photos])


def _features(network: FeatureNetwork, pixels: Sequence[np.ndarray]) -> np.ndarray:
    found = []
    for start in range(0, len(pixels), _BATCH):
        batch = np.stack(pixels[start : start + _BATCH]).transpose(0, 3, 1, 2)  # (B, 3, S, S)
        found.append(network(torch.from_numpy(np.ascontiguousarray(batch))).numpy())
    return np.concatenate(found).astype(np.float64)


def _probe(images: Images, network: FeatureNetwork) -> Probe:
    labels = labels_of(images.training, images.classes)
    rows, names = [], []
    for start in range(0, len(images.training), _BATCH):
        some = images.training[start : start + _BATCH]
        rows.append(_features(network, [version for photo in some for version in versions(photo.pixels)]))
        names += [photo.key for photo in some for _ in BLURS]
    return fit(np.concatenate(rows), labels.repeat(len(BLURS)), names, len(images.classes))


def _through(photos: Sequence[Photo], codec: Codec | None) -> Sequence[Photo]:
    if codec is None:
        return photos
    return [Photo(photo.key, photo.label, codec(photo.key, photo.pixels)) for photo in photos]


def _counts(seen: np.ndarray, photos: Sequence[Photo], classes: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return class -> (how many were taken for it, of how many), for the classes that there are images of."""
    right = seen == labels_of(photos, classes)
    parts = by_class(photos, classes)
    return {name: (int(right[where].sum()), len(where)) for name, where in parts.items() if where}


def _control(drawn: _Looked, known: _Looked) -> np.ndarray:
    """Return positions of training photographs, as many of each class as there are samples, or all there are."""
    order = sorted(range(len(known.photos)), key=lambda n: hashlib.sha256(known.photos[n].key.encode()).digest())
    wanted: dict[str, int] = {}
    for photo in drawn.photos:
        wanted[photo.label] = wanted.get(photo.label, 0) + 1
    chosen = []
    for n in order:
        label = known.photos[n].label
        if wanted.get(label, 0) > 0:
            wanted[label] -= 1
            chosen.append(n)
    return np.array(sorted(chosen), np.int64)


def _sets(original: np.ndarray, drawn: _Looked, known: _Looked) -> dict[str, Any] | None:
    """Return each number of `_compared` for the samples and for the control against photographs, and "n": how many
    images and features these are of; None of too few images."""
    control = known.features[_control(drawn, known)]
    sizes = {"samples": len(drawn.features), "control": len(control), "held_out": len(original)}
    if min(sizes.values()) < FEWEST:
        return None
    found: dict[str, Any] = {"n": {**sizes, "features": original.shape[1]}}
    for name, other in (("samples", drawn.features), ("control", control)):
        scores = left_out(_compared, (original, other))
        found[name] = {key: {k: score[k] for k in ("value", "interval")} for key, score in scores.items()}
    return found


def _compared(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    return {"frechet": frechet_of_sets(real, generated), **neighbourhoods(real, generated)}


def _diversity(drawn: _Looked, test: _Looked, classes: Sequence[str]) -> dict[str, Any]:
    """Return how far two images of a class are apart, of the samples and of photographs through the codec."""
    spread = {}
    for name, looked in (("samples", drawn), ("photographs", test)):
        parts = by_class(looked.photos, classes)
        spread[name] = {label: _apart(looked.features[where]) for label, where in parts.items() if len(where) > 1}
    shared = [label for label in classes if label in spread["samples"] and label in spread["photographs"]]
    if not shared:
        return {"samples": None, "photographs": None, "ratio": None}
    means = {name: float(np.mean([values[label] for label in shared])) for name, values in spread.items()}
    ratios = [spread["samples"][label] / max(spread["photographs"][label], 1e-12) for label in shared]
    return {**means, "ratio": float(np.mean(ratios))}


def _apart(points: np.ndarray) -> float:
    distances = torch.cdist(torch.from_numpy(points), torch.from_numpy(points))
    return float(distances.sum() / (len(points) * (len(points) - 1)))


def _nearest(drawn: _Looked, known: _Looked, test: _Looked) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return medians of the distances to the nearest training photograph, and a row for each sample."""
    found, at = _closest(drawn.features, known.features)
    own, _ = _closest(test.features, known.features)
    small = _reduced(known.photos)
    either = np.concatenate([small, small[:, :, ::-1]]).reshape(2 * len(small), -1)
    unit = np.sqrt(either.shape[1])
    in_pixels, own_pixels = (
        _closest(_reduced(looked.photos).reshape(len(looked.photos), -1), either)[0] / unit for looked in (drawn, test)
    )
    told = {}
    for name, mine, others in (("features", found, own), ("pixels", in_pixels, own_pixels)):
        told[name] = {
            "samples": class_means.median(mine.tolist()),
            "held_out": class_means.median(others.tolist()),
            "ratio": class_means.median_ratio(mine.tolist(), others.tolist()),
            "ratio_by_class": _ratio_by_class(drawn.photos, mine, test.photos, others),
            "share_nearer_than_any_held_out": float((mine < _least(others)).mean()),
        }
    rows = [
        {
            "name": photo.key,
            "nearest": known.photos[where].key,
            "nearest_at": int(where),
            "distance": float(distance),
            "distance_pixels": float(pixels),
        }
        for photo, where, distance, pixels in zip(drawn.photos, at, found, in_pixels, strict=True)
    ]
    return told, rows


def _least(distances: np.ndarray) -> float:
    """Return the smallest distance of held-out photographs that are not in the training themselves; 0 without any."""
    apart = distances[distances > 0]
    return float(apart.min()) if apart.size else 0.0


def _ratio_by_class(
    photos: Sequence[Photo], mine: np.ndarray, held_out: Sequence[Photo], others: np.ndarray
) -> float | None:
    """Return the mean over classes of the ratio of medians; None where no median of held-out ones is above 0."""
    ratios = []
    for label in sorted({photo.label for photo in photos}):
        own = np.median([value for photo, value in zip(photos, mine, strict=True) if photo.label == label])
        below = np.median([value for photo, value in zip(held_out, others, strict=True) if photo.label == label])
        ratios += [own / below] if below > 0 else []
    return float(np.mean(ratios)) if ratios else None


def _closest(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each point to the nearest of others, and which that is."""
    distances = torch.cdist(
        torch.from_numpy(points),
        torch.from_numpy(others),
        compute_mode="donot_use_mm_for_euclid_dist",  # copies are at 0, not at the root of a rounding
    )
    least = distances.min(1)
    return least.values.numpy(), least.indices.numpy()


def _reduced(photos: Sequence[Photo]) -> np.ndarray:
    """Return (n, s, s, 3) float64 8-bit levels, s = _SMALL or less."""
    side = min(_SMALL, photos[0].pixels.shape[0])
    images = [Image.fromarray(photo.pixels).resize((side, side), Image.Resampling.BOX) for photo in photos]
    return np.stack([np.asarray(image) for image in images]).astype(np.float64)


def _by_class(
    counts: Mapping[str, tuple[int, int]],
    reached: Mapping[str, tuple[int, int]],
    rows: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
) -> dict[str, Any]:
    found = {}
    for name in classes:
        mine = [row for row in rows if row["asked"] == name]
        hit, n = counts.get(name, (0, 0))
        found[name] = {
            "n_samples": n,
            "agreement": hit / n if n else None,
            "accuracy_of_held_out": reached[name][0] / reached[name][1],
            "median_distance": float(np.median([row["distance"] for row in mine])) if mine else None,
        }
    return found
