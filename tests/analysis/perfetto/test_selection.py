"""Parts of a run in Perfetto: what is there is what was asked for, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from support import traced
from support.analysis_command import run_command
from support.trace_processor import open_trace

from analysis.perfetto import view
from analysis.trace import events

COLUMNS = ("rank", "cat", "name", "step", "epoch", "ts", "dur")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced.run(tmp_path_factory.mktemp("parts") / "run", traced.TRAINING, world=3)


@pytest.fixture(scope="module")
def table(run: Path) -> pl.DataFrame:
    found = events.load_events(run, columns=COLUMNS)
    return found.filter(~pl.col("cat").cast(pl.String).is_in(["counter", "clock"]))


def convert(run: Path, *words: object) -> tuple[Path, set[str], list[tuple]]:
    """The file, the names of its processes, and its slices."""
    before = {*run.glob("*.pftrace")}
    done = run_command("perfetto", run, *words)
    assert done.code == 0, done.err
    (path,) = {*run.glob("*.pftrace")} - before
    with open_trace(path) as trace:
        processes = {name for (name,) in trace.rows("select name from process where name is not null")}
        rows = trace.rows("select ts, dur from slice where category != 'clock' order by 1, 2")
    return path, processes, rows


def times(table: pl.DataFrame) -> list[tuple]:
    return sorted((ts * 1000, dur * 1000) for ts, dur in table.select("ts", "dur").iter_rows())


def of_step(table: pl.DataFrame, low: int, high: int) -> pl.DataFrame:
    """All that overlaps the steps, from the first rank's begin to the last one's end."""
    steps = table.filter((pl.col("cat") == "train") & (pl.col("name") == "step"))
    steps = steps.filter(pl.col("step").is_between(low, high))
    begin, end = steps["ts"].min(), (steps["ts"] + steps["dur"]).max()
    return table.filter((pl.col("ts") <= end) & (pl.col("ts") + pl.col("dur") >= begin))


PARTS: dict[str, tuple[list[object], Callable[[pl.DataFrame], pl.DataFrame]]] = {
    "ranks": (["--ranks", "0,2-9"], lambda t: t.filter(pl.col("rank") != 1)),
    "every": (["--every", 2], lambda t: t.filter(pl.col("rank") != 1)),
    "long": (["--min-us", 50], lambda t: t.filter(pl.col("dur") >= 50)),
    "steps": (["--steps", "2-3"], lambda t: of_step(t, 2, 3)),
    "a step of a rank": (
        ["--steps", 2, "--ranks", 1],
        lambda t: of_step(t.filter(pl.col("rank") == 1), 2, 2),
    ),
    "calls": (
        ["--posix", "--ranks", 1],
        lambda t: t.filter((pl.col("rank") == 1) & pl.col("cat").cast(pl.String).is_in(["POSIX", "STDIO"])),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_holds_what_was_asked_for(run: Path, table: pl.DataFrame, part: str) -> None:
    words, choose = PARTS[part]
    wanted = choose(table)
    assert 0 < len(wanted) < len(table)
    _, processes, slices = convert(run, *words)
    assert {name.split()[1].rstrip(",") for name in processes} == {*map(str, wanted["rank"].unique())}
    assert slices == times(wanted)


def test_seconds_count_from_the_run_s_begin(run: Path, table: pl.DataFrame) -> None:
    begin = min(process.first for process in events.read_processes(run))
    middle = (int(table["ts"].max()) - begin) // 2  # type: ignore[arg-type]
    path, _, slices = convert(run, "--from", middle / 1e6)
    assert slices == times(table.filter(pl.col("ts") + pl.col("dur") >= begin + middle))
    assert path.name.endswith(f"-from{middle / 1e6:g}.pftrace")
    done = run_command("perfetto", run, "--from", 3600)
    assert done.code == 2 and "--from 3600: nothing is in this part of the run" in done.err


def test_the_whole_trace_is_still_what_view_shows(run: Path) -> None:
    whole, *_ = convert(run)
    assert view.find_trace(run, None) == whole


def test_a_report_of_some_ranks_is_a_page_of_its_own(run: Path) -> None:
    before = {*run.rglob("*")}
    done = run_command("report", run, "--ranks", "0,2")
    assert done.code == 0, done.err
    page = run / "report-ranks0,2.html"
    assert {*run.rglob("*")} - before == {page}
    text = page.read_text()
    assert "Only a part of the run was read: --ranks 0,2." in text and "there is no trace of" not in text
    assert "2 ranks" in done.out and "rank 1 " not in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "7"], "--ranks 7: the run has no such rank"),
        (["--hosts", "elsewhere"], "--hosts elsewhere: the run has no such rank"),
        (["--steps", "900-901"], "--steps 900-901: the traces have no such step"),
        (["--epoch", "77"], "--epoch 77: the traces have no such step"),
        (["--ranks", "3-1"], "--ranks"),
        (["--ranks", "x"], "give numbers and ranges"),
        (["--steps", "1,3"], "--steps: give one range"),
        (["--from", "3", "--to", "2"], "ends before it begins"),
        (["--ranks", "1", "--format", "json"], "not with --format json"),
    ],
)
def test_mistakes(run: Path, words: list[str], said: str) -> None:
    before = sorted(run.iterdir())
    done = run_command("perfetto", run, *words)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert sorted(run.iterdir()) == before
