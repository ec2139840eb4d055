"""The kernel's counters in the trace against /proc/PID/io as another process reads it; file systems."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from analysis.trace.events import load_events, read_processes
from dlrm.runtime.device_io import find_file_system, find_file_systems, parse_layout, read_layout
from tests.support import traced
from tests.support.disk import mount_small_disk

MB = 1 << 20
READING = (
    traced.COLD_FILE
    + """
trace.start_tracing(run, here, "train")
for _ in range(2):  # cold, then warm
    handle = os.open(path, os.O_RDONLY)
    while os.read(handle, 1 << 20):
        pass
    os.close(handle)
    trace.sample_io()
open(f"{run}/waiting", "w").close()
while not os.path.exists(f"{run}/go"):
    time.sleep(0.01)
trace.stop_tracing()
"""
)
COMPUTING = """
os.sched_setaffinity(0, [CORE])
trace.start_tracing(run, here, "train")
time.sleep(1)
trace.sample_io()
end = time.monotonic() + 1
while time.monotonic() < end:
    pass
trace.sample_io()
trace.stop_tracing()
"""
PLAIN = """{}
lmm_stripe_count:  4
lmm_stripe_size:   1048576
lmm_pattern:       raid0
lmm_layout_gen:    0
lmm_stripe_offset: 66
lmm_pool:          original
\tobdidx\t\t objid\t\t objid\t\t group
\t    66\t      39442343\t    0x259d7a7\t             0
"""
PROGRESSIVE = """{}
  lcm_layout_gen:    3
  lcm_mirror_count:  1
  lcm_entry_count:   2
    lcme_id:             1
    lcme_flags:          init
    lcme_extent.e_start: 0
    lcme_extent.e_end:   4194304
      lmm_stripe_count:  1
      lmm_stripe_size:   4194304
      lmm_objects:
      - 0: {{ l_ost_idx: 3, l_fid: [0x100030000:0x2:0x0] }}

    lcme_id:             2
    lcme_extent.e_start: 4194304
    lcme_extent.e_end:   EOF
      lmm_stripe_count:  -1
      lmm_stripe_size:   1048576
"""
DEFAULT = "{}\nstripe_count:  1 stripe_size:   1048576 pattern:       raid0 stripe_offset: -1\n"


def read_counters(run: Path) -> dict[str, list[int]]:
    events = load_events(run).filter(pl.col("cat") == "counter")
    return {
        str(name): found["value"].to_list() for (name,), found in events.group_by("name", maintain_order=True)
    }


def read_io(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(":") for line in lines)}


def run_reading(folder: Path) -> tuple[dict[str, list[int]], dict[str, int]]:
    """(the counters in the trace, those that this process saw after the second reading)"""
    process = traced.start(folder, READING)
    deadline = time.monotonic() + 60
    while not (folder / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    seen = read_io(process.pid)
    (folder / "go").touch()
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return read_counters(folder), seen


def test_a_cold_reading_comes_from_the_device_and_a_warm_one_from_memory(tmp_path):
    if find_file_system(tmp_path).get("type") == "tmpfs":
        pytest.skip("needs a folder on a disk")
    counters, seen = run_reading(tmp_path / "run")
    start, cold, warm = counters["proc/read_bytes"][:3]
    assert 8 * MB <= cold - start < 9 * MB
    assert warm - cold < MB / 4
    assert warm == seen["read_bytes"]
    got = counters["proc/rchar"]
    assert 8 * MB <= got[1] - got[0] < 8.1 * MB and 8 * MB <= got[2] - got[1] < 8.1 * MB
    assert abs(seen["rchar"] - got[2]) < 64 << 10
    assert counters["proc/minor_faults"][0] > 0 and len(counters["proc/major_faults"]) >= 4


def test_a_thread_that_another_program_keeps_off_its_core_waits_for_it(tmp_path):
    """Both are bound to one core and compute: the kernel gives each half of the time."""
    core = min(os.sched_getaffinity(0))
    loop = "import os, time\nos.sched_setaffinity(0, [int(os.environ['CORE'])])\n"
    environment = {**os.environ, "CORE": str(core)}
    other = subprocess.Popen([sys.executable, "-c", loop + "while True: pass"], env=environment)
    try:
        process = traced.start(tmp_path, COMPUTING.replace("CORE", str(core)))
        _, errors = process.communicate(timeout=120)
    finally:
        other.kill()
        other.wait()
    assert process.returncode == 0, errors
    idle, begun, computed, *_ = read_counters(tmp_path)["proc/core_wait_us"]
    assert computed - begun > 300_000  # of a second; half of it, were they alone
    assert begun - idle < (computed - begun) / 2  # a thread that sleeps needs no core


def test_on_tmpfs_nothing_comes_from_a_device(tmp_path):
    with mount_small_disk(tmp_path / "in memory", 64) as disk:
        counters, _ = run_reading(disk / "run")
        read, written = counters["proc/read_bytes"], counters["proc/write_bytes"]
        assert read[2] - read[0] < MB / 4 and written[-1] - written[0] < MB / 4
        (process,) = read_processes(disk / "run")
        (noted,) = [json.loads(text) for text in process.file_systems]
        assert noted["folder"] == "run folder" and noted["path"] == str(disk / "run")
        assert noted["type"] == "tmpfs" and noted["mount"] == str(disk) and "size=65536k" in noted["options"]


def test_counters_that_may_not_be_read_are_said_once(tmp_path):
    if os.getuid():
        pytest.skip("needs the right to become another user")
    # the kernel hides /proc/PID/io of a process that may not be dumped, also from itself
    body = """
