"""Rows to tensors: folding as the reference folds, and bad rows named by file and row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_folder import rows, write_days

from dlrm.data.batches import BatchLoader
from dlrm.data.collate import BatchCollator
from dlrm.data.readers import open_source
from dlrm.data.rows import Rows
from dlrm.runtime.errors import UserError


def make_rows(n: int = 50) -> Rows:
    made = rows(n)
    return Rows(made["dense"], made["sparse"], made["labels"].reshape(-1))


def where(row: int, part: str) -> str:
    return f"{part} {row}"


def test_folding_is_the_remainder_also_of_negative_ids() -> None:
    given = make_rows()
    ids = np.asarray(given.sparse)
    ids[::3] = -ids[::3]
    sizes = [1, 2, 3, *[10**k for k in range(1, 10)], *[977] * 14]
    batch = BatchCollator(sizes)(given, where)
    want = (ids % np.array(sizes, np.int32)).T.reshape(-1)
    np.testing.assert_array_equal(batch.sparse_features.values().numpy(), want)


def test_the_batch_owns_its_memory() -> None:
    given = make_rows()
    batch = BatchCollator([1000] * 26)(given, where)
    before = [batch.dense_features.clone(), batch.sparse_features.values().clone(), batch.labels.clone()]
    for array in given:
        np.asarray(array)[:] = 0
    after = [batch.dense_features, batch.sparse_features.values(), batch.labels]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_dense_values_that_are_no_numbers(value: float) -> None:
    given = make_rows()
    given.dense[17, 4] = value
    with pytest.raises(UserError, match=rf"^dense 17: {value} in column 4"):
        BatchCollator()(given, where)


def test_large_finite_values_pass() -> None:
    given = make_rows()
    given.dense[17, 4] = 3e38
    assert BatchCollator()(given, where).dense_features[17, 4] == np.float32(3e38)


@pytest.mark.parametrize("label", [2, -1, 7])
def test_labels_other_than_0_and_1(label: int) -> None:
    given = make_rows()
    given.labels[3] = label
    with pytest.raises(UserError, match=rf"^labels 3: label {label}, expected 0 or 1"):
        BatchCollator()(given, where)


@pytest.mark.parametrize("bad", [100, -1, 2**31 - 1])
def test_ids_outside_their_table(bad: int) -> None:
    given = make_rows()
    np.asarray(given.sparse)[:] %= 100
    BatchCollator([100] * 26, fold=False)(given, where)
    np.asarray(given.sparse)[8, 25] = bad
    with pytest.raises(UserError, match=rf"^sparse 8: id {bad} of cat_25 is outside its table of 100 rows"):
        BatchCollator([100] * 26, fold=False)(given, where)


def test_negative_ids_without_table_sizes() -> None:
    given = make_rows()
    np.asarray(given.sparse)[8, 25] = -5
    with pytest.raises(UserError, match="^sparse 8: id -5 of cat_25"):
        BatchCollator()(given, where)


@pytest.mark.parametrize(("kind", "how"), [
    ("stream", {}), ("memory", {}), ("mmap", {}), ("stream", {"shuffle_batches": True}),
    ("memory", {"shuffle_set": True}), ("stream", {"shuffle_set": True, "window_mb": 0.01}),
])  # fmt: skip
def test_the_message_names_file_and_row(tmp_path: Path, kind: str, how: dict[str, object]) -> None:
    folder = write_days(tmp_path, [90, 110, 9])
    dense = np.load(folder / "day_1_dense.npy")
    dense[33, 2] = np.nan
    np.save(folder / "day_1_dense.npy", dense)
    for rank in range(2):
        batches = BatchLoader(open_source(kind, folder, "train"), 10, rank, 2, [1000] * 26, **how)  # type: ignore[arg-type]
        try:
            list(batches)
        except UserError as error:
            assert str(error).startswith(f"{folder / 'day_1_dense.npy'}, row 33: nan in column 2")
            break
    else:
        raise AssertionError("no rank met the bad row")


def test_wrong_table_sizes() -> None:
    with pytest.raises(UserError, match="num_embeddings_per_feature: 26 sizes"):
        BatchCollator([5] * 25)(make_rows(), where)
    with pytest.raises(UserError, match="num_embeddings_per_feature"):
        BatchCollator([5] * 25 + [0])
