"""DFTracer's own service: one of a node, its numbers against the kernel's, its end with the rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.trace.nodes import NodeFile, find_node_files, read_node_file
from dlrm.models.script_options import make_answer
from dlrm.runtime.errors import UserError
from dlrm.runtime.node_counters import find_service
from tests.support import traced

needs_service = pytest.mark.skipif(find_service() is None, reason="DFTracer's wheel has no dftracer_service")
MB = 1_000_000
WORK = """
import socket
os.environ["NODE_COUNTERS"] = "yes"
trace.start_tracing(run, here, "train")
deadline = time.monotonic() + 60
while not any("service" in "".join(names) for _, _, names in os.walk(f"{run}/node_counters")):
    assert time.monotonic() < deadline
    time.sleep(0.05)
time.sleep(2.5)  # the service's first record is no interval
"""
SEND = """
if rank == 0:
    listener = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    for _ in range(40):
        one.sendall(bytes(500_000))
        left = 500_000
        while left:
            left -= len(other.recv(left))
    time.sleep(2.5)
trace.stop_tracing()
"""
WAIT = """
open(f"{run}/waiting", "w").close()
time.sleep(600)
"""


def read_sent() -> int:
    """Bytes that the loopback interface has sent, by the kernel."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def read_busy() -> tuple[int, int]:
    """Ticks of all processors that were busy, and all ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def list_processes(run: Path) -> list[int]:
    """The service and the process that keeps it, of this run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(run / "node_counters").encode() in word for word in words):
            found.append(int(entry.parent.name))
    return found


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_nodes(run: Path) -> list[NodeFile]:
    return [read_node_file(path) for path in find_node_files(run)]


@needs_service
def test_numbers_are_the_kernels(tmp_path: Path) -> None:
    """Two ranks of one node: one service, whose sums are what the kernel counted meanwhile."""
    run = tmp_path / "run"
    sent, (busy, ticks) = read_sent(), read_busy()
    traced.run(run, WORK + SEND, world=2)
    sent = read_sent() - sent
    busy, ticks = (after - before for after, before in zip(read_busy(), (busy, ticks), strict=True))
    (node,) = read_nodes(run)
    assert node.host == "node7" and node.losses == [] and not list_processes(run)
    series = {each.name: each for each in node.list_series()}
    moved = series["net lo sent"]
    in_all = float((moved.values[:-1] * (moved.ts[1:] - moved.ts[:-1]) / 1e6).sum() * MB)
    assert 20 * MB * 0.999 <= in_all <= sent * 1.001
    share = series["CPU busy"]  # of a part of the time that the kernel's count is of
    if len(share.ts):
        covered = (moved.ts[-1] - share.ts[0]) / 1e6 * ticks_per_second() * (os.cpu_count() or 1)
        assert 0 < share.values.mean() / 100 * covered <= busy + 0.04 * ticks
    else:  # the service's six digits of the time since boot say nothing of a few seconds
        assert time.clock_gettime(time.CLOCK_BOOTTIME) > 6 * 3600
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024 / 1e9
    assert 0.02 * total < series["memory used"].values.min() < total
    apart = (moved.ts[1:] - moved.ts[:-1]) / 1e6
    assert 0.5 < sorted(apart)[len(apart) // 2] < 2
    assert abs(node.first / 1e6 - time.time()) < 600
    (folder,) = (run / "node_counters").iterdir()
    assert {path.name.partition("_")[0] for path in folder.iterdir()} == {"node.json", "service"}
    note = json.loads((folder / "node.json").read_text())
    assert (note["host"], note["cores"]) == ("node7", os.cpu_count())
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    assert abs(note["boot_time"] - int(booted.split()[1])) < 2


def ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")


@needs_service
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ends_with_the_rank(tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    process = traced.start(run, WORK + WAIT)
    wait_for(lambda: (run / "waiting").exists() or process.poll() is not None)
    assert len(list_processes(run)) == 2
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not list_processes(run), 20)
    (node,) = read_nodes(run)
    assert node.records > 10 and node.losses == []


@needs_service
def test_killed_service_is_no_end_of_the_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = traced.start(run, WORK + WAIT.replace("600", "4") + "trace.stop_tracing()\n")
    wait_for(lambda: (run / "waiting").exists() or process.poll() is not None)
    (pid,) = (int(path.read_text()) for path in run.glob("node_counters/*/*.pid"))
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not list_processes(run)
    early, empty = read_nodes(run)[0].losses
    assert early.endswith("ends early: the service ended before the run")
    assert "has no records: its service writes most of them when it ends, and was killed" in empty


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", "DFTracer's wheel for this machine has no dftracer_service"),
        ("#!/bin/sh\necho no memory; exit 1\n", "dftracer_service did not start: no memory"),
    ],
)
def test_one_line_where_there_is_no_service(tmp_path: Path, program: str, reason: str) -> None:
    """A wheel without it, and one that fails: a line, and the training goes on."""
    folder = tmp_path / "site" / "dftracer"
    (folder / "bin").mkdir(parents=True)
    (folder / "__init__.py").touch()
    if program:
        (folder / "bin" / "dftracer_service").write_text(program)
        (folder / "bin" / "dftracer_service").chmod(0o755)
    code = (
        "import sys, pathlib; from dlrm.runtime.node_counters import NodeCounters; "
        "from dlrm.runtime.ranks import Ranks; "
        "node = NodeCounters(pathlib.Path(sys.argv[1]), Ranks(host='n1')); node.keeper.wait(); node.stop()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{traced.ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], env=environment, text=True, timeout=120,
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"dlrm: n1 has no node counters: {reason}\n"


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"NODE_COUNTERS": "often"}, "NODE_COUNTERS=often: wanted yes or no"),
        ({"NODE_COUNTERS": "yes", "TRACE": "no"}, "beside a trace: leave TRACE=no out"),
    ],
)
def test_refused(variables: dict[str, str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        make_answer("/", "/run", [], variables)
