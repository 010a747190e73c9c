"""The pools behind the commands: the death of a process, and of the parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from codec import batch
from codec.errors import UsageError
from codec.launch import Launch


def double_or_die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def test_the_item_that_kills_its_process_fails_alone() -> None:
    with batch.workers(2) as (_, coders):
        futures: list[Future[int]] = [coders.submit(double_or_die, number) for number in range(8)]
        failures = [future.exception() for future in futures]
        assert [number for number, failure in enumerate(failures) if failure is not None] == [3]
        assert "was killed, or ran out of memory" in str(failures[3])
        assert [future.result() for number, future in enumerate(futures) if number != 3] == [0, 2, 4, 8, 10, 12, 14]


def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from codec import batch\n"
        "if __name__ == '__main__':\n"
        "    with batch.workers(2) as (_, coders):\n"
        "        print(coders.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert _runs(worker)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_empty_names_are_usage_errors_and_not_this_folder() -> None:
    with pytest.raises(UsageError, match="empty source"):
        batch.find([""], frozenset({".lcx"}), "files")
    with pytest.raises(UsageError, match="empty name"):
        batch.plan([], "", ".lcx")


def test_every_item_belongs_to_exactly_one_rank() -> None:
    shares = [Launch(index, 3).share(range(10)) for index in range(3)]
    assert sorted(number for share in shares for number in share) == [*range(10)]
