"""Other programs at a running job's rendezvous port, and ranks that end while the group forms."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist
from support.forked_ranks import rank_server
from support.ranks import LiveRanks, free_port, words

from common.owned import remove_dead_segments
from dlrm.runtime.failure_notice import FailureNotice
from dlrm.runtime.peers import LocalPeers, RankProcess
from dlrm.runtime.signed_store import TOKEN, SignedStore, read_job_key

HOST = socket.gethostname()


@contextmanager
def intrude(port: str, how: str) -> Iterator[None]:
    """What `support.intruder` does, while the block runs."""
    with tempfile.TemporaryFile("a+") as out, tempfile.TemporaryFile("a+") as err:
        intruder = rank_server().start("support.intruder", [port, how], os.environ, out, err)
        try:
            yield
        finally:
            intruder.kill()
            intruder.wait()


@pytest.mark.mpi
@pytest.mark.parametrize("how", ["set", "delete", "all"])
def test_another_program_at_the_port_makes_no_job_succeed(toy: Path, tmp_path: Path, how: str) -> None:
    port = str(free_port())
    more = words(toy, "--timeout", 8, "--max_steps", 150, "--epochs", 60)
    names: dict[str, Any] = {"MASTER_PORT": port, TOKEN: "a secret"}
    with LiveRanks(tmp_path, 2, *more, **names) as ranks:
        ranks.until_step(5)
        with intrude(port, how):
            codes = ranks.wait(120)
    assert "Traceback" not in ranks.stderr, ranks.stderr
    if codes == [0, 0]:
        assert json.loads((tmp_path / "results.json").read_text())["steps"] == 150
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
        with intrude(port, "finished"):
            while not all(has_ended(rank.pid) for rank in ranks.processes):
                time.sleep(0.01)  # a rank whose parent has not waited for it does not tell its exit code
        assert ranks.wait(10) == [0, 0], ranks.stderr


def test_values_of_others_are_not_seen() -> None:
    shared = torch_dist.HashStore()
    mine, other = (
        SignedStore(shared, read_job_key({TOKEN: "a"}), 1),
        SignedStore(shared, read_job_key({TOKEN: "b"}), 1),
    )
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


@pytest.mark.mpi
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_while_the_group_forms_is_named(tmp_path: Path, lost: int) -> None:
    with LiveRanks(tmp_path, 2, lost, module="support.forming_ranks", output=False) as ranks:
        codes = ranks.wait(120)  # of 300
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1, ranks.stderr
    line = f"dlrm: rank {1 - lost} on {HOST}: ends because rank {lost} on {HOST} was killed by signal 9\n"
    assert ranks.printed(1)[1 - lost] == line


@pytest.mark.mpi
def test_a_rank_without_peers_ends_with_one_line(tmp_path: Path, toy: Path) -> None:
    with LiveRanks(tmp_path, 2, *words(toy, "--timeout", 3)) as ranks:
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
