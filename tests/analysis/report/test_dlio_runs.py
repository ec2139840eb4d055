"""Folders that DLIO and MLPerf Storage leave: their own accelerator utilisation beside the trace's."""

import json
import shutil
from pathlib import Path

import pytest
from support.analysis_command import run_command
from support.made_traces import Made

SETUP_US, EPOCH_US, STEP_US, COMPUTE_US = 500_000, 1_000_000, 80_000, 50_000


def make_run(folder: Path, names: tuple[tuple[str, str], ...]) -> Path:
    """Two epochs of ten steps, each with a checkpoint after the fifth and an evaluation that computes, too.

    names: of an epoch, a step, computing, evaluation, a checkpoint.
    """
    epoch, step, compute, evaluation, checkpoint = names
    made = Made(None, pid=7)
    made.span("checkpoint", "PyTorchCheckpointing.__init__", 0, SETUP_US)
    for number in range(2):
        begin = SETUP_US + 2 * EPOCH_US * number
        made.span(*epoch, begin, EPOCH_US)
        for at in range(10):
            ts = begin + STEP_US * at + (20_000 if at > 4 else 0)
            made.span(*step, ts, STEP_US - 10_000, step=at + 1)
            made.span(*compute, ts + 10_000, COMPUTE_US)
        made.span(*checkpoint, begin + 5 * STEP_US, 20_000)
        made.span(*evaluation, begin + EPOCH_US + 1000, 200_000)
        made.span(*compute, begin + EPOCH_US + 2000, 100_000)
    made.write(folder)
    shutil.move(next((folder / "trace").iterdir()), folder / "trace-0-of-1.pfw.gz")
    (folder / "trace").rmdir()
    return folder


DLIO_2 = (
    ("dlio_benchmark", "DLIOBenchmark._train"), ("dlio_benchmark", "<module>.yield"),
    ("ai_framework", "TorchFramework.compute"), ("dlio_benchmark", "DLIOBenchmark._eval"),
    ("checkpoint", "PyTorchCheckpointing.save_state"),
)  # fmt: skip
DLIO_MAIN = (
    ("pipeline", "epoch.block"), ("dataloader", "fetch.block"), ("compute", "forward"),
    ("pipeline", "evaluate"), ("checkpoint", "capture"),
)  # fmt: skip
# nine steps computed, from the end of the first one's computing to the end of the last one's
EXPECTED = 9 * COMPUTE_US / (9 * STEP_US)


@pytest.mark.parametrize("names", [DLIO_2, DLIO_MAIN], ids=["2.0", "main"])
@pytest.mark.parametrize(
    "metric",
    [
        {"train_au_mean_percentage": 61.5, "train_au_percentage": [1, 2]},
        {"train_au_percentage": [61.0, 62.0]},
    ],
)
def test_utilisation_beside_what_dlio_says(
    tmp_path: Path, names: tuple[tuple[str, str], ...], metric: dict
) -> None:
    run = make_run(tmp_path, names)
    (run / "summary.json").write_text(json.dumps({"num_accelerators": 1, "metric": metric}))
    out = run_command("summary", run).out
    lines = {
        line.strip().rsplit("  ", 1)[0].strip(): line.split()[-1] for line in out.splitlines() if "  " in line
    }
    assert lines["accelerator utilisation, by DLIO"] == "61.5%"
    assert lines["accelerator utilisation, traced"] == f"{EXPECTED:.1%}" == "62.5%"
    assert "pauses for 500 ms" not in out  # the set-up of checkpointing is no checkpoint


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '{"metric": 3}', "{", '{"metric": {"train_au_percentage": []}}',
     '{"metric": {"train_au_percentage": ["<b>"]}}'],
)  # fmt: skip
def test_another_summary_says_nothing(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, DLIO_2)
    (run / "summary.json").write_text(text)
    found = run_command("summary", run)
    assert found.code == 0 and "accelerator" not in found.out and "Traceback" not in found.err


def test_a_folder_above_names_one_with_traces(tmp_path: Path) -> None:
    """MLPerf Storage: RESULTS/training/unet3d/run/<time>."""
    run = make_run(tmp_path / "training" / "unet3d" / "run" / "20261127_101010", DLIO_2)
    found = run_command("summary", tmp_path)
    assert found.code == 2 and found.err.count("\n") == 1 and str(run) in found.err
