"""What ends a run before its end: signals, noted when they come, and the clock; obeyed after the step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOP, SAVE, INTERRUPT = 1, 2, 3  # of what several ranks ask for the largest counts
_SIGNALS = {"SIGTERM": SAVE, "SIGUSR1": SAVE, "SIGINT": INTERRUPT}


@dataclass
class Request:
    """What the signals so far ask for.

    Attributes:
        kind: 0 nothing, SAVE (SIGTERM, SIGUSR1: save, exit 0) or INTERRUPT (SIGINT: save, exit 130). The loop itself
            adds STOP (its time is over: validate, save, exit 0).
    """

    kind: int = 0


def leave_to_the_run(worker: int) -> None:
    """Make a reading process deaf to the signals: they often go to the whole process group, and the run obeys them.

    A handler, not SIG_IGN, which programs started by the worker (pipe: URLs) would inherit.
    """
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)


@contextmanager
def requests() -> Iterator[Request]:
    """Note SIGTERM, SIGUSR1 and SIGINT while the context is open; a second SIGINT raises KeyboardInterrupt at once."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and request.kind == INTERRUPT:
            raise KeyboardInterrupt
        request.kind = max(request.kind, _SIGNALS[signal.Signals(number).name])

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
