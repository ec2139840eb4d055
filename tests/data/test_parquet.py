"""Parquet: the same rows as the .npy layout gives, in subsets, days and folders of files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.data_folder import numbered_days, rows, write_days

from dlrm.data.batches import BatchLoader
from dlrm.data.criteo import DatasetMeta
from dlrm.data.readers import open_source, scan_dataset
from dlrm.runtime.errors import UserError


def table(part: dict[str, np.ndarray], **replaced: object) -> pa.Table:
    columns = {
        "label": part["labels"].reshape(-1),
        **{f"I{k + 1}": part["dense"][:, k] for k in range(13)},
        **{f"C{k + 1}": part["sparse"][:, k] for k in range(26)},
    }
    return pa.table({**columns, **replaced})


def day(folder: Path, number: int) -> dict[str, np.ndarray]:
    return {p: np.load(folder / f"day_{number}_{p}.npy") for p in ("dense", "sparse", "labels")}


@pytest.mark.parametrize("group", [7, 40, 1000])
def test_days_are_as_in_npy(tmp_path: Path, group: int) -> None:
    days = write_days(tmp_path / "npy", [90, 53, 31])
    folder = tmp_path / "parquet"
    (folder / "day_2").mkdir(parents=True)
    for number in (0, 1):
        pq.write_table(table(day(days, number)), folder / f"day_{number}.parquet", row_group_size=group)
    last = table(day(days, 2))  # a day may be a folder of files, as Spark writes them
    pq.write_table(last.slice(0, 20), folder / "day_2" / "part-0.parquet", row_group_size=group)
    pq.write_table(last.slice(20), folder / "day_2" / "part-1.parquet", row_group_size=group)
    for stage in ("train", "val", "test"):
        mine, other = open_source("parquet", folder, stage), open_source("stream", days, stage)
        assert mine.rows == other.rows
        for start in range(0, mine.rows, 8):
            stop = min(start + 8, mine.rows)
            for a, b in zip(mine.read(start, stop), other.read(start, stop), strict=True):
                np.testing.assert_array_equal(a, b)
                assert np.asarray(a).dtype == np.asarray(b).dtype
    assert mine.locate_row(3, "dense") == f"{folder}/day_2/part-0.parquet, row 19"
    assert mine.locate_row(4, "dense") == f"{folder}/day_2/part-1.parquet, row 0"


@pytest.mark.parametrize("world", [1, 3])
def test_subsets_dealt_to_ranks(tmp_path: Path, world: int) -> None:
    days = numbered_days(tmp_path / "npy", [100, 31, 17])
    for number, stage in enumerate(("train", "val", "test")):
        (tmp_path / stage).mkdir()
        pq.write_table(table(day(days, number)), tmp_path / stage / "0.parquet", row_group_size=9)
    first = 0
    for stage, n in (("train", 100), ("val", 31), ("test", 17)):
        numbers, bytes_read = [], 0
        for rank in range(world):
            source = open_source("parquet", tmp_path, stage)
            for batch in BatchLoader(source, 4, rank, world):
                numbers += batch.sparse_features["cat_0"].values().tolist()
            bytes_read += source.bytes_read[str(tmp_path / stage / "0.parquet")]
        assert sorted(numbers) == list(range(first, first + n))
        # only groups on the border of two ranks are read twice, and the footer by each
        footer = 65536 if world == 1 else 3 * 65536
        assert bytes_read <= footer + (tmp_path / stage / "0.parquet").stat().st_size * 1.5
        first += n


def test_one_file_holds_out_its_end(tmp_path: Path) -> None:
    pq.write_table(table(rows(70)), tmp_path / "train.parquet")
    assert [open_source("parquet", tmp_path, stage).rows for stage in ("train", "val", "test")] == [60, 5, 5]


def test_bad_files_are_named_at_once(tmp_path: Path) -> None:
    good = rows(20)
    for number in (0, 1, 2, 3, 5):
        pq.write_table(table(good), tmp_path / f"day_{number}.parquet")
    pq.write_table(table(good).drop_columns(["C9", "I2"]), tmp_path / "day_1.parquet")
    pq.write_table(table(good, C3=good["dense"][:, 0]), tmp_path / "day_2.parquet")
    with open(tmp_path / "day_3.parquet", "r+b") as file:
        file.truncate(900)
    with pytest.raises(UserError) as caught:
        scan_dataset("parquet", tmp_path)
    text = str(caught.value)
    for wanted in (
        "day_1.parquet has no column I2, C9",
        "day_2.parquet holds float in column C3, expected int32",
        "day_3.parquet ",
        "day_4.parquet is missing",
    ):
        assert wanted in text
    assert "day_0" not in text and "day_5" not in text and "\n" not in text
    with pytest.raises(UserError, match="is not a dataset"):
        (tmp_path / "empty").mkdir()
        scan_dataset("parquet", tmp_path / "empty")


@pytest.mark.parametrize("replaced", [
    {"I4": pa.array([None, *range(19)], pa.float32())},
    {"C4": pa.array([2**31, *range(19)], pa.int64())},
])  # fmt: skip
def test_values_that_do_not_fit(tmp_path: Path, replaced: dict[str, object]) -> None:
    """Ids beyond int32 are an error where meta.json says that they are rows of tables."""
    pq.write_table(table(rows(20), **replaced), tmp_path / "day_0.parquet")
    pq.write_table(table(rows(20)), tmp_path / "day_1.parquet")
    DatasetMeta([20, 20], [1 << 31] * 26, format="parquet").save(tmp_path)
    with pytest.raises(UserError, match=r"day_0\.parquet, row group 0: (column I4 has 1 e|Integer value)"):
        open_source("parquet", tmp_path, "train").read(0, 5)


def test_shuffled(tmp_path: Path) -> None:
    days = numbered_days(tmp_path / "npy", [300, 17])
    for number in (0, 1):
        pq.write_table(table(day(days, number)), tmp_path / f"day_{number}.parquet", row_group_size=29)
    source = open_source("parquet", tmp_path, "train")
    batches = BatchLoader(source, 10, shuffle_set=True, window_mb=0.005)
    numbers = [n for batch in batches for n in batch.sparse_features["cat_0"].values().tolist()]
    assert sorted(numbers) == list(range(300)) != numbers
