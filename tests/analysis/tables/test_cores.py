"""Ranks read by threads and by processes: the same results, and no process is left when one of them ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support.job_scripts import clean_environment
from support.made_traces import training

from analysis.tables.cores import map_on_processes, map_on_threads
from analysis.tables.gather import read_rank_tables
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.source import FileSource
from common.errors import UserError


def make_run(folder: Path, ranks: int = 5) -> Path:
    for rank in range(ranks):
        training(rank, ranks, steps=4, host=f"n{rank // 2}").write(folder)
    return folder


def end_by_kill(job: Launch) -> int:
    """As the kernel ends a process for which there is no memory."""
    if job.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.rank


def test_processes_give_what_threads_give(tmp_path: Path) -> None:
    jobs = plan_launches(FileSource(make_run(tmp_path)))
    by_threads = list(map_on_threads(read_rank_tables, jobs))
    by_processes = list(map_on_processes(read_rank_tables, jobs, 2))
    assert len(jobs) == len(by_processes) == 5
    for one, other in zip(by_threads, by_processes, strict=True):
        assert one.processes == other.processes and one.paths == other.paths
        assert one.events == other.events > 0
        assert sorted(one.tables) == sorted(other.tables)
        for name, table in one.tables.items():  # rows of a group_by come in any order
            assert_frame_equal(table, other.tables[name], check_row_order=False)


def test_a_killed_process_ends_the_command(tmp_path: Path) -> None:
    jobs = plan_launches(FileSource(make_run(tmp_path)))
    with pytest.raises(UserError, match=r"was killed \(for memory\?\)"):
        list(map_on_processes(end_by_kill, jobs, 2))


SLEEPING = """
import sys
from analysis.tables.cores import map_on_processes
from support_cores import sleep_long
if __name__ == "__main__":
    list(map_on_processes(sleep_long, list(range(4)), 2))
"""
FUNCTION = """
import os, pathlib, time
def sleep_long(number):
    pathlib.Path(__file__).with_name(f"pid{os.getpid()}").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_command(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "support_cores.py").write_text(FUNCTION)
    (tmp_path / "main.py").write_text(SLEEPING)
    root = Path(__file__).parents[3]
    environment = clean_environment(PYTHONPATH=f"{root}:{tmp_path}")
    command = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(found := list(tmp_path.glob("pid*"))) < 2:
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    if how == signal.SIGINT:  # as a terminal sends it, to all of them
        os.killpg(command.pid, how)
    else:
        command.kill()
    _, errors = command.communicate(timeout=120)
    pids = [int(path.name.removeprefix("pid")) for path in found]
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until + 60
        time.sleep(0.05)
    assert errors.count("Traceback") <= 1 and "SpawnProcess" not in errors
