"""The moving average of the weights, which is what is validated and exported."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_LAG = 0.02  # of the loss, by which averages of a run that has settled are never worse


@runtime_checkable
class Settles(Protocol):
    """A module some of whose tensors are more than their mean."""

    def settle(self, live: nn.Module) -> None:
        """Make `self`, the averages of `live`, right where a mean is not."""
        ...


class Average(AveragedModel):
    """Averages that are settled after each update, where the module knows how."""

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the parameters and buffers of `model`."""
        super().update_parameters(model)
        if isinstance(self.module, Settles):
            self.module.settle(model)


def averaged(module: nn.Module, decay: float) -> Average:
    """Return a float32 exponential moving average of a module, decay min(decay, (1 + t) / (10 + t)) at update t.

    Tensors that are no floating-point numbers are copied.
    """

    def update(averages: Any, values: Any, count: torch.Tensor | int) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(list(averages), list(values))
            return
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(values), rate)

    average = Average(module, multi_avg_fn=update, use_buffers=True)
    return average.eval().requires_grad_(False)


def lag(metrics: Mapping[str, float]) -> str | None:
    """Return a line to print where the averages of a finished run are worse than its last weights; None where not.

    Args:
        metrics: of the last validation; "raw_loss": of the last weights.
    """
    loss, raw = metrics.get("loss"), metrics.get("raw_loss")
    if loss is None or raw is None or not loss > raw + _LAG * abs(raw):
        return None
    return (
        f"the averaged weights, which are exported, are behind the last ones: held-out loss {loss:.4f} against "
        f"{raw:.4f}; a smaller optim.ema_decay fits a run of so few steps"
    )
