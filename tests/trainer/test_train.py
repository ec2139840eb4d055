"""python -m dlrm.train on real ranks: what it learns, counts, writes, and that it can be repeated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import words_of_each_step

ROOT = Path(__file__).parents[2]
ROWS, TRAIN_ROWS = 3000, 15000  # a day; all days but the last


@pytest.fixture(scope="module")
def two_ranks(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run under torchrun, as a user would start it, that many tests look at."""
    folder = tmp_path_factory.mktemp("two") / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
        "-m", "dlrm.train", *words_of_each_step(toy, "--batch_size", 128, "--output_dir", folder),
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def read_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_learns_and_scores_each_row_once(two_ranks: Path) -> None:
    results = read(two_ranks, "results.json")
    assert results["test_auroc"] > 0.72 and results["val_scores"][0] > 0.72
    assert results["val_samples"] == results["test_samples"] == ROWS // 2
    assert results["samples"] == TRAIN_ROWS and results["world_size"] == 2
    first, last = np.mean(read_losses(two_ranks)[:3]), np.mean(read_losses(two_ranks)[-10:])
    assert last < first - 0.1


def test_the_run_folder_tells_everything(two_ranks: Path, toy: Path) -> None:
    config = read(two_ranks, "config.json")
    assert config["launch"]["world_size"] == 2 and config["launch"]["device"] in ("cpu", "cuda")
    assert config["data"]["batch_size"] == 128 and config["optim"]["optimizer"] == "adagrad"
    plan = read(two_ranks, "plan.json")
    sizes = read(toy, "meta.json")["table_sizes"]
    rows = {f"t_cat_{i}": size for i, size in enumerate(sizes)}
    assert {name: sum(s["size"][0] for s in t["shards"]) for name, t in plan.items()} == rows
    assert {s["rank"] for t in plan.values() for s in t["shards"]} == {0, 1}
    lines = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, -(-TRAIN_ROWS // 256) + 1))
    assert all(line["lr"] == 0.02 and line["samples_per_second"] > 0 for line in steps)
    assert [line["split"] for line in lines if "split" in line] == ["val", "test"]
    stdout = (two_ranks / "stdout").read_text()
    assert stdout.count("test: samples 1500") == 1  # one rank prints


def test_two_ranks_read_every_byte_of_the_rows_once(two_ranks: Path, toy: Path) -> None:
    read_bytes = read(two_ranks, "results.json")["bytes_read"]
    size = sum(path.stat().st_size for path in toy.glob("day_*.npy"))
    total = sum(sum(files.values()) for files in read_bytes.values())
    assert size <= total < size * 1.1  # headers are read by both
    assert {Path(name).name for files in read_bytes.values() for name in files} == {
        path.name for path in toy.glob("day_*.npy")
    }


def test_one_rank_with_twice_the_batch_is_the_same_run(toy: Path, train: Any) -> None:
    """By SGD: adagrad's first step of a weight is of full length whatever the gradient, of rounding too."""
    flags = ["--optimizer", "sgd", "--learning_rate", 0.1]
    one, two = (
        train(ranks, *words_of_each_step(toy, "--batch_size", 256 // ranks, *flags)) for ranks in (1, 2)
    )
    assert one.codes == [0] and two.codes == [0, 0], one.err + two.err
    assert one.losses == pytest.approx(two.losses, abs=1e-6)
    assert one.losses[-1] < one.losses[0] - 0.05
    for split in ("val", "test"):
        aurocs = [run.results["evaluations"][split]["auroc"] for run in (one, two)]
        assert aurocs[0] == pytest.approx(aurocs[1], abs=1e-6)


def test_a_seed_makes_a_run_repeatable_and_validation_leaves_no_trace(
    toy: Path, train: Any, train_here: Any
) -> None:
    words = words_of_each_step(toy, "--batch_size", 256, "--max_steps", 30)
    plain = train(2, *words)
    looking = train(2, *words, "--validation_freq_within_epoch", 7, "--test_batch_size", 100)
    assert plain.codes == looking.codes == [0, 0], looking.err
    assert len(plain.losses) == 30 and plain.losses == looking.losses
    here, other = (train_here(*words_of_each_step(toy, "--max_steps", 2, "--seed", seed)) for seed in (0, 3))
    assert here.losses[0] != other.losses[0]
    within = [line for line in looking.metrics if line.get("split") == "val"]
    assert [line["step"] for line in within] == [7, 14, 21, 28]
    assert all(line["samples"] == ROWS // 2 for line in within)


def test_it_stops_once_validation_is_good_enough(toy: Path, train_here: Any) -> None:
    done = train_here(
        *words_of_each_step(
            toy, "--validation_auroc", 0.6, "--validation_freq_within_epoch", 10, "--epochs", 5
        )
    )
    found = [line["auroc"] for line in done.metrics if line.get("split") == "val"]
    assert found[-1] >= 0.6 and all(value < 0.6 for value in found[:-1])
    assert done.results["steps"] == 10 * len(found) < 59


def test_random_data_needs_no_files(train: Any) -> None:
    done = train(2, "--num_embeddings", 50, "--limit_train_batches", 7, "--limit_val_batches", 3,
                 "--evaluate_on_epoch_end", "--batch_size", 16, "--learning_rate", 0.1)  # fmt: skip
    assert done.codes == [0, 0], done.err
    assert done.results["steps"] == 7 and done.results["val_samples"] == 3 * 16 * 2
