"""What the ranks of a run tell each other. Every method here is called by all ranks at the same point, or by none."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from codec.errors import UsageError


class Ranks:
    """The processes of a run.

    Attributes:
        index: this process, 0 .. count - 1.
        count: how many there are.
        main: whether this one prints and writes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.main: bool = accelerator.is_main_process

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Average a tensor over ranks."""
        if self.count == 1:
            return tensor
        mean: torch.Tensor = self._accelerator.reduce(tensor, reduction="mean")
        return mean

    def gather(self, own: list[Any]) -> list[Any]:
        """Join the ranks' lists of plain objects, in the order of the ranks."""
        return list(gather_object(own)) if self.count > 1 else own

    def largest(self, *own: int) -> list[int]:
        """Return the largest of each number over all ranks."""
        if self.count == 1:
            return list(own)
        gathered = self._accelerator.gather(torch.tensor([own], device=self._accelerator.device))
        return [int(number) for number in gathered.max(0).values.tolist()]

    def raise_together(self, failure: UsageError | None, what: str) -> None:
        """Raise on every rank when one has failed: its own error there, on the others one that points to it.

        Args:
            failure: this rank's, None when all is well here.
            what: what was tried: "write the checkpoint".
        """
        (failed,) = self.largest(int(failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise UsageError(f"rank {self.index}: another rank could not {what}; see its message")

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._accelerator.wait_for_everyone()
