"""A report of some steps, an epoch or a stretch of time, against the lines of the trace."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
from support.made_traces import BEGIN, Made, training
from support.reports import a_run, analysis

from analysis.report.run import open_run
from analysis.trace.clocks import make_clocks
from analysis.trace.events import read_processes
from analysis.trace.selection import Selection, find_windows


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Made]]:
    folder = a_run(tmp_path_factory.mktemp("part") / "run")
    made = [training(rank, 2, wait=100 + 50 * rank) for rank in range(2)]
    return folder, made


def list_events(made: list[Made], cat: str, name: str) -> list[dict]:
    return [
        line
        for one in made
        for line in one.lines
        if line["ph"] == 1 and (line["cat"], line["name"]) == (cat, name)
    ]


def test_steps(traces: tuple[Path, list[Made]]) -> None:
    run, made = traces
    found = open_run(run, selection=Selection(steps=(10, 19)))
    steps = [line for line in list_events(made, "train", "step") if 10 <= line["args"]["step"] <= 19]
    assert found.joined["steps"]["step"].to_list() == [line["args"]["step"] for line in steps]
    first = min(line["ts"] for line in steps)
    last = max(line["ts"] + line["dur"] for line in steps)
    calls = [line for line in list_events(made, "POSIX", "pread64") if first <= line["ts"] < last]
    reads = found.joined["ops"].filter((pl.col("op") == "read") & (pl.col("layer") == "calls"))
    assert reads["count"].sum() == len(calls) == 2 * 10 * 4
    assert reads["bytes"].sum() == sum(line["args"]["ret"] for line in calls)
    time = found.joined["time"]
    assert set(time["phase"]) == {"train"} and time["wall_us"].to_list() == [last - first] * 2
    assert "--steps 10-19" in found.notes[0]


def test_time_and_short_events(traces: tuple[Path, list[Made]]) -> None:
    """Steps that are cut are left out; what goes on during the stretch counts as far as it reaches in."""
    run, made = traces
    found = open_run(run, selection=Selection(from_seconds=0.1, to_seconds=0.2))
    low, high = BEGIN + 100_000, BEGIN + 200_000
    steps = list_events(made, "train", "step")
    whole = [line for line in steps if line["ts"] >= low and line["ts"] + line["dur"] <= high]
    assert len(found.joined["steps"]) == len(whole) > 5
    assert found.joined["time"]["wall_us"].to_list() == [100_000] * 2
    spans = found.joined["spans"].filter(pl.col("name") == "forward")["us"].sum()
    assert spans == sum(
        max(0, min(line["ts"] + line["dur"], high) - max(line["ts"], low))
        for line in list_events(made, "compute", "forward")
    )
    found = open_run(run, selection=Selection(min_us=1_000))
    assert found.joined.calls == 0 and len(found.joined["steps"]) == len(steps)


def test_own_steps_count_where_there_are_others(tmp_path: Path) -> None:
    """A script of DFTracer's AI logging that is traced as well: both number steps, this project's count."""
    made = training(steps=8)
    own = list_events([made], "train", "step")
    for number, line in enumerate(own):
        # numbered otherwise, and a bit longer
        made.span(
            "dataloader", "fetch.block", line["ts"] - BEGIN - 5, line["dur"] + 10, epoch=0, step=number + 4
        )
    made.write(tmp_path)
    asked = Selection(steps=(5, 6))
    found = open_run(tmp_path, selection=asked).joined
    assert found["steps"]["step"].to_list() == [5, 6]
    assert found["time"]["wall_us"].sum() == own[6]["ts"] + own[6]["dur"] - own[5]["ts"]
    process = read_processes(tmp_path)[0]
    clocks = make_clocks([process])
    assert find_windows(asked, [[process]], clocks, 0) == ((own[5]["ts"], own[6]["ts"] + own[6]["dur"]),)


def test_on_the_command_line(traces: tuple[Path, list[Made]]) -> None:
    run, _ = traces
    out, _ = analysis("report", run, "--steps", "10-19", "--epoch", "0")
    page = run / "report-steps10-19-epoch0.html"
    assert str(page) in out and "Only a part of the run was read: --steps 10-19 --epoch 0." in out
    specs = re.findall(r'<script type="application/json" id="f\d+">(.*)</script>', page.read_text())
    (dots,) = [json.loads(spec)["panels"][0] for spec in specs if "ms per step, slowest rank" in spec]
    assert sum(len(series["x"]) for series in dots["series"]) == 10
    assert not (run / "summary.json").exists()  # that is the whole run's
    text = page.read_text()
    assert ">step, median<" in text and ">first step ends after<" not in text
    assert re.search("^  first step ends after ", analysis("summary", run)[0], re.M)
    for words in (("--steps", "500-600"), ("--epoch", "7"), ("--from", "3", "--to", "2")):
        _, errors = analysis("report", run, *words, code=2)
        assert words[0] in errors and errors.count("\n") == 1
