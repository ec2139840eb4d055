"""Random damage to traces and profiles, and random lines: no signal, no traceback, no command takes 1 GB.

Each seed is a case of its own, and a failure names it: `run_command_case(folder, SEED)`, `profile_case` and
`scan_case(SEED, folder)` repeat it, and so does `PYTHONPATH=.:tests python THIS_FILE SEED 1` for the scanner.
"""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.analysis_command import run_hostile
from support.fuzzing import EXTREMES, check, mutate
from support.made_profiles import gpu_steps
from support.made_traces import training

from analysis.tables import gather
from analysis.trace.lines import ReadLoss, read_blocks
from analysis.trace.scan import MAX_DUR, MAX_TS, scan_block
from analysis.trace.strings import PAD, StringTable
from common.errors import UserError

ROOT = Path(__file__).parents[3]
COMMANDS = (["perfetto"], ["report"], ["check"], ["summary"], ["perfetto", "--format", "json"])
compress = partial(gzip.compress, mtime=0)  # the same bytes from the same seed
NUMBERS = (
    "0", "1", "-1", "3.5", "1e3", "1e999", "-1e308", "1e-999", "0e999", "null", "true", "[]", "{}", '""',
    '"7"', "4294967296", "18446744073709551615", "9223372036854775807", "-9223372036854775808", "9" * 400,
    "-", "1+1",
    "0." + "0" * 400 + "1", str(MAX_TS), str(MAX_TS + 1), str(MAX_DUR), str(MAX_DUR + 1), "[" * 80 + "]" * 80,
)  # fmt: skip
TEXTS = (
    "a", "", "read", "write", "pread64", "step", "epoch", "POSIX", "STDIO", "counter", "clock", "dftracer",
    "train", "data", "barrier", "end", "start", "HH", "FH", "SH", "CM", "rank", "world_size", "host", "role",
    "thread_name",
    "é", "\\ud800", "\\", 'x"y', "\\u0000", "\\n", "\x01", "q" * 300, "value",
)  # fmt: skip
KEYS = (
    "name", "cat", "ph", "pid", "tid", "ts", "dur", "args", "id", "type", "hhash", "fhash", "offset", "count",
    "ret", "epoch", "step", "batch", "value", "split", "when", "file", "bytes", "fname", "size",
    "num_events", "k",
)  # fmt: skip


def random_value(chance: random.Random, key: str, depth: int = 0) -> str:
    if key == "args" and depth < 3:
        return random_object(chance, depth + 1)
    kind = chance.randrange(10)
    if kind < 4 or key in ("name", "cat", "split", "when", "file", "fhash"):
        return f'"{chance.choice(TEXTS)}"'
    if kind < 6:
        return chance.choice(NUMBERS)
    return str(chance.choice((chance.randrange(3), chance.randrange(10**4), chance.randrange(10**16))))


def random_object(chance: random.Random, depth: int = 0) -> str:
    """Mostly an event; now and then with keys doubled, missing, unclosed or where they do not belong."""
    keys = ["name", "cat", "ph", "pid", "tid", "ts", "dur", "args"] if depth == 0 else []
    keys += chance.choices(KEYS, k=chance.choice((0, 1, 3, 8)) if depth else chance.choice((0, 0, 0, 2)))
    parts = []
    for key in keys:
        if chance.random() < 0.01:
            continue
        value = random_value(chance, key, depth)
        if depth == 0 and chance.random() < 0.8:
            value = {
                "ph": chance.choice("114"), "pid": "7", "tid": str(chance.randrange(7, 10)), "id": "1",
                "ts": str(10**15 + chance.randrange(10**7)), "dur": str(chance.randrange(10**5)),
            }.get(key, value)  # fmt: skip
        parts.append(f'"{key}":{value}')
    text = "{" + chance.choice((",",) * 20 + (", ", "", ",,")).join(parts) + "}"
    if chance.random() < 0.03:
        at = chance.randrange(len(text))
        text = text[:at] + chance.choice(('"",' * 90, '"', " " * 3000, "\\", "{" * 70, "")) + text[at + 1 :]
    return text


