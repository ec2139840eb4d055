"""dlrm.runtime.trace: what is in the file, and what a killed process leaves."""

import gzip
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from support import traced

from analysis.trace import events


def lines(folder: Path) -> list[dict]:
    """Every record of the folder's traces, by Python's own gzip and json."""
    found = []
    for path in sorted((folder / "trace").glob("*.pfw.gz")):
        text = gzip.decompress(path.read_bytes()).decode()
        found += [json.loads(line) for line in text.splitlines()]
    return found


def test_off_imports_and_opens_nothing(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    body = """
with trace.span("train", "step", n=1):
    trace.instant("a", "b"); trace.counter("c", 1.0); trace.set_context(step=1); trace.name_thread("x")
trace.stop_tracing()
assert not [name for name in sys.modules if "dftracer" in name]
"""
    log = tmp_path / "strace"
    process = traced.start(
        tmp_path / "run", body, 0, 1, strace, "-f", "-e", "trace=open,openat", "-o", str(log)
    )
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    opened = log.read_text()
    assert "trace.py" in opened or "trace.cpython" in opened  # strace did look
    assert "dftracer" not in opened and ".pfw" not in opened
    assert not list((tmp_path / "run").iterdir())


def test_spans_threads_and_posix_calls(tmp_path: Path) -> None:
    records = lines(traced.run(tmp_path, traced.TRAINING))
    spans = [r for r in records if r["ph"] == 1]
    steps = [r for r in spans if (r["cat"], r["name"]) == ("train", "step")]
    assert [r["args"]["batch"] for r in steps] == [0, 1, 2]
    assert all(r["args"]["epoch"] == 0 and r["args"]["step"] == r["args"]["batch"] for r in steps)
    assert all(r["dur"] >= 3000 for r in steps)
    about = {r["args"]["name"]: r["args"]["value"] for r in records if r["name"] == "CM"}
    assert {k: about[k] for k in ("rank", "world_size", "host", "role")} == {
        "rank": "0", "world_size": "1", "host": "node7", "role": "train",
    }  # fmt: skip
    named = {r["tid"]: r["args"]["value"] for r in records if r["args"].get("name") == "thread_name"}
    assert sorted(named.values()) == ["main", "prefetch train"]
    preads = [r for r in spans if r["name"] == "pread64"]
    assert len(preads) == 6 and all(r["args"]["ret"] == 1000 for r in preads)
    assert {named[r["tid"]] for r in preads} == {"prefetch train"}


def test_no_read_is_lost_while_other_threads_open_and_close_files(tmp_path: Path) -> None:
    """DFTracer forgets an opened file whose descriptor another thread is just closing."""
    body = """
from io import FileIO
from common.descriptors import opening
from common.inputs import open_regular_file, read_bytes
from common.lock import FolderLock
from common.owned import write_whole

data, state = f"{run}/data.bin", Path(run, "state")
Path(data).write_bytes(bytes(1000))
state.mkdir()
trace.start_tracing(run, here, "train")
done = threading.Event()

def change_state(number):
    while not done.is_set():
        write_whole(state / f"{number}.json", b"{}")
        read_bytes(state / f"{number}.json")
        with FolderLock(state, "writing", f"lock{number}"):
            trace.sync_to_disk(state)

threads = [threading.Thread(target=change_state, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for _ in range(1000):
    file = FileIO(data, opener=open_regular_file)
    for _ in range(3):
        file.read(100)
    with opening:
        file.close()
done.set()
for thread in threads:
    thread.join()
trace.stop_tracing()
"""
    records = lines(traced.run(tmp_path, "from pathlib import Path\n" + body))
    files = {r["args"]["value"]: r["args"]["name"] for r in records if r["name"] == "FH"}
    reads = [r for r in records if r["name"] == "read" and files[r["args"]["fhash"]].endswith("data.bin")]
    assert len(reads) == 3000 and all(int(r["args"]["ret"]) == 100 for r in reads)


def test_any_value_and_any_text(tmp_path: Path) -> None:
    body = r"""
import numpy as np
from pathlib import Path
trace.start_tracing(run, here, "train")
name = 'he said "no"\n\\ and é'
with trace.span("train", "odd", i=np.int64(7), f=np.float32(0.5), b=True, nb=np.bool_(False), none=None,
                path=Path("/x/y"), nan=float("nan"), big=1234567.0, text=name, scalar=np.array(3)):
    pass
trace.counter("speed", np.float64(2.5))
trace.stop_tracing()
"""
    records = lines(traced.run(tmp_path, body))
    args = next(r["args"] for r in records if r["name"] == "odd")
    args.pop("hhash")
    assert args == {
        "i": 7, "f": 0.5, "b": 1, "nb": 0, "none": "None", "path": "/x/y", "nan": "nan", "big": 1234567,
        "text": 'he said "no"\n\\ and é', "scalar": 3,
    }  # fmt: skip
    assert next(r["args"]["value"] for r in records if r["name"] == "speed") == 2.5


def test_spans_close_on_exceptions_and_decorate(tmp_path: Path) -> None:
    body = """
trace.start_tracing(run, here, "train")
@trace.span("eval", "metrics", split="val")
def auroc(x):
    return x + 1
assert auroc(1) == 2 and auroc(2) == 3
try:
    with trace.span("train", "outer"), trace.span("train", "inner") as span:
        span.update(late=5)
        raise ValueError
except ValueError:
    pass
trace.stop_tracing()
trace.stop_tracing()
with trace.span("train", "after"):
    pass
"""
    spans = {}
    for record in lines(traced.run(tmp_path, body)):
        spans.setdefault(record["name"], []).append(record)
    assert len(spans["metrics"]) == 2 and spans["metrics"][0]["args"]["split"] == "val"
    assert len(spans["outer"]) == 1 and spans["inner"][0]["args"]["late"] == 5
    assert "after" not in spans


def test_forked_worker_has_its_own_file_and_its_parents_rank(tmp_path: Path) -> None:
    body = """
import multiprocessing
path = f"{run}/data.bin"
open(path, "wb").write(bytes(3000))
trace.start_tracing(run, here, "train")
open(path, "rb").close()  # its name is in the parent's file only
trace.instant("clock", "barrier", when="start")
def work():
    with trace.span("data", "worker"), open(path, "rb", buffering=0) as file:
        file.read(3000)
worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
assert worker.exitcode == 0
trace.stop_tracing()
"""
    traced.run(tmp_path, body)
    found = {process.role: process for process in events.read_processes(tmp_path)}
    assert set(found) == {"train", "worker"} and found["worker"].rank == 0
    assert found["worker"].pid != found["train"].pid and not found["worker"].lost
    table = events.load_events(tmp_path)
    reads = table.filter((table["name"] == "read") & (table["pid"] == found["worker"].pid))
    assert reads["ret"].to_list() == [3000] and str(reads["file"][0]).endswith("data.bin")


def test_fork_between_two_flushes(tmp_path: Path) -> None:
    """What the parent's C library has not yet written was written by the child as well, into its own file."""
    body = """
trace.start_tracing(run, here, "train", flush_ms=600_000)
for number in range(3000):
    with trace.span("data", "read", number=number):
        pass
child = os.fork()
with trace.span("train", "step", child=int(child == 0)):
    pass
if child:
    os.waitpid(child, 0)
else:
    import ctypes
    ctypes.CDLL(None).fflush(None)  # as the thread does that flushes
trace.stop_tracing()
os._exit(0)
"""
    seen = lines(traced.run(tmp_path / "run", body))
    assert len(list((tmp_path / "run/trace").iterdir())) == 2
    assert sum(line["name"] == "read" for line in seen) == 3000
    assert sorted(line["args"]["child"] for line in seen if line["name"] == "step") == [0, 1]


def test_killed_process_loses_little(tmp_path: Path) -> None:
    body = """
trace.start_tracing(run, here, "train", flush_ms=200)
number = 0
while True:
    with trace.span("train", "step", number=number):
        time.sleep(0.002)
    number += 1
    print(number, time.time(), flush=True)
"""
    process = traced.start(tmp_path, body)
    assert process.stdout
    output = [process.stdout.readline() for _ in range(300)]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=180)
    last = float((output + rest.splitlines())[-1].split()[1])
    (killed,) = events.read_processes(tmp_path)
    assert "no end record" in killed.lost
    table = events.load_events(tmp_path).filter(events.pl.col("name") == "step")
    assert len(table) > 100
    assert last - table["ts"].max() / 1e6 < 1.0  # type: ignore[operator]


