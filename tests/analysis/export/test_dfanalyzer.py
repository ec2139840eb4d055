"""DFAnalyzer, where it is installed, reads a training's trace: the same bytes, epochs and compute time."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
from support.job_scripts import clean_environment
from support.ranks import on_ranks, words

from analysis.trace.classify import CALLS, DATA_OPS, find_operation
from analysis.trace.events import load_events

PYTHON = os.environ.get("DFANALYZER_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="DFANALYZER_PYTHON names no python of an environment with requirements/dfanalyzer.txt",
    ),
]
# Batches are loaded by a thread. dftracer-utils 0.0.12 finds no names of files in what DFTracer 2 writes.
MAY_BE_EMPTY = {"data_loader_fork", "reader_posix", "checkpoint_posix"}


@pytest.fixture(scope="module")
def run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced toy training on two ranks, with checkpoints and evaluations."""
    folder = tmp_path_factory.mktemp("dfanalyzer")
    more = ["--trace", "--checkpoint_dir", folder / "checkpoints", "--checkpoint_epochs"]
    ended = on_ranks(folder / "run", 2, "dlrm.train", *words(toy, *more, "--evaluate_on_epoch_end"))
    assert ended.codes == [0, 0], ended.err
    return folder / "run"


def analyze(run: Path, view: str) -> dict[str, dict[str, float]]:
    """DFAnalyzer's layers, by its preset for DLIO."""
    copy = run.parent / f"trace-{view}"  # it writes into the folder
    shutil.copytree(run / "trace", copy)
    found = run.parent / f"{view}.json"
    options = [
        "analyzer/preset=dlio", f"trace_path={copy}", f"view_types=[{view}]", "analyzer.checkpoint=False",
        "cluster.processes=False", "cluster.n_workers=1", "output=json", f"output.file_path={found}",
        f"hydra.run.dir={run.parent / 'hydra'}",
    ]  # fmt: skip
    subprocess.run(
        [PYTHON, "-m", "dftracer.analyzer", *options], cwd=run.parent, check=True, timeout=900,
        env={**clean_environment(), "USER": "nobody"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(found.read_text())["views"][view]["summary"]["layers"]


def test_dfanalyzer_counts_the_same(run: Path) -> None:
    layers = analyze(run, "proc_name")
    assert {layer for layer, found in layers.items() if not found["count"]} <= MAY_BE_EMPTY
    events = load_events(run, ("rank", "cat", "name", "dur", "ret")).with_columns(
        pl.col("cat", "name").cast(pl.String)
    )
    moving = [name for name in events["name"].unique() if find_operation(name) in DATA_OPS]
    calls = events.filter(pl.col("cat").is_in(CALLS))
    moved = calls.filter(pl.col("name").is_in(moving) & (pl.col("cat") == "POSIX"))["ret"].clip(0).sum()
    assert layers["posix"]["count"] == len(calls) and layers["posix"]["size_bytes"] == moved > 0
    spans = events.filter(~pl.col("cat").is_in(CALLS))
    epochs = spans.filter((pl.col("cat") == "pipeline") & (pl.col("name") == "epoch"))
    assert layers["epoch"]["count"] == len(epochs) == 2 * 2
    for layer, chosen in (
        ("compute", pl.col("cat") == "compute"),
        ("fetch_data", pl.col("name") == "fetch.iter"),
        ("device", pl.col("cat") == "device"),
    ):
        of_ranks = spans.filter(chosen).group_by("rank").agg(pl.col("dur").sum() / 1e6, pl.len())
        assert layers[layer]["count"] == of_ranks["len"].sum()
        # by process, of the one with most
        assert layers[layer]["time_s"] == pytest.approx(of_ranks["dur"].max(), abs=1e-6)