def random_lines(chance: random.Random, count: int) -> bytes:
    return "".join(random_object(chance) + "\n" for _ in range(count)).encode(errors="replace")


def seed_text() -> bytes:
    made = training(0, 2, steps=5)
    for number in range(5):
        made.span("counter", "loss", 20_000 + number, 0, value=0.5 / (number + 1))
    made.span("clock", "barrier", 5, 0, when="start")
    made.span("checkpoint", "write", 40_000, 100, file="/c", bytes=77)
    made.posix("write", 40_010, 20, "/out", ret=77)
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in made.lines)


SEED = seed_text()


def hostile_file(chance: random.Random) -> tuple[str, bytes]:
    """A name and the bytes of a trace."""
    kind = chance.randrange(5)
    if kind == 0:
        return "train00000-1-app.pfw.gz", mutate(compress(SEED, 1), chance)
    text = random_lines(chance, 60) if kind == 1 else mutate(SEED, chance)
    if kind == 2:  # numbers and texts in the places where the scanner expects them
        pieces = SEED.split(b":")
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(1, len(pieces))
            _, comma, rest = pieces[at].partition(b",")
            new = chance.choice((*EXTREMES, *(number.encode() for number in NUMBERS)))
            pieces[at] = new + comma + rest
        text = b":".join(pieces)
    return ("train00000-1-app.pfw", text) if chance.random() < 0.5 else ("a.pfw.gz", compress(text, 1))


def write_run(folder: Path, chance: random.Random) -> None:
    (folder / "trace").mkdir(parents=True)
    name, data = hostile_file(chance)
    (folder / "trace" / name).write_bytes(data)
    if chance.random() < 0.3:
        name, data = hostile_file(chance)
        (folder / "trace" / f"other-{name}").write_bytes(data)
    said = {"0": {"/data/day_0_sparse.npy": 5 * 4 * (1 << 20)}}
    (folder / "results.json").write_text(
        json.dumps({"bytes_read": said, "bytes_written": {"0": {"/out": 77}}})
    )


def on_this_thread(function, work):
    """For map: a pool of threads for each of thousands of files would take most of the time."""
    return map(function, work)


def run_command_case(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    write_run(folder, chance)
    command = COMMANDS[chance.randrange(len(COMMANDS))]
    try:
        check(run_hostile(command[0], folder, *command[1:]))
    except AssertionError as error:
        error.add_note(f"seed {seed}: {' '.join(command)}; kept in {folder}")
        raise


def run_cases(run_case: Callable[[Path, int], None], folder: Path, seeds: Iterable[int]) -> None:
    for seed in seeds:
        run_case(folder / str(seed), seed)
        shutil.rmtree(folder / str(seed))


def test_commands_survive_damaged_traces(tmp_path: Path) -> None:
    run_cases(run_command_case, tmp_path, range(20))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 8000, 400))
def test_commands_survive_thousands_of_damaged_traces(tmp_path: Path, start: int) -> None:
    run_cases(run_command_case, tmp_path, range(start, start + 400))


