"""A run of more ranks than the Perfetto UI opens: all of them in outline, the interesting parts in full."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.analysis_command import run_command
from support.made_traces import training
from support.trace_processor import Trace, open_trace

import analysis
from analysis.perfetto.overview import MAX_RANKS

ROOT = Path(__file__).parents[3]

RANKS, STEPS, SLOW_RANK, SLOW_STEP = 70, 12, 37, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks a host; one rank waits long for its data in one step, and computes more in all of them."""
    folder = tmp_path_factory.mktemp("many") / "run"
    for rank in range(RANKS):
        slow = rank == SLOW_RANK
        made = training(
            rank, RANKS, STEPS, host=f"n{rank // 4}", reads=2, compute=6_000 if slow else 5_000,
            wait=lambda step, slow=slow: 60_000 if slow and step == SLOW_STEP else 100,
        )  # fmt: skip
        made.write(folder)
    return folder


@pytest.fixture(scope="module")
def overview(run: Path):
    done = run_command("perfetto", run)
    assert done.code == 0, done.err
    (path,) = run.glob("*.pftrace")
    with open_trace(path) as trace:
        yield trace, done


def outline_slices(trace: Trace, what: str) -> list[tuple]:
    return trace.rows(
        f"select {what} from slice join thread_track t on track_id = t.id join thread using (utid) "
        "join process using (upid) where thread.name = 'outline' and category = 'train'"
    )


def test_all_ranks_have_their_steps_with_the_sums_of_their_parts(overview, run: Path) -> None:
    trace, _ = overview
    steps = analysis.load(run).steps
    found = outline_slices(
        trace,
        "cast(substr(process.name, 6) as int), slice.name, slice.dur, "
        "extract_arg(slice.arg_set_id, 'debug.wait_us'), extract_arg(slice.arg_set_id, 'debug.compute_us')",
    )
    wanted = [
        (row["rank"], f"step {row['step']}", row["wall_us"] * 1000, row["wait_us"], row["compute_us"])
        for row in steps.iter_rows(named=True)
    ]
    assert len(wanted) == RANKS * STEPS and sorted(found) == sorted(wanted)
    phases = trace.rows("select name, count(*) from slice where category = 'phase' group by 1 order by 1")
    assert ("train", RANKS) in phases and ("startup", RANKS) in phases


def test_the_slow_step_of_the_slow_rank_is_there_in_full(overview, run: Path) -> None:
    trace, done = overview
    assert f"step {SLOW_STEP}, one of the slowest" in done.err and f"rank {SLOW_RANK}" in done.err
    query = (
        "select count(*) from slice join thread_track t on track_id = t.id join thread using (utid) "
        "join process using (upid) where process.name like 'rank {rank} %' and slice.name = 'forward' "
    )
    shown = {rank: trace.rows(query.format(rank=rank))[0][0] for rank in (0, SLOW_RANK, 20)}
    assert shown[SLOW_RANK] >= 3 and 5 <= shown[0] < STEPS and shown[20] == 0


def test_bandwidth_is_that_of_all_calls(overview, run: Path) -> None:
    trace, _ = overview
    moved = analysis.load(run).calls["size"].sum()
    name = "read MB/s by calls, all ranks"
    rows = trace.rows(
        "select ts, value from counter join track on track_id = track.id "
        f"where track.name = '{name}' order by 1"
    )
    total = sum(
        value * 1e6 * (after - ts) / 1e9 for (ts, value), (after, _) in zip(rows, rows[1:], strict=False)
    )
    assert total == pytest.approx(moved, rel=0.01)


def test_finish_makes_the_same_and_whole_makes_all(overview, run: Path, tmp_path: Path) -> None:
    """From one reading of each rank, what the single commands make from one each."""
    (run / "results.json").write_text(json.dumps({"bytes_read": {"0": {}}}))
    (path,) = run.glob("*.pftrace")
    alone = path.read_bytes()
    checked, reported = run_command("check", run), run_command("report", run)
    names = ["summary.json", *(f"tables/{name.name}" for name in (run / "tables").iterdir())]
    tables = {name: (run / name).read_bytes() for name in names}
    done = run_command("finish", run)
    assert f"an overview: {RANKS} ranks" in done.err
    assert path.read_bytes() == alone and len(list(run.glob("*.pftrace"))) == 2
    assert checked.out.strip() in done.out and reported.out.strip() in done.out
    assert "tables/steps.csv" in tables
    for name in names:
        if name == "tables/timeline.csv":  # the last digit depends on the order in which ranks are added up
            one, other = (pl.read_csv(each) for each in (tables[name], run / name))
            assert_frame_equal(one, other)
        else:
            assert (run / name).read_bytes() == tables[name], name
    done = run_command("perfetto", run, "--whole", "-o", tmp_path / "whole.pftrace")
    assert done.code == 0 and "overview" not in done.err
    with open_trace(tmp_path / "whole.pftrace") as trace:
        assert trace.rows("select count(*) from slice where name = 'forward'") == [(RANKS * STEPS,)]
        assert not outline_slices(trace, "slice.name")


def test_only_launches_that_have_a_detail_are_read_again(tmp_path: Path) -> None:
    """Of a run that was resumed; by strace: the slow steps are all in the second launch."""
    ranks, run = MAX_RANKS + 1, tmp_path / "run"
    for rank in range(ranks):
        made = training(rank, ranks, 4, reads=1)
        made.pid = 1000 + rank
        made.write(run)
        made = training(
            rank, ranks, 8, reads=1,
            wait=lambda step, rank=rank: 30_000 if rank == SLOW_RANK and step in (2, 3, 4) else 100,
        )  # fmt: skip
        for line in made.lines:
            line["pid"], line["tid"] = line["pid"] + 1000, line["tid"] + 1000
            if line["ph"] == 1:
                line["ts"] += 600_000_000
        made.pid += 1000
        made.write(run)
    log = tmp_path / "log"
    words = ["strace", "-f", "-qq", "-e", "trace=openat", "-o", log, sys.executable, "-m", "analysis"]
    done = subprocess.run([*words, "perfetto", run], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("one of the slowest") == 3, done.stderr
    opened = Counter(re.findall(r"train(\d+)-(\w+)-app", log.read_text()))
    times = {(int(rank), int(pid, 16) // 1000): count for (rank, pid), count in opened.items()}
    last = ranks - 1  # one of the ranks that the slow steps are shown of
    assert times[last, 2] > times[20, 2] and times[last, 1] == times[20, 1]
