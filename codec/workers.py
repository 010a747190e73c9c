"""Processes that work for this one: they outlive the death of one of them, and end when this one ends."""

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Lock, Thread
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Processes(Executor):
    """A pool of processes that outlives the death of one: what was in it is tried again, each in a process of its own.

    So the one file that kills its process, for want of memory for instance, fails alone.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._waiting = ThreadPoolExecutor(jobs, "codec-wait")  # each waits for one process
        self._lock = Lock()
        self._pool = _pool(jobs)

    def submit(self, function: Callable[..., _Result], /, *arguments: Any, **named: Any) -> Future[_Result]:
        """See `Executor.submit`."""
        return self._waiting.submit(self._run, partial(function, *arguments, **named))

    def _run(self, call: Callable[[], _Result]) -> _Result:
        with self._lock:
            pool = self._pool
        try:
            return pool.submit(call).result()
        except BrokenProcessPool:
            with self._lock:
                if self._pool is pool:
                    self._pool = _pool(self._jobs)
        with _pool(1) as alone:
            try:
                return alone.submit(call).result()
            except BrokenProcessPool as exception:
                raise RuntimeError("its worker process was killed, or ran out of memory") from exception

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `Executor.shutdown`."""
        self._waiting.shutdown(wait, cancel_futures=cancel_futures)
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Fresh processes: copies of this one would inherit torch's threads, asleep for ever."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C, which reaches every process of the terminal, to the parent; end when it ends, however it does."""
    signal(SIGINT, SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
