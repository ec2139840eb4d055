"""Traced runs played again: by strace, by the trace that the replay leaves, by the files that are there."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support import traced
from support.disk import mount_small_disk
from support.file_calls import PLACED, list_strace_requests, read_events
from support.hosts import start_on_hosts
from support.made_traces import Made
from support.ranks import MPIEXEC, Train, words
from support.replays import ROOT, Replayed, count_requests, replay

from analysis.tables.read import read_rank
from analysis.trace.events import read_heads
from analysis.trace.launches import plan_launches
from analysis.trace.source import FileSource
from common.lock import FolderLock

NEEDS_STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
STRACE = ["strace", "-f", "-y", "-e", f"trace={PLACED}", "-o"]
# Calls of many kinds: with and without offsets, of two descriptors, by streams, on files that the run makes
# (also a folder that it renames), and on ones that it finds.
MIXED = """
import ctypes
os.makedirs(f"{run}/in")
for name in ("a", "b", "deep"):
    with open(f"{run}/in/{name}", "wb") as file:
        file.write(os.urandom(50_000))
trace.start_tracing(run, here, "train")
fd = os.open(f"{run}/in/a", os.O_RDONLY)
os.pread(fd, 1000, 3000)
os.read(fd, 500)
os.lseek(fd, 20_000, os.SEEK_SET)
os.readv(fd, [bytearray(100), bytearray(300)])
os.lseek(fd, -50, os.SEEK_END)
os.read(fd, 500)
os.read(fd, 500)
other = os.open(f"{run}/in/a", os.O_RDONLY)
os.preadv(other, [bytearray(70)], 44)
os.close(other)
os.close(fd)
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(f"{run}/in/b".encode(), b"rb"))
memory = ctypes.create_string_buffer(9000)
libc.fread(memory, 10, 700, stream)
libc.fseek(stream, ctypes.c_long(33_000), 0)
libc.fread(memory, 1, 800, stream)
libc.fclose(stream)
os.mkdir(f"{run}/part")
fd = os.open(f"{run}/part/x", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
os.write(fd, bytes(7000))
os.pwrite(fd, bytes(100), 9000)
os.writev(fd, [b"ab", b"cde"])
os.fsync(fd)
os.pread(fd, 50, 100)
os.close(fd)
os.rename(f"{run}/part", f"{run}/whole")
with open(f"{run}/whole/x", "rb", buffering=0) as file:
    file.read(4000)
with open(f"{run}/log", "ab", buffering=0) as file:
    file.write(b"a line")
    file.write(b"another")
try:
    os.open(f"{run}/not there", os.O_RDONLY)
except FileNotFoundError:
    pass
os.unlink(f"{run}/log")
trace.stop_tracing()
"""


def below(requests: Counter[tuple[str, str, int, int]], folder: Path) -> Counter[tuple[str, str, int, int]]:
    """The requests on files in a folder, without a tracer's own, by their names in it."""
    return Counter({
        (file.removeprefix(f"{folder}/"), op, at, moved): count
        for (file, op, at, moved), count in requests.items()
        if file.startswith(f"{folder}/") and "/trace/" not in file
    })  # fmt: skip


@NEEDS_STRACE
def test_a_replay_makes_the_requests_of_the_run(tmp_path: Path) -> None:
    """The same reads and writes of the same bytes of the same files, by strace of both."""
    run = tmp_path / "run"
    _, errors = traced.start(run, MIXED, 0, 1, *STRACE, str(tmp_path / "first")).communicate(timeout=180)
    assert (run / "trace").is_dir(), errors
    shutil.rmtree(run / "in")  # nothing of the original is needed
    shutil.rmtree(run / "whole")
    done = replay(run, tmp_path / "replayed", prefix=(*STRACE, tmp_path / "second"))
    assert done.code == 0, done.err
    first = below(list_strace_requests((tmp_path / "first").read_text(errors="replace")), run)
    second = below(list_strace_requests((tmp_path / "second").read_text(errors="replace")), done.at(run))
    made = {"in/a", "in/b", "in/deep"}
    setup = {key for key in first if key[0] in made and key[1] == "write"}  # before the trace began
    for key in setup:
        del first[key]
    assert len(first) == 15 and second == first
    assert sorted(p.name for p in done.at(run).rglob("*")) == ["a", "b", "in", "whole", "x"]
    assert done.at(f"{run}/whole/x").stat().st_size == 9100
    assert not (run / "in").exists()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced.run(tmp_path_factory.mktemp("two") / "run", traced.TRAINING, world=2)


@pytest.mark.mpi
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ranks_are_dealt_to_processes(two_ranks: Path, tmp_path: Path, processes: int) -> None:
    """Fewer processes than ranks, as many, and more."""
    mpiexec = (MPIEXEC, "-n", processes) if processes > 1 else ()
    done = replay(two_ranks, tmp_path / "out", prefix=mpiexec)
    assert done.code == 0, done.err
    assert done.count_requests() == count_requests(two_ranks)
    assert len(list((done.output / "trace").iterdir())) == processes
    assert [each["rank"] for each in done.record["ranks"]] == [0, 1]
    assert done.record["bytes_read"] == 12_000 and done.record["bytes_written"] == 10_000
    assert not done.record["differences"] and done.err == ""


@pytest.mark.mpi
def test_over_two_hosts(two_ranks: Path, tmp_path: Path) -> None:
    """Each host has its own trace, and the clocks of both are compared; the root is shared."""
    mpiexec, variables = start_on_hosts(tmp_path, ["node-a", "node-b"])
    done = replay(two_ranks, tmp_path / "out", prefix=mpiexec, **variables)
    assert done.code == 0, done.err
    assert done.count_requests() == count_requests(two_ranks)
    assert [head.host for head in read_heads(done.output)] == ["node-a", "node-b"]
    spans = [(e.get("cat"), e["name"], e["args"]) for e in read_events(done.output)]
    offsets = [args for cat, name, args in spans if (cat, name) == ("clock", "offset")]
    assert [each["when"] for each in offsets] == ["start", "end"]
    assert all(abs(int(each["ahead_us"])) <= int(each["error_us"]) for each in offsets)


def test_the_command_of_analysis_and_its_report(two_ranks: Path, tmp_path: Path) -> None:
    """What a replay leaves is a run folder like others: spans, steps and all."""
    words = ["-m", "analysis", "replay", two_ranks, "--output_dir", tmp_path / "out", "--ranks", "1"]
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True, timeout=180)
    events = read_events(tmp_path / "out")
    steps = [e["args"] for e in events if (e.get("cat"), e["name"]) == ("train", "step")]
    assert [(args["epoch"], args["step"], args["batch"]) for args in steps] == [(0, n, n) for n in range(3)]
    named = {e["args"]["file"] for e in events if (e.get("cat"), e["name"]) == ("data", "read")}
    assert named == {f"{tmp_path}/out/files{two_ranks}/data1.bin"}
    names = {e["args"]["value"] for e in events if e["args"].get("name") == "thread_name"}
    assert {"main", "prefetch train"} <= names


