"""Items handled by processes: results in order, the earliest error, no process left running."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.progress import StepProgress
from dlrm.prep.io.files import OffsetFile, bytes_read
from dlrm.prep.job.workers import run_in_processes
from dlrm.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def all_at_work(workers: int, folder: Path) -> Callable[[], None]:
    """A function that returns once every worker has called it."""

    def wait() -> None:
        (folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 20
        while len(list(folder.iterdir())) < workers:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_in_order(workers: int, tmp_path: Path) -> None:
    work_with = all_at_work(workers, tmp_path)

    def work(item: int) -> tuple[int, int]:
        work_with()
        return item * item, os.getpid()

    results = run_in_processes(workers, work, range(12))
    assert [square for square, _ in results] == [item * item for item in range(12)]
    assert len({process for _, process in results}) == workers
    assert run_in_processes(workers, work, []) == []


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    out = os.open(tmp_path / "done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run_in_processes(5, lambda item: os.write(out, b"%d\n" % item), range(20_000))
    os.close(out)
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(20_000))


@pytest.mark.parametrize("workers", [1, 3])
def test_what_forks_have_done_is_known_here(workers: int, tmp_path: Path) -> None:
    """Their progress, and the bytes of files that stay open until their last item."""
    (data := tmp_path / "data").write_bytes(b"0123456789")
    work_with = all_at_work(workers, ended := tmp_path / "ended")
    ended.mkdir()
    progress = StepProgress(1, show=False)
    opened: list[OffsetFile] = []
    before = bytes_read[str(data)]

    def work(item: int) -> None:
        if not opened:
            opened.append(OffsetFile(data))
        assert opened[0].read(item, 0) == b"0123456789"[:item]
        progress.add(rows=item)

    def at_end() -> None:
        work_with()
        for file in opened:
            file.close()

    with progress.step("read"):
        run_in_processes(workers, work, range(10), at_end)
        assert progress.rows == 45
    assert bytes_read[str(data)] - before == 45
    assert len(list(ended.iterdir())) == workers


@pytest.mark.parametrize("workers", [1, 3])
def test_the_earliest_error_is_raised(workers: int, tmp_path: Path) -> None:
    def work(item: int) -> None:
        time.sleep(0.01)
        if item in (4, 5):
            raise UserError(f"{item} is bad")
        (tmp_path / str(item)).touch()

    with pytest.raises(UserError, match="4 is bad"):
        run_in_processes(workers, work, range(100))
    assert len(list(tmp_path.iterdir())) < 10  # the workers stop after the error


@pytest.mark.parametrize("worse", [False, True])
def test_a_killed_process_is_reported(worse: bool, tmp_path: Path) -> None:
    """Another error is raised instead, if there is one."""
    first, wait = os.getpid(), all_at_work(2, tmp_path)

    def work(item: int) -> None:
        wait()
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        if worse:
            raise UserError("bad row")

    with pytest.raises(UserError, match="bad row" if worse else "a worker ended with exit code -9"):
        run_in_processes(2, work, range(4))


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_parent(ended_by: signal.Signals) -> None:
    code = (
        "import os, time; from dlrm.prep.job.workers import run_in_processes\n"
        "def work(item): os.write(1, b'%d\\n' % os.getpid()); time.sleep(100)\n"
        "run_in_processes(3, work, range(3))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        processes = [int(process.stdout.readline()) for _ in range(3)]
        process.send_signal(ended_by)
        assert process.wait(90) != 0
    deadline = time.monotonic() + 20
    while any(alive(number) for number in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(number: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError):
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    return False
