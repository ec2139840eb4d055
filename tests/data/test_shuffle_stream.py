"""--shuffle_training_set where rows stream: also a set that fits one window, and Parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import python

from dlrm.data.shuffle import ShuffledOrder


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 100, 4097])
@pytest.mark.parametrize("window", [16, 100, 5000])
def test_every_row_has_one_place(rows: int, window: int) -> None:
    order = ShuffledOrder(rows, 3, 1, window)
    found = []
    for number in range(len(order.starts) - 1):
        held = np.concatenate([np.arange(*block) for block in order.list_blocks(number)])
        found.append(held[order.permute_window(number)])
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(rows))
    if window >= rows:
        assert len(found) == 1


def test_a_small_set_streams(toy: Path, train_here: Any) -> None:
    words = ["--preset", "toy", "--in_memory_binary_criteo_path", toy, "--report_every", 1, "--max_steps", 6]
    plain = train_here(*words, "--source", "stream")
    one, two = (train_here(*words, "--source", "stream", "--shuffle_training_set") for _ in range(2))
    assert one.losses == two.losses != plain.losses


def test_parquet(toy: Path, tmp_path: Path, train_here: Any) -> None:
    made = python(
        "-m", "dlrm.prep", "run", "--input_dir", toy.parent / "tsv", "--output_dir", tmp_path / "parquet",
        "--format", "parquet",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    words = ["--preset", "toy", "--in_memory_binary_criteo_path", tmp_path / "parquet", "--max_steps", 6]
    words += ["--report_every", 1, "--shuffle_training_set"]
    named, found = train_here(*words, "--source", "parquet"), train_here(*words)
    assert named.losses == found.losses and len(found.losses) == 6