import ctypes
os.chmod(run, 0o777)
os.environ.update(DFTRACER_ENABLE="1", DFTRACER_INIT="FUNCTION")
import dftracer.dftracer  # the other user may not be able to read it
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
trace.start_tracing(run, here, "train")
trace.sample_io()
trace.stop_tracing()
"""
    for folder in (tmp_path, *tmp_path.parents):  # the other user must get there
        if folder.stat().st_mode & 0o1 == 0 and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o1)
    run = traced.run(tmp_path / "run", body)
    (process,) = read_processes(run)
    assert process.io_error == "/proc/self/io: Permission denied"
    assert "proc/read_bytes" not in read_counters(run)


def test_a_child_adds_no_counters_of_its_own(tmp_path):
    body = """
trace.start_tracing(run, here, "train")
child = os.fork()
trace.sample_io()
if not child:
    trace.stop_tracing()
    os._exit(0)
os.waitpid(child, 0)
trace.stop_tracing()
"""
    run = traced.run(tmp_path / "run", body)
    events = load_events(run).filter(pl.col("name") == "proc/rchar")
    assert len(events) == 3 and events["pid"].n_unique() == 1


def put_lfs(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command `lfs` on the PATH that prints this text for the path it is asked about, and its arguments."""
    script = folder / "bin" / "lfs"
    script.parent.mkdir()
    answer = text.replace("{{", "{").replace("}}", "}").replace("{}", "$last")
    script.write_text(
        f'#!/bin/sh\necho "$@" > "{folder}/asked"\nfor last; do :; done\ncat <<END\n{answer}END\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return folder / "asked"


@pytest.mark.parametrize(
    "text, layout",
    [
        (PLAIN, [{"stripe_count": 4, "stripe_size": MB, "pool": "original"}]),
        (
            PROGRESSIVE,
            [
                {"stripe_count": 1, "end": "4194304", "stripe_size": 4 * MB},
                {"stripe_count": -1, "end": "EOF", "stripe_size": MB},
            ],
        ),
    ],
)
def test_layout_of_a_folder_is_that_of_its_largest_file(text, layout, tmp_path, monkeypatch):
    asked = put_lfs(tmp_path, text, monkeypatch)
    data = tmp_path / "my data"
    data.mkdir()
    (data / "small").write_bytes(b"1")
    (data / "large").write_bytes(bytes(100))
    assert read_layout(str(data)) == layout
    assert asked.read_text() == f"getstripe {data}/large\n"


def test_layout_of_an_empty_folder_is_its_default(tmp_path, monkeypatch):
    asked = put_lfs(tmp_path, DEFAULT, monkeypatch)
    (tmp_path / "run").mkdir()
    assert read_layout(str(tmp_path / "run")) == [{"stripe_count": 1, "stripe_size": MB}]
    assert asked.read_text() == f"getstripe -d {tmp_path}/run\n"


def test_lfs_that_hangs_or_fails_costs_little_and_says_nothing(tmp_path, monkeypatch):
    put_lfs(tmp_path, PLAIN, monkeypatch)
    script = tmp_path / "bin" / "lfs"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    begun = time.monotonic()
    assert read_layout(str(tmp_path), seconds=0.2) == []
    assert time.monotonic() - begun < 5
    script.write_text(f"#!/bin/sh\necho '{PLAIN}'\nexit 1\n")
    assert read_layout(str(tmp_path)) == []
    assert parse_layout("stripe_count: many stripe_size: 5\nnonsense") == []


def test_file_systems_by_role(tmp_path):
    found = find_file_systems(
        {"a": "/proc/self", "b": tmp_path / "not" / "made yet", "c": "/proc/self"}, True
    )
    assert [each["folder"] for each in found] == ["a", "b"]
    assert found[0]["type"] == "proc" and found[0]["mount"] == "/proc"
    assert found[1]["type"] == find_file_system(tmp_path)["type"] and found[1]["source"]
