"""A run that was stopped and resumed: report, Perfetto file and check handle each launch by itself."""

import json
import signal
from pathlib import Path

import polars as pl
import pytest
from support import trace_processor
from support.made_traces import BEGIN, Made, training
from support.ranks import LiveRanks

from analysis.__main__ import main
from analysis.perfetto import convert
from analysis.report import report
from analysis.report.facts import Facts
from analysis.report.run import open_run
from analysis.tables import answers, check, progress
from analysis.tables.gather import gather_tables
from analysis.trace.events import find_trace_files
from dlrm.runtime.errors import STOPPED

PAUSE = 600_000_000  # us


def shift_launch(made: Made, by: int, pid: int) -> Made:
    """The same, so much later, by another process."""
    for line in made.lines:
        if line["ph"] == 1:
            line["ts"] += by
        for key in ("pid", "tid"):
            line[key] += pid - made.pid
    made.pid = pid
    return made


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Two ranks on hosts whose clocks are 50 ms apart, stopped; ten minutes later three, 9 s apart."""
    for rank, off in ((0, 0), (1, 50_000)):
        made = training(rank, 2, steps=30, host=f"n{rank}")
        made.span("clock", "barrier", 9_400, 0, when="start")
        shift_launch(made, off, 1000 + rank).write(tmp_path, end=False)
    for rank, off in ((0, 0), (1, 9_000_000), (2, 9_000_000)):
        made = training(rank, 3, steps=40, host=f"m{min(rank, 1)}")
        made.span("clock", "barrier", 9_400, 0, when="start")
        shift_launch(made, PAUSE + off, 2000 + rank).write(tmp_path)
    return tmp_path


def test_the_pause_is_not_counted(resumed: Path) -> None:
    joined = gather_tables(resumed)
    one, two = (10_000 + steps * 12_010 for steps in (30, 40))  # us of a launch
    table = progress.list_launches(joined)
    assert table["ranks"].to_list() == [2, 3] and table["steps"].to_list() == [30, 40]
    assert table["wall_s"].to_list() == pytest.approx([one / 1e6, two / 1e6])
    assert table["not_running_before_s"].to_list() == pytest.approx([0, (PAUSE - one) / 1e6])
    walls = dict(answers.sum_breakdown(joined).select("rank", "wall").iter_rows())
    assert walls == pytest.approx({0: (one + two) / 1e6, 1: (one + two) / 1e6, 2: two / 1e6})
    facts = Facts(joined, {})
    assert facts.find_wall_seconds() == pytest.approx((one + two) / 1e6)
    assert facts.average_seconds("wall_s") == pytest.approx((one + two) / 1e6)
    assert facts.average_seconds("wait_s", "train") == pytest.approx(70 * 100e-6)
    shares = pl.read_csv(write_tables(resumed) / "timeline.csv")
    inside = shares.filter((pl.col("at_s") > one / 1e6 + 2) & (pl.col("at_s") < PAUSE / 1e6 - 2))
    assert len(inside) == 0


def write_tables(run: Path) -> Path:
    report.write_report(run)
    return run / "tables"


def test_each_launch_has_its_own_clock(resumed: Path) -> None:
    table = progress.list_steps(gather_tables(resumed))
    assert len(table) == 70 and table["ranks"].to_list() == [2] * 30 + [3] * 40  # no step is two launches'
    assert table["ts"].to_list()[30] == BEGIN + PAUSE + 10_000
    begun = (
        gather_tables(resumed)["steps"]
        .group_by("launch", "rank")
        .agg(pl.col("ts").min())
        .sort("launch", "rank")
    )
    assert begun["ts"].to_list() == [BEGIN + 10_000] * 2 + [BEGIN + PAUSE + 10_000] * 3


def test_it_is_said(resumed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(resumed)]) == 0
    out = capsys.readouterr().out
    assert "launch 2: 3 ranks" in out and "not running between launches" in out
    assert "The run was launched 2 times" in out
    page = (resumed / "report.html").read_text()
    assert "not running" in page and "Launches" in page and '"gaps":[[' in page
    told = json.loads((resumed / "summary.json").read_text())
    assert [launch["ranks"] for launch in told["launches"]] == [2, 3]


def test_in_perfetto_they_are_processes_of_their_own(resumed: Path) -> None:
    summary = convert.convert_to_pftrace(resumed)
    assert any("clock of m1 in launch 2: moved by -9000000 us, right" in line for line in summary.clocks)
    with trace_processor.open_trace(summary.path) as trace:
        assert not trace.complaints()
        names = "select name from process where name glob 'rank*' order by name"
        assert [name for (name,) in trace.rows(names)] == [
            "rank 0 on m0, launch 2", "rank 0 on n0, launch 1", "rank 1 on m1, launch 2",
            "rank 1 on n1, launch 1", "rank 2 on m1, launch 2",
        ]  # fmt: skip


@pytest.mark.mpi
def test_stopped_and_run_again(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "toy", "--report_every", 5, "--batch_size", 128, "--trace", "--epochs", 2]
    words += ["--in_memory_binary_criteo_path", toy, "--checkpoint_every_steps", 3, "--keep_checkpoints", 0]
    for last in (False, True):
        with LiveRanks(tmp_path, 2, *words) as ranks:
            if not last:
                ranks.until_step(22)
                ranks.signal(signal.SIGTERM, rank=1)
            assert ranks.wait() == [0 if last else STOPPED] * 2, ranks.stderr
        assert last == (tmp_path / "results.json").exists()
    assert len(find_trace_files(tmp_path)) == 4
    run = open_run(tmp_path)
    steps = run.results["steps"]
    table = progress.list_launches(run.joined)
    assert table["ranks"].to_list() == [2, 2] and sum(table["steps"]) == steps
    assert table["first_step"].to_list() == [1, table["last_step"][0] + 1]
    assert run.joined["steps"]["step"].n_unique() == steps
    sums = run.joined["collectives"].filter(pl.col("name") == "all_reduce")  # of gradients
    assert sums["step"].n_unique() == steps and (sums["dur"] > 0).any()
    pause = table["not_running_before_s"][1]
    both = answers.sum_breakdown(run.joined)["wall"]
    begin = min(p.first for p in run.joined.processes)
    end = max(p.last for p in run.joined.processes)
    assert 0 < pause < 30 and both.max() <= (end - begin) / 1e6 - pause + 0.001  # type: ignore[operator]
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "launch 1 left no results.json" in out and "launch 2, from results.json:" in out
    assert "coverage 100.0%" in out
    rows, _, unchecked = check.check_run(tmp_path)
    mine = [row for row in rows if row.launch == 2]
    # a checkpoint is written in a work folder, which gets the name of its step when it is complete
    saved = [(path.name, path.stat().st_size) for path in (tmp_path / "checkpoints").glob("0*/*")]
    written = [(Path(row.file).name, row.counted) for row in mine if row.direction == "written"]
    assert set(written) <= set(saved) and len(written) >= 3 * (steps - table["first_step"][1]) // 3
    assert [
        row.counted for row in mine if "checkpoints" in row.file and row.direction == "read"
    ]  # gone on from
    said = sum(row.counted for row in mine)
    assert said == sum(sum(of.values()) for key in ("bytes_read", "bytes_written")
                       for of in run.results.get(key, {}).values())  # fmt: skip
    first = [row for row in rows if row.launch == 1]
    rows_read = sum(row.counted for row in first if row.direction == "read")
    assert rows_read > 22 * 128 * 2 * 160  # rows of 160 bytes
    # the first launch's checkpoints have their second count in its spans: nothing of them is left out
    written = [(Path(row.file).name, row.counted) for row in first if row.direction == "written"]
    assert len(written) >= 22 // 3 * 3 and set(written) <= set(saved)
    left_out = {Path(each.file).name for each in unchecked if each.direction == "written"}
    assert not left_out & {name for name, _ in written}, left_out