@NEEDS_STRACE
def test_a_training_played_again(toy: Path, train: Train, tmp_path: Path) -> None:
    """With validation, checkpoints, a test: each request whose place the trace tells, and as many others."""
    words_ = words(toy, "--max_steps", 6, "--checkpoint_every_steps", 3, "--limit_val_batches", 2, "--trace")
    run = train(1, *words_, "--checkpoint_dir", tmp_path / "checkpoints").folder
    done = replay(run, tmp_path / "out", "--speed", "max", "--data_only", prefix=(*STRACE, tmp_path / "log"))
    assert done.code == 0, done.err
    names = json.loads((done.output / "replayed_files.json").read_text())
    made = list_strace_requests((tmp_path / "log").read_text(errors="replace"))
    by_strace = Counter({(names[key[0]], *key[1:]): n for key, n in made.items() if key[0] in names})
    (launch,) = plan_launches(FileSource(run))
    calls = read_rank(launch.rank, launch.files, launch.clock, details=True).calls
    rows = calls.filter(pl.col("op").is_in(["read", "write"])).select("path", "op", "position", "size").rows()
    wanted = Counter(row for row in rows if row[0] in names.values())
    placed = Counter({row: n for row, n in wanted.items() if row[2] is not None})
    assert placed.total() > 50 and not placed - by_strace
    assert by_strace.total() == wanted.total()
    files = {row[0].rpartition("/")[2] for row in placed}
    assert {"day_0_sparse.npy", "day_5_labels.npy", "metrics.jsonl"} & files
    assert any(name.endswith(".safetensors") for name in files)


