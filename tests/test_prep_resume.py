"""Killed at any moment, the same command goes on where it was and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm.prep import place, spill
from dlrm.prep.__main__ import main
from dlrm.prep.toy import write_days

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    write_days(folder, 3, 30_000, 0)
    return folder


def run(days: Path, out: Path, *flags: str) -> Path:
    assert main(["run", "--input_dir", str(days), "--output_dir", str(out), *flags]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def test_killed_again_and_again(days: Path, tmp_path: Path) -> None:
    wanted = contents(run(days, tmp_path / "whole"))
    assert len(wanted) == 9
    out, random_ = tmp_path / "out", random.Random(1)
    command = [sys.executable, "-m", "dlrm.prep", "run", "--input_dir", days, "--output_dir", out]
    command += ["--part_bytes", "300000", "--map_bytes", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    kills = 0
    for _ in range(40):
        child = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            # from the first file it writes on, kill it somewhere in its work
            deadline = time.monotonic() + 60
            while child.poll() is None and not (out / "prep.tmp").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            child.wait(timeout=0.35 + random_.random() * 0.5)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
        if child.returncode == 0:
            break
        if (out / "meta.json").exists():  # killed between its last word and its end
            assert contents(out) == wanted
    else:
        subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, check=True, timeout=120)
    assert kills > 0
    assert contents(out) == wanted
    assert not (out / "prep.tmp").exists()
    assert main(["check", str(out)]) == 0


def test_interrupted(days: Path, tmp_path: Path) -> None:
    """Ctrl-C: a line, not a traceback, and soon."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dlrm.prep", "run", "--input_dir", str(days), "--output_dir", str(out)]
    command += ["--part_bytes", "20000", "--workers", "2"]  # many lanes, so that it takes a while
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    said = child.stderr.readline() + child.stderr.readline()
    child.send_signal(signal.SIGINT)
    said += child.communicate(timeout=30)[1]
    assert said.endswith("\ndlrm.prep: interrupted; the same command goes on where it was\n")
    assert "Traceback" not in said
    assert child.returncode == 130
    assert not (out / "meta.json").exists()


def test_finished_work_is_left_alone(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(days, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    run(days, out)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_other_parameters_start_anew(days: Path, tmp_path: Path) -> None:
    out = run(days, tmp_path / "out", "--keep_tmp")
    first = contents(out)
    run(days, out, "--random_seed", "1")
    second = contents(out)
    assert first != second
    assert second == contents(run(days, tmp_path / "other", "--random_seed", "1"))


def test_steps_that_are_done_are_not_done_again(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its parts on disk and only the end missing, the text is not even read."""
    out = run(days, tmp_path / "out", "--keep_tmp")
    wanted = contents(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "prep.tmp").glob("piece_*")}
    assert kept
    (out / "meta.json").unlink()
    (out / "prep.tmp" / "publish_00000.json").unlink()
    for path in out.glob("day_1_*"):
        path.unlink()
    run(days, out, "--keep_tmp")
    assert contents(out) == wanted
    assert {path: path.stat().st_mtime_ns for path in (out / "prep.tmp").glob("piece_*")} == kept


def test_changed_input_starts_anew(days: Path, tmp_path: Path) -> None:
    folder = tmp_path / "days"
    write_days(folder, 2, 100, 0)
    out = run(folder, tmp_path / "out", "--keep_tmp")
    (out / "meta.json").unlink()
    write_days(folder, 2, 120, 0)
    run(folder, out)
    write_days(folder, 2, 120, 0)
    assert contents(out) == contents(run(folder, tmp_path / "fresh"))


def test_foreign_folder_is_not_touched(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    flags = ["--output_dir", str(tmp_path / "out"), "--tmp_dir", str(tmp_path / "mine")]
    assert main(["run", "--input_dir", str(days), *flags]) == 2
    assert "not empty, and not ours" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


USE_CODE = """
from dlrm.prep.parse import parse_short_hex
import numpy as np
text = np.frombuffer(b"1f\t     ", np.uint8)
assert parse_short_hex(text.ctypes.data, 9) == (31, text.ctypes.data + 3)
print(sum(parse_short_hex.stats.cache_hits.values()))
"""


def test_machine_code_goes_with_what_is_built_into_it(tmp_path: Path) -> None:
    """numba keeps it as long as a function's own file is the same; loads and vectors are in other files."""
    (tmp_path / "dlrm" / "prep").mkdir(parents=True)
    for path in (*ROOT.glob("dlrm/*.py"), *ROOT.glob("dlrm/prep/*.py")):
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())

    def from_disk() -> str:
        command = [sys.executable, "-c", USE_CODE]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert [from_disk(), from_disk()] == ["0\n", "1\n"]
    with open(tmp_path / "dlrm" / "prep" / "words.py", "a") as words:
        words.write("# changed\n")
    assert [from_disk(), from_disk()] == ["0\n", "1\n"]


def test_more_pieces_than_files_may_be_open(
    days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, spills = contents(run(days, tmp_path / "whole")), []

    class Counted(place.File):
        def __init__(self, path: Path, mode: str = "r") -> None:
            super().__init__(path, mode)
            spills.append(path.suffix)

    monkeypatch.setattr(place, "File", Counted)
    monkeypatch.setattr(spill, "MIN_BITS", 12)
    opened = {}
    for most in (100, 2):
        monkeypatch.setattr(place, "may_be_open", lambda files, most=most: most)
        spills.clear()
        out = run(days, tmp_path / str(most), "--part_bytes", "4000000")
        assert contents(out) == wanted
        opened[most] = spills.count(".spill")
    assert 3 < opened[100] < 15 < opened[2]


def test_shuffle_alone_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    """A folder for intermediate files may hold others; what a longer run left behind ends up nowhere."""
    write_days(tmp_path / "days", 3, 100, 0)
    assert main(["parse", "--input_dir", str(tmp_path / "days"), "--output_dir", str(tmp_path / "npy")]) == 0
    folders = [
        "--input_dir_labels_and_dense",
        str(tmp_path / "npy"),
        "--input_dir_sparse",
        str(tmp_path / "npy"),
    ]
    wanted, out, mine = tmp_path / "wanted", tmp_path / "out", tmp_path / "mine"
    assert main(["shuffle", *folders, "--output_dir_shuffled", str(wanted)]) == 0
    for folder in (out, mine):
        folder.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (out / "day_0_labels.npy.partial").write_bytes(bytes(1000))
    assert main(["shuffle", *folders, "--output_dir_shuffled", str(out), "--tmp_dir", str(mine)]) == 0
    assert contents(out) == contents(wanted)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
