"""Bad input gives one line with file, line number and reason. Odd input is read as torchrec reads it."""

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from dlrm.data.criteo import DatasetMeta
from dlrm.prep.__main__ import main
from dlrm.prep.io import odd_lines
from dlrm.prep.io.blocks import InputPiece, LineScanner
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels import parse_line
from dlrm.prep.tools.toy import format_tsv, write_days
from dlrm.runtime.errors import UserError

GOOD = "1\t" + "\t".join(str(i) for i in range(13)) + "\t" + "\t".join(f"{i:08x}" for i in range(26)) + "\n"


def make_line(number: int, value: str) -> str:
    fields = GOOD[:-1].split("\t")
    fields[number] = value
    return "\t".join(fields) + "\n"


BAD = {
    "a CSV": (GOOD.replace("\t", ","), "1 column, 40 expected: separate the fields by tabs"),
    "39 columns": (GOOD.rsplit("\t", 1)[0] + "\n", "39 columns, 40 expected; for other data give --num_"),
    "41 columns": (GOOD[:-1] + "\t1\n", "41 columns, 40 expected"),
    "trailing tab": (GOOD[:-1] + "\t\n", "41 columns"),
    "not hexadecimal": (make_line(20, "12g45678"), "C7 is '12g45678', not hexadecimal"),
    "a decimal point": (make_line(3, "1.0"), "I3 is '1.0', not an integer"),
    "a lone minus": (make_line(1, "-"), "I1 is '-', not an integer"),
    "too large": (make_line(2, "2147483648"), "I2 is '2147483648', which does not fit 32 bits"),
    "too small": (make_line(2, "-2147483649"), "which does not fit 32 bits"),
    "a wide id": (make_line(39, "123456789"), "C26 is '123456789', which is not an id of 32 bits"),
    "a negative id": (make_line(39, "-1"), "not an id of 32 bits"),
    "a label in words": (make_line(0, "yes"), "the label is 'yes', not an integer"),
    "CRLF": (GOOD[:-1] + "\r\n", "a carriage return"),
    "lone CR": (GOOD[:-1] + "\r" + GOOD, "a carriage return"),
    "blank line": ("\n", "a blank line"),
    "open quote": (make_line(5, '"5'), "a quote is left open"),
    "not UTF-8": (make_line(5, "\udcff"), "not UTF-8"),
    "a byte order mark": ("\ufeff" + GOOD, "the label is"),
    "NUL": (make_line(5, "\0"), "not an integer"),
}


