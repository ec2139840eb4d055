"""`finish`: all analyses at the end of a job, from one reading, with the results of the single commands."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import traced
from support.analysis_command import run_command
from support.made_traces import training
from support.ranks import Train
from support.reports import METRICS, analysis

ROOT = Path(__file__).parents[2]
SINGLE = (["perfetto"], ["perfetto", "--posix"], ["check"], ["report"])


def write_records(folder: Path) -> None:
    """What training leaves beside the traces; the bytes are those that support.traced reads and writes."""
    read = {str(rank): {str(folder / f"data{rank}.bin"): 6000} for rank in range(2)}
    written = {str(rank): {str(folder / f"out{rank}.bin"): 5000} for rank in range(2)}
    results = {"samples_per_second": 1000.0, "bytes_read": read, "bytes_written": written}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real ranks that trace themselves."""
    folder = traced.run(tmp_path_factory.mktemp("finish") / "run", traced.TRAINING, world=2)
    write_records(folder)
    return folder


def list_outputs(folder: Path) -> dict[str, bytes]:
    names = [
        *folder.glob("*.pftrace"),
        folder / "report.html",
        folder / "summary.json",
        *folder.glob("tables/*"),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.exists()}


def remove_outputs(folder: Path) -> None:
    for name in list_outputs(folder):
        (folder / name).unlink()


def test_the_same_as_by_the_single_commands(run: Path) -> None:
    single = [analysis(words[0], run, *words[1:])[0] for words in SINGLE]
    expected = list_outputs(run)
    assert (
        len([name for name in expected if name.endswith(".pftrace")]) == 2 and "tables/steps.csv" in expected
    )
    remove_outputs(run)
    out, errors = analysis("finish", run)
    found = list_outputs(run)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert all(text.strip() in out for text in single) and "every byte is in the trace" in out
    assert "failed" not in errors
    lines = errors.splitlines()
    assert any("barrier" in line for line in lines) and len(lines) == len(set(lines))


def test_keys_and_columns_of_the_earlier_release_are_still_there(run: Path) -> None:
    analysis("report", run)
    numbers = json.loads((run / "summary.json").read_text())
    metrics = numbers["metrics"]
    assert 0 < metrics["dataset_read_bytes"] <= metrics["read_bytes"] == numbers["headline"]["bytes read"]
    rows = [*numbers["phases_s"], *csv.DictReader((run / "tables" / "phases.csv").open())]
    assert rows and all(row["io_not_hidden_s"] == row["io_bare_s"] for row in rows)
    steps = [*csv.DictReader((run / "tables" / "steps.csv").open())]
    assert steps and all(row["io_not_hidden_us"] == row["io_bare_us"] for row in steps)


def test_data_that_were_named_by_a_relative_path_count_whole(toy: Path, train: Train) -> None:
    counted = []
    for path in (toy, os.path.relpath(toy, ROOT)):
        words = ["--preset", "toy", "--in_memory_binary_criteo_path", path, "--max_steps", 3, "--trace"]
        done = train(1, *words)
        assert done.codes == [0], done.err
        analysis("report", done.folder)
        counted.append(
            json.loads((done.folder / "summary.json").read_text())["metrics"]["dataset_read_bytes"]
        )
    assert counted[0] == counted[1] > 0


def test_several_launches_hosts_and_blocks(tmp_path: Path) -> None:
    """Clocks to set right, two launches, a forked worker's file, and more events than a block holds."""
    for rank in range(2):
        made = training(rank, 2, steps=1500, host=f"n{rank}")
        made.span("clock", "barrier", 9_400 + 50_000 * rank, 0, when="start")
        made.write(tmp_path)
    later = training(0, 1, steps=20)
    later.pid = 77
    for line in later.lines:
        line["pid"] = 77
        line["ts"] = line.get("ts", 0) + 900_000_000
    later.write(tmp_path)
    for words in SINGLE:
        analysis(words[0], tmp_path, *words[1:])
    expected = list_outputs(tmp_path)
    remove_outputs(tmp_path)
    analysis("finish", tmp_path)
    found = list_outputs(tmp_path)
    assert [name for name in expected if found.get(name) != expected[name]] == []


