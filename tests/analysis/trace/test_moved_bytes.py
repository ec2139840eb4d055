"""The bytes of a call, which the check, the tables and the bandwidth counters must count alike."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import traced
from support.made_traces import BEGIN, Made

from analysis.perfetto.bandwidth import BandwidthCounter
from analysis.tables import answers, check
from analysis.tables.gather import gather_tables
from analysis.tables.read import read_rank
from analysis.trace.arguments import READ, WRITE, count_moved_bytes
from analysis.trace.events import TraceReader
from analysis.trace.launches import plan_launches
from analysis.trace.source import FileSource
from analysis.trace.strings import StringTable
from analysis.trace.windows import spread_bytes

FILE = "/data/day_0"
STREAMS = """
import ctypes
trace.start_tracing(run, here, "train")
library = ctypes.CDLL(f"{run}/streams.so")
library.write_stream(f"{run}/text".encode())
library.read_stream(f"{run}/text".encode())
trace.stop_tracing()
"""


def test_bytes_of_every_kind_of_call(tmp_path: Path) -> None:
    made = Made()
    made.posix("pread64", 0, 300_000, FILE, ret=1000, count=4096, offset=0)
    made.posix("read", 300_010, 10, FILE, ret=-1, count=4096)
    made.posix("fread", 300_020, 10, FILE, cat="STDIO", ret=256, count=256, size=4096)  # items
    made.posix("fwrite", 300_040, 10, FILE, cat="STDIO", ret=3, count=10, size=100)
    made.posix("pwritev2", 300_060, 10, FILE, ret=77)
    made.posix("copy_file_range", 300_070, 5, FILE, ret=9000, len=9000, fd_out=7)
    made.posix("lseek64", 300_080, 10, FILE, ret=5000, offset=5000)
    made.span("STDIO", "ftell", 300_100, 10, ret=5000)
    made.span("data", "read", 300_120, 10, bytes=1)  # a span, no call
    made.write(tmp_path)
    expected = {"read": 1000 + 256 * 4096 + 9000, "write": 300 + 77}

    volume = answers.sum_volume(gather_tables(tmp_path), "layer")
    calls = volume.filter(volume["layer"] == "calls")
    assert dict(calls.select("op", "bytes").iter_rows()) == expected

    ((_, by_rank),) = check.sum_by_launch(FileSource(tmp_path))
    assert by_rank[0] == {
        (READ, FILE): expected["read"], (WRITE, FILE): expected["write"], (check.STREAM, FILE): 2,
    }  # fmt: skip

    strings, counter = StringTable(), BandwidthCounter(BEGIN)
    (path,) = (tmp_path / "trace").iterdir()
    for block in TraceReader(path, strings):
        counter.add(block.ts, block.dur, *count_moved_bytes(block, strings))
    assert {op: sums.sum() for op, sums in counter.bytes.items()} == pytest.approx(expected)


def test_bytes_are_spread_over_the_time_of_the_call() -> None:
    starts, ends = np.array([5, 10, 20, -30, 38]), np.array([25, 10, 29, 10, 90])
    sums = np.zeros(4)
    spread_bytes(starts, ends, np.array([200, 7, 9, 40, 52]), 10, sums)
    before, after = 40, 52  # what is outside of the windows counts in the first and in the last one
    assert sums.tolist() == pytest.approx([50 + before, 100 + 7, 50 + 9, after])


def test_streams_of_the_c_library_move_the_bytes_of_the_file(tmp_path: Path) -> None:
    """Characters and lines too; and each call begins where the last one ended, but for the appended ones."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    run = tmp_path / "run"
    run.mkdir()
    source = traced.ROOT / "tests/support/streams.c"
    subprocess.run([compiler, "-O0", "-shared", "-fPIC", "-o", run / "streams.so", source], check=True)
    traced.run(run, STREAMS)
    size = (run / "text").stat().st_size
    ((_, by_rank),) = check.sum_by_launch(FileSource(run))
    assert [by_rank[0][kind, str(run / "text")] for kind in (READ, WRITE)] == [size, size]
    (run / "results.json").write_text(json.dumps({"bytes_written": {"0": {str(run / "text"): size}}}))
    assert "fprintf and fscanf moved, which DFTracer does not record, of files used by streams: text\n" in (
        check.format_check(*check.check_run(run))
    )
    (job,) = plan_launches(FileSource(run))
    calls = read_rank(job.rank, job.files, job.clock, details=True).calls.sort("ts", maintain_order=True)
    calls = calls.filter((calls["file"] == str(run / "text")) & calls["op"].is_in(["read", "write"]))
    for op, before in (("read", 0), ("write", 1)):
        mine = calls.filter(calls["op"] == op)
        ends = mine["size"].cum_sum().to_list()
        followed = mine["position"].to_list()
        assert followed == ([0, *ends][: len(mine) - before] + [None] * before) and len(mine) > 7
