"""Parquet and multi-hot output, the checker and toy data, each compared with independent code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.ranks import Finished, python

from analysis.tables.check import check_run
from dlrm.data.criteo import DatasetMeta
from dlrm.prep.__main__ import main
from dlrm.prep.tools.toy import draw_log_odds, draw_skewed, write_days

SIZES = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    write_days(folder, 3, 1001, 0)
    return folder


@pytest.fixture(scope="module")
def dataset(days: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(days, tmp_path_factory.mktemp("npy") / "out")


def run(days: Path, out: Path, *flags: str) -> Path:
    assert main(["run", "--input_dir", str(days), "--output_dir", str(out), *flags]) == 0
    return out


def test_parquet_holds_the_same_rows(days: Path, dataset: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = run(days, tmp_path / "out", "--format", "parquet")
    wanted = {part: np.concatenate([np.load(dataset / f"day_{day}_{part}.npy") for day in range(3)])
              for part in ("dense", "sparse", "labels")}  # fmt: skip
    begin = 0
    for subset, rows in (("train", 2002), ("val", 501), ("test", 500)):
        table = pq.read_table(out / subset)
        assert table.num_rows == rows
        names = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
        assert table.column_names == names
        columns = [table[name].to_numpy() for name in names]
        stretch = slice(begin, begin + rows)
        assert (columns[0] == wanted["labels"][stretch, 0]).all()
        assert (np.stack(columns[1:14], axis=1) == wanted["dense"][stretch]).all()
        assert (np.stack(columns[14:], axis=1) == wanted["sparse"][stretch]).all()
        begin += rows
    assert DatasetMeta.load(out).table_sizes == DatasetMeta.load(dataset).table_sizes
    assert f"table_size_array = {DatasetMeta.load(out).table_sizes}" in (out / "README.md").read_text()
    assert main(["check", str(out)]) == 0


def test_other_format_than_the_folder_has(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line describes the dataset and the next command; a run with another --format is refused."""
    out = run(days, tmp_path / "out", "--format", "parquet", "--no_md5")
    output, small = capsys.readouterr().out, min(DatasetMeta.load(out).table_sizes)
    assert f"{out}: 3,003 rows in 3 days, 26 tables of {small} to " in output
    assert f"(parquet); next: DATASET_DIR={out} ./3_train.sh\n" in output
    before = sorted(out.rglob("*"))
    assert main(["run", "--input_dir", str(days), "--output_dir", str(out)]) == 2
    assert f"{out}: a finished parquet dataset, not npy; give --format parquet" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("modulo", [500, 10**8, 1 << 32, 0])
def test_parquet_with_oneflow_ids(days: Path, tmp_path: Path, modulo: int) -> None:
    """The unshuffled rows compared with the text: counts + 1, hash mod N + N times the column; with 0 a hash
    of 64 bits. The types are those of OneFlow's tool in Scala.
    """
    import pyarrow.parquet as pq

    flags = ["--format", "parquet", "--mod_idx", str(modulo)]
    out = run(days, tmp_path / "out", *flags)
    whole = pq.read_table(out / "val")
    kinds = {str(field.type) for field in whole.schema if field.name[0] != "C"}
    assert kinds == {"float"} and {str(field.type) for field in whole.schema if field.name[0] == "C"} == {
        "int64"
    }
    table = whole.to_pydict()
    distinct = [set() for _ in range(26)]
    rows = [line.split("\t") for day in range(3) for line in (days / f"day_{day}").read_text().splitlines()]
    for fields in rows:
        for column, value in enumerate(fields[14:]):
            distinct[column].add(int(value or "0", 16) % (modulo or 1 << 32))
    for row, fields in enumerate(rows[2002:2503]):
        assert table["label"][row] == int(fields[0])
        assert [table[f"I{i}"][row] for i in range(1, 14)] == [int(f or "0") + 1 for f in fields[1:14]]
        if modulo:
            ids = [int(f or "0", 16) % modulo + modulo * column for column, f in enumerate(fields[14:])]
            assert [table[f"C{i}"][row] for i in range(1, 27)] == ids
    sizes = [len(found) for found in distinct]
    assert f"table_size_array = {sizes}" in (out / "README.md").read_text()
    assert DatasetMeta.load(out).table_sizes == sizes
    assert main(["check", str(out)]) == 0


def test_hashes_are_those_of_spark() -> None:
    """What Spark 4.3's xxhash64(text, number) gave for these ids; 0 stands for an empty field."""
    from dlrm.prep.io.oneflow_ids import hash_ids

    ids = np.array([0x68FD1E64, 1, 0xFFFFFFFF, 0xABCD, 0], np.uint32)
    assert hash_ids(ids, -1).tolist() == [
        530904046652179569, 1667057909069350313, -3103839329719928868, 955348319099744495,
        2017008487422258757,
    ]  # fmt: skip
    assert hash_ids(ids, 24).tolist() == [
        1236261005386860824, -5663232757906684171, 5809313792852464548, -145329011223966781,
        7788558767429488329,
    ]  # fmt: skip


