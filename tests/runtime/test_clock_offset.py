"""Hosts with clocks of their own: what `mark_clock` records, and what the analysis makes of it.

A host is a process whose wall clock is shifted by a preloaded library, since no namespace shifts that clock.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.ranks import ROOT, free_port

from analysis.trace import clocks, events

pytestmark = pytest.mark.mpi
# Both ranks note moments of a clock that all processes of the machine share.
RANK = """
import os, sys, time
from dlrm.runtime import session, trace
from dlrm.runtime.ranks import Ranks
run, rank, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
here = Ranks(rank, 0, 4, 1, ("a", "b", "c", "c")[rank])
trace.start_tracing(run, here, "train")
with session.open_session(here, 60):
    session.mark_clock("start")
    for moment in range(20):
        before = time.monotonic_ns() // 1000
        at = trace.get_time()
        after = -(-time.monotonic_ns() // 1000)
        trace.record_span("test", "moment", at, at, before_us=str(before), after_us=str(after))
        time.sleep(seconds / 20)
    session.mark_clock("end")
trace.stop_tracing()
"""


AHEAD = {"b": (7_200_000_000, 0), "c": (-3_000_000, 2000)}  # host -> us, and us per s that it gains


def run_hosts(folder: Path, seconds: float) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = folder / "shifted_clock.so"
    source = ROOT / "tests/support/shifted_clock.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    script = folder / "rank.py"
    script.write_text(RANK)
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "DLRM_JOB_TOKEN": "x" * 32, "OMP_NUM_THREADS": "1", "CLOCK_BEGUN_NS": str(time.time_ns()),
    }  # fmt: skip
    ranks = []
    for rank, host in enumerate("abcc"):
        ahead, ppm = AHEAD.get(host, (0, 0))
        shifted = {"LD_PRELOAD": str(library), "CLOCK_AHEAD_US": str(ahead), "CLOCK_GAIN_PPM": str(ppm)}
        words = [sys.executable, script, folder, str(rank), str(seconds)]
        ranks.append(
            subprocess.Popen(words, cwd=folder, text=True, env=common | shifted, stderr=subprocess.PIPE)
        )
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


def find_errors(run: Path, ranks: set[int]) -> float:
    """us by which the moments on these ranks differ from rank 0's once corrected: the median. A moment lies
    between two readings of the shared clock; on busy cores these are far apart, and that is no error.
    """
    table = events.load_events(run).filter(events.pl.col("name") == "moment")
    before, after = (
        table["args"].str.extract(rf'"{name}_us":"(\d+)"').cast(events.pl.Int64)
        for name in ("before", "after")
    )
    table = table.select("rank", (table["ts"] - after).alias("low"), (table["ts"] - before).alias("high"))
    own = table.filter(table["rank"] == 0)
    base = statistics.median((own["low"] + own["high"]) / 2)
    others = table.filter(table["rank"].is_in(ranks))
    return statistics.median(max(0, low - base, base - high) for low, high in others.drop("rank").iter_rows())


def test_shifted_and_drifting_hosts(tmp_path: Path) -> None:
    run_hosts(tmp_path, 2)
    found = events.read_heads(tmp_path)
    assert [set(p.offsets) for p in found] == [set(), {"start", "end"}, {"start", "end"}, set()]
    known = clocks.make_clocks(found)
    base, shifted, drifting, beside = (known[p.path] for p in found)
    assert not base.moves and beside == drifting
    assert shifted.by == drifting.by == "round trips"

    # a shift alone leaves no error, and no drift is made of it
    # (busy cores make round trips longer: then the clock says that its error is larger)
    assert shifted.drift == 0 and abs(shifted.shift + AHEAD["b"][0]) <= max(100, shifted.error)
    assert find_errors(tmp_path, {1}) <= max(100, shifted.error)

    # a drift is known within its error, and corrected
    assert drifting.measured_rate is not None
    assert abs(1e6 * drifting.measured_rate + AHEAD["c"][1]) <= 1e6 * drifting.rate_error + 10
    possible = drifting.error + 3e6 * drifting.rate_error  # over the 2 s and a little
    assert find_errors(tmp_path, {2, 3}) <= max(100, possible)  # up to 4,000 us without
    one, two = clocks.describe_moves(found, known)
    assert "clock of b" in one and "not corrected, since that may be nothing" in one
    assert "clock of c" in two and "corrected, though a clock is seldom that wrong" in two