def test_stop_in_a_signal_handler(tmp_path: Path) -> None:
    body = """
import signal
def leave(*_):
    trace.stop_tracing()
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
trace.start_tracing(run, here, "train")
print("ready", flush=True)
while True:
    with trace.span("train", "step"):
        time.sleep(0.001)
"""
    process = traced.start(tmp_path, body)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.terminate()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 7, errors
    (ended,) = events.read_processes(tmp_path)
    assert ended.ended and not ended.lost and ended.events > 50


def test_a_span_costs_microseconds(tmp_path: Path) -> None:
    body = """
def cost(n=20000):
    best = 1.0
    for _ in range(5):
        begun = time.perf_counter()
        for i in range(n):
            with trace.span("train", "step", batch=i):
                pass
        best = min(best, (time.perf_counter() - begun) / n)
    return best * 1e6
off = cost()
trace.start_tracing(run, here, "train")
print(off, cost())
trace.stop_tracing()
"""
    out, errors = traced.start(tmp_path, body).communicate(timeout=120)
    off, on = map(float, out.split())
    assert off < 5 and on < 60, errors  # generous: an idle machine needs 0.5 and 6


def test_other_settings_of_dftracer_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single events in us, numbers beyond 32 bits among them."""
    for name, value in {
        "DFTRACER_TIME_METRIC": "NS", "DFTRACER_ENABLE_AGGREGATION": "1", "DFTRACER_DISABLE_POSIX": "1",
        "DFTRACER_DISABLE_IO": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    body = """
trace.start_tracing(run, here, "train")
fd = os.open(__file__, os.O_RDONLY); os.pread(fd, 10, 0); os.close(fd)
with trace.span("data", "read", file="/x", bytes=5 << 30):
    pass
trace.counter("large", 3e10)
trace.stop_tracing()
"""
    run = traced.run(tmp_path / "run", body)
    table = events.load_events(run)
    assert len(table.filter(table["name"] == "pread64")) == 1
    assert table.filter(table["cat"] == "data")["bytes"].to_list() == [5 << 30]
    assert table.filter(table["name"] == "large")["value"].to_list() == [3e10]
    assert abs(table["ts"].max() / 1e6 - time.time()) < 600  # type: ignore[operator]
