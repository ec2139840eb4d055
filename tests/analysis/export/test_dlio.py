"""A run as a workload of DLIO and of MLPerf Storage: the numbers are the trace's, the YAML can be read, and
the real DLIO runs it where it is installed.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.made_traces import Made, training
from support.reports import a_run, analysis

from analysis.__main__ import main
from analysis.export.dlio import make_workload, plan_files
from analysis.export.dlio_run import compare, sum_block_seconds
from analysis.export.measured import MeasuredTraining, Spread, measure_training


def export(form: str, run: Path, output: Path) -> tuple[str, Any]:
    """What is printed, and the file as a reader of YAML sees it."""
    printed, err = analysis("export", form, run, "-o", output)
    assert not err
    return printed, yaml.safe_load(output.read_text())


def evaluated(rank: int) -> Made:
    """40 steps, a checkpoint every 10, then an evaluation of 5 steps."""
    made = training(rank, 2, compute=5_000 + 1_000 * rank)
    for step in range(10, 40, 10):
        made.span("checkpoint", "save", 10_000 + step * 12_010 - 9, 8, step=step, epoch=0, bytes=7_000)
    end = 10_000 + 40 * 12_010
    made.span("eval", "evaluate", end, 20_000, split="val", epoch=0, step=40)
    for batch in range(5):
        ts = end + 4_000 * batch
        made.span("eval", "eval_step", ts, 3_000, batch=batch)
        made.span("data", "read", ts, 500, 9, bytes=1_000_000, eval_batch=batch)
        made.span("data", "assemble", ts + 500, 100, 9, batch=batch)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = a_run(tmp_path / "run")
    for path in (folder / "trace").iterdir():
        path.unlink()
    for rank in range(2):
        evaluated(rank).write(folder)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"prefetch_batches": 7}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_numbers_are_the_traces(run: Path) -> None:
    found = measure_training(run)
    assert (found.ranks, found.epochs, found.steps, found.batch_rows, found.prefetch) == (2, 1, 40, 256, 7)
    assert found.record_bytes == 4 << 20
    assert found.calls_per_batch == 4
    # the last rank to come computes 6 ms and exchanges until 12 ms, the other one waits 1 ms for it
    assert found.compute.mean == pytest.approx(0.0114, abs=0.0002)
    assert found.step.mean == pytest.approx(0.01201, abs=0.00001)
    assert (found.checkpoints, found.checkpoint_steps, found.checkpoint_bytes) == (3, 10, 7_000)
    assert (found.eval_steps, found.eval_record_bytes, found.evaluations) == (5, 1_000_000, 1)


def test_the_workload(run: Path, tmp_path: Path) -> None:
    printed, found = export("dlio", run, tmp_path / "workload.yaml")
    assert "2 ranks, 40 steps an epoch, records of 4,194,304 bytes" in printed
    assert found["dataset"]["record_dims"] == [4 << 20]
    assert found["dataset"]["num_files_train"] == 80 and found["dataset"]["num_samples_per_file"] == 1
    assert found["dataset"]["num_files_eval"] == 10
    assert found["reader"]["prefetch_size"] == 7 and found["reader"]["batch_size"] == 1
    assert found["checkpoint"]["steps_between_checkpoints"] == 10
    assert found["model"]["model_size_bytes"] == 7_000
    assert found["workflow"] == {
        "generate_data": False,
        "train": True,
        "evaluation": True,
        "checkpoint": True,
    }
    compute = found["train"]["computation_time"]
    assert compute["type"] == "gamma"
    assert compute["shape"] * compute["scale"] == pytest.approx(measure_training(run).compute.mean, rel=1e-4)
    text = (tmp_path / "workload.yaml").read_text()
    for limit in ("several files", "start-up", "communication", "checkpoints are written by a thread"):
        assert limit in re.sub(r"\n# *", " ", text)
    analysis("export", "dlio", run, "-o", tmp_path / "workload.yaml")  # its own file is replaced


@pytest.mark.parametrize(
    ("steps", "eval_steps"), [(1, 0), (4, 0), (49, 5), (1_000, 0), (997, 100), (10_000, 33)]
)
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_files_hold_whole_steps(run: Path, steps: int, eval_steps: int, ranks: int) -> None:
    """As DLIO rounds: the number of files, down to a multiple of (records of a file x ranks)."""
    asked = replace(measure_training(run), steps=steps, eval_steps=eval_steps, ranks=ranks)
    records, *files = plan_files(asked)
    for wanted, number in zip((steps, eval_steps), files, strict=True):
        assert number // (records * ranks) * records * ranks == number
        made = number * records // ranks
        assert 0.98 * wanted <= made <= wanted


def test_one_rank_without_ups_and_downs(run: Path) -> None:
    even, none = Spread(0.25, 0.0), Spread(0.0, 0.0)
    calm = replace(measure_training(run), ranks=1, compute=even, load=none, eval_steps=0, checkpoints=0)
    found = yaml.safe_load(make_workload(calm))
    assert found["train"]["computation_time"] == {"mean": 0.25}
    assert found["reader"]["preprocess_time"] == {"mean": 0.0}
    assert "evaluation" not in found and "checkpoint" not in found


def test_a_name_that_is_no_plain_word(run: Path, tmp_path: Path) -> None:
    strange = run.rename(tmp_path / 'a "run": #1\n- [x]')
    _, found = export("dlio", strange, tmp_path / "w.yaml")
    assert found["dataset"]["data_folder"].startswith("data/a ")
    assert export("mlperf", strange, tmp_path / "m.yaml")[1]["model"]["name"] == "dlrm"


def test_mlperf(run: Path, tmp_path: Path) -> None:
    printed, found = export("mlperf", run, tmp_path / "mlperf.yaml")
    assert "batches of 256" in printed
    assert found["dataset"]["record_length_bytes"] == (4 << 20) // 256
    assert found["reader"]["batch_size"] == 256
    assert found["dataset"]["num_files_train"] * found["dataset"]["num_samples_per_file"] == 2 * 40 * 256
    assert found["train"]["computation_time"] == pytest.approx(measure_training(run).compute.mean, rel=1e-4)
    text = (tmp_path / "mlperf.yaml").read_text()
    assert "dlrm_b200" in text and "0.000375" in text and "4 reads for a batch, of 1,048,576 to" in text


def test_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.yaml"
    foreign.write_text("model: mine\n")
    nothing = Made(None)
    nothing.posix("read", 10, 5, "/x", ret=7)
    nothing.write(tmp_path / "stepless")
    unread = Made()
    unread.span("train", "step", 0, 100, epoch=0, step=1, batch=0)
    unread.write(tmp_path / "unread")
    (run / "config.json").unlink()
    for words, said in (
        (("dlio", run, "-o", foreign), "mine.yaml"),
        (("dlio", run, "-o", tmp_path / "none" / "w.yaml"), "no such folder"),
        (("dlio", tmp_path / "stepless", "-o", tmp_path / "w.yaml"), "no training steps"),
        (("mlperf", tmp_path / "unread", "-o", tmp_path / "w.yaml"), "what was read for a batch"),
        (("mlperf", run, "-o", tmp_path / "w.yaml"), "no config.json that says the batch size"),
    ):
        _, err = analysis("export", *words, code=2)
        assert said in err and len(err.splitlines()) == 1
        assert not (tmp_path / "w.yaml").exists()
    assert foreign.read_text() == "model: mine\n"


def test_run_without_dlio_or_with_one_that_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(folder: str) -> str:
        words = ["export", "dlio", str(run), "-o", str(tmp_path / "w.yaml"), "--run", str(tmp_path / folder)]
        assert main(words) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        return err

    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert "there is no dlio_benchmark on PATH: install" in refuse("none")
    assert not (tmp_path / "none").exists()
    for name, text in (
        ("dlio_benchmark", "echo 'ValueError: no such key' >&2; exit 3"),
        ("mpiexec", 'shift 2; exec "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    assert "failed in making data (exit code 3): ValueError: no such key" in refuse("dlio")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "is not empty" in refuse("full")
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_the_comparison(run: Path) -> None:
    found: MeasuredTraining = measure_training(run)
    blocks = {"block1": {"duration": "0.30"}, "save_ckpt1": {"duration": 9}, "block2": {"duration": "0.20"}}
    epochs = {"1": {"start": "x", **blocks}}
    assert sum_block_seconds(epochs) == pytest.approx(0.5)
    lines = compare(found, 95.0, 0.5).splitlines()
    assert lines[2].split()[-3:] == ["83.27", "80", "-3.9%"]  # 40 steps in half a second


@pytest.mark.skipif(shutil.which("dlio_benchmark") is None, reason="needs DLIO's main branch on PATH")
def test_the_real_dlio_runs_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    training(steps=16, reads=1, read_size=50_000).write(run)
    out, _ = analysis("export", "dlio", run, "-o", tmp_path / "w.yaml", "--run", tmp_path / "dlio")
    assert out.splitlines()[-4].split()[-3:-1] == ["16", "16"]
    data = [path.stat().st_size for path in (tmp_path / "dlio").rglob("*.indexed_binary")]
    assert sum(data) == 16 * 50_000
