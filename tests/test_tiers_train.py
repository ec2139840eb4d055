"""Training with tables in files: the numbers of tables in memory, at any budget, through stops and stores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished, Train

from dlrm.errors import UserError

SMALL = [
    "--preset", "toy", "--report_every", 1, "--num_embeddings", 3000, "--batch_size", 128,
    "--limit_train_batches", 12, "--limit_val_batches", 2, "--limit_test_batches", 2, "--learning_rate", 0.1,
]  # fmt: skip
FILES = ["--store_type", "cached_ssd", "--cache_memory_budget_mb", 1.5]


def same(one: Finished, other: Finished) -> None:
    assert one.losses == other.losses and len(one.losses) == 12
    assert one.results["val_aurocs"] == other.results["val_aurocs"]
    assert one.results["test_auroc"] == other.results["test_auroc"] is not None


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_losses_are_those_of_tables_in_memory(train_here: Train, optimizer: str) -> None:
    words = [*SMALL, "--optimizer", optimizer]
    memory = train_here(*words)
    for budget in (1, 100):
        files = train_here(*words, *FILES[:3], budget)
        same(files, memory)
        evicted = sum(line["cache_evictions"] for line in files.metrics if "loss" in line)
        assert (evicted > 0) == (budget < 100)
        assert all(0 <= line["cache_hit_rate"] < 1 for line in files.metrics)
        assert files.metrics[0]["store_bytes_read"] > 0


def test_two_ranks(train: Train, toy: Path) -> None:
    words = [*SMALL, "--in_memory_binary_criteo_path", toy, "--multi_hot_sizes", ",".join(["2"] * 26)]
    memory, files = train(2, *words), train(2, *words, *FILES)
    assert memory.codes == files.codes == [0, 0], files.err
    same(files, memory)
    read = files.results["bytes_read"]
    for rank in ("0", "1"):
        stores = {path: count for path, count in read[rank].items() if path.endswith(".rows")}
        assert stores and min(stores.values()) > 0
    owned = [{path for path in read[rank] if path.endswith(".rows")} for rank in ("0", "1")]
    assert len(owned[0] | owned[1]) == 26 and not owned[0] & owned[1]


def test_stopped_and_resumed_through_either_kind_of_table(train_here: Train, tmp_path: Path) -> None:
    whole = train_here(*SMALL)
    saved = tmp_path / "saved"
    first = train_here(*SMALL, *FILES, "--max_steps", 5, "--checkpoint_dir", saved)
    for kind in (FILES, [], ["--store_type", "cached_host_mem"]):  # the checkpoint holds whole tables
        after = train_here(*SMALL, *kind, "--load_checkpoint_path", saved)
        assert first.losses[:5] + after.losses == whole.losses
        assert after.results["test_auroc"] == whole.results["test_auroc"]


def test_tables_outlive_the_job(train_here: Train, tmp_path: Path) -> None:
    store = ["--persistent_path", tmp_path / "store"]
    words = [*SMALL, "--limit_train_batches", 3]
    first, second = (train_here(*words, *FILES, *store) for _ in range(2))
    assert first.losses[0] != second.losses[0]
    facts: dict[str, Any] = json.loads((tmp_path / "store" / "t_cat_0.json").read_text())
    assert facts["clean"] and facts["rows"] == 3000
    values = np.fromfile(tmp_path / "store" / "t_cat_0.rows", np.float32).reshape(3000, 32)
    assert (values[:, 16:].max(1) > 0).any()  # adagrad's sums


def test_mistakes_are_told(train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="touches .* of --cache_memory_budget_mb"):
        train_here(*SMALL, *FILES[:3], 0.05)
    wishes = tmp_path / "sharding.json"
    wishes.write_text('{"t_cat_0": {"sharding": "row_wise"}}')
    with pytest.raises(UserError, match="t_cat_0: row_wise, but tables in files are table_wise"):
        train_here(*SMALL, *FILES, "--sharding_file", wishes)


def test_single_tables_by_the_sharding_file(train_here: Train, tmp_path: Path) -> None:
    wishes = tmp_path / "sharding.json"
    wishes.write_text('{"t_cat_3": {"store": "cached_ssd"}, "t_cat_9": {"store": "cached_ssd"}}')
    some = train_here(*SMALL, "--cache_memory_budget_mb", 0.1, "--sharding_file", wishes)
    same(some, train_here(*SMALL))
    assert {path.name for path in (some.folder / "tables").glob("*.rows")} == {"t_cat_3.rows", "t_cat_9.rows"}
