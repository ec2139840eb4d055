"""Foreign files, two writers, input that changes or is not a file: one error line, and no file is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.prep.__main__ import main
from dlrm.prep.tools.toy import write_days

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    write_days(folder, 2, 300, 0)
    return folder


def words(days: Path, out: Path, *flags: str) -> list[str]:
    return ["run", "--input_dir", str(days), "--output_dir", str(out), *flags]


FOREIGN = {
    "run": ["day_0_dense.npy", "day_1_labels.npy", "meta.json", ".dlrm-io.json", ".dlrm-io.lock"],
    "parquet": ["train/part_00077.parquet", "README.md", "meta.json"],
    "plain": ["day_1_sparse.npy", "meta.json"],
    "parse": ["day_0_sparse.npy", "meta.json"],
    "toy": ["day_0", "day_1"],
}


@pytest.mark.parametrize(
    ("command", "name"), [(key, name) for key, names in FOREIGN.items() for name in names]
)
def test_foreign_results_are_refused_and_stay(
    days: Path, tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    out = str(tmp_path / "out")
    argv = {
        "run": words(days, tmp_path / "out"),
        "parquet": words(days, tmp_path / "out", "--format", "parquet"),
        "plain": words(days, tmp_path / "out", "--engine", "plain"),
        "parse": ["parse", "--input_dir", str(days), "--output_dir", out],
        "toy": ["toy", out, "--days", "2", "--rows", "10"],
    }[command]
    assert main(argv) == 2
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1 and str(path) in output[0]
    assert path.read_text() == "years of work"
    assert {str(each) for each in (tmp_path / "out").rglob("*") if each.is_file()} == {str(path)}


def pairs(days: Path, base: Path, count: int) -> None:
    for number in range(count):
        out = base / f"out{number}"
        argv = [sys.executable, "-m", "dlrm.prep", *words(days, out)]
        both = [
            subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        output = [process.communicate(timeout=120)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes in ([0, 0], [0, 2]), output
        assert "Traceback" not in "".join(output)
        assert codes == [0, 0] or any("in use" in text and "process" in text for text in output), output
        assert main(["check", str(out)]) == 0
        assert not [
            path for path in out.iterdir() if path.name.startswith(".dlrm-io-") or "partial" in path.name
        ]


def test_pairs_of_starts_leave_good_folders(days: Path, tmp_path: Path) -> None:
    pairs(days, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_pairs_of_starts_leave_good_folders(days: Path, tmp_path: Path) -> None:
    pairs(days, tmp_path, 200)


def test_input_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """The input changes after the step parse; the next run reads all of it again."""
    write_days(tmp_path / "in", 2, 300, 0)
    path, out = tmp_path / "in" / "day_1", tmp_path / "out"
    argv = [sys.executable, "-u", "-m", "dlrm.prep", *words(tmp_path / "in", out)]
    for step in ("parse", "place"):
        with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            for line in process.stderr:
                if f" {step}: " in line:
                    process.send_signal(signal.SIGSTOP)
                    text = path.read_bytes()
                    times = path.stat()
                    path.write_bytes(text.replace(b"\n0\t", b"\n1\t", 1))
                    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                    process.send_signal(signal.SIGCONT)
                    break
            output = process.stderr.read()
        assert process.returncode == 2 and f"{path}: has changed while it was read" in output
        assert not (out / "meta.json").exists()
    assert main(words(tmp_path / "in", out)) == 0
    assert main(words(tmp_path / "in", tmp_path / "fresh")) == 0
    for each in (tmp_path / "fresh").glob("*.npy"):
        assert each.read_bytes() == (out / each.name).read_bytes()


def test_a_lane_of_bad_rows_only(days: Path, tmp_path: Path) -> None:
    good = (days / "day_0").read_bytes()
    for name, bad in (("bad", b"x\n" * 80_000), ("good", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "day_0").write_bytes(good + bad + good)
        flags = ["--skip_bad_rows", "--workers", "2", "--part_bytes", "10000"]
        assert main(words(tmp_path / name, tmp_path / f"{name}-npy", *flags)) == 0
    for part in ("dense", "sparse", "labels"):
        name = f"day_0_{part}.npy"
        assert (tmp_path / "bad-npy" / name).read_bytes() == (tmp_path / "good-npy" / name).read_bytes()


def test_a_line_without_an_end(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (days / "day_0").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "day_0").write_bytes(good + b"7" * (130 << 20) + b"\n" + good)
    for engine in ("numba", "plain"):
        flags = ["--engine", engine]
        assert main(words(tmp_path / "in", tmp_path / engine, *flags)) == 2
        assert "day_0:301: a line of more than 64 MB" in capsys.readouterr().err
        assert main(words(tmp_path / "in", tmp_path / engine, *flags, "--skip_bad_rows")) == 0
    assert (tmp_path / "numba/day_0_sparse.npy").read_bytes() == (
        tmp_path / "plain/day_0_sparse.npy"
    ).read_bytes()


@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "fifo.gz", "device", "zero", "huge", "folder"])
def test_what_is_no_day_file(
    days: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "day_0").write_bytes((days / "day_0").read_bytes())
    names = {"fifo.gz": "day_1.gz", "zero": "day_01", "huge": "day_999999999999"}
    path = folder / names.get(kind, "day_1")
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("day_1")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind in ("zero", "huge"):
        path.write_text("x")
    else:
        os.mkfifo(path)
    for command in (words(folder, tmp_path / "out"), ["parse", *words(folder, tmp_path / "out")[1:]]):
        assert main(command) == 2
        output = capsys.readouterr().err.splitlines()
        assert len(output) == 1 and ("day_1" in output[0] or "day_01" in output[0])


@pytest.mark.parametrize("name", [b"a 'b' \"c\"", b"back\\slash", b"new\nline", b"\xff\xfe"])
def test_odd_names_of_folders(
    days: Path, tmp_path: Path, name: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    assert main(words(days, out, "--tmp_dir", f"{out}tmp")) == 0
    assert main(["check", str(out)]) == 0
    assert main(words(days, out)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(words(days, tmp_path / "o", "--trace_dir", str(out))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
