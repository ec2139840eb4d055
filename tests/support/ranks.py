"""Real ranks of the program: run to their end (on_ranks), or signalled and killed meanwhile (LiveRanks)."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from support.forked_ranks import MODULES, ForkedRank, rank_server

ROOT = Path(__file__).parents[2]
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")
CHANGING = ("time", "seconds", "samples_per_second", "step_time", "cpu_seconds")
TOY = ["--preset", "toy", "--report_every", 5, "--batch_size", 256, "--epochs", 2]


def words(toy: Path, *more: object) -> list[object]:
    """A short training on the toy dataset: 60 steps of two ranks."""
    return [*TOY, "--in_memory_binary_criteo_path", toy, *more]


def words_of_each_step(folder: Path, *more: object) -> list[object]:
    """Options of a training on the toy dataset that reports every step."""
    return ["--preset", "toy", "--report_every", 1, "--in_memory_binary_criteo_path", folder, *more]


@dataclass
class Finished:
    """What some ranks left behind when they ended."""

    folder: Path
    codes: list[int]
    out: list[str]
    err: list[str]
    seconds: float

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        """One loss per report of training."""
        return [line["loss"] for line in self.metrics if "loss" in line]


def python(*words: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env=os.environ | environment,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, which may be growing, without what a clock tells."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CHANGING} for line in lines]


def free_port() -> int:
    """A port that nobody listens on, below those that the system may give to a connection meanwhile."""
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = 10000 + secrets.randbelow(10000)  # below launcher.sh's
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def same(first: Path, second: Path) -> None:
    """Two run folders hold the same training."""
    assert metrics(first) == metrics(second)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (first, second))
    for key in ("val_scores", "test_auroc", "steps", "samples", "val_samples", "test_samples"):
        assert one[key] == two[key], key


class LiveRanks:
    """`count` ranks of a module; leaving ends all of them.

    launcher  "": forks of a process that has imported everything, where that makes no difference to the rank
              "python": each a process from the start; mpiexec, torchrun, launcher.sh: what they start
    more      variables
    """

    def __init__(
        self, folder: Path, count: int, *words: object, launcher: str = "", module: str = "dlrm.train",
        output: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        self.folder, self.count, self.module = folder, count, module
        words = tuple(map(str, words))
        forked = not launcher and module in MODULES
        self.begun = time.monotonic()
        common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | more
        command = ["-m", module, *words, *(["--output_dir", str(folder)] if output else [])]
        self.port = common["MASTER_PORT"]
        self.processes: list[subprocess.Popen[bytes] | ForkedRank] = []
        self.logs: list[tuple[IO[str], IO[str]]] = []  # not in `folder`: its disk may be full
        starts = {
            "": [([sys.executable, *command], {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)],
            "launcher.sh": [([str(ROOT / "launcher.sh"), sys.executable, *command], {"NPROC": str(count)})],
            "mpiexec": [(["mpiexec", "-n", str(count), sys.executable, *command], {})],
            "torchrun": [
                ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
                  "--master_port", common["MASTER_PORT"], *command], {})
            ],
        }[launcher.removeprefix("python")]  # fmt: skip
        ours = launcher in ("", "python")
        names = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if ours else {}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for words_, mine in starts:
            log = tempfile.TemporaryFile("a+"), tempfile.TemporaryFile("a+")  # noqa: SIM115
            self.logs.append(log)
            environment = os.environ | common | names | mine | {"PATH": path}
            if forked:
                server = rank_server(more.get("LD_PRELOAD", ""))
                started = server.start(module, command[2:], environment, *log)
            else:
                started = subprocess.Popen(
                    words_, cwd=ROOT, env=environment, stdout=log[0], stderr=log[1], start_new_session=True
                )
            self.processes.append(started)

    def until(self, true: Callable[[], Any], seconds: float = 180) -> Any:
        given_up = time.monotonic() + seconds
        while time.monotonic() < given_up:
            if found := true():
                return found
            assert any(process.poll() is None for process in self.processes), self.stderr
            time.sleep(0.01)
        raise AssertionError(f"waited {seconds} s in vain; stderr: {self.stderr}")

    def until_step(self, step: int) -> None:
        self.until(lambda: any(line["step"] >= step for line in metrics(self.folder)))

    def pids(self) -> list[int]:
        """Of the ranks that live, in rank order, whoever started them."""
        if any(isinstance(process, ForkedRank) for process in self.processes):
            return [process.pid for process in self.processes if process.poll() is None]
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if self.module.encode() not in words or str(self.folder).encode() not in words:
                    continue
                names = dict(item.split(b"=", 1) for item in environment if b"=" in item)
                if names.get(b"MASTER_PORT", b"").decode() != self.port:
                    continue  # another job in the same folder
                rank = names.get(b"RANK") or names.get(b"PMI_RANK")
                if rank is not None and not {b"mpiexec", b"torch.distributed.run"} & set(words):
                    found[int(rank)] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def until_gone(self, seconds: float = 60) -> None:
        """Wait for the end of ranks whose launcher has ended: a killed process needs a core to go."""
        given_up = time.monotonic() + seconds
        while left := self.pids():
            assert time.monotonic() < given_up, f"still there: {left}"
            time.sleep(0.05)

    def signal(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.pids()[rank], number)

    def wait(self, seconds: float = 180) -> list[int]:
        given_up = time.monotonic() + seconds
        return [process.wait(max(0.1, given_up - time.monotonic())) for process in self.processes]

    def printed(self, which: int) -> list[str]:
        """What each process wrote: 0 is stdout, 1 is stderr."""
        found = []
        for log in self.logs:
            log[which].seek(0)
            found.append(log[which].read())
        return found

    @property
    def stderr(self) -> str:
        """All of stderr."""
        return "".join(self.printed(1))

    def __enter__(self) -> "LiveRanks":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives the test."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()


def on_ranks(
    folder: Path, count: int, module: str, *words: object, timeout: float = 120, output: bool = True,
    **variables: str,
) -> Finished:  # fmt: skip
    """Run to the end."""
    with LiveRanks(folder, count, *words, module=module, output=output, **variables) as ranks:
        codes = ranks.wait(timeout)
        seconds = time.monotonic() - ranks.begun
        return Finished(folder, codes, ranks.printed(0), ranks.printed(1), seconds)


Train = Callable[..., Finished]
