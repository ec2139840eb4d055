"""MLCommons' own program under MODEL=mlcommons, where a checkout of it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.analysis_command import run_command
from support.file_calls import read_events
from support.job_scripts import clean_environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    "MLCOMMONS_DIR" not in os.environ,
    reason="MLCOMMONS_DIR names no checkout of github.com/mlcommons/training",
)


def test_mlcommons_program_is_traced(tmp_path: Path) -> None:
    data, results = tmp_path / "npy", tmp_path / "results"
    for words in (
        ["toy", tmp_path / "tsv", "--days", 24, "--rows", 2000, "--seed", 1],  # its program wants 24 days
        ["run", "--input_dir", tmp_path / "tsv", "--output_dir", data],
    ):
        subprocess.run([sys.executable, "-m", "dlrm.prep", *map(str, words)], check=True)
    environment = clean_environment(
        MODEL="mlcommons", DATASET_DIR=data, RESULTS=results, NPROC=2, DLRM_THREADS=1, EMBEDDING_DIM=8,
        BATCH_SIZE=1024, ARGS="--limit_train_batches 5 --over_arch_layer_sizes 16,1",
    )  # fmt: skip
    done = subprocess.run(
        [ROOT / "3_train.sh"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = next(results.iterdir())
    assert "AUROC over test set" in (run / "log.txt").read_text()
    # torchrec's pipeline of today also trains the two batches that the program adds to fill it
    steps = [e["args"]["step"] for e in read_events(run) if (e.get("cat"), e["name"]) == ("train", "step")]
    assert sorted(steps) == sorted([*range(1, 8)] * 2)
    splits = [json.loads(line)["split"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert splits == ["val", "test"]
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["batch_size"] == 1024 and config["launch"]["model"] == "MLCommons DLRM"
    checked = run_command("check", run)
    assert checked.code == 0 and "every byte" in checked.out and "NOT" not in checked.out
