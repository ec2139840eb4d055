"""What is a dataset folder, which rows belong to which stage, and how bad ones are reported."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.data_folder import rows, write_days

from dlrm.data.criteo import DatasetMeta
from dlrm.data.readers import open_source, scan_dataset
from dlrm.runtime.errors import UserError

KINDS = ["stream", "memory", "mmap"]


def load_days(folder: Path, days: list[int], part: str) -> np.ndarray:
    return np.concatenate([np.load(folder / f"day_{day}_{part}.npy") for day in days])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_mb", [0.001, 0.01, 16])
def test_sequential_reads_give_each_row_once(tmp_path: Path, kind: str, chunk_mb: float) -> None:
    folder = write_days(tmp_path, [101, 7, 33, 50])
    half = {"train": None, "val": slice(0, 25), "test": slice(25, 50)}
    for stage, days in (("train", [0, 1, 2]), ("val", [3]), ("test", [3])):
        source = open_source(kind, folder, stage, read_chunk_mb=chunk_mb)
        found = []
        for start in range(0, source.rows, 9):
            stop = min(start + 9, source.rows)
            got = source.read(start, stop, source.rows)
            found.append([got.dense.copy(), np.array(got.sparse), got.labels[:, None].copy()])
        for part, columns in zip(("dense", "sparse", "labels"), zip(*found, strict=True), strict=True):
            want = load_days(folder, days, part)[half[stage] or slice(None)]
            np.testing.assert_array_equal(np.concatenate(columns), want)
        source.close()


def test_bytes_are_the_rows_and_the_headers(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [100, 60])
    for kind in ("stream", "memory"):
        source = open_source(kind, folder, "test")
        for start in range(0, 30, 7):
            source.read(start, min(start + 7, 30), 30)
        want = {str(file): 128 for file in folder.iterdir()}
        want[str(folder / "day_1_dense.npy")] += 30 * 52
        want[str(folder / "day_1_sparse.npy")] += 30 * 26 * 8
        want[str(folder / "day_1_labels.npy")] += 30 * 4
        assert source.bytes_read == want


def test_stages_opened_from_one_scan_count_together(tmp_path: Path) -> None:
    layout = scan_dataset("stream", write_days(tmp_path, [100, 60]))
    for stage in ("train", "val", "test"):
        source = open_source("stream", layout, stage)
        source.read(0, source.rows)
    assert layout.bytes_read == {str(file): file.stat().st_size for file in tmp_path.iterdir()}


def test_one_day_holds_out_its_last_seventh(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [107])
    ids = np.load(folder / "day_0_sparse.npy")
    found = []
    for stage, n in (("train", 92), ("val", 8), ("test", 7)):
        source = open_source("stream", folder, stage)
        assert source.rows == n
        found.append(np.array(source.read(0, n).sparse))
    np.testing.assert_array_equal(np.concatenate(found), ids)


def test_kaggle_is_one_file(tmp_path: Path) -> None:
    for part, array in rows(70).items():
        np.save(tmp_path / f"train_{part}.npy", array)
        np.save(tmp_path / f"test_{part}.npy", array)  # without labels: never read
    source = open_source("stream", tmp_path, "train")
    assert source.rows == 60
    assert source.locate_row(3, "dense") == f"{tmp_path / 'train_dense.npy'}, row 3"


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [40] * 9)
    (folder / "day_1_dense.npy").unlink()
    with open(folder / "day_2_sparse.npy", "r+b") as file:
        file.truncate(1000)
    with open(folder / "day_3_dense.npy", "ab") as file:
        file.write(b"more")
    np.save(folder / "day_4_sparse.npy", rows(40)["sparse"][:, :25])
    np.save(folder / "day_5_dense.npy", rows(40)["dense"].astype(np.float64))
    np.save(folder / "day_6_labels.npy", rows(39)["labels"])
    (folder / "day_7_labels.npy").write_bytes(b"label\n1\n0\n" * 20)
    np.save(folder / "day_8_dense.npy", np.asfortranarray(rows(40)["dense"]))
    with pytest.raises(UserError) as caught:
        scan_dataset("stream", folder)
    text = str(caught.value)
    for wanted in (
        "day_1_dense.npy is missing",
        "day_2_sparse.npy has 1000 bytes, but its header promises 4288 (40 rows)",
        "day_3_dense.npy has 2212 bytes, but its header promises 2208",
        "day_4_sparse.npy has shape [40, 25], expected [rows, 26]",
        "day_5_dense.npy holds float64, expected float32",
        "day_6_labels.npy has 39 rows",
        "day_7_labels.npy is not an .npy file",
        "day_8_dense.npy is in Fortran order",
    ):
        assert wanted in text, wanted
    assert "\n" not in text
    assert "day_0" not in text


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00\xff", b"\x93NUMPY\x01\x00\x05\x00{'a':", b"\0" * 99]
)
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    folder = write_days(tmp_path, [40, 40])
    (folder / "day_0_labels.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"day_0_labels\.npy (ends inside its|is not an|has a damaged)"):
        scan_dataset("stream", folder)


def test_meta_says_how_many_days_and_rows(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [40, 30])
    DatasetMeta(rows=[40, 30], table_sizes=[9] * 26).save(folder)
    assert scan_dataset("stream", folder).table_sizes == [9] * 26
    DatasetMeta(rows=[40, 31, 5], table_sizes=[9] * 26).save(folder)
    with pytest.raises(
        UserError, match=r"day_1_dense\.npy has 30 rows, meta\.json says 31.*day_2_dense\.npy is"
    ):
        scan_dataset("stream", folder)


def test_missing_days_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        scan_dataset("stream", tmp_path / "none")
    with pytest.raises(UserError, match="no files like day_0_dense.npy"):
        scan_dataset("stream", tmp_path)
    write_days(tmp_path, [9, 9, 9])
    for file in tmp_path.glob("day_1_*"):
        file.unlink()
    with pytest.raises(UserError, match="/: day_1_dense.npy is missing; day_1_sparse.npy is missing;"):
        scan_dataset("stream", tmp_path)
    DatasetMeta(rows=[9] * 24, table_sizes=[9] * 26).save(tmp_path)
    with pytest.raises(UserError, match="; and 56 more: restore these files") as caught:
        scan_dataset("stream", tmp_path)
    assert len(str(caught.value)) < 500 + 2 * len(str(tmp_path))


def test_files_of_numpy_format_2_and_flat_labels(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [40, 40])
    array = np.load(folder / "day_0_dense.npy")
    with open(folder / "day_0_dense.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    labels = np.load(folder / "day_0_labels.npy")
    np.save(folder / "day_0_labels.npy", labels[:, 0])
    got = open_source("stream", folder, "train").read(0, 40)
    np.testing.assert_array_equal(got.dense, array)
    np.testing.assert_array_equal(got.labels, labels[:, 0])


# 41,700 is 28 bytes short: the rest of a map's last page is zeros
@pytest.mark.parametrize(("kind", "size"), [("stream", 2000), ("mmap", 0), ("mmap", 2000), ("mmap", 41_700)])
def test_a_file_cut_while_in_use(tmp_path: Path, kind: str, size: int) -> None:
    folder = write_days(tmp_path, [400, 40])
    source = open_source(kind, folder, "train", read_chunk_mb=0.001)
    source.read(0, 10, 400)
    os.truncate(folder / "day_0_sparse.npy", size)
    with pytest.raises(UserError, match=rf"day_0_sparse\.npy: ends at byte {size}: the file was cut"):
        for start in range(10, 400, 10):
            source.read(start, start + 10, 400)


def test_a_file_cut_before_it_is_mapped(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [400, 40])
    layout = scan_dataset("mmap", folder)
    os.truncate(folder / "day_0_sparse.npy", 0)
    with pytest.raises(UserError, match=r"day_0_sparse\.npy: ends at byte 0"):
        open_source("mmap", layout, "train")


@pytest.mark.parametrize("kind", ["stream", "mmap"])
def test_int64_ids_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    folder = write_days(tmp_path, [40, 40])
    ids = np.load(folder / "day_1_sparse.npy")
    ids[25, 4] = 2**31
    np.save(folder / "day_1_sparse.npy", ids)
    source = open_source(kind, folder, "test")
    with pytest.raises(UserError, match=r"day_1_sparse\.npy: row 25, column 4: 2147483648 does not fit"):
        source.read(0, 20)


def test_memory_is_bounded_by_the_chunk(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [5000, 10])
    source = open_source("stream", folder, "train", read_chunk_mb=0.1)
    for start in range(0, 5000, 50):
        source.read(start, start + 50, 5000)
    held = sum(part.buffer.nbytes for part in source.parts.values())  # type: ignore[attr-defined]
    assert held <= 0.11 * 2**20


def test_random_rows_depend_on_their_number_alone() -> None:
    sizes = [3, 10**7, *[100] * 24]
    one = open_source("random", "", "train", rows=10**6, table_sizes=sizes, seed=4)
    far = one.read(16380, 16390)
    again = open_source("random", "", "train", rows=10**6, table_sizes=sizes, seed=4).take(
        np.array([16385, 999])
    )
    np.testing.assert_array_equal(far.dense[5], again.dense[0])
    np.testing.assert_array_equal(np.array(far.sparse)[5], np.array(again.sparse)[0])
    ids = np.array(one.read(0, 200_000).sparse)
    assert [ids[:, k].min() for k in (0, 2)] == [0, 0]
    assert [ids[:, k].max() for k in (0, 2)] == [2, 99]
    assert len(np.unique(ids[:, 1])) > 190_000
    counts = np.bincount(ids[:, 2])
    assert np.abs(counts / 2000 - 1).max() < 0.15
    other = open_source("random", "", "val", rows=10**6, table_sizes=sizes, seed=4).read(0, 10)
    assert not np.array_equal(other.dense, one.read(0, 10).dense)


def test_unknown_kinds_and_stages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown kind of data tape"):
        scan_dataset("tape", tmp_path)
    with pytest.raises(UserError, match="unknown stage dev"):
        open_source("stream", write_days(tmp_path, [9, 9]), "dev")
    with pytest.raises(UserError, match="num_embeddings"):
        open_source("random", "", "train")
    write_days(tmp_path / "one", [9, 1])
    with pytest.raises(UserError, match="no rows for test"):
        open_source("stream", tmp_path / "one", "test")


def test_meta_of_another_make(tmp_path: Path) -> None:
    folder = write_days(tmp_path, [9, 9])
    (folder / "meta.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match="version 1 expected"):
        scan_dataset("stream", folder)
