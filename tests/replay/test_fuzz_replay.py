"""Calls with odd arguments, replayed: no signal, no traceback, no more memory than a call can use.

A replay hands what a trace says to the C library. Files are opened as they should be; the calls on them have
numbers that are missing, negative, too large or no numbers.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from support.analysis_command import run_hostile
from support.fuzzing import check
from support.made_traces import Made

from dlrm.replay.calls import KNOWN_CALLS

ODD = (
    -1,
    0,
    1,
    4096,
    1 << 20,
    1 << 31,
    1 << 50,
    1 << 62,
    (1 << 63) - 1,
    -(1 << 63),
    "x",
    "",
    None,
    0.5,
    True,
)
USUAL = {
    "ret": 10, "count": 10, "offset": 100, "size": 8, "flags": os.O_RDWR, "mode": "r", "len": 100,
    "length": 4096, "whence": 1, "iovcnt": 2,
}  # fmt: skip
NOT_DRAWN = ("open", "creat", "fopen", "close", "fclose", "posix_fadvise")
ON_NAMES = ("mkdir", "rmdir", "unlink", "remove", "rename", "link", "symlink", "chmod")
STREAMS = [name for name in KNOWN_CALLS if name[0] == "f" and not name.startswith(("fs", "fda"))]


def write_run(run: Path, chance: random.Random) -> None:
    made = Made(None)
    for number, file in enumerate(("/d/a", "/d/b")):
        made.posix("open64", number, 1, file, flags=os.O_CREAT | os.O_RDWR)
        made.posix("pwrite64", 10 + number, 1, file, ret=9000, count=9000, offset=0)
    made.posix("fopen64", 20, 1, "/d/b", cat="STDIO", mode="r+")
    for at in range(100, 100 + 10 * chance.choice((1, 3, 12)), 10):
        name = chance.choice([each for each in KNOWN_CALLS if not each.startswith(NOT_DRAWN)])
        args = {key: value for key, value in USUAL.items() if chance.random() < 0.5}
        args |= {key: chance.choice(ODD) for key in USUAL if chance.random() < 0.1}
        file = (
            f"/d/new{at}"
            if name in ON_NAMES
            else "/d/b"
            if name in STREAMS
            else chance.choice(("/d/a", "/d/b"))
        )
        made.posix(name, at, 5, file, cat="STDIO" if name in STREAMS else "POSIX", **args)
        if name in ("rename", "link", "symlink") and chance.random() < 0.7:
            made.lines[-1]["args"]["newpath_hash" if name == "rename" else "path2_hash"] = f"{at:016x}"
            made._meta("FH", f"/d/other{at}", f"{at:016x}")
        if chance.random() < 0.2:
            odd = {key: chance.choice((-1, 0, 10, 1 << 50)) for key in ("bytes", "offset")}
            made.span("data", "read", at + 6, 2, file=file, mapped=1, **odd)
    made.write(run)


def replay_cases(folder: Path, seeds: range) -> None:
    for seed in seeds:
        write_run(folder / "run", random.Random(seed))
        try:
            check(run_hostile("replay", folder / "run", "--output_dir", folder / "out", "--speed", "max"))
        except AssertionError as error:
            error.add_note(f"seed {seed}; kept in {folder}")
            raise
        shutil.rmtree(folder / "run")
        shutil.rmtree(folder / "out", ignore_errors=True)


def test_odd_arguments(tmp_path: Path) -> None:
    replay_cases(tmp_path, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 200))
def test_odd_arguments_of_many_kinds(tmp_path: Path, start: int) -> None:
    replay_cases(tmp_path, range(start, start + 200))


@pytest.mark.parametrize("name, more", [
    ("pread64", {"ret": 10, "count": 10}), ("pwrite64", {"ret": 10, "count": 10}),  # without an offset
    ("read", {"ret": 10, "count": -1}), ("fread", {"ret": 1, "count": -1, "size": 1 << 20}),
    ("pread64", {"ret": -1, "count": 1 << 62, "offset": 0}),
])  # fmt: skip
def test_numbers_that_are_missing_or_out_of_range(tmp_path: Path, name: str, more: dict[str, int]) -> None:
    made = Made(None)
    made.posix("open64", 0, 1, "/d/a", flags=os.O_CREAT | os.O_RDWR)
    made.posix("pwrite64", 10, 1, "/d/a", ret=9000, count=9000, offset=0)
    made.posix(name, 20, 5, "/d/a", cat="STDIO" if name == "fread" else "POSIX", **more)
    made.write(tmp_path / "run")
    found = run_hostile("replay", tmp_path / "run", "--output_dir", tmp_path / "out", "--speed", "max")
    check(found)
    assert found.code == 0, found.err


def test_more_space_than_there_is_is_refused(tmp_path: Path) -> None:
    """Before anything is allocated: a file system may take all that is free, and only then say no."""
    made = Made(None)
    made.posix("open64", 0, 1, "/d/a", flags=os.O_CREAT | os.O_RDWR)
    made.posix("posix_fallocate", 20, 5, "/d/a", offset=0, len=1 << 50)
    made.write(tmp_path / "run")
    found = run_hostile("replay", tmp_path / "run", "--output_dir", tmp_path / "out", "--speed", "max")
    check(found, refused=True)
    assert "the replay writes up to" in found.err


def test_more_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    made = Made(None)
    made.posix("fopen64", 0, 1, "/d/a", cat="STDIO", mode="r")
    made.posix("fread", 20, 5, "/d/a", cat="STDIO", ret=1, count=1 << 50, size=8)
    made.write(tmp_path / "run")
    found = run_hostile("replay", tmp_path / "run", "--output_dir", tmp_path / "out", "--speed", "max")
    check(found, refused=True)
    assert "fread of /d/a needs" in found.err
