"""Reading, network and writing of many files at once, results in order.

    items -> before (a pool) -> network (this thread) -> after (a pool) -> outcomes, in the order of the items

While one item is in the network, the ones after it are read and the ones before it are coded and written. Which item
comes out of which pool changes nothing: each passes alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_Made = TypeVar("_Made")
_Done = TypeVar("_Done")

FAILURES = (ValueError, ArithmeticError, OSError, RuntimeError, MemoryError)
"""What may go wrong with one file without ending the others; RuntimeError is torch's, without memory for instance."""


@dataclass(frozen=True)
class Outcome(Generic[_Item, _Done]):
    """What became of an item: a value, or the exception that it ended with."""

    item: _Item
    value: _Done | None
    failure: Exception | None


def pipelined(
    items: Iterable[_Item],
    before: Callable[[_Item], _Read],
    network: Callable[[_Item, _Read], _Made],
    after: Callable[[_Item, _Made], _Done],
    *,
    readers: Executor,
    writers: Executor,
    ahead: int,
) -> Iterator[Outcome[_Item, _Done]]:
    """Pass items through three stages.

    Args:
        items: what to work on.
        before: runs on `readers`.
        network: runs here, for one item at a time.
        after: runs on `writers`.
        readers: an executor.
        writers: another, or the same.
        ahead: how many items wait, at most, before the network, and how many after it.

    Yields:
        An outcome for each item, in order; those of `FAILURES` are caught, others end the whole.
    """
    source = iter(items)
    reading: deque[tuple[_Item, Future[_Read]]] = deque()
    writing: deque[tuple[_Item, Future[_Done] | Exception]] = deque()

    def refill() -> None:
        while len(reading) < ahead:
            for item in source:
                reading.append((item, readers.submit(before, item)))
                break
            else:
                return

    refill()
    while reading:
        item, future = reading.popleft()
        refill()
        entry: Future[_Done] | Exception
        try:
            entry = writers.submit(after, item, network(item, future.result()))
        except FAILURES as exception:
            entry = exception
        del future  # and with it what was read
        writing.append((item, entry))
        while writing and (len(writing) > ahead or _is_done(writing[0][1])):
            yield _outcome(*writing.popleft())
    while writing:
        yield _outcome(*writing.popleft())


def _is_done(entry: Any) -> bool:
    return isinstance(entry, Exception) or entry.done()


def _outcome(item: _Item, entry: "Future[_Done] | Exception") -> Outcome[_Item, _Done]:
    if isinstance(entry, Exception):
        return Outcome(item, None, entry)
    try:
        return Outcome(item, entry.result(), None)
    except FAILURES as exception:
        return Outcome(item, None, exception)