@pytest.mark.mpi
def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Its line, and no rank left waiting for it at the next step."""
    for rank in range(2):
        made = make_training(rank, 2, slow=100_000)
        name = "/d" if rank else "/d/out0"  # a folder cannot be written
        made.posix("open64", 300_000, 5, name, flags=os.O_WRONLY)
        made.posix("fsync", 300_010, 5, name)
        made.write(tmp_path / "run")
    mpiexec = (MPIEXEC, "-n", 2)
    done = replay(tmp_path / "run", tmp_path / "out", prefix=mpiexec)
    lines = [line for line in done.err.splitlines() if line.startswith("dlrm: ")]
    assert done.code == 2 and len(lines) == 1
    assert "open64" in lines[0] and "Is a directory" in lines[0] and "rank 1" in lines[0]


def test_of_several_launches_one_is_replayed(tmp_path: Path) -> None:
    for launch in range(2):
        made = Made(0, 1, pid=1000 + launch)
        for n in range(launch + 1):
            at = launch * 3_600_000_000 + 10 * n
            made.posix("pread64", at, 5, f"/d/launch{launch}", ret=10, count=10, offset=0)
        made.write(tmp_path / "run")
    for words_, launch in (((), 1), (("--launch", 1), 0)):
        done = replay(tmp_path / "run", tmp_path / f"out{launch}", *words_)
        assert done.code == 0, done.err
        assert [path.name for path in done.at("/d").iterdir()] == [f"launch{launch}"]
        assert done.record["calls"] == launch + 1 and done.record["seconds"] < 60
        assert ("has 2 launches: the last is replayed" in done.err) == (not words_)


def test_a_thread_reads_what_another_will_write(tmp_path: Path) -> None:
    """Without times to think the reader may be first: the file is as large as it needs from the beginning."""
    made = Made(0)
    made.posix("open64", 0, 5, "/d/store", flags=os.O_RDWR | os.O_CREAT)
    for n in range(40):
        made.posix("pwrite64", 1000 + n * 1000, 5, "/d/store", ret=100, count=100, offset=n * 100)
        made.posix("pread64", 1500 + n * 1000, 5, "/d/store", 1, ret=100, count=100, offset=n * 100)
    made.write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out", "--speed", "max")
    assert done.code == 0 and not done.record["differences"], done.record
    assert done.count_requests() == count_requests(tmp_path / "run")


def test_copies_from_mapped_files(tmp_path: Path) -> None:
    """What spans say that they copied is copied again, from a mapping."""
    made = Made(0)
    made.posix("open64", 0, 5, "/d/a", flags=0)
    made.posix("mmap64", 10, 5, "/d/a", offset=0, flags=1, length=100_000)
    made.posix("close", 20, 5, "/d/a", ret=0)
    made.span("data", "read", 30, 50, file="/d/a", bytes=5000, offset=95_000, mapped=1, batch=0)
    made.span("data", "read", 90, 50, file="/d/b", bytes=5000, mapped=1, batch=0)
    made.write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.at("/d/a").stat().st_size == 100_000
    assert done.record["differences"] == {"copies from files that the trace does not map: not replayed": 1}
    spans = [e["args"] for e in read_events(done.output) if (e.get("cat"), e["name"]) == ("data", "read")]
    assert [args["mapped"] for args in spans] == [1, 1] and spans[0]["file"] == str(done.at("/d/a"))


def test_advice(tmp_path: Path) -> None:
    run = write_calls(
        tmp_path / "run",
        ("open64", 0, "/d/a", {"flags": 0}),
        ("posix_fadvise64", 20, "/d/a", {"offset": 100, "len": 50}),
        ("pread64", 40, "/d/a", READ),
    )
    done = replay(run, tmp_path / "out1")
    assert "not replayed: posix_fadvise64 (the trace does not say which advice: --fadvise): 1" in done.err
    done = replay(run, tmp_path / "out2", "--fadvise", "willneed")
    assert (done.code, done.err) == (0, "") and done.record["calls"] == 3
    (advised,) = [e["args"] for e in read_events(done.output) if e["name"] == "posix_fadvise64"]
    assert (advised["offset"], advised["len"]) == (100, 50)


# --- traces of other programs


def write_calls(run: Path, *calls: tuple[str, int, str, dict[str, Any]], rank: int | None = None) -> Path:
    """A trace of these calls: name, begin (us), file, arguments; each lasts 10 us."""
    made = Made(rank)
    for name, ts, file, args in calls:
        made.posix(name, ts, 10, file, **args)
    made.write(run)
    return run


def test_a_trace_of_another_program(tmp_path: Path) -> None:
    """Without ranks, steps or flags; a file that was open before the trace began; calls nobody knows."""
    run = write_calls(
        tmp_path / "run",
        ("open64", 0, "/data/a", {}),
        ("read", 20, "/data/a", {"ret": 4096, "count": 4096}),
        ("pread", 40, "/data/a", {"ret": 100, "count": 4096, "offset": 1_000_000}),
        ("close", 60, "/data/a", {"ret": 0}),
        ("pread64", 80, "/data/b", {"ret": 10, "count": 10, "offset": 5}),
        ("frobnicate", 100, "/data/a", {}),
        ("read", 120, "/proc/self/maps", {"ret": 10}),
    )
    done = replay(run, tmp_path / "out")
    assert done.code == 0, done.err
    assert done.at("/data/a").stat().st_size == 1_000_100
    assert done.at("/data/b").stat().st_size == 15
    assert done.at("/data/a").stat().st_blocks == 0  # sparse
    assert done.count_requests() == count_requests(run) - Counter({("/proc/self/maps", "read", 0, 10): 1})
    lines = done.err.splitlines()
    assert lines == [
        "replay: not replayed: frobnicate (not known to the replay): 1; "
        "calls on files of /proc, /sys and /dev: 1",
        "replay: other than in the trace: on a file that the trace does not open: opened at its first use: 1",
    ]
    assert done.record["not_replayed"] == {
        "frobnicate (not known to the replay)": 1, "calls on files of /proc, /sys and /dev": 1,
    }  # fmt: skip


def test_files_of_real_bytes(tmp_path: Path) -> None:
    run = write_calls(tmp_path / "run", ("pread64", 0, "/d/a", {"ret": 70_000, "count": 70_000, "offset": 0}))
    done = replay(run, tmp_path / "out", "--real_bytes")
    assert done.code == 0, done.err
    data = done.at("/d/a").read_bytes()
    assert len(data) == 70_000 and len(set(data)) == 256


READ: dict[str, Any] = {"ret": 10, "count": 10, "offset": 0}
WRITE: dict[str, Any] = {"ret": 10, "count": 10, "offset": 0}
CREATE: dict[str, Any] = {"flags": os.O_WRONLY | os.O_CREAT}


def test_no_name_leads_out_of_the_root(tmp_path: Path) -> None:
    """`..`, links that the run makes, names too long, names with anything in them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    made = Made(None)
    up = "/../" * 30 + str(outside).lstrip("/")
    made.posix("open64", 0, 5, f"/d{up}/made", **CREATE)
    made.posix("pwrite64", 10, 5, f"/d{up}/made", **WRITE)
    made.posix("symlink", 20, 5, str(outside))  # /d/link -> outside, then through it
    made.lines[-1]["args"]["path2_hash"] = "00000000000000aa"
    made._meta("FH", "/d/link", "00000000000000aa")
    made.posix("open64", 30, 5, "/d/link/through", **CREATE)
    made.posix("pwrite64", 40, 5, "/d/link/through", **WRITE)
    odd = ["/d/a b\n$(x)", "/d/" + "n" * 300, "/d/" + "ü" * 200, "relative/../../../x"]
    for number, name in enumerate(odd):
        made.posix("open64", 100 + number * 20, 5, name, **CREATE)
        made.posix("pwrite64", 110 + number * 20, 5, name, **WRITE)
    made.write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out")
    assert done.code == 0, done.err
    assert not list(outside.iterdir()) and not (tmp_path / "outside/made").exists()
    assert done.at(f"{outside}/made").stat().st_size == 10
    assert done.at(f"{outside}/through").stat().st_size == 10  # the link leads to where its target lies below
    assert os.readlink(done.at("/d/link")) == str(done.at(outside))
    assert done.record["bytes_written"] == 10 * (2 + len(odd))


