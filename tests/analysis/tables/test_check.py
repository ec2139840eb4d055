"""Byte coverage: the trace against strace, and the comparison with what a run says of itself."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import traced
from support.file_calls import STRACED, count_strace_calls
from support.made_traces import Made

from analysis.tables import check
from analysis.trace.arguments import READ, WRITE
from analysis.trace.source import FileSource
from common.errors import UserError

# Every way in which this project reads and writes: whole files, at offsets, into buffers, in threads.
READING = """
import json, multiprocessing, numpy as np
data = f"{run}/data.bin"
open(data, "wb").write(bytes(300_000))
np.save(f"{run}/array.npy", np.arange(5000, dtype=np.int64))
trace.start_tracing(run, here, "train")
with open(data, "rb") as file:
    file.read(1000); file.seek(200_000); file.read(150_000)
with open(data, "rb", buffering=0) as file:
    file.readinto(bytearray(70_000))
fd = os.open(data, os.O_RDONLY)
thread = threading.Thread(target=lambda: [os.pread(fd, 4096, i * 8192) for i in range(20)])
thread.start(); thread.join()
os.pread(fd, 10_000, 295_000)  # short: only 5,000 are there
os.close(fd)
def work():
    with open(data, "rb", buffering=0) as file:
        file.read(12_345)
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start(); worker.join()
with open(f"{run}/array.npy", "rb", buffering=0) as file:
    file.readinto(memoryview(bytearray(40_128)))
with open(f"{run}/out.bin", "wb") as file:
    file.write(bytes(100_000)); file.write(b"x" * 77)
fd = os.open(f"{run}/out.bin", os.O_WRONLY)
os.pwrite(fd, b"y" * 500, 10)
os.close(fd)
with open(f"{run}/log.txt", "a") as file:
    for i in range(10):
        print(i, file=file, flush=True)
trace.stop_tracing()
"""


def test_every_byte_that_strace_sees(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    log, run = tmp_path / "log", tmp_path / "run"
    process = traced.start(run, READING, 0, 1, strace, "-f", "-y", "-e", f"trace={STRACED}", "-o", str(log))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    names = {str(run / name) for name in ("data.bin", "array.npy", "out.bin", "log.txt")}
    moved = count_strace_calls(log.read_text()).bytes
    kinds = {"read": READ, "write": WRITE}
    seen = {
        (kinds[name], file): size for (file, name), size in moved.items() if name in kinds and file in names
    }
    for name, before in (("data.bin", 300_000), ("array.npy", 40_128)):  # written before the trace began
        assert seen.pop((WRITE, str(run / name))) == before
    [(processes, traced_bytes)] = check.sum_by_launch(FileSource(run))
    assert set(traced_bytes) == {0} and len(processes) == 2  # the worker's bytes are its rank's
    mine = {key: value for key, value in traced_bytes[0].items() if key[1] in names and value}
    assert mine == seen
    assert mine[READ, str(run / "data.bin")] >= 1000 + 100_000 + 70_000 + 20 * 4096 + 5000 + 12_345


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = traced.run(tmp_path / "run", traced.TRAINING, world=2)
    said = {
        "bytes_read": {str(r): {str(folder / f"data{r}.bin"): 6000} for r in range(2)},
        "bytes_written": {str(r): {str(folder / f"out{r}.bin"): 5000} for r in range(2)},
    }
    (folder / "results.json").write_text(json.dumps(said))
    return folder


def change(run: Path, rank: int, by: int) -> None:
    said = json.loads((run / "results.json").read_text())
    said["bytes_read"][str(rank)][str(run / f"data{rank}.bin")] += by
    (run / "results.json").write_text(json.dumps(said))


def test_all_covered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from analysis.__main__ import main

    assert main(["check", str(run)]) == 0
    out = capsys.readouterr().out
    assert "coverage 100.0%: every byte is in the trace" in out
    assert re.search(r"all +read +2 +12,000 +12,000 +100\.0%", out)


def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mapped file has no calls; and a file that the run does not count has no second count."""
    from analysis.__main__ import main

    made = Made()
    made.posix("read", 0, 5, "/data/day_0.npy", ret=128, count=128)
    made.span("data", "read", 10, 5, file="/data/day_0.npy", bytes=19_000_000, mapped=1)
    made.posix("write", 20, 5, "/run/.state.json.0123456789abcdef.partial", ret=77, count=77)
    made.posix("read", 30, 5, "/x/lib/python3.11/os.py", ret=5000, count=5000)
    made.posix("write", 35, 5, "/tmp/5y5rb5ji", ret=4, count=4)  # what Python's tempfile tries
    made.write(tmp_path)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"bytes_read": {"0": {"/data/day_0.npy": 128}}, "bytes_written": {}}))
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "not compared: 19,000,000 bytes from 1 mapped file:" in out and "/data/day_0.npy: 19,000,000" in out
    )
    assert "not compared: 77 bytes written of files that the run does not count" in out
    assert "in the trace: state.json\n" in out and "5,000" not in out
    assert "coverage 100.0%: every byte that was compared is in the trace" in out

    results.write_text(json.dumps({"bytes_read": {"0": {"/data/none.npy": 0}}}))
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "100.0%" not in out and "coverage unknown: the run counted no bytes" in out


