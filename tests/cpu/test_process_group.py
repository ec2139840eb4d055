"""The shared-memory backend: the same results as gloo, and a bounded wait for peers that end or stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import free_port

from dlrm.cpu import process_group

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]


def start(task: str, ranks: int) -> list[subprocess.Popen[str]]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests/support/exchange_ranks.py"), task]
    return [
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip


def left_behind() -> set[str]:
    return {name for name in os.listdir(process_group.FOLDER) if name.startswith("dlrm-")}


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_as_gloo(ranks: int) -> None:
    before = left_behind()
    for rank, process in enumerate(start("compare", ranks)):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-3000:]
        assert f"rank {rank} agrees with gloo" in out
    assert left_behind() <= before


@pytest.mark.parametrize(
    "task, message", [("killed", "rank 1 has ended"), ("stopped", "rank 1 has sent nothing to rank 0 in 6 s")]
)
def test_a_lost_peer_is_named_in_time(task: str, message: str) -> None:
    waiting, lost = start(task, 2)
    try:
        out, err = waiting.communicate(timeout=180)
    finally:
        lost.send_signal(signal.SIGKILL)
        lost.communicate()
    assert waiting.returncode == 3, err[-3000:]
    seconds, messages = out.split(" s: ")
    assert message in messages
    assert float(seconds) < 12


def test_one_rank_needs_no_exchange() -> None:
    (process,) = start("killed", 1)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