def test_a_name_with_a_nul_is_refused(tmp_path: Path) -> None:
    run = write_calls(tmp_path / "run", ("pread64", 0, "/d/a\0b", READ))
    done = replay(run, tmp_path / "out")
    assert done.code == 2 and "has a NUL in its name" in done.err and done.err.count("\n") == 1


def refused(done: Replayed, said: str) -> bool:
    """One line that says it, exit code 2, and no trace of a replay: no folder without a file, either."""
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert not done.root.is_dir() or any(done.root.iterdir())
    made = ("trace", "env.txt", "gpu.txt")
    return said in done.err and not any((done.output / name).exists() for name in made)


def test_files_that_are_there(tmp_path: Path) -> None:
    """What is only read and large enough is used as it is; all else is refused, or overwritten on demand."""
    run = write_calls(
        tmp_path / "run",
        ("pread64", 0, "/d/read", {"ret": 10, "count": 10, "offset": 90}),
        ("open64", 20, "/d/made", {"flags": os.O_WRONLY | os.O_CREAT | os.O_EXCL}),
        ("pwrite64", 40, "/d/made", WRITE),
    )
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    here, made = root / "d/read", root / "d/made"
    here.write_bytes(b"mine" * 30)
    done = replay(run, tmp_path / "out1", "--root", root)
    assert done.code == 0 and here.read_bytes() == b"mine" * 30
    made.write_bytes(b"mine, too, and long")
    assert refused(
        replay(run, tmp_path / "out2", "--root", root), "made: exists, and the replay would change"
    )
    here.write_bytes(b"short")
    made.unlink()
    done = replay(run, tmp_path / "out3", "--root", root)
    assert refused(done, "read: has 5 bytes, the replay reads up to byte 100")
    assert here.read_bytes() == b"short" and not made.exists()
    made.write_bytes(b"mine, too, and long")
    done = replay(run, tmp_path / "out4", "--root", root, "--overwrite")
    assert done.code == 0, done.err
    assert here.stat().st_size == 100 and here.read_bytes()[:5] == b"short" and made.stat().st_size == 10


