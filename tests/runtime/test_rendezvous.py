"""Other programs at a running job's rendezvous port, and ranks that end while the group forms."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist
from support.ranks import ROOT, LiveRanks, free_port, words

from common.owned import remove_dead_segments
from dlrm.runtime.failure_notice import FailureNotice
from dlrm.runtime.peers import LocalPeers, RankProcess
from dlrm.runtime.signed_store import TOKEN, SignedStore, job_key

HOST = socket.gethostname()
INTRUDER = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist

port, how = int(sys.argv[1]), sys.argv[2]
store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5), wait_for_workers=False)
note = json.dumps({"reason": "nothing", "lost": [0, 1], "code": 0, "reporter_rank": None})
garbage = [note, "", "0", "{" * 5000, "\\udcff".encode("utf-8", "surrogateescape"), "x" * 1000000]
garbage.append("0" * 64 + note)
names = ["dlrm/failure", "dlrm/processes", "dlrm/stop/0", "dlrm/stop/0/last", "dlrm/checkpoint/0/begin"]
for rank in range(2):
    names += [f"dlrm/{each}/{rank}" for each in ("process", "heartbeat", "finished", "left", "stop/0")]
    names += [f"group/{rank}", f"group/host{rank}", f"group/file{rank}", f"group/opened{rank}"]
print("there", flush=True)
if how == "finished":
    while True:
        for rank in range(2):
            store.delete_key(f"dlrm/finished/{rank}")
            store.delete_key(f"dlrm/left/{rank}")
for turn in range(60):
    if how == "all":
        names = sorted({*names, *store.list_keys()})
    for number, name in enumerate(names):
        if how == "delete":
            store.delete_key(name)
        else:
            store.set(name, garbage[(turn + number) % len(garbage)])
    time.sleep(0.05)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("how", ["set", "delete", "all"])
def test_another_program_at_the_port_makes_no_job_succeed(toy: Path, tmp_path: Path, how: str) -> None:
    port = str(free_port())
    more = words(toy, "--timeout", 8, "--max_steps", 400, "--epochs", 60)
    names: dict[str, Any] = {"MASTER_PORT": port, TOKEN: "a secret"}
    with LiveRanks(tmp_path, 2, *more, **names) as ranks:
        ranks.until_step(5)
        with subprocess.Popen(
            [sys.executable, "-c", INTRUDER, port, how], stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as intruder:
            codes = ranks.wait(120)
            intruder.kill()
    assert "Traceback" not in ranks.stderr, ranks.stderr
    if codes == [0, 0]:
        assert json.loads((tmp_path / "results.json").read_text())["steps"] == 400
    else:
        assert 0 not in codes and 0 < len(ranks.stderr.splitlines()) <= 2, (codes, ranks.stderr)


def has_ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.mpi
def test_a_finished_job_succeeds_whatever_is_deleted(toy: Path, tmp_path: Path) -> None:
    port = str(free_port())
    names: dict[str, Any] = {"MASTER_PORT": port, TOKEN: "a secret"}
    with LiveRanks(tmp_path, 2, *words(toy, "--timeout", 8, "--max_steps", 60), **names) as ranks:
        ranks.until_step(1)
        with subprocess.Popen(
            [sys.executable, "-c", INTRUDER, port, "finished"],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        ) as intruder:  # fmt: skip
            while not all(has_ended(rank.pid) for rank in ranks.processes):
                time.sleep(0.01)  # a rank whose parent has not waited for it does not tell its exit code
            intruder.kill()
        assert ranks.wait(10) == [0, 0], ranks.stderr


def test_values_of_others_are_not_seen() -> None:
    shared = torch_dist.HashStore()
    mine, other = SignedStore(shared, job_key({TOKEN: "a"}), 1), SignedStore(shared, job_key({TOKEN: "b"}), 1)
    other.set("key", "theirs")
    assert mine.find_value("key") is None and not mine.check(["key"])
    mine.set_first("key", "first")
    mine.set_first("key", "second")
    assert mine.get("key") == b"first"
    shared.set("moved", shared.get("key"))  # type: ignore[arg-type]  # a value counts under its own name only
    assert mine.find_value("moved") is None
    for garbage in ("", "\x7f\x00" * 99, "0" * 64):
        shared.set("note", garbage)
        assert mine.find_value("note") is None
        mine.set_first("note", "good")
        assert mine.get("note") == b"good"


@pytest.mark.parametrize(("code", "kept"), [(0, 1), (-5, 1), (75, 75), (10**30, 255)])
def test_a_note_never_says_success(code: int, kept: int) -> None:
    assert FailureNotice.from_json(json.dumps(asdict(FailureNotice("why", code=code))).encode()).code == kept


FORMING = """
import os, sys
from dlrm.runtime import entry, gloo, session
if os.environ["RANK"] == sys.argv[1]:
    def create(*_):
        print("forming", flush=True)
        os.kill(os.getpid(), 9)
    gloo.create_gloo = create
