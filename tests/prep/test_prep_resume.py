"""Killed at any point, the same command resumes where the run stopped and ends with the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dlrm.prep.__main__ import main
from dlrm.prep.io import spill
from dlrm.prep.steps import place
from dlrm.prep.tools.toy import write_days

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    write_days(folder, 3, 30_000, 0)
    return folder


def run(days: Path, out: Path, *flags: str) -> Path:
    assert main(["run", "--input_dir", str(days), "--output_dir", str(out), *flags]) == 0
    return out


def read_arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


COMMANDS = {
    "run": ["run", "--input_dir", "DAYS", "--output_dir", "OUT", "--part_bytes", "20000", "--map_bytes", "1"],
    "parquet": ["run", "--input_dir", "DAYS", "--output_dir", "OUT", "--format", "parquet", "--tmp_dir",
                "TMP"],
    "parse": ["parse", "--input_dir", "DAYS", "--output_dir", "OUT"],
    "contiguous": ["contiguous", "--input_dir", "NPY", "--output_dir", "OUT"],
    "shuffle": [
        "shuffle", "--input_dir_labels_and_dense", "NPY", "--input_dir_sparse", "NPY",
        "--output_dir_shuffled", "OUT", "--tmp_dir", "TMP",
    ],
    "multihot": [
        "multihot", "--input_dir", "NPY", "--output_dir", "OUT", "--copy_labels_and_dense",
        "--multi_hot_sizes", ",".join(["2"] * 26),
        "--num_embeddings_per_feature", ",".join(["50"] * 26),
    ],
    "toy": ["toy", "OUT", "--days", "3", "--rows", "500"],
}  # fmt: skip
# ends the process by SIGKILL before or after the n-th call that changes what lies in a folder
KILLED = """
import os, sys, signal
calls, after = int(sys.argv[1]), sys.argv[2] == "after"
def counted(call):
    def one(*args, **more):
        global calls
        calls -= 1
        if calls == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = call(*args, **more)
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return one
from dlrm.prep.__main__ import main
for name in ("mkdir", "replace", "rename", "unlink", "rmdir", "pwrite", "write", "ftruncate", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
sys.exit(main(sys.argv[3:]))
"""


class World:
    """Input, foreign files in all folders that the command writes to, and its output when not killed."""

    def __init__(self, base: Path, command: str) -> None:
        self.base, self.command = base, command
        write_days(base / "days", 3, 300, 0)
        if "NPY" in COMMANDS[command]:
            assert main(["parse", "--input_dir", str(base / "days"), "--output_dir", str(base / "npy")]) == 0
        assert main(self.words("whole", "whole_tmp")) == 0
        self.wanted = results(base / "whole")
        assert self.wanted

    def words(self, out: str, tmp: str) -> list[str]:
        names = {"DAYS": "days", "NPY": "npy", "OUT": out, "TMP": tmp}
        return [str(self.base / names[word]) if word in names else word for word in COMMANDS[self.command]]

    def survives(self, number: int, kill: Callable[[list[str]], int]) -> bool:
        """Returns whether it was killed. The next run makes the same output; foreign files stay."""
        out, tmp = self.base / f"out{number}", self.base / f"tmp{number}"
        foreign = [folder / name for folder in (out, tmp) for name in ("thesis.tex", "README", "prep.tmp/x")]
        for path in foreign:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("years of work")
        words = self.words(out.name, tmp.name)
        code = kill(words)
        assert code in (0, -signal.SIGKILL)
        assert main(words) == 0
        found = results(out)
        for path in foreign:
            assert path.read_text() == "years of work"
            found.pop(str(path.relative_to(out)) if path.is_relative_to(out) else "", None)
        assert found == self.wanted
        assert not [path for folder in (out, tmp) for path in folder.glob(".dlrm-io-*")]
        return code != 0


def results(folder: Path) -> dict[str, bytes]:
    """All files but the ledger."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".dlrm-io.json")
    }


def killed_at_call(call: int, after: bool) -> Callable[[list[str]], int]:
    def kill(words: list[str]) -> int:
        command = [sys.executable, "-c", KILLED, str(call), "after" if after else "before", *words]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            timeout=120,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode

    return kill


def check_kills(base: Path, command: str, calls: Iterable[int]) -> None:
    world = World(base, command)
    killed = [world.survives(call, killed_at_call(call, call % 2 == 0)) for call in calls]
    assert any(killed)


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_a_call_the_next_run_makes_the_same(command: str, tmp_path: Path) -> None:
    check_kills(tmp_path, command, (3, 9))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_many_calls_the_next_run_makes_the_same(command: str, tmp_path: Path) -> None:
    chance = random.Random(command)
    check_kills(tmp_path, command, sorted(chance.sample(range(1, 60), 10)) + [70, 90, 130])


def test_killed_again_and_again(days: Path, tmp_path: Path) -> None:
    """Killed in each of several steps."""
    wanted = read_arrays(run(days, tmp_path / "whole"))
    assert len(wanted) == 9
    out = tmp_path / "out"
    command = ["run", "--input_dir", str(days), "--output_dir", str(out), "--part_bytes", "300000"]
    command += ["--map_bytes", "1"]
    codes = [killed_at_call(call, False)(command) for call in (30, 60, 90, 120, 250)]
    assert codes[0] == -signal.SIGKILL
    assert killed_at_call(0, False)(command) == 0
    assert read_arrays(out) == wanted
    assert not list(out.glob(".dlrm-io-*"))
    assert main(["check", str(out)]) == 0


