"""Parquet as OneFlow's own tools write it, without meta.json: ids become rows of 26 tables, none shared."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.ranks import Train, python

from dlrm.data.readers import count_ids, open_source, scan_dataset

FORMS = ["python", "scala", "hashes"]


def write_like_oneflow(
    folder: Path, form: str, rows: int = 400, high: int = 50
) -> dict[str, list[np.ndarray]]:
    """The three subsets, each in two files of small row groups. Returns [counts, ids, labels] of each.

    Its Python tool writes int32 and numbers the columns from -1; its Scala tool float32, from 0.
    """
    rng, wanted = np.random.default_rng(3), {}
    for stage, count in (("train", rows), ("val", 60), ("test", 50)):
        counts, labels = rng.integers(-2, 90, (count, 13)) + 1, rng.integers(0, 2, count)
        ids = rng.integers(0, high, (count, 26)) + 1000 * (np.arange(26) - (form == "python"))
        if form == "hashes":
            ids = ids * np.int64(0x9E3779B97F4A7C15 - (1 << 64))  # wraps: any 64-bit number, different ones
        kind = np.float32 if form == "scala" else np.int32
        columns = {"label": labels.astype(kind)}
        columns |= {f"I{i + 1}": counts[:, i].astype(kind) for i in range(13)}
        columns |= {f"C{i + 1}": ids[:, i] for i in range(26)}
        (folder / stage).mkdir(parents=True)
        table = pa.table(columns)
        pq.write_table(table.slice(0, 33), folder / stage / "part-00000-a.snappy.parquet", row_group_size=16)
        pq.write_table(table.slice(33), folder / stage / "part-00001-a.snappy.parquet", row_group_size=64)
        (folder / stage / "_SUCCESS").touch()
        wanted[stage] = [counts, ids, labels]
    return wanted


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_numbered_by_column(tmp_path: Path, form: str) -> None:
    with np.errstate(over="ignore"):
        wanted = write_like_oneflow(tmp_path / "data", form)
    layout = scan_dataset("parquet", tmp_path / "data")
    known = [np.unique(np.concatenate([ids[:, c] for _, ids, _ in wanted.values()])) for c in range(26)]
    assert count_ids(layout) == [len(ids) for ids in known]
    for stage, (counts, ids, labels) in wanted.items():
        source = open_source("parquet", layout, stage)
        rows = source.read(0, source.rows)
        assert np.array_equal(
            rows.sparse, np.stack([np.searchsorted(known[c], ids[:, c]) for c in range(26)], 1)
        )
        assert np.array_equal(rows.labels, labels)
        # OneFlow's model takes log(count + 1)
        np.testing.assert_allclose(rows.dense, np.log(np.maximum(counts, 0) + 1.0), rtol=1e-6)


def test_ordinary_ids_stay(tmp_path: Path) -> None:
    """Ids that begin near 0 in every column are rows already."""
    folder = tmp_path / "train"
    folder.mkdir()
    columns = {"label": np.arange(70, dtype=np.int32) % 2}
    columns |= {f"I{i + 1}": np.ones(70, np.float32) for i in range(13)}
    columns |= {f"C{i + 1}": np.arange(70) + i for i in range(26)}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    folder.rmdir()
    layout = scan_dataset("parquet", tmp_path)
    assert count_ids(layout) is None
    rows = open_source("parquet", layout, "train").read(0, 3)
    assert np.array(rows.sparse)[:, 5].tolist() == [5, 6, 7] and rows.dense[0, 0] == 1


@pytest.mark.parametrize("modulo", ["300", "0"])
def test_a_dataset_with_oneflow_ids_is_learned(toy: Path, train: Train, tmp_path: Path, modulo: str) -> None:
    """The ids of text, in OneFlow's form, on two ranks; the table sizes are those of README.md."""
    data = tmp_path / "data"
    made = python(
        "-m", "dlrm.prep", "run", "--input_dir", toy.parent / "tsv", "--output_dir", data,
        "--format", "parquet", "--mod_idx", modulo,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "next: DATASET_DIR=" in made.stdout
    done = train(2, "--preset", "toy", "--in_memory_binary_criteo_path", data)
    assert done.codes == [0, 0], done.err
    assert done.results["test_auroc"] > 0.7
    sizes = (data / "README.md").read_text().split("table_size_array = [")[1].split("]")[0]
    plan = done.folder / "plan.json"
    assert all(size in plan.read_text() for size in sizes.split(", "))
    (data / "meta.json").unlink()  # as OneFlow's own tool leaves it
    again = train(2, "--preset", "toy", "--in_memory_binary_criteo_path", data)
    assert again.losses == done.losses


@pytest.mark.parametrize("option", ["--num_embeddings", "--num_embeddings_per_feature"])
def test_tables_that_are_too_small_are_refused(tmp_path: Path, train: Train, option: str) -> None:
    write_like_oneflow(tmp_path / "data", "scala")
    value = "49" if option == "--num_embeddings" else ",".join(["50"] * 8 + ["49"] + ["50"] * 17)
    done = train(1, "--preset", "toy", "--in_memory_binary_criteo_path", tmp_path / "data", option, value)
    assert done.codes == [2]
    name = "C1" if option == "--num_embeddings" else "C9"
    assert (
        f"{option}: {name} has 50 different ids, its table would have 49 rows: give at least" in done.err[0]
    )
    assert done.err[0].count("\n") == 1