def main(here):
    with session.open_session(here, 300):
        pass
entry.run_entry(main)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_while_the_group_forms_is_named(lost: int) -> None:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    common["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as run_entry, which is too late here
    begun = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FORMING, str(lost)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    output = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert ranks[lost].returncode == -signal.SIGKILL and ranks[1 - lost].returncode == 1, output
    line = f"dlrm: rank {1 - lost} on {HOST}: ends because rank {lost} on {HOST} was killed by signal 9\n"
    assert output[1 - lost] == line
    assert time.monotonic() - begun < 120  # of 300


@pytest.mark.mpi
def test_a_rank_without_peers_ends_with_one_line(tmp_path: Path, toy: Path) -> None:
    with LiveRanks(tmp_path, 2, *words(toy, "--timeout", 3), launcher="python") as ranks:
        ranks.processes[0].kill()  # before it listens
        assert ranks.wait(90)[1] == 1
    output = ranks.stderr.splitlines()
    assert len(output) == 1 and f"rank 1 on {HOST}: " in output[0] and "rank 0" in output[0], output


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize(
    ("how", "cause"), [("kill -9 $$", "killed by signal 9"), ("exit 7", "ended with code 7")]
)
def test_the_end_of_a_process_is_noticed(how: str, cause: str, pidfd: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = subprocess.Popen(["bash", "-c", f"read; {how}"], stdin=subprocess.PIPE)
    assert child.stdin
    here = RankProcess.of_this_process(HOST)
    start = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    peers = LocalPeers(pidfds=pidfd)  # without: as on an old kernel
    peers.add(3, RankProcess(HOST, child.pid, start, here.pid_namespace))
    peers.add(4, RankProcess(HOST, child.pid, "0", here.pid_namespace))  # its pid is another's now
    assert not pidfd or peers.wait(0) == {4: ""}
    assert pidfd or 4 in peers.wait(1)
    assert peers.wait(0.01) == {}
    child.stdin.write(b"\n")
    child.stdin.close()
    ended: dict[int, str] = {}
    while not ended:
        ended = peers.wait(60)
    assert ended == {3: cause}
    child.wait()
    peers.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_shared_memory_of_ended_runs_is_removed(tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-c", "echo $$"], capture_output=True, text=True, check=True)
    dead = int(done.stdout)
    names = {
        f"dlrm-{dead}-1": 100, f"dlrm-{dead}-2": 99, f"dlrm-{os.getpid()}-3": 100, "dlrm-mine": 100,
    }  # fmt: skip
    for name, size in names.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / f"dlrm-{dead}-4").symlink_to(tmp_path / "dlrm-mine")
    remove_dead_segments(str(tmp_path), (100,))
    assert {path.name for path in tmp_path.iterdir()} == {*names, f"dlrm-{dead}-4"} - {f"dlrm-{dead}-1"}
