"""DLRM on datasets with other numbers of columns than Criteo's: trained, stopped and resumed, benchmarked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.runtime.errors import UserError

SMALL = ["--preset", "toy", "--batch_size", 50, "--report_every", 2]
Made = Callable[[int, int], Path]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5, 7), []),
        ((0, 3), []),
        ((0, 3), ["--interaction_type", "dcn"]),
        ((40, 200), ["--source", "memory", "--shuffle_training_set"]),
    ],
)
def test_resumed_as_if_never_stopped(
    other_columns: Made, tmp_path: Path, train_here: Any, shape: tuple[int, int], words: list[object]
) -> None:
    data = ["--in_memory_binary_criteo_path", other_columns(*shape) / "npy"]

    def train(steps: int, *more: object) -> Any:
        return train_here(*SMALL, *data, *words, "--max_steps", steps, *more)

    whole, kept = train(8), ["--checkpoint_dir", tmp_path / "kept"]
    train(4, *kept)
    resumed = train(8, *kept)
    assert resumed.results["steps"] == 8 and resumed.results["test_samples"] == 250
    assert 0 < resumed.results["test_auroc"] == whole.results["test_auroc"]
    config = json.loads((resumed.folder / "config.json").read_text())
    assert config["data"]["num_numerical"] is None  # meta.json says it


def test_without_numerical_columns_it_learns(other_columns: Made, train_here: Any) -> None:
    data = ["--in_memory_binary_criteo_path", other_columns(0, 3) / "npy"]
    done = train_here(*SMALL, *data, "--epochs", 2, "--learning_rate", 0.05)
    assert done.results["test_auroc"] > 0.6
    assert done.losses[-1] < done.losses[0]


def test_random_data_of_any_shape(train_here: Any) -> None:
    sizes = ["--num_embeddings_per_feature", "5,6,7", "--limit_train_batches", 2]
    done = train_here(*SMALL, "--num_numerical", 0, *sizes)
    assert done.results["steps"] == 2 and np.isfinite(done.losses).all()
    with pytest.raises(UserError, match="3 sizes, 4 expected"):
        train_here(*SMALL, *sizes, "--num_categorical", 4)


def test_the_dataset_decides(other_columns: Made, train_here: Any) -> None:
    data = ["--in_memory_binary_criteo_path", other_columns(5, 7) / "npy"]
    with pytest.raises(UserError, match="--num_numerical 13: .* has 5 numerical columns"):
        train_here(*SMALL, *data, "--num_numerical", 13)
    with pytest.raises(UserError, match="26 sizes, 7 expected"):
        train_here("--preset", "mlperf_v1", *data)


def test_bench_takes_the_columns_from_the_checkpoint(
    other_columns: Made, train_here: Any, run_ranks: Any
) -> None:
    data = ["--in_memory_binary_criteo_path", other_columns(5, 7) / "npy"]
    trained = train_here(*SMALL, *data, "--max_steps", 4, "--checkpoint_every_steps", 4)
    quick = ["--batch_sizes", 8, "--iterations", 2, "--seconds", 0, "--benchmark_warmup_steps", 1]
    done = run_ranks(1, "dlrm.bench", "--load_checkpoint_path", trained.folder, *quick, output=False)
    assert done.codes == [0], done.err
    found = json.loads(done.out[0].splitlines()[-1])
    assert found["tables"] == 7 and 0 < found["results"][0]["mean_prediction"] < 1
