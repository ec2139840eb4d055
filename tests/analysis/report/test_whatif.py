"""`python -m analysis whatif`, and its figure in the report: what they print, and what they refuse."""

import csv
import json
from pathlib import Path

import pytest
from support.made_traces import Made
from support.reports import a_run, analysis


def test_the_table_over_the_speed_of_storage(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", wait=4_000)
    out, err = analysis("whatif", run)
    assert not err
    lines = out.splitlines()
    assert lines[0].startswith("run: 2 ranks, 39 steps after the first, prefetching 4")
    shown = [line.split()[0] for line in lines if line]
    assert [each for each in shown if each.startswith("x")] == ["x0.25", "x0.5", "x1", "x2", "x4", "x8"]
    assert "fitted to the run's calls" in out and "as DLIO counts it" in out


def test_a_scenario_as_json(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    words = ["--storage", "x0.01", "--latency", "x2", "--compute", "x.5", "--prefetch", 8, "--ranks", 4]
    found = json.loads(analysis("whatif", run, *words, "--json")[0])
    assert found["scenario"] == {
        "storage": 0.01, "latency": 2.0, "compute": 0.5, "prefetch": 8, "read_chunk_mb": None, "ranks": 4,
    }  # fmt: skip
    assert found["predicted"]["steps"] == 19  # four ranks need half as many; the first is not timed
    assert found["predicted"]["waiting_share"] > found["model"]["waiting_share"]
    assert found["predicted"]["saved_seconds"] == pytest.approx(
        found["model"]["seconds"] - found["predicted"]["seconds"]
    )
    assert found["model"]["samples_per_second"] == pytest.approx(512e3 / found["model"]["step_ms"])
    assert [row["storage"] for row in found["range"]][-2:] == ["x8", "no time"]
    assert any("--ranks" in note for note in found["notes"])


def test_what_changes_nothing_is_said(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    out, _ = analysis("whatif", run, "--read_chunk_mb", 32, "--latency", "x0.5")
    assert "--read_chunk_mb changes nothing here: the run did not stream" in out
    assert "latency and bandwidth cannot be told apart" in out
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"source": "auto", "read_chunk_mb": 8.0, "prefetch_batches": 7}
    (run / "config.json").write_text(json.dumps(config))
    out, _ = analysis("whatif", run, "--read_chunk_mb", 32)
    assert "prefetching 7" in out
    assert "ranks that take turns in a file read one batch at a time" in out


def test_the_report_has_the_figure(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", wait=4_000)
    analysis("report", run)
    assert "What faster storage would buy" in (run / "report.html").read_text()
    rows = list(csv.DictReader((run / "tables" / "whatif.csv").read_text().splitlines()))
    assert [row["storage"] for row in rows] == ["x0.25", "x0.5", "x1", "x2", "x4", "x8", "no time"]
    assert float(rows[2]["saved_s"]) == 0
    assert float(rows[0]["saved_s"]) <= 0 <= float(rows[-1]["saved_s"])


def test_a_trace_without_steps(tmp_path: Path) -> None:
    made = Made(None)
    made.posix("read", 10, 5, "/x", ret=7)
    made.write(tmp_path)
    _, err = analysis("whatif", tmp_path, code=2)
    assert "the trace has no steps" in err and len(err.splitlines()) == 1
    analysis("report", tmp_path)
    assert "What faster storage would buy" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "words",
    [("--storage", "2"), ("--storage", "2x"), ("--storage", "xnan"), ("--storage", "x1e9"),
     ("--latency", "x-1"), ("--compute", "x0"),
     ("--prefetch", "0"), ("--prefetch", "1.5"), ("--ranks", "5000"), ("--read_chunk_mb", "0"),
     ("--read_chunk_mb", "x2")],
)  # fmt: skip
def test_wrong_values_are_refused_in_one_line(tmp_path: Path, words: tuple[str, str]) -> None:
    _, err = analysis("whatif", a_run(tmp_path / "run"), *words, code=2)
    assert len(err.splitlines()) == 1 and words[0] in err and words[1] in err


def test_no_such_run(tmp_path: Path) -> None:
    _, err = analysis("whatif", tmp_path / "none", code=2)
    assert "no such folder" in err and len(err.splitlines()) == 1
