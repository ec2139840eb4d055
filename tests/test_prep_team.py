"""Work dealt to processes: each result in its place, one error, nobody left behind; writing in one call."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlrm.errors import UserError
from dlrm.prep.files import File, write_together
from dlrm.prep.team import in_processes

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_in_order(workers: int) -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02)
        return item * item, os.getpid()

    results = in_processes(workers, work, range(12))
    assert [square for square, _ in results] == [item * item for item in range(12)]
    assert len({process for _, process in results}) == workers
    assert in_processes(workers, work, []) == []


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    out = os.open(tmp_path / "done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    in_processes(5, lambda item: os.write(out, b"%d\n" % item), range(20_000))
    os.close(out)
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(20_000))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_earliest_error_is_raised(workers: int, tmp_path: Path) -> None:
    def work(item: int) -> None:
        time.sleep(0.01)
        if item in (4, 5):
            raise UserError(f"{item} is bad")
        (tmp_path / str(item)).touch()

    with pytest.raises(UserError, match="4 is bad"):
        in_processes(workers, work, range(100))
    assert len(list(tmp_path.iterdir())) < 10  # nobody began another


def test_a_killed_process_is_told() -> None:
    first = os.getpid()

    def work(item: int) -> None:
        time.sleep(0.05)
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="a worker ended with exit code -9"):
        in_processes(2, work, range(4))


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_is_left_behind(ended_by: signal.Signals) -> None:
    code = (
        "import os, time; from dlrm.prep.team import in_processes\n"
        "def work(item): print(os.getpid(), flush=True); time.sleep(100)\n"
        "in_processes(3, work, range(3))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        processes = [int(process.stdout.readline()) for _ in range(3)]
        process.send_signal(ended_by)
        assert process.wait(20) != 0
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_several_files_in_one_call(tmp_path: Path) -> None:
    arrays = [np.arange(1000, dtype=np.int32), np.arange(30, dtype=np.float64).reshape(3, 10)]
    with File(tmp_path / "a", "w") as a, File(tmp_path / "b", "w") as b:
        write_together([(a, arrays[0], 8), (b, arrays[1], 0), (a, arrays[0][:2], 0)])
        write_together([])
    assert (tmp_path / "a").read_bytes() == arrays[0][:2].tobytes() + arrays[0].tobytes()
    assert (tmp_path / "b").read_bytes() == arrays[1].tobytes()


def test_a_full_disk_is_told_by_its_file(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    data = np.arange(1000, dtype=np.int64)
    try:
        with File(tmp_path / "a", "w") as a, File(tmp_path / "b", "w") as b:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(UserError, match=rf"^{tmp_path}/b: File too large$"):
                write_together([(a, data[:10], 0), (b, data, 0)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "b").read_bytes() == data.tobytes()[:1000]  # as far as there was room
