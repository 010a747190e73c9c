"""Mixed precision: autocast around the networks' forward passes, float32 weights, one loss scaler for each side."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

_SETTINGS = ("peak_lr", "betas", "weight_decay")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of autocast contexts for a recipe's `run.precision`; "no" gives contexts that do nothing."""
    if precision == "no":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=DTYPES[precision])


class Side:
    """One side of the game, generator or critic: a module, its optimizer, its loss scaling.

    Accelerate has one scaler for all optimizers and updates it once per optimizer; each side needs its own.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float, scaled: bool) -> None:
        """Join the parts.

        Args:
            module: wrapped for several ranks.
            optimizer: of its parameters, in float32; each group holds its `peak_lr`.
            clip_norm: largest gradient norm; 0 = no clipping.
            scaled: scale losses, for fp16.
        """
        self.module = module
        self.optimizer = optimizer
        self._clip_norm = clip_norm or float("inf")
        device = next(module.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)

    def set_rate(self, factor: float) -> None:
        """Set every group's learning rate to its peak times `factor`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def backward(self, objective: torch.Tensor) -> None:
        """Add the gradients of an objective."""
        self.scaler.scale(objective).backward()  # type: ignore[no-untyped-call]

    def finish(self) -> torch.Tensor:
        """Unscale and clip the gradients, each group of parameters by itself.

        Returns:
            Their norm over all groups before clipping, a scalar, equal on all ranks.
        """
        self.scaler.unscale_(self.optimizer)
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [torch.nn.utils.clip_grad_norm_(group, self._clip_norm) for group in groups]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def update(self, finite: bool) -> None:
        """Take the optimizer's step, or leave it out where the gradients are not finite; then drop the gradients."""
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()  # lowers the scale where this side's gradients were not finite
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def scale_is_exhausted(self) -> bool:
        """Whether gradients that are not finite can no longer be the fault of a loss scale that is too large."""
        return not self.scaler.is_enabled() or self.scaler.get_scale() < 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; what the recipe sets stays as it says now."""
        settings = [{name: group[name] for name in _SETTINGS} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        if self.scaler.is_enabled() and state["scaler"]:  # empty when the run before took no fp16
            self.scaler.load_state_dict(state["scaler"])
