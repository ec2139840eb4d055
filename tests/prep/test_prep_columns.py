"""Datasets with other numbers of columns than Criteo's 13 and 26: the same bytes by every engine and tool."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.data_folder import check_same_files
from support.ranks import python

from dlrm.data.criteo import CRITEO, Columns, DatasetMeta
from dlrm.data.readers import open_source, scan_dataset
from dlrm.data.rows import Rows
from dlrm.prep.__main__ import main
from dlrm.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SHAPES = [(5, 7), (0, 3), (40, 200)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}+{shape[1]}")
Made = Callable[[int, int], Path]


def run_prep(command: str, **options: object) -> int:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word]
    return main([command, *words])


@each_shape
def test_engines_agree(other_columns: Made, tmp_path: Path, shape: tuple[int, int]) -> None:
    made, out = other_columns(*shape), tmp_path / "npy"
    assert run_prep("run", input_dir=made / "tsv", output_dir=out, workers=2, part_bytes=20_000) == 0
    check_same_files(made / "npy", out)
    assert DatasetMeta.load(out).columns == Columns(*shape)
    assert main(["check", str(out)]) == 0


@each_shape
def test_against_the_text(other_columns: Made, tmp_path: Path, shape: tuple[int, int]) -> None:
    """Each field of the text, parsed here, is where it belongs."""
    numerical, categorical = shape
    made = other_columns(*shape)
    assert run_prep("run", input_dir=made / "tsv", output_dir=tmp_path / "raw", steps="parse") == 0
    for day in range(3):
        lines = [line.split("\t") for line in (made / "tsv" / f"day_{day}").read_text().split("\n")[:-1]]
        counts = np.array([[int(f or "0") for f in line[1 : 1 + numerical]] for line in lines], np.int32)
        ids = np.array([[int(f or "0", 16) for f in line[1 + numerical :]] for line in lines])
        dense, sparse, labels = (
            np.load(tmp_path / "raw" / f"day_{day}_{part}.npy") for part in ("dense", "sparse", "labels")
        )
        assert dense.shape == (500, numerical) and sparse.shape == (500, categorical)
        assert labels[:, 0].tolist() == [int(line[0]) for line in lines]
        assert np.array_equal(sparse, ids)
        if numerical:
            np.testing.assert_allclose(dense, np.log(counts - counts.min() + 2.0), rtol=1e-6)


@each_shape
def test_the_three_scripts(other_columns: Made, tmp_path: Path, shape: tuple[int, int]) -> None:
    """One after the other they make what run makes; a folder without meta.json has its arrays' columns."""
    text = other_columns(*shape) / "tsv"
    one, two, three, whole = (tmp_path / name for name in ("one", "two", "three", "whole"))
    # of lines with more than Criteo's 40 columns torchrec ignores the rest, unless the numbers are given
    given = {"num_numerical": shape[0], "num_categorical": shape[1]} if sum(shape) > 39 else {}
    assert run_prep("parse", input_dir=text, output_dir=one, workers=1, **given) == 0
    assert run_prep("contiguous", input_dir=one, output_dir=two) == 0
    for path in two.glob("*_contig_freq.npy"):
        path.rename(two / path.name.replace("_contig_freq", ""))
    dirs = {"input_dir_labels_and_dense": one, "input_dir_sparse": two, "output_dir_shuffled": three}
    assert run_prep("shuffle", **dirs) == 0
    assert run_prep("run", input_dir=text, output_dir=whole, compat="torchrec", **given) == 0
    check_same_files(whole, three)
    assert scan_dataset("stream", three).columns == Columns(*shape)


def read(kind: str, folder: Path, stage: str) -> Rows:
    source = open_source(kind, folder, stage)
    source.load(np.array([[0, source.rows]]))
    found = source.read(0, source.rows).map_arrays(np.copy)
    source.close()
    return found


@each_shape
def test_every_format_has_the_same_rows(other_columns: Made, tmp_path: Path, shape: tuple[int, int]) -> None:
    made = other_columns(*shape)
    parquet, multi_hot = tmp_path / "parquet", tmp_path / "multi_hot"
    assert run_prep("run", input_dir=made / "tsv", output_dir=parquet, format="parquet") == 0
    hots = [1 + column % 3 for column in range(shape[1])]
    words = ["--copy_labels_and_dense", "--multi_hot_sizes", ",".join(map(str, hots))]
    folders = ["--input_dir", str(made / "npy"), "--output_dir", str(multi_hot)]
    assert main(["multihot", *folders, *words]) == 0
    assert DatasetMeta.load(multi_hot).columns == Columns(*shape)
    for stage, rows in (("train", 1000), ("val", 250), ("test", 250)):
        wanted = read("stream", made / "npy", stage)
        assert wanted.dense.shape == (rows, shape[0]) and wanted.sparse.shape == (rows, shape[1])  # type: ignore[union-attr]
        found = {kind: read(kind, made / "npy", stage) for kind in ("memory", "mmap")}
        found["parquet"] = read("parquet", parquet, stage)
        for kind, each in found.items():
            for one, two in zip(wanted, each, strict=True):
                assert np.array_equal(one, two), kind
        many = read("multi_hot", multi_hot, stage)
        assert [ids.shape for ids in many.sparse] == [(rows, k) for k in hots]
        assert np.array_equal(np.stack([ids[:, 0] for ids in many.sparse], axis=1), wanted.sparse)
        assert np.array_equal(many.dense, wanted.dense)
    (parquet / "meta.json").unlink()
    assert scan_dataset("parquet", parquet).columns == Columns(*shape)