def test_oneflow_ids_that_make_no_sense(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["run", "--input_dir", str(days), "--output_dir", str(tmp_path / "out")]
    for flags, reason in (
        (["--mod_idx", "0"], "--mod_idx needs --format parquet"),
        (["--format", "parquet", "--mod_idx", str((1 << 32) + 1)], "must be at most 2^32"),
        (["--format", "parquet", "--mod_idx", "5", "--steps", "parse"], "needs the step contiguous"),
    ):
        assert main([*common, *flags]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("distribution", ["uniform", "pareto"])
def test_multi_hot_is_what_np_savez_writes(dataset: Path, tmp_path: Path, distribution: str) -> None:
    sizes = DatasetMeta.load(dataset).table_sizes
    out = tmp_path / "out"
    flags = ["--multi_hot_sizes", ",".join(map(str, SIZES)), "--multi_hot_distribution_type", distribution]
    command = ["multihot", "--input_dir", str(dataset), "--output_dir", str(out), *flags]
    assert main([*command, "--copy_labels_and_dense"]) == 0
    np.random.seed(0)
    tables = []
    for rows, hots in zip(sizes, SIZES, strict=True):
        if distribution == "uniform":
            others = np.random.randint(0, rows, size=(rows, hots - 1))
        else:
            with np.errstate(invalid="ignore"):
                others = np.random.pareto(a=0.25, size=(rows, hots - 1)).astype(np.int32) % rows
        tables.append(np.hstack([np.arange(rows)[:, None], others]).astype(np.int32))
    for day in range(3):
        ids = np.load(dataset / f"day_{day}_sparse.npy")
        wanted = {str(column): table[ids[:, column]] for column, table in enumerate(tables)}
        np.savez(tmp_path / "wanted.npz", **wanted)
        assert (out / f"day_{day}_sparse_multi_hot.npz").read_bytes() == (
            tmp_path / "wanted.npz"
        ).read_bytes()
        assert (out / f"day_{day}_dense.npy").read_bytes() == (dataset / f"day_{day}_dense.npy").read_bytes()
    assert DatasetMeta.load(out).format == "multi_hot"
    assert main(["check", str(out)]) == 0


def test_multi_hot_wants_26_numbers(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["multihot", "--input_dir", str(dataset), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--multi_hot_sizes", "1,2,3"]) == 2
    assert "--multi_hot_sizes: 26 numbers" in capsys.readouterr().err


def set_bytes(folder: Path, name: str, at: int, data: bytes) -> None:
    with open(folder / name, "r+b") as file:
        file.seek(at)
        file.write(data)


HUGE = b"\xff\xff\xff\x7f"
FLAWS = {
    "id too large": (lambda f: set_bytes(f, "day_0_sparse.npy", 128, HUGE), "its table has"),
    "dense not a number": (lambda f: set_bytes(f, "day_1_dense.npy", 128, b"\0\0\xc0\x7f"), "not finite"),
    "label": (lambda f: set_bytes(f, "day_1_labels.npy", 128, b"\5\0\0\0"), "labels from 0 to 5"),
    "cut short": (lambda f: truncate_labels(f), "cut short"),
    "missing": (lambda f: (f / "day_2_dense.npy").unlink(), "day_2_dense.npy: missing"),
    "other shape": (lambda f: np.save(f / "day_2_dense.npy", np.zeros((2, 13), "f4")), "shape (2, 13)"),
    "other type": (lambda f: np.save(f / "day_2_sparse.npy", np.zeros((1001, 26), "i8")), "int64 instead"),
    "a changed value": (lambda f: set_bytes(f, "day_0_dense.npy", 400, b"\0"), "md5 is not the one"),
    "left over": (lambda f: (f / "day_0_dense.npy.partial").write_text(""), "left by an unfinished run"),
    "not numpy": (lambda f: (f / "day_2_dense.npy").write_text("hello, world"), "no readable header"),
}  # fmt: skip


def truncate_labels(folder: Path) -> None:
    with open(folder / "day_0_labels.npy", "r+b") as file:
        file.truncate(1000)


@pytest.mark.parametrize("name", FLAWS)
def test_check_names_the_flaw(
    name: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = FLAWS[name]
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    assert main(["check", str(folder)]) == 0
    spoil(folder)
    assert main(["check", str(folder)]) == 2
    output = capsys.readouterr().err
    assert reason in output and str(folder) in output


def test_check_finds_ids_that_never_occur(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["table_sizes"][4] += 3
    (folder / "meta.json").write_text(json.dumps(meta))
    assert main(["check", str(folder)]) == 2
    assert "column 4: 3 ids never occur" in capsys.readouterr().err


def test_toy_can_be_learned_and_repeats() -> None:
    """Labels depend on the features: the true log-odds as scores give an AUROC far above 0.5."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    ids = draw_skewed(20_000, rng)
    dense = np.floor(rng.lognormal(1.5, 1.3, (20_000, 13))).astype(np.int64)
    truth = draw_log_odds(ids, dense, 0)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-truth))
    assert 0.85 < roc_auc_score(labels, truth) < 0.95
    assert 0.2 < labels.mean() < 0.6
    assert (draw_log_odds(ids, dense, 0) == truth).all()


def test_one_file_is_the_days_after_each_other(tmp_path: Path) -> None:
    write_days(tmp_path / "days", 3, 70, 4)
    write_days(tmp_path / "one", 3, 70, 4, one_file=True)
    days = b"".join((tmp_path / "days" / f"day_{day}").read_bytes() for day in range(3))
    assert (tmp_path / "one" / "day_0").read_bytes() == days
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [".dlrm-io.json", "day_0"]
    lines = days.splitlines()
    assert len(lines) == 210 and {line.count(b"\t") for line in lines} == {39}


def test_parse_counts_the_bytes_of_all_its_processes(days: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["--input_dir", days, "--output_dir", out, "--workers", 3, "--trace_dir", run]
    done = python("-m", "dlrm.prep", "parse", *words)
    assert done.returncode == 0, done.stderr
    rows, *_ = check_run(run)
    assert not [row for row in rows if row.missed]
    written = {Path(row.file).name: row.counted for row in rows if row.direction == "written"}
    for path in out.glob("day_*.npy"):  # dense values twice: counts, then their logarithms
        twice = 1001 * 13 * 4 if path.name.endswith("dense.npy") else 0
        assert written[path.name] == path.stat().st_size + twice
    assert sum(name.endswith(".npy") for name in written) == 9
    read = {Path(row.file).name: row.counted for row in rows if row.direction == "read"}
    assert all(read[f"day_{day}"] >= (days / f"day_{day}").stat().st_size for day in range(3))


def test_trace_accounts_for_every_byte(days: Path, tmp_path: Path) -> None:
    """In a subprocess, because the tracer cannot be unloaded."""
    import gzip
    from collections import defaultdict

    words = ["--trace_dir", tmp_path / "run", "--part_bytes", 100000, "--workers", 2]
    done = python("-m", "dlrm.prep", "run", "--input_dir", days, "--output_dir", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    files, read, written, spans = {}, defaultdict(int), defaultdict(int), set()
    calling, named_threads = set(), set()
    for path in (tmp_path / "run" / "trace").glob("prep00000*.pfw.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            if not line.startswith("{"):
                continue
            event = json.loads(line.rstrip(","))
            args = event.get("args", {})
            if event["name"] == "FH":
                files[args["value"]] = args["name"]
            elif args.get("name") == "thread_name":
                named_threads.add(event["tid"])
            elif event.get("cat") == "POSIX" and "ret" in args:
                calling.add(event["tid"])
                side = read if event["name"] in ("read", "pread64") else written
                if event["name"] in ("read", "pread64", "write", "pwrite64"):
                    side[args["fhash"]] += max(0, int(args["ret"]))
            elif event.get("cat") == "prep":
                spans.add(event["name"])
                assert args["bytes"] > 0
    assert len(calling) > 2 and calling <= named_threads
    assert spans >= {"count", "permute", "parse", "ids", "place"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for side, traced in (("bytes_read", read), ("bytes_written", written)):
        named = {files[key]: count for key, count in traced.items()}
        assert results[side]["0"]
        for path, count in results[side]["0"].items():
            assert named[path] == count, (side, path)


def test_digests_are_hashlibs(tmp_path: Path) -> None:
    """Files of lengths around md5's block size and our read size."""
    import hashlib

    from dlrm.prep.io.digests import CHUNK, compute_digests

    rng, paths = np.random.default_rng(0), []
    borders = [size + more for size in (0, 56, 64, 128, CHUNK, 2 * CHUNK) for more in (-9, -8, -1, 0, 1)]
    for number, size in enumerate([*borders[3:], 300_001]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(rng.bytes(size))
    wanted = {path: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    assert compute_digests(paths) == wanted
    assert compute_digests(paths[:1]) == {paths[0]: wanted[paths[0]]}


@pytest.mark.parametrize("rows", [1, 2, 3, 700, 40_000])
@pytest.mark.parametrize("bits", [6, 11, 24])
def test_permutation_is_numpys(tmp_path: Path, rows: int, bits: int) -> None:
    """With one partition and with hundreds."""
    from dlrm.prep.steps.permute import write_places

    order = np.arange(rows)
    np.random.RandomState(7).shuffle(order)
    write_places(tmp_path / "places", rows, 7, lambda count: None, bits)
    assert (np.fromfile(tmp_path / "places", np.uint32)[order] == np.arange(rows)).all()


def test_two_ranks_train_on_the_parquet(toy: Path, train: Callable[..., Finished], tmp_path: Path) -> None:
    """From text to an AUROC, with every row used once."""
    out = run(toy.parent / "tsv", tmp_path / "parquet", "--format", "parquet")
    done = train(2, "--preset", "toy", "--in_memory_binary_criteo_path", out)
    assert done.codes == [0, 0], done.err
    assert done.results["samples"] == 15_000
    assert done.results["val_samples"] == done.results["test_samples"] == 1500
    assert done.results["test_auroc"] > 0.72
    read = {path for files in done.results["bytes_read"].values() for path in files}
    assert read == {str(path) for path in out.glob("*/*.parquet")}
