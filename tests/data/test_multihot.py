"""Multi-hot ids: the file read as numpy reads it, the tables as MLCommons defines them."""

from pathlib import Path

import numpy as np
import pytest
from support.data_folder import write_days

from dlrm.data.batches import BatchLoader
from dlrm.data.collate import BatchCollator
from dlrm.data.multihot import MultiHotMaker
from dlrm.data.readers import open_source, scan_dataset
from dlrm.runtime.errors import UserError

HOTS = [1 + k % 5 for k in range(26)]
SIZES = [3 + 11 * k for k in range(26)]


def multi_hot_days(folder: Path, days: list[int], hots: list[int] = HOTS) -> Path:
    write_days(folder, days)
    rng = np.random.default_rng(8)
    for day, n in enumerate(days):
        (folder / f"day_{day}_sparse.npy").unlink()
        ids = {str(k): rng.integers(0, SIZES[k], (n, hots[k])).astype(np.int32) for k in range(26)}
        np.savez(folder / f"day_{day}_sparse_multi_hot.npz", **ids)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_files(tmp_path: Path, world: int) -> None:
    folder = multi_hot_days(tmp_path, [90, 53, 31])
    for stage, days, cut in (("train", [0, 1], slice(0, 143)), ("val", [2], slice(0, 16)),
                             ("test", [2], slice(16, 31))):  # fmt: skip
        files = [np.load(folder / f"day_{day}_sparse_multi_hot.npz") for day in days]
        want = [np.concatenate([file[str(k)] for file in files])[cut] for k in range(26)]
        for rank in range(world):
            source = open_source("multi_hot", folder, stage, read_chunk_mb=0.02)
            for step, batch in enumerate(BatchLoader(source, 5, rank, world, SIZES)):
                n = len(batch.labels)
                if n < 5:
                    break  # which rows the last step deals to whom is tested elsewhere
                rows = slice((step * world + rank) * 5, (step * world + rank) * 5 + n)
                ids = batch.sparse_features
                np.testing.assert_array_equal(
                    ids.values().numpy(), np.concatenate([w[rows].reshape(-1) for w in want])
                )
                assert ids.lengths().tolist() == [hot for hot in HOTS for _ in range(n)]
                assert ids.offsets().tolist() == np.cumsum([0, *ids.lengths().tolist()]).tolist()
                assert ids.length_per_key() == [hot * n for hot in HOTS]


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = multi_hot_days(tmp_path, [20] * 6)
    name = "day_{}_sparse_multi_hot.npz"
    ids = dict(np.load(folder / name.format(0)))
    np.savez_compressed(folder / name.format(1), **ids)
    del ids["7"]
    np.savez(folder / name.format(2), **ids)
    (folder / name.format(3)).write_bytes(b"PK" * 99)
    np.savez(folder / name.format(4), **{**ids, "7": ids["8"].astype(np.int64)})
    with pytest.raises(UserError) as caught:
        scan_dataset("multi_hot", folder)
    for text in (
        "npz is compressed",
        "has no member 7.npy",
        "is not an .npz file",
        "member 7.npy holds int64",
    ):
        assert text in str(caught.value)
    (folder / "day_0_labels.npy").unlink()
    with pytest.raises(UserError, match="no day_0_labels.npy: make it with .* --copy_labels_and_dense"):
        scan_dataset("multi_hot", folder)
    multi_hot_days(tmp_path / "other", [20, 20], HOTS)
    multi_hot_days(tmp_path / "more", [20, 20], HOTS[::-1])
    (tmp_path / "more" / name.format(1)).replace(tmp_path / "other" / name.format(1))
    with pytest.raises(UserError, match="has 5 ids per row of feature 1, .* has 2: make all"):
        scan_dataset("multi_hot", tmp_path / "other")


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_tables_are_the_published_ones(distribution: str) -> None:
    """The definition: numpy's global generator, seed 0, table after table, in one draw each."""
    np.random.seed(0)
    want = []
    for size, hot in zip(SIZES, HOTS, strict=True):
        if distribution == "uniform":
            drawn = np.random.randint(0, size, size=(size, hot - 1))
        else:
            with np.errstate(invalid="ignore"):
                drawn = np.random.pareto(a=0.25, size=(size, hot - 1)).astype(np.int32) % size
        want.append(np.concatenate([np.arange(size)[:, None], drawn], axis=1))
    for draws in (7, 1 << 22):  # drawn in pieces or at once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dlrm.data.multihot.DRAWS", draws)
            made = MultiHotMaker(SIZES, HOTS, distribution)
        for mine, table in zip(made.tables, want, strict=True):
            np.testing.assert_array_equal(mine, table)


def test_made_on_the_fly(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [60, 20])
    widen = MultiHotMaker(SIZES, HOTS)
    source = open_source("stream", folder, "train")
    batches = BatchLoader(source, 60, to_batch=BatchCollator(SIZES, make_multi_hot=widen))
    ids = np.load(folder / "day_0_sparse.npy") % np.array(SIZES)
    want = np.concatenate([widen.tables[k][ids[:, k]].reshape(-1) for k in range(26)])
    batch = next(iter(batches))
    np.testing.assert_array_equal(batch.sparse_features.values().numpy(), want)
    for k in range(26):
        feature = batch.sparse_features[f"cat_{k}"]
        assert feature.lengths().tolist() == [HOTS[k]] * 60


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="--multi_hot_distribution_type normal"):
        MultiHotMaker(SIZES, HOTS, "normal")
    with pytest.raises(UserError, match="--multi_hot_sizes"):
        MultiHotMaker(SIZES, HOTS[:25])