@pytest.mark.parametrize("kind", ["folder", "file", "second name"])
def test_links_that_are_there_are_not_followed(tmp_path: Path, kind: str) -> None:
    run = write_calls(
        tmp_path / "run", ("open64", 0, "/d/e/made", CREATE), ("pwrite64", 20, "/d/e/made", WRITE)
    )
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    (root / "d").mkdir(parents=True)
    if kind == "folder":
        (root / "d/e").symlink_to(outside)
    else:
        (root / "d/e").mkdir()
        link = (root / "d/e/made").symlink_to if kind == "file" else (root / "d/e/made").hardlink_to
        link(outside / "precious")
    said = {"folder": "is a link", "file": "is a link", "second name": "several names"}[kind]
    assert refused(replay(run, tmp_path / "out", "--root", root, "--overwrite"), said)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name, more", [("unlink", {}), ("rmdir", {}), ("chmod", {"mode": 0}), ("rename", {}), ("open64", CREATE)]
)
def test_nothing_that_is_there_is_removed_or_changed(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """Also by calls on names that the trace uses for nothing else; nor through a folder that is a link."""
    made = Made(None)
    made.posix(name, 0, 5, "/d/mine", **more)
    if name == "rename":
        made.lines[-1]["args"]["newpath_hash"] = "00000000000000aa"
        made._meta("FH", "/d/new", "00000000000000aa")
    made.write(tmp_path / "run")
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "d", outside):
        folder.mkdir(parents=True)
        if name == "rmdir":
            (folder / "mine").mkdir()
        else:
            (folder / "mine").write_text("mine")
    before = os.lstat(root / "d/mine")
    assert refused(
        replay(tmp_path / "run", tmp_path / "out1", "--root", root), "d/mine: exists, and the replay"
    )
    assert os.lstat(root / "d/mine") == before
    (root / "d").rename(tmp_path / "away")
    (root / "d").symlink_to(outside)
    done = replay(tmp_path / "run", tmp_path / "out2", "--root", root, "--overwrite")
    assert refused(done, "d: is a link")
    assert [path.name for path in outside.iterdir()] == ["mine"]