def write_text(folder: Path, line: str) -> Path:
    folder.mkdir()
    (folder / "day_0").write_text(line.replace(" ", "\t") * 50)
    return folder


@pytest.mark.parametrize(
    ("line", "given", "found"),
    [
        ("1 5 -2 deadbeef 0000000a\n", {}, (2, 2)),
        ("0 deadbeef\n" * 2, {"num_numerical": 0}, (0, 1)),
        ("1 5 7 12 3\n", {"num_numerical": 1, "num_categorical": 3}, (1, 3)),
        ("1 5 7 12 3\n", {"num_categorical": 1}, (3, 1)),
        ("1 " + "5 " * 20 + "deadbeef " * 18 + "7\n", {}, (13, 26)),
    ],
)
def test_how_many_columns_there_are(
    tmp_path: Path, line: str, given: dict[str, int], found: tuple[int, int]
) -> None:
    text = write_text(tmp_path / "in", line)
    code = run_prep("run", input_dir=text, output_dir=tmp_path / "out", engine="plain", **given)
    if found == (13, 26) and "deadbeef" in line:  # 40 columns are read as Criteo's: the tenth id is "5"
        assert code == 2 or DatasetMeta.load(tmp_path / "out").columns == CRITEO
    else:
        assert code == 0 and DatasetMeta.load(tmp_path / "out").columns == Columns(*found)


@pytest.mark.parametrize(
    ("line", "given", "why"),
    [
        ("1 5 7 12 3\n", {}, "give --num_numerical N --num_categorical M"),
        ("1 5 12345678 deadbeef\n", {}, "it is not certain which are categorical"),
        ("1 deadbeef 5\n", {}, "give --num_numerical N --num_categorical M"),
        ("1 5 deadbeef\n", {"num_numerical": 2}, "do not have more columns"),
        ("1 5 deadbeef\n", {"num_numerical": 1, "num_categorical": 2}, "day_0:1: 3 columns, 4 expected"),
        ("1 5 deadbeef\n", {"num_categorical": 0}, "--num_categorical 0: must be from 1 to 1024"),
        ("1 5 deadbeef\n", {"num_numerical": 1025}, "--num_numerical 1025: must be from 0 to 1024"),
    ],
)
@pytest.mark.parametrize("engine", ["plain", "numba"])
def test_what_is_not_certain_must_be_given(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    line: str,
    given: dict[str, int],
    why: str,
) -> None:
    text = write_text(tmp_path / "in", line)
    assert run_prep("run", input_dir=text, output_dir=tmp_path / "out", engine=engine, **given) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert why in last and last.startswith("dlrm.prep: ")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_dataset_of_other_columns_is_made_again(other_columns: Made, tmp_path: Path) -> None:
    text, out = other_columns(5, 7) / "tsv", tmp_path / "out"
    assert run_prep("run", input_dir=text, output_dir=out, steps="parse") == 0
    assert (
        run_prep("run", input_dir=text, output_dir=out, steps="parse", num_numerical=4, num_categorical=8)
        == 0
    )
    assert np.load(out / "day_0_sparse.npy").shape == (500, 8)
    assert DatasetMeta.load(out).columns == Columns(4, 8)


def test_a_meta_without_columns_is_criteos(toy: Path, tmp_path: Path) -> None:
    values = json.loads((toy / "meta.json").read_text())
    assert (values.pop("num_numerical"), values.pop("num_categorical")) == (13, 26)
    (tmp_path / "meta.json").write_text(json.dumps(values))
    assert DatasetMeta.load(tmp_path).columns == CRITEO
    (tmp_path / "meta.json").write_text(json.dumps(values | {"num_categorical": 25}))
    with pytest.raises(UserError, match="table_sizes has 26 numbers, num_categorical is 25"):
        DatasetMeta.load(tmp_path)


@pytest.mark.spark
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_spark_agrees(other_columns: Made, tmp_path: Path, shape: tuple[int, int]) -> None:
    pytest.importorskip("pyspark")
    made = other_columns(*shape)
    words = ("--engine", "spark", "--input_dir", made / "tsv", "--output_dir", tmp_path / "spark")
    done = python("-m", "dlrm.prep", "run", *words, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_files(made / "npy", tmp_path / "spark")