def test_interrupted(days: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the run soon, with one line and no traceback."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dlrm.prep", "run", "--input_dir", str(days), "--output_dir", str(out)]
    command += ["--part_bytes", "20000", "--workers", "2"]  # many lanes, so that it takes a while
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert child.stderr
    output = child.stderr.readline() + child.stderr.readline()
    child.send_signal(signal.SIGINT)
    output += child.communicate(timeout=180)[1]
    assert output.endswith("\ndlrm.prep: interrupted; run the same command again to resume\n")
    assert "Traceback" not in output
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
    first = read_arrays(out)
    run(days, out, "--random_seed", "1")
    second = read_arrays(out)
    assert first != second
    assert second == read_arrays(run(days, tmp_path / "other", "--random_seed", "1"))


def test_steps_that_are_done_are_not_done_again(
    days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that had only to publish does not read the text again."""
    out = run(days, tmp_path / "out", "--keep_tmp")
    wanted = read_arrays(out)
    [work] = [path.parent for path in out.glob(".dlrm-io-run-*/state.json")]
    kept = {path: path.stat().st_mtime_ns for path in work.glob("piece_*")}
    assert kept
    (out / "meta.json").unlink()
    (work / "publish_00000.json").unlink()
    for path in out.glob("day_1_*"):
        path.unlink()
    run(days, out, "--keep_tmp")
    assert read_arrays(out) == wanted
    assert {path: path.stat().st_mtime_ns for path in work.glob("piece_*")} == kept


def test_changed_input_starts_anew(days: Path, tmp_path: Path) -> None:
    folder = tmp_path / "days"
    write_days(folder, 2, 100, 0)
    out = run(folder, tmp_path / "out", "--keep_tmp")
    (out / "meta.json").unlink()
    write_days(folder, 2, 120, 0)
    run(folder, out)
    write_days(folder, 2, 120, 0)
    assert read_arrays(out) == read_arrays(run(folder, tmp_path / "fresh"))


@pytest.mark.parametrize("where", ["apart", "linked", "output", "above output", "inside output"])
def test_a_folder_for_intermediate_files_may_hold_anything(days: Path, tmp_path: Path, where: str) -> None:
    out, mine = tmp_path / "mine" / "out", tmp_path / "mine"
    places = {
        "apart": tmp_path / "other", "linked": tmp_path / "link", "output": out, "above output": mine,
        "inside output": out / "sub",
    }  # fmt: skip
    if where == "linked":
        places[where].symlink_to(mine)
    given = places[where]
    for folder in (mine, out, given):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README").write_text("notes")
        (folder / "state.json").write_text("thesis")
    run(days, out, "--tmp_dir", str(given))
    assert main(["check", str(out)]) == 0
    for folder in (mine, out, given):
        assert [(folder / name).read_text() for name in ("README", "state.json")] == ["notes", "thesis"]
    assert not list(tmp_path.rglob(".dlrm-io-*"))


@pytest.mark.parametrize("where", ["same", "inside", "above", "linked"])
def test_intermediate_files_do_not_go_to_the_input(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    days = tmp_path / "in"
    write_days(days, 1, 10, 0)
    (tmp_path / "link").symlink_to(days)
    before = sorted(tmp_path.rglob("*"))
    given = {"same": days, "inside": days / "tmp", "above": tmp_path, "linked": tmp_path / "link"}[where]
    flags = ["--output_dir", str(tmp_path / "out"), "--tmp_dir", str(given)]
    assert main(["run", "--input_dir", str(days), *flags]) == 2
    assert f"--tmp_dir {given}: " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


USE_CODE = """
from dlrm.prep.kernels.parse_line import parse_short_hex
import numpy as np
text = np.frombuffer(b"1f\t     ", np.uint8)
assert parse_short_hex(text.ctypes.data, 9) == (31, text.ctypes.data + 3)
print(sum(parse_short_hex.stats.cache_hits.values()))
"""


def test_machine_code_goes_with_what_is_built_into_it(tmp_path: Path) -> None:
    """Cached code must be compiled anew when a file changes whose functions are inlined into it."""
    for package in ("common", "dlrm"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    private = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def from_disk() -> str:
        command = [sys.executable, "-c", USE_CODE]
        return subprocess.run(
            command, cwd=tmp_path, env=private, check=True, capture_output=True, text=True
        ).stdout

    assert [from_disk(), from_disk()] == ["0\n", "1\n"]
    with open(tmp_path / "dlrm/prep/kernels/fields.py", "a") as words:
        words.write("# changed\n")
    assert [from_disk(), from_disk()] == ["0\n", "1\n"]


def test_more_pieces_than_files_reserve_open_files(
    days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, spills = read_arrays(run(days, tmp_path / "whole")), []

    class Counted(place.OffsetFile):
        def __init__(self, path: Path, mode: str = "r") -> None:
            super().__init__(path, mode)
            spills.append(path.suffix)

    monkeypatch.setattr(place, "OffsetFile", Counted)
    monkeypatch.setattr(spill, "MIN_BITS", 12)
    opened = {}
    for most in (100, 2):
        monkeypatch.setattr(place, "reserve_open_files", lambda files, most=most: most)
        spills.clear()
        out = run(days, tmp_path / str(most), "--part_bytes", "4000000")
        assert read_arrays(out) == wanted
        opened[most] = spills.count(".spill")
    assert 3 < opened[100] < 15 < opened[2]


def test_shuffle_alone_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    """--tmp_dir may contain other files; intermediate files of an earlier, longer run are not used."""
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
    (out / "day_0_labels.npy.partial").write_bytes(b"mine")
    assert main(["shuffle", *folders, "--output_dir_shuffled", str(out), "--tmp_dir", str(mine)]) == 0
    assert read_arrays(out) == read_arrays(wanted)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert (out / "day_0_labels.npy.partial").read_bytes() == b"mine"
