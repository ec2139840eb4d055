"""Real ranks that a test may signal, kill or stop while they train."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHANGING = ("time", "seconds", "samples_per_second", "cpu_seconds")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock tells."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Alive:
    """`count` ranks of python -m dlrm.train, each a child of the test; or under a launcher."""

    def __init__(self, folder: Path, count: int, *words: object, launcher: str = "", **more: str) -> None:
        self.folder, self.count = folder, count
        folder.mkdir(parents=True, exist_ok=True)
        common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | more
        command = ["-m", "dlrm.train", *map(str, words), "--output_dir", str(folder)]
        self.error = tempfile.TemporaryFile("a+")  # noqa: SIM115  # not in `folder`: its disk may be full
        self.processes = []
        starts = {
            "": [([sys.executable, *command], {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)],
            "launcher.sh": [([str(ROOT / "launcher.sh"), sys.executable, *command], {"NPROC": str(count)})],
            "mpiexec": [(["mpiexec", "-n", str(count), sys.executable, *command], {})],
            "torchrun": [
                ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
                  "--master_port", common["MASTER_PORT"], *command], {})
            ],
        }[launcher]  # fmt: skip
        names = {} if launcher else {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for words_, mine in starts:
            self.processes.append(
                subprocess.Popen(
                    words_, cwd=ROOT, env=os.environ | common | names | mine | {"PATH": path},
                    stdout=subprocess.DEVNULL, stderr=self.error, start_new_session=True,
                )
            )  # fmt: skip

    def until(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        given_up = time.monotonic() + seconds
        while time.monotonic() < given_up:
            if found := true():
                return found
            assert any(process.poll() is None for process in self.processes), self.said
            time.sleep(0.01)
        raise AssertionError(f"waited {seconds} s in vain; stderr: {self.said}")

    def until_step(self, step: int) -> None:
        self.until(lambda: any(line["step"] >= step for line in metrics(self.folder)))

    def pids(self) -> list[int]:
        """Of the ranks, in rank order, whoever started them."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"dlrm.train" not in words or str(self.folder).encode() not in words:
                    continue
                names = dict(item.split(b"=", 1) for item in environment if b"=" in item)
                rank = names.get(b"RANK") or names.get(b"PMI_RANK")
                if rank is not None and not {b"mpiexec", b"torch.distributed.run"} & set(words):
                    found[int(rank)] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def signal(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.pids()[rank], number)

    def wait(self, seconds: float = 60) -> list[int]:
        given_up = time.monotonic() + seconds
        return [process.wait(max(0.1, given_up - time.monotonic())) for process in self.processes]

    @property
    def said(self) -> str:
        if not self.error.closed:
            self.error.seek(0)
            self._said = self.error.read()
        return self._said

    def __enter__(self) -> "Alive":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives the test."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()
        assert self.said is not None
        self.error.close()