def check_kills(run: Path, folder: Path, seeds: Iterable[int]) -> int:
    """Ended without a chance to clean up, at random moments; the next run does all of it. How many were."""
    analysis("finish", run)
    expected = list_outputs(run)
    begun = time.monotonic()
    analysis("finish", run)
    longest = time.monotonic() - begun
    killed = 0
    for seed in seeds:
        chance = random.Random(seed)
        copy = folder / str(seed) / run.name
        shutil.copytree(run, copy)
        if chance.random() < 0.7:
            remove_outputs(copy)
        (copy / "thesis.tex").write_text("years of work")
        (copy / "tables").mkdir(exist_ok=True)
        (copy / "tables" / "mine.csv").write_text("a\n")
        found = run_command("finish", copy, seconds=chance.uniform(0.02, longest))
        assert found.code in (0, 1, -signal.SIGALRM), found.err
        killed += found.code < 0
        for path in copy.glob(".dlrm-io-analysis-*"):
            os.utime(path, (1, 1))  # only an old one can be known to be left over
        analysis("finish", copy)
        made = list_outputs(copy)
        assert made.pop("tables/mine.csv") == b"a\n" and (copy / "thesis.tex").read_text() == "years of work"
        assert sorted(made) == sorted(expected), seed
        assert not list(copy.glob("**/.dlrm-io-analysis-*")) and not list(copy.glob("**/*.partial")), seed
        for name in ("summary.json", *(name for name in made if name.endswith((".pftrace", ".csv")))):
            assert made[name] == expected[name], (seed, name)
        shutil.rmtree(folder / str(seed))
    return killed


def test_killed_at_any_moment_the_next_run_makes_the_same(run: Path, tmp_path: Path) -> None:
    check_kills(run, tmp_path, range(2))


@pytest.mark.slow
def test_many_kills(run: Path, tmp_path: Path) -> None:
    assert check_kills(run, tmp_path, range(100, 240)) >= 54


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_each_trace_is_opened_once(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=openat", "-o", log, sys.executable, "-m", "analysis", "finish", run],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    opened = Counter(re.findall(r'openat\(AT_FDCWD, "([^"]+\.pfw\.gz)"', log.read_text()))
    assert opened == {str(path): 1 for path in (run / "trace").glob("*.pfw.gz")}


def test_one_that_fails_does_not_prevent_the_others(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    remove_outputs(folder)
    (folder / "results.json").unlink()
    (folder / "report.html").write_text("somebody's own\n")
    out, errors = analysis("finish", folder, code=1)
    assert sorted(path.name for path in folder.glob("*.pftrace")) == ["run-posix.pftrace", "run.pftrace"]
    assert "report.html" in errors and (folder / "report.html").read_text() == "somebody's own\n"
    last = errors.splitlines()[-1]
    assert last.startswith("analysis: failed: report") and f"python -m analysis report {folder}" in last
    assert "coverage" in out


def test_missing_bytes_are_a_failure(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text())
    results["bytes_read"]["0"]["/data/never"] = 1000
    (folder / "results.json").write_text(json.dumps(results))
    out, errors = analysis("finish", folder, code=1)
    assert "NOT every byte is in the trace" in out and "analysis: failed: check;" in errors


def test_what_cannot_be_read_is_said_once_for_all(tmp_path: Path) -> None:
    _, errors = analysis("finish", tmp_path / "none", code=2)
    assert errors.count("\n") == 1 and "no such folder" in errors
    training(0, 1, steps=2).write(tmp_path)
    (tmp_path / "trace" / "x.pfw.gz").mkdir()
    _, errors = analysis("finish", tmp_path, code=2)
    assert errors.count("\n") == 1 and "x.pfw.gz" in errors
