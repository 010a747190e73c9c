"""What the training loop asks of a task. The loop knows nothing of images, perceptual losses or critics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Task(Protocol):
    """One thing that can be trained: the autoencoder now; the conditional head and the prior over codes later.

    Attributes:
        module: everything trainable, wrapped by the loop (DDP) and averaged (EMA); its forward does the whole pass.
    """

    module: nn.Module

    def to(self, device: torch.device) -> None:
        """Move what is not in `module` (frozen networks of losses) to a device."""
        ...

    def describe(self) -> dict[str, str]:
        """Return short facts about the network and the losses, to print when the run starts."""
        ...

    def generator_step(
        self, module: nn.Module, batch: Mapping[str, Any], generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Return named, weighted scalar losses; the loop minimises their sum.

        Args:
            module: `self.module`, wrapped: call it, so that gradients are reduced over ranks.
            batch: what the loader gave, on the device.
            generator: the random numbers of this step and rank, on the CPU.
        """
        ...

    def evaluate(self, module: nn.Module, device: torch.device) -> tuple[dict[str, float], np.ndarray | None]:
        """Return metrics of the held-out samples under `module` (the averaged weights) and a picture, (H, W, 3) uint8.

        Every held-out sample counts exactly once. ({}, None) when there are none.
        """
        ...

    def export(self, module: nn.Module, out: Path, record: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Write the model folder of `module` to `out`.

        Args:
            module: the averaged weights.
            out: the folder; created.
            record: what the run knows about itself (images seen, time, metrics, versions), for the model card.
            device: where `module` lies.

        Returns:
            What the run should print about the model.
        """
        ...
