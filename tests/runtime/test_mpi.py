"""Ranks without torch, under a real mpiexec."""

import subprocess
import sys

import pytest
from support.file_calls import read_events
from support.ranks import MPIEXEC

PROGRAM = """
import sys, time
from dataclasses import replace
from dlrm.runtime import entry, mpi, trace
from dlrm.runtime.errors import UserError

def main(here):
    here = replace(here, host=f"host{here.rank // 2}")  # two hosts, whose clocks are the same
    if sys.argv[1]:
        trace.start_tracing(sys.argv[1], here, "train")
    with mpi.open_group(here) as group:
        run(here, group)

def run(here, group):
    group.mark_clock("start")
    began = time.monotonic()
    if here.rank == 1:
        time.sleep(0.5)
    group.barrier()
    waited = time.monotonic() - began
    found = group.gather_from_all((here.rank, waited > 0.4, time.process_time()))
    assert [rank for rank, *_ in found] == list(range(here.world_size)) and all(late for _, late, _ in found)
    assert group.broadcast_from_first(here.rank + 5) == 5
    values = [f"for {rank}" for rank in range(here.world_size)] if here.first else None
    assert group.scatter_from_first(values) == f"for {here.rank}"
    received = bytearray(4 * here.world_size)
    group.exchange_bytes(bytes([here.rank]) * len(received), received)
    assert here.world_size == 1 or received == b"".join(bytes([rank]) * 4 for rank in range(here.world_size))
    assert not {"torch", "torchrec", "polars", "numba"} & set(sys.modules)
    with group.errors_on_all_ranks():
        if here.rank == here.world_size - 1 and sys.argv[2]:
            raise UserError(sys.argv[2])
    if sys.argv[3] and here.rank == 1:
        raise RuntimeError("broken")
    group.barrier()
    sys.stdout.write(f"rank {here.rank} is done\\n")

entry.run_entry(main)
"""


def run_ranks(
    count: int, folder: str = "", error: str = "", failure: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MPIEXEC, "-n", str(count), sys.executable, "-c", PROGRAM, folder, error, failure],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4])
def test_barriers_and_values_of_all_ranks(count, tmp_path):
    if count == 1:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.replace("if here.rank == 1", "if here.rank == 0"), "", "", ""],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    else:
        done = run_ranks(count)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == [f"rank {rank} is done" for rank in range(count)]


def test_error_of_one_rank_is_printed_once_and_ends_all():
    done = run_ranks(3, error="there: is not here, look elsewhere")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("dlrm:")]
    assert lines == ["dlrm: there: is not here, look elsewhere"]
    assert "is done" not in done.stdout


def test_failure_of_one_rank_is_named_and_ends_all():
    done = run_ranks(3, failure="yes")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("dlrm:")]
    assert len(lines) == 1 and "rank 1" in lines[0] and "broken" in lines[0]
    assert "is done" not in done.stdout


def test_clock_of_each_host_is_measured(tmp_path):
    done = run_ranks(4, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    marks = [event for event in read_events(tmp_path) if event.get("cat") == "clock"]
    offsets = [event["args"] for event in marks if event["name"] == "offset"]
    assert len(offsets) == 1, "one other host, one mark"
    assert abs(offsets[0]["ahead_us"]) <= offsets[0]["error_us"] < 20_000
    assert sum(event["name"] == "barrier" for event in marks) == 4