@pytest.mark.parametrize("name, more", [
    ("posix_fallocate", {"offset": 0, "len": 1000}),
    ("open64", {"flags": os.O_WRONLY | os.O_TRUNC}),
    ("pwrite64", {"ret": -1, "count": 9, "offset": 0}),
])  # fmt: skip
def test_no_other_call_changes_what_is_there(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """A file that the run found, opened to write, and then did not write to."""
    made = Made(None)
    made.posix("open64", 0, 5, "/d/mine", flags=os.O_RDWR)
    made.posix("pread64", 10, 5, "/d/mine", ret=4, count=4, offset=0)
    made.posix(name, 20, 5, "/d/mine", **more)
    made.write(tmp_path / "run")
    mine = tmp_path / "root/d/mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = replay(tmp_path / "run", tmp_path / "out", "--root", tmp_path / "root")
    assert mine.read_text() == "mine"
    assert done.code == 0 if name == "pwrite64" else refused(done, "d/mine: exists, and the replay")


def test_a_file_that_was_open_before_tracing_began(tmp_path: Path) -> None:
    """The file exists at once, and no call waits for it."""
    for number, name in enumerate(("pread64", "fsync", "lseek64", "fstat")):
        made = Made(None)
        made.posix(name, 0, 5, "/d/a", ret=0)
        made.write(tmp_path / f"run{number}")
        done = replay(tmp_path / f"run{number}", tmp_path / f"out{number}")
        assert done.code == 0 and done.at("/d/a").exists(), done.err


def test_a_file_that_an_untraced_program_made_again(tmp_path: Path) -> None:
    """Removed, then opened as one that is there: nobody would make it in a replay, however long it waits."""
    read = {"ret": 10, "count": 10, "offset": 0}
    run = write_calls(
        tmp_path / "run",
        *(("open64", 0, "/d/a", CREATE), ("close", 20, "/d/a", {}), ("unlink", 40, "/d/a", {})),
        *(("open64", 60, "/d/a", {"flags": 0}), ("pread64", 80, "/d/a", read), ("close", 99, "/d/a", {})),
    )
    done = replay(run, tmp_path / "out")
    assert done.code == 0 and done.record["seconds"] < 30, done.err
    assert "made again, which no traced call did: sparse: 1" in done.err
    assert done.count_requests() == count_requests(run)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Before anything is done where the sizes say so, else where it happens."""
    big: dict[str, Any] = {"ret": 3 << 20, "count": 3 << 20, "offset": 0}
    foreseen = write_calls(
        tmp_path / "foreseen", ("open64", 0, "/d/a", CREATE), ("pwrite64", 20, "/d/a", big)
    )
    made = Made(None)
    for begin in (0, 100):  # a file that is renamed, and made again
        made.posix("open64", begin, 5, "/d/a", **CREATE)
        made.posix("pwrite64", begin + 10, 5, "/d/a", ret=3 << 19, count=3 << 19, offset=0)
        made.posix("close", begin + 20, 5, "/d/a")
        made.posix("rename", begin + 30, 5, "/d/a")
        made.lines[-1]["args"]["newpath_hash"] = f"{begin:016x}aa"[2:]
        made._meta("FH", f"/d/b{begin}", f"{begin:016x}aa"[2:])
    sudden = made.write(tmp_path / "sudden").parents[1]
    with mount_small_disk(tmp_path / "disk", 2) as disk:
        done = replay(foreseen, tmp_path / "out1", "--root", disk / "root")
        assert refused(done, "the replay writes up to 3 MiB, and 2 MiB are free")
        done = replay(sudden, tmp_path / "out2", "--root", disk / "root")
        assert done.code == 2 and done.err.count("\n") == 1
        assert f"pwrite64 of {disk}/root/d/a: No space left on device; free space" in done.err


# --- time and order


def test_speed(tmp_path: Path) -> None:
    """Time to think is kept, shortened, or left out."""
    run = write_calls(
        tmp_path / "run", *(("pread64", 100_000 * n, "/d/a", READ) for n in range(6)), rank=0
    )  # 0.5 s
    seconds = {}
    for speed in ("1", "2.5", "max"):
        done = replay(run, tmp_path / speed, "--speed", speed)
        assert done.code == 0, done.err
        seconds[speed] = done.record["seconds"]
    assert 0.5 <= seconds["1"] < 1.5
    assert 0.2 <= seconds["2.5"] < seconds["1"]
    assert seconds["max"] < 0.2


def make_training(rank: int = 0, world: int = 1, slow: int = 0) -> Made:
    """Three steps; before each the main thread waits for a batch, for which another one makes 50 reads. After
    each step it writes. slow: us that a step computes.
    """
    made = Made(rank, world)
    made.posix("open64", 0, 5, f"/d/out{rank}", **CREATE)
    for step in range(3):
        begin, where = 1000 + step * 200_000, {"epoch": 0, "step": step, "batch": step}
        for n in range(50):
            made.posix("pread64", begin + 20 + n * 20, 5, "/d/in", 1, ret=100, count=100, offset=n * 100)
        made.span("data", "read", begin + 10, 1200, 1, **where, bytes=5000, file="/d/in")
        made.span("data", "wait", begin, 1500, **where)
        made.span("train", "step", begin, 2000 + slow, **where)
        made.posix("pwrite64", begin + 2010 + slow, 5, f"/d/out{rank}", ret=8, count=8, offset=step * 8)
    return made


def list_times(done: Replayed, name: str, of: str) -> list[tuple[int, int]]:
    """(begin, end) of the events of a name whose file's name ends so, in us."""
    events = read_events(done.output)
    hashes = {e["args"]["value"]: e["args"]["name"] for e in events if e["name"] == "FH"}
    return sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events
        if e["name"] == name and hashes.get(e["args"].get("fhash"), "").endswith(of)
    )  # fmt: skip


