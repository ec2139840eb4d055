"""A run as logs for fio: what the real fio then does is what the trace says, file by file."""

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from support import traced
from support.analysis_command import run_command
from support.file_calls import count_strace_calls, count_traced_calls, read_events
from support.made_traces import Made

NEEDS_FIO = pytest.mark.skipif(
    shutil.which("fio") is None or shutil.which("strace") is None, reason="needs fio and strace"
)


def export(run: Path, folder: Path, *words: str) -> str:
    done = run_command("export", "fio", run, "-o", folder, *words)
    assert done.code == 0, done.err
    return done.out


def run_fio(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Make the files, replay, and count by strace: (file of the run, operation) -> calls, bytes."""
    subprocess.run(["sh", "make_files.sh"], cwd=folder, check=True)
    calls = "trace=open,openat,creat,read,pread64,write,pwrite64,fsync,fdatasync"
    command = ["strace", "-f", "-y", "-e", calls, "-o", "log", "fio", "--output-format=json", "replay.fio"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    originals = json.loads((folder / "files.json").read_text())
    found = count_strace_calls((folder / "log").read_text(errors="replace")).below(folder)
    return {(originals[file], op): moved for (file, op), moved in found.items() if file in originals}


@NEEDS_FIO
def test_fio_moves_the_bytes_of_the_trace(tmp_path: Path) -> None:
    """Two ranks with a reading thread each; fio opens files as it likes, so opens are not compared."""
    run = traced.run(tmp_path / "run", traced.TRAINING, world=2)
    printed = export(run, tmp_path / "fio")
    by_trace = count_traced_calls(read_events(run)).below(run, "/trace/")
    want = {(f"{run}/{file}", op): moved for (file, op), moved in by_trace.items() if op != "open"}
    assert Counter(op for _, op in want) == {"read": 2, "write": 2}
    assert {key: moved for key, moved in run_fio(tmp_path / "fio").items() if key[1] != "open"} == want
    assert "12 reads of 12,000 bytes, 2 writes of 10,000 bytes" in printed
    assert len(list((tmp_path / "fio/logs").iterdir())) == 4  # a log for each thread


def test_a_log_keeps_offsets_and_times(tmp_path: Path) -> None:
    made = Made()
    made.posix("open64", 100, 5, "/data/a", flags=2)
    made.posix("read", 200, 5, "/data/a", count=70, ret=70)
    made.posix("lseek64", 210, 1, "/data/a", whence=0, offset=1000, ret=1000)
    made.posix("read", 1_000_300, 5, "/data/a", count=70, ret=30)
    made.posix("fsync", 1_000_400, 5, "/data/a")
    made.posix("close", 1_000_500, 5, "/data/a", ret=0)
    made.write(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "fio")
    (log,) = (tmp_path / "fio/logs").iterdir()
    assert log.read_text().splitlines() == [
        "fio version 3 iolog",
        "100 files/a add",
        "100 files/a open",
        "100 files/a read 0 70",
        "1000200 files/a read 1000 30",
        "1000300 files/a sync 0 0",
        "1000400 files/a close",
    ]
    assert "make 1030 files/a\n" in (tmp_path / "fio/make_files.sh").read_text()


def test_last_names_and_data_alone(tmp_path: Path) -> None:
    """What is written under one name and then renamed has the last name; of programs nothing is left."""
    made = Made()
    made.posix("pwrite64", 100, 5, "/out/.a.part", count=10, ret=10, offset=0)
    made.posix("rename", 200, 5, "/out/.a.part")
    made.lines[-1]["args"]["newpath_hash"] = "00000000000000aa"
    made._meta("FH", "/out/a", "00000000000000aa")
    made.posix("pwrite64", 300, 5, "/out/.a.part", count=20, ret=20, offset=0)  # another file of the name
    made.posix("pread64", 400, 5, "/usr/lib/python3.11/os.py", count=9, ret=9, offset=0)
    made.write(tmp_path / "run")
    printed = export(tmp_path / "run", tmp_path / "fio", "--data_only")
    assert json.loads((tmp_path / "fio/files.json").read_text()) == {
        "files/a": "/out/a", "files/.a.part": "/out/.a.part",
    }  # fmt: skip
    (log,) = (tmp_path / "fio/logs").iterdir()
    assert [line.split()[1:] for line in log.read_text().splitlines() if " write " in line] == [
        ["files/a", "write", "0", "10"], ["files/.a.part", "write", "0", "20"],
    ]  # fmt: skip
    assert "calls on files of programs and of the system, left out (--data_only): 1" in printed


HOSTILE = ["/d/a b", "/d/$(touch here)/x", "/other/x", "/d/;rm -rf files;", "/d/" + "n" * 300, "/"]


@NEEDS_FIO
def test_names_that_fio_and_the_shell_cannot_take(tmp_path: Path) -> None:
    """Each has a name of its own; blanks, quotes and shell words are not in it."""
    made = Made()
    for number, name in enumerate(HOSTILE):
        made.posix("pwrite64", number * 100, 5, name, count=10, ret=10 + number, offset=5)
    made.write(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "fio")
    moved = run_fio(tmp_path / "fio")
    assert {name: moved[name, "write"] for name in HOSTILE} == {
        name: (1, 10 + number) for number, name in enumerate(HOSTILE)
    }
    inside = {path.name for path in (tmp_path / "fio").iterdir()}
    assert inside == {"logs", "files", "files.json", "make_files.sh", "replay.fio", "log", ".dlrm-io.json"}


def test_what_fio_cannot_do_is_counted_and_named(tmp_path: Path) -> None:
    made = Made(rank=None)  # of another program
    made.posix("mkdir", 0, 5, "/data")
    made.posix("frobnicate", 10, 5, "/data/a")
    made.posix("read", 20, 5, "/data/a", count=9, ret=9)  # open since before the trace began
    made.posix("read", 30, 5, "/data/a", count=9, ret=0)
    made.posix("read", 40, 5, "/proc/self/maps", count=9, ret=9)
    made.write(tmp_path / "run")
    printed = export(tmp_path / "run", tmp_path / "fio")
    job = (tmp_path / "fio/replay.fio").read_text()
    for line in (
        "calls that fio has no action for: mkdir 1, frobnicate 1",
        "requests whose offset the trace leaves open, placed behind the one before: 1",
        "reads and writes that moved no byte, left out: 1",
        "calls on files of /proc, /sys and /dev, left out: 1",
    ):
        assert line in printed and f"# {line}\n" in job


def test_refusals_are_one_line(tmp_path: Path) -> None:
    made = Made()
    made.posix("read", 20, 5, "/data/a", count=9, ret=9)
    made.write(tmp_path / "run")
    Made().write(tmp_path / "silent")
    (tmp_path / "fio").mkdir()
    (tmp_path / "fio/replay.fio").write_text("[mine]\n")
    for run, output, said in (
        ("run", "fio", "replay.fio: was not made by this program"),
        ("run", "no/where", "is not a folder; name another"),
        ("silent", "other", "the traces hold no"),
    ):
        done = run_command("export", "fio", tmp_path / run, "-o", tmp_path / output)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert (tmp_path / "fio/replay.fio").read_text() == "[mine]\n"
    assert run_command("export", "oif", tmp_path).code == 2
