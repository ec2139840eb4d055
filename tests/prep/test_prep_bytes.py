"""All output files are equal, byte for byte, to those of torchrec's three scripts and of the plain engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.data_folder import check_same_files
from support.ranks import MPIEXEC, python

from dlrm.data.criteo import DatasetMeta
from dlrm.prep.__main__ import main
from dlrm.prep.tools.toy import write_days

ROOT = Path(__file__).parents[2]
COUNTS = '|-3|+5| 7 |1_000|2147483000|0|-0|12345678|123456789|00012|\u0663|"4"'
IDS = '|0|ffffffff|FFFFFFFF|80000000|abc|0x1f| 1f|1_f|"7a"|00000000|DeadBeef|7'
ODD_ROWS = [
    "-2|" + COUNTS + "|" + IDS + "|" + IDS,
    "|" * 39,
    "1|" + "|".join(["1"] * 13) + "|" + "|".join(["c0ffee00"] * 26),
]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four days of different lengths, with some odd but acceptable lines."""
    folder = tmp_path_factory.mktemp("days")
    for day, rows in enumerate((700, 1, 2500, 333)):
        write_days(folder, 1, rows, seed=day)
        text = (folder / "day_0").read_bytes().splitlines(keepends=True)
        for place, odd in enumerate(ODD_ROWS):
            text.insert(place * len(text) // 2, odd.replace("|", "\t").encode() + b"\n")
        (folder / f"text_{day}").write_bytes(b"".join(text))
    (folder / "day_0").unlink()
    for day in range(4):
        (folder / f"text_{day}").rename(folder / f"day_{day}")
    return folder


def run_torchrec(days: Path, out: Path, count: int, threshold: int, seed: int) -> Path:
    """torchrec's functions, called as its scripts call them, for fewer than 24 days."""
    from torchrec.datasets.criteo import BinaryCriteoUtils as Utils

    one, two, three = (out / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir(parents=True)
    for day in range(count):
        names = [str(one / f"day_{day}_{part}.npy") for part in ("dense", "sparse", "labels")]
        Utils.tsv_to_npys(str(days / f"day_{day}"), *names)
    files = [str(one / f"day_{day}_sparse.npy") for day in range(count)]
    Utils.sparse_to_contiguous(files, str(two), frequency_threshold=threshold, output_file_suffix=".npy")
    rows = {day: len(np.load(one / f"day_{day}_labels.npy")) for day in range(count - 1)}
    Utils.shuffle(str(one), str(two), str(three), rows, days=count, random_seed=seed)
    return out


def run(days: Path, out: Path, *flags: str) -> Path:
    assert main(["run", "--input_dir", str(days), "--output_dir", str(out), *flags]) == 0
    return out


@pytest.mark.parametrize(("threshold", "seed"), [(0, 0), (3, 0), (2, 42), (1, 7), (40, 1)])
def test_torchrec_byte_for_byte(days: Path, tmp_path: Path, threshold: int, seed: int) -> None:
    wanted = run_torchrec(days, tmp_path / "reference", 4, threshold, seed)
    flags = ["--frequency_threshold", str(threshold), "--random_seed", str(seed), "--compat", "torchrec"]
    for engine in ("plain", "numba"):
        got = run(days, tmp_path / engine, *flags, "--engine", engine)
        check_same_files(wanted / "three", got)
        assert len(list(got.glob("*.npy"))) == 12
    steps = run(days, tmp_path / "parsed", *flags[4:], "--steps", "parse")
    check_same_files(wanted / "one", steps)
    steps = run(days, tmp_path / "numbered", *flags[:2], *flags[4:], "--steps", "parse,contiguous")
    check_same_files(wanted / "two", steps)


@pytest.mark.parametrize("threshold", [0, 3])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_three_scripts_one_at_a_time(days: Path, tmp_path: Path, threshold: int, workers: str) -> None:
    wanted = run_torchrec(days, tmp_path / "reference", 4, threshold, 5)
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert main(["parse", "--input_dir", str(days), "--output_dir", one, "--workers", workers]) == 0
    check_same_files(wanted / "one", Path(one))
    numbering = ["--frequency_threshold", str(threshold)]
    assert main(["contiguous", "--input_dir", one, "--output_dir", two, *numbering]) == 0
    for path in Path(two).glob("*_contig_freq.npy"):
        path.rename(path.with_name(path.name.replace("_contig_freq", "")))
    check_same_files(wanted / "two", Path(two))
    folders = ["--input_dir_labels_and_dense", one, "--input_dir_sparse", two, "--output_dir_shuffled", three]
    assert main(["shuffle", *folders, "--random_seed", "5"]) == 0
    check_same_files(wanted / "three", Path(three))
    folders = ["--input_dir_labels_and_dense", one, "--input_dir_sparse", one, "--output_dir_shuffled", three]
    assert main(["shuffle", *folders, "--random_seed", "5"]) == 0  # raw hashes: rounded, and lost above 2^31
    rows = {day: len(np.load(f"{one}/day_{day}_labels.npy")) for day in range(3)}
    from torchrec.datasets.criteo import BinaryCriteoUtils as Utils

    Utils.shuffle(one, one, str(wanted / "three"), rows, days=4, random_seed=5)
    check_same_files(wanted / "three", Path(three))


VARIANTS = {
    "default": [],
    "small parts": ["--part_bytes", "30000", "--workers", "3"],
    "rewritten records": ["--part_bytes", "50000", "--map_bytes", "1"],
    "threshold": ["--frequency_threshold", "3", "--part_bytes", "60000", "--workers", "2"],
    "nvidia": ["--frequency_limit", "4", "--part_bytes", "40000"],
    "modulo": ["--max_ind_range", "100", "--random_seed", "3"],
    "modulo, raw": ["--max_ind_range", "1000", "--steps", "parse,shuffle"],
    "raw": ["--steps", "parse,shuffle"],
    "mlperf": ["--compat", "mlperf"],
    "mlperf, raw": ["--compat", "mlperf", "--steps", "parse,shuffle"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_engines_agree(days: Path, tmp_path: Path, name: str) -> None:
    if name == "nvidia":
        days = without_low_counts(days, tmp_path / "days")
    wanted = run(days, tmp_path / "plain", *VARIANTS[name], "--engine", "plain")
    got = run(days, tmp_path / "numba", *VARIANTS[name])
    check_same_files(wanted, got)
    wanted, got = ((folder / "meta.json").read_text() for folder in (wanted, got))
    assert wanted.split('"parameters"')[0] == got.split('"parameters"')[0]
    assert wanted.split('"md5"')[1] == got.split('"md5"')[1]


def without_low_counts(days: Path, out: Path) -> Path:
    out.mkdir()
    for path in days.iterdir():
        (out / path.name).write_bytes(path.read_bytes().replace(b"\t-3\t", b"\t-2\t"))
    return out


@pytest.mark.parametrize("least", [0, 3, 300])
def test_giant_columns_by_bitmap(days: Path, tmp_path: Path, least: int) -> None:
    """The bitmap for giant columns: a tiny limit makes two columns giant."""
    flags = ["--frequency_threshold", str(least), "--part_bytes", "90000"]
    wanted = run(days, tmp_path / "tables", *flags)
    got = run(days, tmp_path / "bitmaps", *flags, "--bitmap_entries", "2600")
    check_same_files(wanted, got)


def test_exact_ids_where_torchrec_rounds(tmp_path: Path) -> None:
    """torchrec's shuffle rounds ids above 2^24; ours does so only with --compat."""
    ids = np.array([[16777217, 33554435, 292775613]], np.int32)
    from dlrm.prep.io.publish import round_through_float

    assert round_through_float(ids).tolist() == [[16777216, 33554436, 292775616]]


@pytest.fixture(scope="module")
def one_rank(days: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield run(days, tmp_path_factory.mktemp("one"), "--frequency_threshold", "2")


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_same_bytes_for_any_number_of_ranks(days: Path, one_rank: Path, tmp_path: Path, ranks: int) -> None:
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "dlrm.prep", "run", "--input_dir", days]
    command += ["--output_dir", tmp_path / "out", "--frequency_threshold", "2", "--part_bytes", "100000"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, timeout=200, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    check_same_files(one_rank, tmp_path / "out")


@pytest.mark.mpi
def test_ranks_end_together_with_one_error(days: Path, tmp_path: Path) -> None:
    """A bad line, found by one rank, or a missing day, found by all: one line, exit code 2, no rank hangs."""
    source = tmp_path / "in"
    source.mkdir()
    for day in (0, 1):
        (source / f"day_{day}").write_bytes((days / f"day_{2 * day}").read_bytes())
    command = [MPIEXEC, "-n", "2", sys.executable, "-m", "dlrm.prep", "run", "--input_dir", source]
    command += ["--output_dir", tmp_path / "out", "--part_bytes", "100000"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}

    def output() -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, timeout=100, capture_output=True
        )
        assert done.returncode == 2
        lines = [line for line in done.stderr.decode().splitlines() if line.startswith("dlrm.prep:")]
        assert len(lines) == 1
        return lines[0]

    with open(source / "day_1", "a") as file:
        file.write("1\t2\n")
    assert f"{source}/day_1:2504: 2 columns, 40 expected" in output()
    (source / "day_0").unlink()
    assert f"{source}/day_0 is missing" in output()


def copy_few_rows(days: Path, folder: Path) -> Path:
    """Three days of 60 rows: Spark is slow."""
    folder.mkdir()
    for day in range(3):
        lines = (days / f"day_{day}").read_bytes().splitlines(keepends=True)
        (folder / f"day_{day}").write_bytes(b"".join(lines[:60]))
    return folder


def run_spark(days: Path, out: Path, *flags: object, code: int = 0) -> str:
    """In local mode and in a subprocess, because Spark leaves threads and a JVM running. Returns stderr."""
    words = ("--engine", "spark", "--input_dir", days, "--output_dir", out, *flags)
    done = python("-m", "dlrm.prep", "run", *words, timeout=500)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.mark.spark
@pytest.mark.parametrize("flags", [["--frequency_threshold", "2"], ["--compat", "torchrec"]])
def test_spark_gives_the_same_bytes(days: Path, tmp_path: Path, flags: list[str]) -> None:
    pytest.importorskip("pyspark")
    few = copy_few_rows(days, tmp_path / "few")
    wanted = run(few, tmp_path / "plain", "--engine", "plain", *flags)
    run_spark(few, tmp_path / "spark", "--workers", 1, *flags)
    check_same_files(wanted, tmp_path / "spark")


@pytest.mark.spark
def test_spark_writes_the_same_parquet(days: Path, tmp_path: Path) -> None:
    """With OneFlow's ids and its memory options."""
    pytest.importorskip("pyspark")
    few = copy_few_rows(days, tmp_path / "few")
    flags = ["--format", "parquet", "--mod_idx", "500"]
    wanted = run(few, tmp_path / "numba", *flags)
    memory = ["--spark_driver_memory_gb", 1, "--spark_tmp_dir", tmp_path, "--spark_conf", "spark.task.cpus=1"]
    run_spark(few, tmp_path / "spark", *memory, *flags)
    names = [path.relative_to(wanted) for path in wanted.rglob("*") if path.suffix in (".parquet", ".md")]
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "spark" / name).read_bytes() == (wanted / name).read_bytes(), name
    assert DatasetMeta.load(tmp_path / "spark").md5 == DatasetMeta.load(wanted).md5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--spark_driver_memory_gb", "4"], "--spark_driver_memory_gb is for --engine spark"),
        (["--spark_tmp_dir", "x"], "--spark_tmp_dir is for --engine spark"),
        (["--engine", "spark", "--spark_driver_memory_gb", "-1"], "--spark_driver_memory_gb -1: must be"),
        (["--engine", "spark", "--spark_conf", "memory=4g"], "--spark_conf memory=4g: must be like spark."),
    ],
)
def test_spark_options_that_make_no_sense(
    days: Path, tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--input_dir", str(days), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    output = capsys.readouterr().err
    assert says in output and output.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.spark
def test_spark_names_the_bad_line(days: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    (tmp_path / "in").mkdir()
    lines = (days / "day_0").read_bytes().splitlines(keepends=True)
    (tmp_path / "in" / "day_0").write_bytes(b"".join([*lines[:4], b"x\n", *lines[4:9]]))
    error = run_spark(tmp_path / "in", tmp_path / "out", code=2)
    assert f"{tmp_path}/in/day_0:5: 1 column, 40 expected" in error.splitlines()[-1]
    assert not (tmp_path / "out" / "meta.json").exists()


def test_nvidias_recipe_against_counted_text(tmp_path: Path) -> None:
    """--frequency_limit 4: empty ids are 0, rarer ones 1; counts are log(x + 3), empty ones 0."""
    from collections import Counter

    write_days(tmp_path / "days", 2, 900, seed=3)
    out = run(tmp_path / "days", tmp_path / "out", "--frequency_limit", "4", "--steps", "parse,contiguous")
    lines = [
        line.split("\t") for day in (0, 1) for line in (tmp_path / f"days/day_{day}").read_text().split("\n")
    ]
    lines = [fields for fields in lines if len(fields) == 40]
    ids, dense = (np.concatenate([np.load(out / f"day_{day}_{part}.npy") for day in (0, 1)])
                  for part in ("sparse", "dense"))  # fmt: skip
    sizes = json.loads((out / "meta.json").read_text())["table_sizes"]
    for column in range(26):
        text = [fields[14 + column] for fields in lines]
        seen = Counter(text)
        kept = {value for value, count in seen.items() if value and count >= 4}
        given = dict(zip(text, ids[:, column].tolist(), strict=True))
        assert all(given[value] == (1 if value else 0) for value in seen if value not in kept)
        assert sorted(given[value] for value in kept) == list(range(2, 2 + len(kept)))
        assert sizes[column] == len(kept) + 2
    for column in range(13):
        text = [fields[1 + column] for fields in lines]
        wanted = np.log(np.array([int(value) + 3 if value else 1 for value in text], np.float32))
        assert (dense[:, column] == wanted).all()
