"""The command lines of TorchRec's examples, by torchx: real ranks here, and a Slurm job's text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import python

ROOT = Path(__file__).parents[2]
SMALL = """--num_embeddings 50 --embedding_dim 8 --dense_arch_layer_sizes 16,8 --over_arch_layer_sizes 16,1
--batch_size 16 --learning_rate 0.1"""


def torchx(*words: object, folder: Path = ROOT) -> str:
    """What `torchx run` prints; the ranks' lines have a prefix."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["torchx", "run", *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "USER": os.environ.get("USER", "somebody")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def local(tmp_path: Path) -> list[object]:
    return ["-s", "local_cwd", "--scheduler_args", f"log_dir={tmp_path / 'logs'}"]


def test_the_component_trains_and_prints_mlcommons_lines(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = torchx(
        *local(tmp_path), "components.py:run_dlrm_main", "--num_trainers=2", "--", *SMALL.split(),
        "--epochs", 2, "--evaluate_on_epoch_end", "--evaluate_on_training_end", "--print_lr",
        "--limit_train_batches", 3, "--output_dir", run,
    )  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 2 and results["steps"] == 6
    vals = [float(text) for text in re.findall(r"AUROC over val set: (\S+)\.$", output, flags=re.M)]
    assert vals == results["val_scores"] and len(vals) == 2
    assert re.findall(r"AUROC over test set: (\S+)\.$", output, flags=re.M) == [str(results["test_auroc"])]
    samples = str(results["test_samples"])
    assert re.findall(r"Number of test samples: (\d+)$", output, flags=re.M) == [samples]
    assert len(re.findall(r"Total number of iterations: 3$", output, flags=re.M)) == 2
    rates = re.findall(r"lr: (\d) 0 (\S+)$", output, flags=re.M)
    assert rates == [(str(step), "0.100000") for step in (1, 2, 3, 1, 2, 3)]
    assert "'over_arch_layer_sizes': (16, 1)" in output


def test_scripts_by_torchx_own_component(tmp_path: Path) -> None:
    """In the folder of the scripts, as the examples' READMEs write it."""
    run = tmp_path / "run"
    words = ["dist.ddp", "-j", "1x2", "--script", "bert4rec_main.py", "--"]
    words += ["--dataset_name", "random", "--mode", "dmp", "--num_epochs", "1", "--output_dir", run]
    torchx(*local(tmp_path), *words, folder=ROOT / "scripts")
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 2 and results["score"] == "NDCG@10"


def test_without_the_option_nothing_of_it_is_printed() -> None:
    words = [*SMALL.split(), "--limit_train_batches", 2, "--evaluate_on_training_end"]
    plain = python("-m", "dlrm.train", *words)
    assert plain.returncode == 0 and "AUROC over" not in plain.stdout
    script = python(ROOT / "scripts" / "dlrm_main.py", *words)
    assert script.returncode == 0 and script.stdout.count("AUROC over test set: ") == 1


@pytest.mark.parametrize("where", ["components.py", "scripts/aws_component.py"])
def test_a_slurm_job(where: str) -> None:
    """The README's command; no Slurm is needed to see what would be submitted."""
    path = ROOT / where
    output = torchx(
        "--scheduler", "slurm", "--dryrun", "--scheduler_args", "partition=train,time=5:00:00",
        f"{path.name}:run_dlrm_main", "--num_trainers=16", "--", "--pin_memory", "--batch_size", 8192,
        folder=path.parent,
    )  # fmt: skip
    assert "--nnodes 2" in output and "--nproc_per_node 8" in output and "partition=train" in output
    assert f"{ROOT}/scripts/dlrm_main.py" in output and "--pin_memory --batch_size 8192" in output