def run_profile_case(folder: Path, seed: int) -> None:
    """A damaged profile of torch.profiler, given by its name or as the run's own, beside a whole trace."""
    chance = random.Random(seed)
    text = gpu_steps(wait=chance.choice((0, 3_000))).text().encode()
    if chance.random() < 0.5:  # numbers, texts and nests in the places where values are expected
        pieces = text.split(b": ")
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(1, len(pieces))
            new = chance.choice((*EXTREMES, *(each.encode() for each in (*NUMBERS, '"<b>\\u2028"'))))
            pieces[at] = new + pieces[at][pieces[at].find(b",") :]
        text = b": ".join(pieces)
    else:
        text = mutate(text, chance)
    packed = chance.random() < 0.5
    data = mutate(compress(text, 1), chance) if chance.random() < 0.3 else compress(text, 1)
    training(0, 1, steps=6, wait=3_000).write(folder / "run")
    name = "rank00000-steps3-5-1000.json" + (".gz" if packed else "")
    own = chance.random() < 0.3
    path = folder / "run" / "profile" / name if own else folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data if packed else text)
    try:
        command = chance.choice(("perfetto", "report"))
        found = run_hostile(command, folder / "run", *given_profile(path, own))
        check(found)
        assert not own or found.code == 0, found  # the rest of the run does not need it
    except AssertionError as error:
        error.add_note(f"seed {seed}; kept in {folder}")
        raise


def given_profile(path: Path, own: bool) -> list[object]:
    return [] if own else ["--kineto", path]


def test_commands_survive_damaged_profiles(tmp_path: Path) -> None:
    run_cases(run_profile_case, tmp_path, range(20))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 2000, 400))
def test_commands_survive_thousands_of_damaged_profiles(tmp_path: Path, start: int) -> None:
    run_cases(run_profile_case, tmp_path, range(start, start + 400))


def scan_case(seed: int, folder: Path) -> None:
    """The scanner and everything compiled that follows it, in this process."""
    from analysis.perfetto import convert

    chance = random.Random(seed)
    strings = StringTable()
    text = bytearray(hostile_file(chance)[1] if chance.random() < 0.5 else random_lines(chance, 200)) + b"\n"
    size = len(text)
    block = scan_block(np.frombuffer(text + chance.randbytes(PAD), np.uint8), size, strings)
    assert ((block.ts >= 0) & (block.ts <= MAX_TS) & (block.dur >= 0) & (block.dur <= MAX_DUR)).all()
    assert (block.name < len(strings)).all() and (block.arg_key < len(strings)).all()
    assert (np.diff(block.arg_begin) >= 0).all() and block.arg_begin[-1] == len(block.arg_key)
    for column in (block.pid, block.tid):
        assert ((column >= 0) & (column < 1 << 32)).all()
    for number in range(min(5, len(block))):
        block.args(number, strings)
    path = folder / "one.pfw"
    path.write_bytes(text)
    if len(block) and chance.random() < 0.3:
        try:
            convert.convert_to_pftrace(path, folder / "out")
            gather.gather_tables(path, on_this_thread)
        except UserError:
            pass


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(150, 400), marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_the_scanner_survives_random_lines(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        scan_case(seed, tmp_path)


@pytest.mark.parametrize("first, count", [(0, 40), pytest.param(100_000, 8000, marks=pytest.mark.slow)])
def test_the_build_with_checked_bounds_finds_no_access_outside(
    tmp_path: Path, request: pytest.FixtureRequest, first: int, count: int
) -> None:
    """numba reads NUMBA_BOUNDSCHECK when it compiles, so these cases have a process of their own, and the
    checked code, which takes most of a minute to compile, a folder in pytest's cache.
    """
    cache = getattr(request.config, "cache", None)
    compiled = cache.mkdir("numba-checked") if cache else tmp_path / "numba-checked"
    environment = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(compiled)}
    done = subprocess.run(
        [sys.executable, __file__, str(first), str(count)], cwd=ROOT, capture_output=True, text=True,
        timeout=3600, env=os.environ | environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]


def test_damaged_gzip_streams_give_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.pfw.gz"
    for seed in range(400):
        chance = random.Random(seed)
        path.write_bytes(mutate(compress(SEED, 1) + compress(SEED[:5000], 9), chance))
        for text in read_blocks(path, ReadLoss()):
            assert text.endswith(b"\n")


def main(first: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            try:
                scan_case(seed, Path(folder))
            except BaseException:
                print(f"seed {seed}", file=sys.stderr)
                raise


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
