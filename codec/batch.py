"""Many files in, as many out: what stands where, what exists already, what failed, and what to say in the end.

sources -> plan -> items -> (pipeline) -> Report.add of each outcome -> finish: one summary of all processes
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rich.progress import Progress, TaskID, TextColumn

from codec import console, files
from codec.console import Exit
from codec.errors import UsageError
from codec.files import Source
from codec.launch import Launch
from codec.pipeline import Outcome
from codec.workers import Processes

STREAM = "-"  # stands for stdin among the sources, for stdout as the output
_MOST_JOBS = 8

_Result = TypeVar("_Result")


class Existing(Enum):
    """What to do about an output that exists already."""

    FAIL = "fail"
    SKIP = "skip"
    OVERWRITE = "overwrite"

    @classmethod
    def of(cls, skip: bool, overwrite: bool) -> "Existing":
        """Return what two options ask for; raises UsageError when they ask for both."""
        if skip and overwrite:
            raise UsageError("--skip-existing and --overwrite: which of the two?")
        return cls.SKIP if skip else cls.OVERWRITE if overwrite else cls.FAIL


@dataclass(frozen=True)
class Item:
    """One file to make.

    Attributes:
        source: what from.
        target: where to; None = stdout.
        replace: whether an existing target is to be replaced.
    """

    source: Source
    target: Path | None
    replace: bool = False

    @property
    def is_stdin(self) -> bool:
        """Whether the source is stdin."""
        return str(self.source.path) == STREAM

    def read(self) -> bytes:
        """Return the bytes of the source; raises OSError."""
        return sys.stdin.buffer.read() if self.is_stdin else self.source.path.read_bytes()

    def write(self, data: bytes) -> None:
        """Write the target, whole or not at all.

        Raises:
            FileExistsError: it exists, also when it came into being meanwhile, and is not to be overwritten.
            OSError: the system refuses.
        """
        if self.target is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            files.write_atomic(self.target, data, exclusive=not self.replace)


@dataclass(frozen=True)
class Done:
    """What one finished file has to tell.

    Attributes:
        source_bytes: size of what was read.
        size_bytes: size of what was written.
        pixels: of the image.
        bits_of: bytes that count as the compressed ones.
        notes: what the user should hear, a line each.
        flawed: written, but not whole: counts as failed.
    """

    source_bytes: int
    size_bytes: int
    pixels: int
    bits_of: int
    notes: tuple[str, ...] = ()
    flawed: bool = False


def find(sources: Sequence[str], extensions: frozenset[str], what: str) -> list[Source]:
    """List the sources, of which "-" is stdin; see `codec.files.find`."""
    if "" in sources:  # an unset variable, not this folder
        raise UsageError("an empty source: no such file or folder")
    if STREAM in sources:
        if len(sources) > 1:
            raise UsageError("- (stdin) goes alone")
        return [Source(Path(STREAM), PurePosixPath("stdin"))]
    return files.find(sources, extensions, what)


def plan(found: Sequence[Source], out: str, suffix: str, strip: str = "") -> list[Item]:
    """Say where each source goes; the output is proved to be writable.

    Args:
        found: the sources.
        out: a folder; "-" for stdout, or a file's name that ends in `suffix`, for one source.
        suffix: what is added to each name.
        strip: what is taken from its end before.

    Raises:
        UsageError: the output cannot be written, or is one file for several sources.
    """
    if not out:
        raise UsageError("-o: an empty name")
    if out == STREAM:
        if len(found) > 1:
            raise UsageError(f"{len(found)} files cannot go to stdout: name a folder with -o")
        return [Item(found[0], None)]
    path = Path(out)
    if path.suffix.lower() == suffix and not path.is_dir():
        if len(found) > 1:
            raise UsageError(f"{out}: {len(found)} files cannot become one: name a folder with -o")
        files.check_writable(path.parent)
        return [Item(found[0], path)]
    files.check_writable(path)
    return [Item(source, path / _renamed(source.relative, suffix, strip)) for source in found]


def _renamed(relative: PurePosixPath, suffix: str, strip: str) -> PurePosixPath:
    name = relative.name
    if strip and name.lower().endswith(strip):
        name = name[: -len(strip)]
    return relative.with_name(name + suffix)


@dataclass
class Report:
    """What became of all files of this process.

    Attributes:
        launch: this process among its like.
        total: files to make, in this process.
        done: made.
        failed: not made, or made with losses.
        skipped: existed already.
        failures: what to say of those that failed, lines that begin with the source.
        pixels: of the images made.
        source_bytes: read for them.
        size_bytes: written.
        bits_of: compressed bytes, for bits per pixel.
    """

    launch: Launch
    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    pixels: int = 0
    source_bytes: int = 0
    size_bytes: int = 0
    bits_of: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _bar: tuple[Progress, TaskID] | None = None

    @classmethod
    def start(
        cls, launch: Launch, items: Sequence[Item], existing: Existing, is_whole: Callable[[Path], bool] | None = None
    ) -> "tuple[Report, list[Item]]":
        """Take this process's share of the items; return its report, and what of the share is to be made.

        What another source of the run is written to is a failure, and so is what exists already, unless it is to be
        skipped or replaced. What a killed run left half-written beside the targets is removed.

        Args:
            launch: this process among its like.
            items: those of all processes.
            existing: what to do about targets that exist.
            is_whole: tells an existing target that may be skipped from a damaged one, which is made again.
        """
        owners: dict[Path, Item] = {}
        for item in items:
            if item.target is not None:
                owners.setdefault(item.target, item)
        share = launch.share(items)
        report, todo = cls(launch, len(share)), []
        for item in share:
            target = item.target
            if target is None or (owners[target] is item and not os.path.lexists(target)):
                todo.append(item)
            elif owners[target] is not item:
                report._fail(f"{item.source.path}: {target} is written for {owners[target].source.path}")
            elif existing is Existing.OVERWRITE or (existing is Existing.SKIP and is_whole and not is_whole(target)):
                todo.append(replace(item, replace=True))
            elif existing is Existing.SKIP:
                report.skipped += 1
            else:
                report._fail(f"{item.source.path}: {target} exists already, left untouched")
        files.remove_abandoned({item.target.parent for item in todo if item.target is not None})
        return report, todo

    def add(self, outcome: Outcome[Item, Done]) -> None:
        """Count an outcome; an error says itself at once, so that nothing is lost when the rest is interrupted."""
        path = outcome.item.source.path
        done = outcome.value
        if done is None:
            assert outcome.failure is not None
            if isinstance(outcome.failure, UsageError):
                raise outcome.failure  # nothing that another file would change
            self._fail(failure(path, outcome.failure, outcome.item.target))
        else:
            self.pixels += done.pixels
            self.source_bytes += done.source_bytes
            self.size_bytes += done.size_bytes
            self.bits_of += done.bits_of
            self.done += not done.flawed
            if done.flawed:
                self._fail(*(f"{path}: {note}" for note in done.notes))
            else:
                for note in done.notes:
                    console.note(f"note: {path}: {note}")
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done + self.skipped + self.failed, note=self._pace())

    def _fail(self, *lines: str) -> None:
        """Count one file that failed, and say why."""
        self.failed += 1
        self.failures += lines
        for line in lines:
            console.error(line)

    def _pace(self) -> str:
        speed = self.pixels / 1e6 / max(time.perf_counter() - self._start, 1e-9)
        return f"{speed:.2f} MP/s, {8 * self.bits_of / self.pixels:.3f} bpp" if self.pixels else ""

    @contextmanager
    def progress(self, verb: str) -> Iterator[None]:
        """Show a bar on stderr, on the first process alone."""
        with console.progress(TextColumn("{task.fields[note]}"), disable=self.launch.index > 0) as bar:
            self._bar = bar, bar.add_task(verb, total=self.total, note="")
            yield
        self._bar = None

    def finish(self, what: str, facts: dict[str, Any], as_json: bool, to_stderr: bool) -> int:
        """Join the reports of all processes, print one summary, and return the exit code.

        Args:
            what: "images" or "files".
            facts: what else belongs into the summary.
            as_json: one JSON object instead of a sentence.
            to_stderr: stdout carries a file.
        """
        names = ("total", "done", "failed", "skipped", "pixels", "source_bytes", "size_bytes", "bits_of")
        own = {name: getattr(self, name) for name in names}
        told = self.launch.gather((own, self.failures, time.perf_counter() - self._start))
        sums = {name: sum(numbers[name] for numbers, _, _ in told) for name in names}
        failures = [line for _, lines, _ in told for line in lines]
        time_s = max(seconds for _, _, seconds in told)
        if self.launch.index == 0:
            summary: dict[str, Any] = {
                "n_files": sums["total"],
                "n_done": sums["done"],
                "n_skipped": sums["skipped"],
                "n_failed": sums["failed"],
                "source_bytes": sums["source_bytes"],
                "size_bytes": sums["size_bytes"],
                "pixels": sums["pixels"],
                "bpp": round(8 * sums["bits_of"] / sums["pixels"], 5) if sums["pixels"] else None,
                "time_s": round(time_s, 3),
                "mp_per_s": round(sums["pixels"] / 1e6 / max(time_s, 1e-9), 3),
                "processes": self.launch.count,
                **facts,
                "failures": failures,
            }
            text = json.dumps(summary) if as_json else _sentence(what, summary)
            print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)
        self.launch.gather(None)  # a launcher ends the others as soon as one has failed: not before the summary is out
        return Exit.SOME_FAILED if sums["failed"] else Exit.OK


def _sentence(what: str, summary: dict[str, Any]) -> str:
    parts = [f"{summary['n_done']} of {summary['n_files']} {what}"]
    if summary["n_skipped"]:
        parts.append(f"{summary['n_skipped']} skipped")
    parts.append(f"{summary['size_bytes']} bytes")
    if summary["bpp"] is not None:
        parts.append(f"{summary['bpp']:.4f} bpp")
        parts.append(f"{summary['mp_per_s']:.2f} MP/s")
    parts += [f"{name.replace('_', ' ')} {summary[name]}" for name in ("model", "quality") if summary.get(name)]
    return ", ".join(parts)


def failure(path: Path, exception: Exception, target: Path | None = None) -> str:
    """Say which file failed and why: the operating system's word for it, or the message."""
    if isinstance(exception, FileExistsError):
        return f"{path}: {target} exists already, left untouched"
    if isinstance(exception, OSError) and exception.strerror:
        return f"{path}: {exception.strerror}"
    message = str(exception) or type(exception).__name__
    return message if message.startswith(f"{path}: ") else f"{path}: {message}"


def n_jobs(asked: int, todo: Sequence[Item]) -> int:
    """Return how many workers read, code and write; 0 = half the processors, 1 to 8."""
    if any(item.is_stdin or item.target is None for item in todo):
        return 1  # other processes have no stdin, and stdout is this one's; both go alone
    return asked or min(_MOST_JOBS, max(1, (os.cpu_count() or 1) // 2))


@contextmanager
def workers(jobs: int) -> Iterator[tuple[Executor, Executor]]:
    """Yield a pool for what waits on files and libraries (threads) and one for the coder (processes if jobs > 1).

    The coder is Python: with several threads it would still use one processor.
    """
    threads = ThreadPoolExecutor(jobs, "codec")
    coders: Executor = threads if jobs == 1 else Processes(jobs)
    try:
        yield threads, coders
    except BaseException:  # also Ctrl-C: what waits is dropped, what runs ends
        for executor in (threads, coders):
            executor.shutdown(wait=True, cancel_futures=True)
        raise
    for executor in (threads, coders):
        executor.shutdown()
