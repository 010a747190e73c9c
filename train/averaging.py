"""The moving average of the weights, which is what is validated and exported."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return a float32 exponential moving average of a module, decay min(decay, (1 + t) / (10 + t)) at update t."""

    def update(averages: Any, values: Any, count: torch.Tensor | int) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averages), list(values), rate)

    average = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    return average.eval().requires_grad_(False)