def test_a_step_waits_for_its_batch(tmp_path: Path) -> None:
    """Also where nothing else delays it: with no time to think all would be done at once."""
    make_training().write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out", "--speed", "max")
    assert done.code == 0, done.err
    reads, writes = list_times(done, "pread64", "/d/in"), list_times(done, "pwrite64", "/d/out0")
    assert (len(reads), len(writes)) == (150, 3)
    for step in range(3):
        assert reads[50 * step + 49][1] <= writes[step][0]


def test_ranks_meet_at_each_step(tmp_path: Path) -> None:
    """Rank 1 computes 60 ms longer: rank 0 does not go on before."""
    for rank in range(2):
        make_training(rank, 2, slow=60_000 * rank).write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out")
    assert done.code == 0, done.err
    fast, slow = (list_times(done, "pwrite64", f"/d/out{rank}") for rank in range(2))
    assert len(fast) == len(slow) == 3
    assert all(abs(one[0] - other[0]) < 50_000 for one, other in zip(fast, slow, strict=True))


def test_files_that_another_thread_opens(tmp_path: Path) -> None:
    """A thread writes into one that main opens later than the thread began; it has no name (O_TMPFILE)."""
    nameless = os.O_RDWR | os.O_TMPFILE
    made = Made(None)
    made.posix("open64", 0, 5, "/d/in", flags=0)
    made.posix("pread64", 10, 5, "/d/in", 5, ret=9, count=9, offset=0)
    for n in range(300):
        made.posix("pread64", 20 + 10 * n, 5, "/d/in", ret=9, count=9, offset=9 * n)
    made.posix("open64", 4000, 5, "/d", flags=nameless)
    made.posix("open64", 4010, 5, "/d", flags=nameless)
    made.posix("pwrite64", 5000, 5, "/d", 5, ret=9, count=9, offset=0)
    made.posix("pread64", 5010, 5, "/d", 5, ret=9, count=9, offset=0)
    made.posix("pread64", 5020, 5, "/d", 5, ret=7, count=7, offset=2)
    made.write(tmp_path / "run")
    done = replay(tmp_path / "run", tmp_path / "out", "--speed", "max")
    assert (done.code, done.err) == (0, ""), done.err
    assert done.count_requests() == count_requests(tmp_path / "run")
    assert [path.name for path in done.at("/d").iterdir()] == ["in"]