def write(folder: Path, *texts: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for day, text in enumerate(texts):
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        (folder / f"day_{day}").write_bytes(data)
    return folder


def run_refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *flags: str) -> str:
    """The error of a run that must fail: exit code 2, one line, no published file."""
    assert main(["run", "--input_dir", str(source), "--output_dir", str(out), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dlrm.prep:")]
    assert len(lines) == 1
    assert not (out / "meta.json").exists()
    assert not list(out.glob("*.npy"))
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, reason = BAD[name]
    source = write(tmp_path / "in", GOOD * 3, GOOD * 4 + line + GOOD * 2)
    output = run_refused(capsys, source, tmp_path / "out")
    assert f"{source}/day_1:5: " in output
    assert reason in output
    write(source, GOOD * 3, GOOD * 6)  # mended: the same command goes on
    assert main(["run", "--input_dir", str(source), "--output_dir", str(tmp_path / "out")]) == 0
    assert DatasetMeta.load(tmp_path / "out").rows == [3, 6]


def test_no_newline_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", GOOD * 2 + GOOD[:-1])
    assert f"{source}/day_0:3: no newline at the end" in run_refused(capsys, source, tmp_path / "out")
    assert (
        main(["run", "--input_dir", str(source), "--output_dir", str(tmp_path / "o"), "--compat", "torchrec"])
        == 0
    )
    assert DatasetMeta.load(tmp_path / "o").rows == [3]


def test_missing_empty_and_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", GOOD, GOOD, GOOD)
    (source / "day_1").rename(source / "elsewhere")
    assert f"{source}/day_1 is missing" in run_refused(capsys, source, tmp_path / "out")
    (source / "day_1").write_bytes(b"")
    assert f"{source}/day_1: empty" in run_refused(capsys, source, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no day_0" in run_refused(capsys, empty, tmp_path / "out")
    assert "not a folder" in run_refused(capsys, tmp_path / "nowhere", tmp_path / "out")


def test_numbers_that_float_would_lose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", make_line(1, "2147483647") + make_line(1, "-3"))
    for engine in ("numba", "plain"):
        output = run_refused(capsys, source, tmp_path / "out", "--engine", engine)
        assert f"{source}/day_0: counts from -3 to 2147483647" in output


LIMITED = {
    "-3": "/day_0: count -3: --frequency_limit needs at least -2",
    "2147483645": "/day_0: count 2147483645: with 3 added it does not fit 32 bits",
    "-2147483648": "/day_0:2: I1 is '-2147483648', which is reserved for an empty field",
}


@pytest.mark.parametrize("engine", ["numba", "plain"])
@pytest.mark.parametrize("count", LIMITED)
def test_no_logarithm_with_three_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: str, engine: str
) -> None:
    flags = ["--frequency_limit", "1", "--engine", engine]
    source = write(tmp_path / "in", make_line(1, "") + make_line(1, count))
    assert LIMITED[count] in run_refused(capsys, source, tmp_path / "out", *flags)
    source = write(tmp_path / "good", make_line(1, "") + make_line(1, "-2") + make_line(1, "2147483644"))
    assert main(["run", "--input_dir", str(source), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    found = np.load(tmp_path / "out" / "day_0_dense.npy")[:, 0]
    np.testing.assert_array_equal(found, np.log(np.array([1, 1, 2147483647], np.float32)))


def test_a_folder_in_place_of_a_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", GOOD)
    (source / "day_1").mkdir()
    assert f"{source}/day_1: is a folder, a file is expected" in run_refused(capsys, source, tmp_path / "out")


def test_truncated_gzip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    write_days(source, 1, 500, 0)
    text = (source / "day_0").read_bytes()
    (source / "day_0").unlink()
    packed = gzip.compress(text)
    (source / "day_0.gz").write_bytes(packed[: len(packed) // 2])
    output = run_refused(capsys, source, tmp_path / "out")
    assert f"{source}/day_0.gz: byte " in output and "truncated" in output
    (source / "day_0.gz").write_bytes(packed)
    assert main(["run", "--input_dir", str(source), "--output_dir", str(tmp_path / "out")]) == 0
    assert DatasetMeta.load(tmp_path / "out").rows == [500]


def test_skipping_bad_rows_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", GOOD * 2 + "x\n" + GOOD, GOOD + "\n" + GOOD + GOOD[:-1])
    clean = write(tmp_path / "clean", GOOD * 3, GOOD * 2)
    for name, folder, flags in (("a", source, ["--skip_bad_rows"]), ("b", clean, [])):
        assert main(["run", "--input_dir", str(folder), "--output_dir", str(tmp_path / name), *flags]) == 0
    output = capsys.readouterr().err
    assert f"skipped 1 bad row, the first: {source}/day_0:3: 1 column, 40 expected\n" in output
    assert f"skipped 2 bad rows, the first: {source}/day_1:2: a blank line" in output
    for path in (tmp_path / "b").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name


def test_no_permission_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", GOOD)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in run_refused(capsys, source, tmp_path / "file" / "out")
    assert str(tmp_path / "file") in run_refused(
        capsys, source, tmp_path / "out", "--trace_dir", str(tmp_path / "file")
    )
    assert main(["parse", "--input_dir", str(source), "--output_dir", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"dlrm.prep: {tmp_path}/file: File exists\n"


def test_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    source = write(tmp_path / "in", GOOD * 100)
    output = run_refused(capsys, source, tmp_path / "out")
    assert f"{tmp_path}/out: " in output and "kB needed, 1.0 kB free: free some space" in output


def test_kaggle_with_and_without_labels(tmp_path: Path) -> None:
    """train.txt becomes seven days; test.txt, which has no labels, keeps its order and shares the ids."""
    source = tmp_path / "in"
    source.mkdir()
    train, test = format_tsv(703, np.random.default_rng(1), 0), format_tsv(90, np.random.default_rng(2), 0)
    (source / "train.txt").write_bytes(train)
    (source / "test.txt").write_bytes(b"".join(line[2:] for line in test.splitlines(keepends=True)))
    for engine in ("numba", "plain"):
        flags = ["--output_dir", str(tmp_path / engine), "--engine", engine, "--part_bytes", "40000"]
        assert main(["run", "--input_dir", str(source), *flags]) == 0
    assert DatasetMeta.load(tmp_path / "numba").rows == [101] * 3 + [100] * 4
    assert (np.load(tmp_path / "numba" / "test_labels.npy") == -1).all()
    for path in (tmp_path / "plain").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "numba" / path.name).read_bytes(), path.name
    assert main(["check", str(tmp_path / "numba")]) == 0


def test_kaggle_parsed_as_torchrec_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a relative folder: torchrec takes any path with "test" in it for the file without labels."""
    from torchrec.datasets.scripts.npy_preproc_criteo import main as torchrec_main

    monkeypatch.chdir(tmp_path)
    source, wanted, got = Path("in"), Path("wanted"), Path("got")
    source.mkdir()
    wanted.mkdir()
    (source / "train.txt").write_bytes(format_tsv(50, np.random.default_rng(1), 0))
    (source / "test.txt").write_bytes((GOOD[2:] * 3).encode())
    torchrec_main(
        ["--input_dir", str(source), "--output_dir", str(wanted), "--dataset_name", "criteo_kaggle"]
    )
    flags = ["--steps", "parse", "--compat", "torchrec"]
    assert main(["run", "--input_dir", str(source), "--output_dir", str(got), *flags]) == 0
    assert len(list(wanted.glob("*.npy"))) == 6
    for path in wanted.glob("*.npy"):
        assert path.read_bytes() == (got / path.name).read_bytes(), path.name


def torchrec_row(line: str) -> tuple[list[int], list[int], int]:
    """A line as torchrec's loader reads it: text, csv, int."""
    import csv
    import io

    row = next(csv.reader(io.StringIO(line, newline=None), delimiter="\t"))
    dense = [int(row[i] or "0") for i in range(1, 14)]
    return dense, [int(row[i] or "0", 16) for i in range(14, 40)], int(row[0] or "0")


def corrupt_line(random_: random.Random, line: str) -> str:
    """A line with one to three random changes."""
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(line))
        kind = random_.randrange(5)
        some = random_.choice("0123456789abcdefABCDEF-+ _.\"'xg\t\r\0٣é")
        if kind == 0:
            line = line[:at] + line[at + 1 :]
        elif kind == 1:
            line = line[:at] + some + line[at:]
        elif kind == 2:
            line = line[:at] + some + line[at + 1 :]
        elif kind == 3:
            line = line[:at] + line[at : at + 9] + line[at:]
        else:
            line = make_line(random_.randrange(40), some * random_.randint(1, 12))
    return line


def test_fuzzed_lines_mean_what_torchrec_reads(tmp_path: Path) -> None:
    """Values are torchrec's; what it refuses is refused; what only we refuse has a known reason."""
    random_ = random.Random(5)
    good = format_tsv(400, np.random.default_rng(3), 0).decode().splitlines()
    path, both, ours_only = tmp_path / "line", 0, 0
    for _ in range(6000):
        line = corrupt_line(random_, random_.choice(good))
        if "\n" in line or not line:
            continue
        path.write_bytes(line.encode() + b"\n")
        try:
            wanted = torchrec_row(line + "\n")
            assert all(abs(value) < 1 << 31 for value in wanted[0] + [wanted[2]])
        except (ValueError, IndexError, AssertionError, StopIteration):
            wanted = None
        with OffsetFile(path) as file:
            scanner = LineScanner(file, "x", InputPiece(0, 0, file.size), odd_lines.LineRules(), False)
            try:
                blocks = [
                    (block.dense[0].tolist(), block.sparse[0].tolist(), int(block.labels[0]), block.rows)
                    for block, _ in scanner.read_blocks()
                ]
            except UserError as error:
                reasons = ("columns", "carriage return", "quote", "id of 32 bits", "not fit 32 bits")
                assert wanted is None or any(reason in str(error) for reason in reasons), (line, error)
                ours_only += wanted is not None
                continue
        assert wanted is not None and blocks == [(*wanted, 1)], line
        both += 1
    assert both > 500 and ours_only > 10


def test_block_borders(tmp_path: Path) -> None:
    """The rows do not depend on where chunks, blocks and odd lines begin."""
    text = (GOOD * 2047 + make_line(3, " 5 ") + GOOD * 2048 + make_line(3, "+7") * 3000 + GOOD).encode()
    path = tmp_path / "text"
    path.write_bytes(text)
    with OffsetFile(path) as file:
        scanner = LineScanner(file, "x", InputPiece(0, 0, len(text)), odd_lines.LineRules(), False)
        third = np.concatenate([block.dense[: block.rows, 2].copy() for block, _ in scanner.read_blocks()])
    assert third.tolist() == [2] * 2047 + [5] + [2] * 2048 + [7] * 3000 + [2]
    assert parse_line.PAD >= 16