def test_a_dataset_where_programs_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What every program loads is left out, but not what the run counts, or what its spans declare."""
    from analysis.__main__ import main

    made, file = Made(), "/usr/share/python3/day_0.npy"
    made.posix("read", 0, 5, file, ret=128, count=128)
    made.posix("read", 10, 5, "/usr/share/python3/os.py", ret=5000, count=5000)
    made.write(tmp_path / "counted")
    results = tmp_path / "counted/results.json"
    results.write_text(json.dumps({"bytes_read": {"0": {file: 128}}, "bytes_written": {}}))
    made.span("data", "read", 20, 5, file=file, bytes=128)
    made.write(tmp_path / "declared")
    for run in ("counted", "declared"):
        assert main(["check", str(tmp_path / run)]) == 0
        out = capsys.readouterr().out
        assert "coverage 100.0%: every byte is in the trace" in out and "5,000" not in out


def test_a_stopped_run_of_mapped_files_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from analysis.__main__ import main

    made = Made()
    made.posix("pread64", 0, 5, "/data/day_0.npy", ret=128, count=128, offset=0)
    made.span("data", "read", 10, 5, file="/data/day_0.npy", bytes=19_000_000, offset=128, mapped=1)
    made.write(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not compared: 19,000,000 bytes from 1 mapped file:" in out
    assert "coverage unknown: no results.json, and the spans name mapped files only" in out


RELATIVE = """
os.chdir(run)
trace.start_tracing(run, here, "train")
with open("out.bin", "wb", buffering=0) as file:
    file.write(bytes(5000))
trace.stop_tracing()
"""


def test_a_relative_name_counts_from_where_the_process_began(tmp_path: Path) -> None:
    run = traced.run(tmp_path / "run", RELATIVE)
    said = {"bytes_written": {"0": {str(run / "out.bin"): 5000}}}
    (run / "results.json").write_text(json.dumps(said))
    rows, *_ = check.check_run(run)
    assert [(row.counted, row.traced) for row in rows] == [(5000, 5000)]


@pytest.mark.parametrize("by, share", [(1, "99.995455%"), (-1, "99.995454%"), (6000, "78.6%")])
def test_a_single_byte_is_missed(run: Path, capsys: pytest.CaptureFixture[str], by: int, share: str) -> None:
    from analysis.__main__ import main

    change(run, 1, by)
    assert main(["check", str(run)]) == 1
    out = capsys.readouterr().out
    assert "NOT every byte" in out and f"coverage {share}" in out
    assert f"rank 1: {run / 'data1.bin'}: read {6000 + by:,} bytes, traced 6,000" in out


def test_killed_before_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own spans are what there is to hold the calls against; a file that no call touched is missed."""
    from analysis.__main__ import main

    (run / "results.json").unlink()
    assert main(["check", str(run)]) == 0
    out = capsys.readouterr().out
    assert "launch 1 left no results.json" in out and "coverage 100.0%" in out
    rows, *_ = check.check_run(run)
    assert {(row.rank, row.file, row.counted, row.traced) for row in rows} == {
        (rank, str(run / f"data{rank}.bin"), 6000, 6000) for rank in range(2)
    }
    made = Made(2, 3)
    made.span("data", "read", 10, 5, file="/data/mapped.npy", bytes=500)
    made.write(run)
    assert main(["check", str(run)]) == 1
    assert "rank 2: /data/mapped.npy: read 500 bytes, traced 0" in capsys.readouterr().out


def test_a_run_that_read_no_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with random rows and no checkpoints: nothing to compare is not a failure, and no 100 %."""
    from analysis.__main__ import main

    (run / "results.json").write_text('{"bytes_read": {"0": {}, "1": {}}, "bytes_written": {}}')
    assert main(["check", str(run)]) == 0
    out = capsys.readouterr().out
    assert "coverage unknown: the run counted no bytes" in out and "100" not in out


def test_bad_results(run: Path) -> None:
    (run / "results.json").write_text("{}")
    with pytest.raises(UserError, match="no bytes_read"):
        check.check_run(run)
    (run / "results.json").write_text('{"bytes_re')
    with pytest.raises(UserError, match="not JSON"):
        check.check_run(run)


def test_unknown_spans_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from analysis.__main__ import main

    assert main(["check", str(run)]) == 0
    assert "nothing is known" not in capsys.readouterr().out
    made = Made(2, 3)
    for at in range(3):
        made.span("strange", "thing\u001b[31m", at, 1)
    made.span("compute", "forward", 10, 1)
    for number in range(6):
        made.span("other one", f"n{number}", 20, 1)
    made.write(run)
    assert main(["check", str(run)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "nothing is known" in line)
    assert line.startswith(
        "nothing is known about the names of 9 spans: strange/thing\\x1b[31m, other one/n0, "
    )
    assert line.endswith(" and 2 more names")
