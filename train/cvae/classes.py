"""The classes of an autoencoder with a condition: those of its shards, in a fixed order. Must not import torch."""

from collections.abc import Sequence

from codec.errors import UsageError
from codec.shards import SampleRef
from train.cache.index import sort_classes


def classes_of(training: Sequence[SampleRef], held_out: Sequence[SampleRef]) -> tuple[str, ...]:
    """Return the names of the classes of the training images; their places are the labels.

    Raises:
        UsageError: an image has no class, or all images of one are held out.
    """
    both = [*training, *held_out]
    if missing := [sample.name for sample in both if sample.label is None]:
        raise UsageError(
            f"model.condition = class: {len(missing)} of {len(both)} images have no class (that of an image is the "
            f"folder that it lay in, or what its shard says); first: {missing[0]}"
        )
    classes = sort_classes(sample.label for sample in training if sample.label is not None)
    if untaught := [sample for sample in held_out if sample.label not in classes]:
        raise UsageError(
            f"model.condition = class: all images of class {untaught[0].label} are held out; "
            "give it more of them, or lower data.n_validation"
        )
    return tuple(classes)


def check_same(before: Sequence[str], now: Sequence[str], so: str) -> None:
    """Raise UsageError where the shards have other classes than a checkpoint; `so`: what cannot be done."""
    if tuple(before) != tuple(now):
        raise UsageError(f"the shards have other classes than the run had: {_list(before)} -> {_list(now)}; {so}")


def _list(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "none"
