"""`analysis.load`: the frames, their documented columns, equal numbers, and the notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from support import traced
from support.analysis_command import run_command

import analysis
from common.errors import UserError

ROOT = Path(__file__).parents[2]
TABLES = (
    "settings", "metrics", "findings", "ranks", "phases", "steps", "timeline", "files", "checkpoints",
    "calls", "spans",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = traced.run(tmp_path_factory.mktemp("loaded") / "run", traced.TRAINING, world=2)
    done = run_command("report", folder, "--parquet")
    assert done.code == 0, done.err
    return folder


def test_every_column_is_documented(run: Path) -> None:
    loaded = analysis.load(run)
    text = (ROOT / "docs" / "python.md").read_text()
    for name in TABLES:
        section = text.partition(f"### {name}\n")[2].partition("\n###")[0]
        documented = re.findall(r"`(\w+)`", section)
        assert documented == [*getattr(loaded, name).columns], name
        assert f"`run.{name}`" in text


def test_numbers_are_those_of_the_report(run: Path) -> None:
    loaded, summary = analysis.load(str(run)), json.loads((run / "summary.json").read_text())
    assert [*loaded.findings["rule"]] == [found["rule"] for found in summary["findings"]]
    assert [*loaded.ranks["wall_s"]] == [row["wall"] for row in summary["breakdown_s"]]
    assert len(loaded.calls) == summary["calls"]
    assert len(loaded.calls) + len(loaded.spans) == summary["events"]
    moved = loaded.calls.filter((pl.col("op") == "read") & ~pl.col("failed"))["size"].sum()
    assert moved == summary["metrics"]["read_bytes"]
    assert loaded.steps["step"].n_unique() == loaded.steps.filter(rank=0).height
    assert len(loaded.steps.to_pandas()) == len(loaded.steps)


def test_parquet_beside_csv_has_the_same_rows_with_types(run: Path) -> None:
    tables = run / "tables"
    names = {path.stem for path in tables.glob("*.csv")}
    assert names and names == {path.stem for path in tables.glob("*.parquet")}
    for name in names:
        assert len(pl.read_parquet(tables / f"{name}.parquet")) == len(pl.read_csv(tables / f"{name}.csv"))
    assert pl.read_parquet(tables / "breakdown.parquet")["wall"].dtype == pl.Float64


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"data": {"batch_size": 7}, "launch": {"model": "DLRM"}}')
    loaded = analysis.load(tmp_path)
    assert loaded.settings.filter(name="batch size of a rank")["value"].item() == "7"
    assert loaded.results == {} and not len(loaded.metrics)
    with pytest.raises(UserError, match="no traces"):
        loaded.steps  # noqa: B018
    with pytest.raises(UserError, match="no such folder"):
        analysis.load(tmp_path / "absent")


def test_the_notebook_runs(run: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "analysis.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] for cell in notebook["cells"] if "outputs" in cell)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)], cwd=ROOT / "docs", env=os.environ | {"RUN": str(run)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "median" in done.stdout
