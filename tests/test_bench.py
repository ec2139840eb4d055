"""python -m dlrm.bench: what it measures is consistent with itself and the clock, on one rank and on two."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL = """--batch_sizes 2,64,256 --seconds 0.2 --iterations 20 --num_embeddings 50 --embedding_dim 8
--dense_arch_layer_sizes 16,8 --over_arch_layer_sizes 16,1"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_throughput_and_latency(ranks: int, run_ranks: Any) -> None:
    begun = time.monotonic()
    done = run_ranks(ranks, "dlrm.bench", *SMALL.split(), output=False)
    assert done.codes == [0] * ranks, done.err
    assert ranks == 1 or not done.out[1]
    found = json.loads(done.out[0].splitlines()[-1])
    assert found["world_size"] == ranks and [each["batch_size"] for each in found["results"]] == [2, 64, 256]
    assert found["model"]["embedding_dim"] == 8
    spent = 0.0
    for each in found["results"]:
        latency = each["latency_ms"]
        rising = [latency[f"p{percent}"] for percent in (50, 90, 95, 99)]
        assert all(low <= high for low, high in pairwise(rising)) and rising[0] > 0
        assert each["iterations"] >= 20
        assert each["samples_per_second"] == pytest.approx(
            each["batch_size"] / latency["mean"] * 1e3, rel=1e-6
        )
        spent += latency["mean"] * each["iterations"] / 1e3
    assert spent < time.monotonic() - begun
    assert len(done.out[0].splitlines()) == 1 + 3 + 1  # a head, a line each, the object


def test_larger_batches_pay(run_ranks: Any) -> None:
    done = run_ranks(1, "dlrm.bench", *SMALL.split(), "--batch_sizes", "1,512", "--amp", output=False)
    one, many = json.loads(done.out[0].splitlines()[-1])["results"]
    assert many["samples_per_second"] > 5 * one["samples_per_second"]


def test_a_batch_must_fit_the_ranks(run_ranks: Any) -> None:
    done = run_ranks(2, "dlrm.bench", "--batch_sizes", "3", output=False)
    assert done.codes == [2, 2]
    assert "--batch_sizes 3" in done.err[0] and not done.err[1]


def test_a_checkpoint_on_real_rows(toy: Path, tmp_path: Path, run_ranks: Any) -> None:
    """The run folder brings model and weights: two ranks predict what the test did on one."""
    made = ["--preset", "toy", "--in_memory_binary_criteo_path", str(toy), "--max_steps", "5"]
    trained = run_ranks(1, "dlrm.train", *made, "--checkpoint_every_steps", "5")
    assert trained.codes == [0], trained.err
    labels = np.load(sorted(toy.glob("day_*_labels.npy"), key=lambda path: int(path.name.split("_")[1]))[-1])
    labels = labels[(len(labels) + 1) // 2 :]
    size = len(labels) // 2 * 2
    words = ["--load_checkpoint_path", str(trained.folder), "--in_memory_binary_criteo_path", str(toy)]
    done = run_ranks(
        2,
        "dlrm.bench",
        *words,
        "--batch_sizes",
        f"{size},{size + 2}",
        "--seconds",
        "0",
        "--iterations",
        "1",
        output=False,
    )  # fmt: skip
    assert done.codes == [0, 0], done.err
    found = json.loads(done.out[0].splitlines()[-1])
    assert found["model"]["embedding_dim"] == 16 and found["tables"] == 26
    # calibration: the mean prediction over the mean label
    expected = trained.results["evaluations"]["test"]["calibration"] * labels.mean()
    left_out = f"--batch_sizes {size + 2}: the test set has {len(labels):,} rows; left out\n"
    assert done.err[0].endswith(left_out)
    assert [each["batch_size"] for each in found["results"]] == [size]
    assert found["results"][0]["mean_prediction"] == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--load_checkpoint_path . --preset toy", "remove --preset and model options"),
        (
            "--load_checkpoint_path nowhere",
            "--load_checkpoint_path nowhere: no checkpoint in it: give a run folder",
        ),
        ("--batch_sizes 1,x", "argument --batch_sizes: not integers separated by commas: '1,x'"),
        ("--store_type cached_ssd", "unrecognized arguments: --store_type"),
    ],
)
def test_mistakes_in_one_line(words: str, says: str, run_ranks: Any) -> None:
    done = run_ranks(1, "dlrm.bench", *words.split(), output=False)
    assert done.codes == [2] and says in done.err[0] and done.err[0].count("\n") == 1
