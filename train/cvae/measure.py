"""What the class is worth to an autoencoder that knows it, and what it looks like, on held-out images.

    x, c -> encode -> z -> decode under c, another image's class      -> dB that the right class is worth
    x    -> encode and decode without a class                         -> PSNR of the same network without
    z, and draws of the prior N(0, I) -> decode under every class     -> a picture

Entries: `HeldClasses`, `sentence`. Imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec.conditional_kl import ConditionalKLModel
from codec.pixels import to_uint8
from codec.shards import SampleRef
from eval.draws import generator
from train.channels import Channels
from train.draws import differing

_SHOWN_CLASSES = 10
_DRAWS = 4  # columns of the picture


@dataclass(frozen=True)
class HeldClasses:
    """The classes of held-out images, each with that of another one.

    Attributes:
        classes: all of the model's.
        other: name of a sample -> the class of another held-out image, drawn among those of other classes; empty where
            all are of one class.
        seed: of what is drawn.
    """

    classes: Sequence[str]
    other: Mapping[str, str]
    seed: int

    @classmethod
    def of(cls, classes: Sequence[str], samples: Sequence[SampleRef], seed: int) -> "HeldClasses":
        """Return them for all held-out images of a run, of whatever rank."""
        labels = np.array([classes.index(str(sample.label)) for sample in samples], np.int64)
        places = [differing(labels, n, generator(seed, sample.key, "other")) for n, sample in enumerate(samples)]
        pairs = zip(samples, places, strict=True)
        other = {a.name: str(samples[n].label) for a, n in pairs if samples[n].label != a.label}
        return cls(classes, other, seed)

    def mixed(self, samples: Sequence[SampleRef]) -> list[SampleRef]:
        """Return held-out images in another order, the same for all ranks: shards have class after class."""
        return sorted(samples, key=lambda sample: float(generator(self.seed, sample.key, "order").random()))

    def compared(
        self, model: ConditionalKLModel, sample: SampleRef, image: np.ndarray, x: torch.Tensor, z: torch.Tensor,
        channels: Channels,
    ) -> dict[str, float]:  # fmt: skip
        """Return the PSNR, dB, of an image decoded under another class (where there is one), and without any.

        Args:
            model: without a condition.
            sample: of the image.
            image: (H, W, C) uint8.
            x: (1, C, H, W), the same.
            z: its latents under its own class.
            channels: of the image.
        """
        found = {"without_psnr": model.decode(model.encode(x).mean)}
        if sample.name in self.other:
            found["other_psnr"] = model.under(self.other[sample.name]).decode(z)
        return {name: channels.measured(image, to_uint8(each.float()[0]))["psnr"] for name, each in found.items()}

    def under_each(self, model: ConditionalKLModel, z: torch.Tensor, channels: Channels) -> list[np.ndarray]:
        """Return the pictures of one image's latents, (1, D, h, w), under the first classes, one each."""
        some = range(min(len(self.classes), _SHOWN_CLASSES))
        return [channels.picture(to_uint8(model.under(n).decode(z).float()[0])) for n in some]

    def drawn(self, model: ConditionalKLModel, side: int, channels: Channels) -> list[np.ndarray]:
        """Return columns of the picture: each one draw under the first classes, below two empty places."""
        blank = np.full((2 * side, side, 3), 255, np.uint8)
        draws = model.draw(_DRAWS, size=(side, side))
        return [np.concatenate([blank, *self.under_each(model, z[None], channels)]) for z in draws]

    def describe(self) -> str:
        """Say what the picture shows."""
        shown = ", ".join(self.classes[:_SHOWN_CLASSES])
        return f"validation pictures: originals, reconstructions, the same as {shown}; at the right draws as these"


def sentence(metrics: Mapping[str, float]) -> str:
    """Return what a validation says of the class."""
    if "other_psnr" not in metrics:
        return "condition: not measured, the held-out images are of one class"
    gain = metrics["psnr"] - metrics["other_psnr"]
    return (
        f"condition used: {gain:+.2f} dB over shuffled conditions (PSNR {metrics['psnr']:.2f} dB, under another "
        f"image's class {metrics['other_psnr']:.2f} dB, without a class {metrics['without_psnr']:.2f} dB)"
    )
