"""One command on many processes, as `accelerate launch` and torchrun start them: shares of the work, one summary.

The launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) say who is who. With one process
nothing is imported and nothing is sent.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from codec.errors import UsageError

_Item = TypeVar("_Item")
_WAIT = timedelta(days=7)  # for the slowest rank's share


@dataclass(frozen=True)
class Launch:
    """This process among its like.

    Attributes:
        index: 0 .. count - 1.
        count: processes in all.
        local: index on this machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the launcher's variables; without them this process is alone.

        Raises:
            UsageError: they make no sense.
        """
        try:
            index, count, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            )
        except ValueError as exception:
            raise UsageError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {exception}") from exception
        if not 0 <= index < count:
            raise UsageError(f"RANK {index} of WORLD_SIZE {count}")
        if count > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise UsageError(
                f"WORLD_SIZE is {count}, and MASTER_ADDR or MASTER_PORT is not set: start it by a launcher"
            )
        return cls(index, count, local)

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this process's part of the work: every item goes to exactly one process."""
        return items[self.index :: self.count]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in order, on every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_WAIT)
            atexit.register(_leave)
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


def _leave() -> None:
    """Close the connections: threads that still run when the interpreter goes would abort the process."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
