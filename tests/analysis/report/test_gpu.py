"""The report's table of GPUs, against times that were planted; none where no GPU was profiled."""

import json
import re
from pathlib import Path

import polars as pl
import pytest
from support.made_profiles import MadeProfile, gpu_steps
from support.made_traces import training
from support.reports import analysis

TITLE = "What the GPU did while waiting for data"


def report(run: Path, *words: object) -> tuple[str, pl.DataFrame | None]:
    """The page, and the table."""
    analysis("report", run, *words)
    table = run / "tables/gpu.csv"
    return (run / "report.html").read_text(), pl.read_csv(table) if table.exists() else None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for rank in (0, 1):
        training(rank, 2, wait=3_000).write(tmp_path / "run")
        gpu_steps(rank, 2).write(tmp_path / f"run/profile/rank0000{rank}-steps3-5-{1000 + rank}.json.gz")
    return tmp_path / "run"


def test_times_of_three_steps(run: Path) -> None:
    """Each step: 3 ms of waiting with a copy of 0.5 ms in it, then 5 ms of compute with a kernel of 2.3 ms,
    at whose end a sum of gradients runs for 0.4 ms, 0.1 of them behind it; then communication.
    """
    page, table = report(run)
    assert TITLE in page and table is not None
    assert table["rank"].to_list() == [0, 1] and table["steps"].to_list() == [3, 3]
    expected = {
        "profiled": 3 * 12_000, "kernels": 3 * 2_300, "collectives": 3 * 300, "copies": 3 * 500,
        "idle_wait": 3 * 2_500, "idle_compute": 3 * (5_000 - 2_300 - 300), "idle_io": 0,
        "waiting": 3 * 3_000, "busy_while_waiting": 3 * 500,
    }  # fmt: skip
    for name, us in expected.items():
        assert table[f"{name}_s"].to_list() == pytest.approx([us / 1e6] * 2, abs=2e-6), name
    parts = ("kernels", "collectives", "copies", "idle")
    idle = ("idle_io", "idle_wait", "idle_communication", "idle_copy", "idle_compute", "idle_other")
    for row in table.iter_rows(named=True):
        assert sum(row[f"{name}_s"] for name in parts) == pytest.approx(row["profiled_s"])
        assert sum(row[f"{name}_s"] for name in idle) == pytest.approx(row["idle_s"])
    assert "waited 18 ms for data, and for 83% of that their GPUs had nothing to do" in page
    specs = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    bars = [json.loads(spec) for spec in specs if "idle: waiting for data" in spec]
    assert [row["label"] for row in bars[0]["rows"]] == ["rank 0, GPU 0", "rank 1, GPU 0"]


def test_part_of_the_run(run: Path) -> None:
    for words, steps in ((["--steps", "4-4"], 1), (["--ranks", "1"], 3)):
        (run / "part").mkdir(exist_ok=True)
        analysis("report", run, *words, "-o", run / "part")
        table = pl.read_csv(run / "part/tables/gpu.csv")
        assert set(table["steps"].to_list()) == {steps}
        assert table["kernels_s"].to_list() == pytest.approx([steps * 0.0023] * len(table))
    assert table["rank"].to_list() == [1]
    _, said = analysis("report", run, "--steps", "10-12", "-o", run / "part")
    assert "Traceback" not in said and not (run / "part/tables/gpu.csv").exists()


def test_profiles_from_elsewhere_and_finish(tmp_path: Path) -> None:
    training(0, 1, wait=3_000).write(tmp_path / "run")
    file = gpu_steps().write(tmp_path / "one.json")
    assert report(tmp_path / "run")[1] is None
    page, table = report(tmp_path / "run", "--kineto", file)
    assert TITLE in page and table is not None and len(table) == 1
    mine, stranger, processor = MadeProfile(0, 1, 1000), MadeProfile(5, 8, 7), MadeProfile(None, 1, 7)
    for number, each in enumerate((mine, stranger, processor)):
        each.operator("aten::mm", 50_000, 5)
        each.write(tmp_path / f"{number}.json")
    page, table = report(tmp_path / "run", "--kineto", *(tmp_path / f"{number}.json" for number in range(3)))
    assert TITLE not in page and table is None
    for number, why in enumerate((
        "it has nothing of a GPU; perfetto shows it", "it is of rank 5, which the run does not have",
        "it names no rank (distributedInfo), and its pid 7 is not the rank",
    )):  # fmt: skip
        assert f"{number}.json is not in this report: {why}" in page
    _, said = analysis("report", tmp_path / "run", "--kineto", tmp_path / "missing.json", code=2)
    assert len(said.splitlines()) == 1
    (tmp_path / "run/profile").mkdir()
    file.rename(tmp_path / "run/profile/rank00000-steps3-5-1000.json")
    out, said = analysis("finish", tmp_path / "run")
    assert "failed" not in said and TITLE in (tmp_path / "run/report.html").read_text()
    assert (tmp_path / "run/tables/gpu.csv").exists()


def test_nothing_is_said_without_a_gpu(run: Path) -> None:
    for path in (run / "profile").iterdir():
        made = MadeProfile(int(path.name[8]), 2, 1000)
        made.operator("aten::mm", 50_000, 5)
        made.write(path)
    page, table = report(run)
    assert TITLE not in page and table is None
    for path in (run / "profile").iterdir():
        path.write_bytes(b"\x1f\x8bdamaged")
    page, table = report(run)
    assert TITLE not in page and table is None