@pytest.mark.mpi
def test_a_folder_is_renamed_once_it_is_whole(tmp_path: Path) -> None:
    """As checkpoints are written: threads of two ranks fill a folder, one renames it, the next one's thread
    removes a file. The trace shows who came after whom; at full speed nothing else would keep the order.
    """
    first, other = Made(0, 2), Made(1, 2)
    first.posix("open64", 0, 5, "/d/log", **CREATE)
    first.posix("mkdir", 100, 5, "/d/part", 5)
    other.posix("open64", 200, 5, "/d/in", 5, flags=0)
    for n in range(300):  # what the other rank does before takes it long
        other.posix("pread64", 210 + 10 * n, 5, "/d/in", 5, ret=9, count=9, offset=9 * n)
    for made, rank in ((first, 0), (other, 1)):
        made.posix("open64", 4000, 5, f"/d/part/{rank}", 5, **CREATE)
        made.posix("pwrite64", 4010, 5, f"/d/part/{rank}", 5, ret=9, count=9, offset=0)
        made.posix("close", 4020, 5, f"/d/part/{rank}", 5)
    first.posix("rename", 5000, 5, "/d/part", 5)
    first.lines[-1]["args"]["newpath_hash"] = "00000000000000aa"
    first._meta("FH", "/d/whole", "00000000000000aa")
    first.posix("unlink", 6000, 5, "/d/whole/0", 6)
    for made in (first, other):
        made.write(tmp_path / "run")
    mpiexec = (MPIEXEC, "-n", 2)
    done = replay(tmp_path / "run", tmp_path / "out", "--speed", "max", prefix=mpiexec)
    assert (done.code, done.err) == (0, ""), done.err
    assert sorted(path.name for path in done.at("/d").rglob("*")) == ["1", "in", "log", "whole"]
    assert done.at("/d/whole/1").stat().st_size == 9
    assert done.count_requests() == count_requests(tmp_path / "run")


# --- options


@pytest.mark.parametrize(
    "words, said",
    [
        (["--speed", "0"], "--speed 0: give a number above 0, or max"),
        (["--speed", "fast"], "--speed fast"),
        (["--ranks", "3-1"], "--ranks 3-1: give one rank, or A-B"),
        (["--ranks", "7"], "--ranks 7-7: "),
        (["--launch", "5"], "--launch 5: "),
        (["--spead", "2"], "did you mean --speed instead of --spead?"),
    ],
)
def test_wrong_options(two_ranks: Path, tmp_path: Path, words: list[str], said: str) -> None:
    assert refused(replay(two_ranks, tmp_path / "out", *words), said)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(two_ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    assert refused(replay(two_ranks, tmp_path / "full"), "is not empty; name a new folder")
    assert refused(replay(tmp_path / "none", tmp_path / "out"), "no such folder")
    Made(None).write(tmp_path / "silent")
    assert refused(replay(tmp_path / "silent", tmp_path / "out"), "hold no calls on files")


def test_a_dry_run_changes_nothing(two_ranks: Path, tmp_path: Path) -> None:
    done = replay(two_ranks, tmp_path / "out", "--dry_run", "--root", tmp_path / "root")
    assert done.code == 0 and not list(tmp_path.iterdir())
    assert done.out.splitlines()[1].startswith("rank 1: 2 threads, 21 calls: 6 reads of 6,000 bytes, 1 write")
    assert "files to be there: 2, 12,000 bytes, sparse where missing" in done.out


def test_of_two_at_once_one_is_refused(two_ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out", "another replay"):
        done = replay(two_ranks, tmp_path / "out")
    assert done.code == 2 and "in use since" in done.err and done.err.count("\n") == 1
