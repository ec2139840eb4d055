"""What the tests of training share: a small dataset made by the real preprocessing, and real ranks."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]


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


def on_ranks(
    folder: Path, count: int, module: str, *words: object, timeout: float = 120, output: bool = True
) -> Finished:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.monotonic()
    logs = []
    processes = []
    for rank in range(count):
        names = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }  # fmt: skip
        log = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", module, *map(str, words)]
        command += ["--output_dir", str(folder)] if output else []
        logs.append(log)
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | names, stdout=log[0], stderr=log[1])
        )
    codes = []
    try:
        for process in processes:
            codes.append(process.wait(max(0.1, begun + timeout - time.monotonic())))
    finally:
        for process in processes:
            process.kill()
    out, err = ([whole(log[which]) for log in logs] for which in (0, 1))
    return Finished(folder, codes, out, err, time.monotonic() - begun)


def whole(log: IO[str]) -> str:
    with log:
        log.seek(0)
        return log.read()


Train = Callable[..., Finished]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`train(ranks, *words)`: python -m dlrm.train on so many real ranks, with a run folder."""
    runs = iter(range(100))
    return lambda count, *words, **more: on_ranks(
        tmp_path / f"run{next(runs)}", count, "dlrm.train", *words, **more
    )


@pytest.fixture
def run_ranks(tmp_path: Path) -> Train:
    """`run_ranks(ranks, module, *words)`: any entry; `output=False` leaves out --output_dir."""
    return lambda count, module, *words, **more: on_ranks(tmp_path / "run", count, module, *words, **more)


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`train_here(*words)`: the same on one rank inside this process, without the start-up."""
    import torch

    from dlrm.config.parser import parse_options
    from dlrm.models.dlrm.options import Config
    from dlrm.models.dlrm.presets import PRESETS
    from dlrm.models.dlrm.spec import SPEC
    from dlrm.runtime.ranks import Ranks
    from dlrm.trainer import trainer

    runs = iter(range(100))

    def run(*words: object) -> Finished:
        folder, begun = tmp_path / f"here{next(runs)}", time.monotonic()
        argv = [*map(str, words), "--output_dir", str(folder)]
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        try:
            trainer.train(SPEC, parse_options(Config, argv, "train", "", PRESETS), Ranks())
        finally:
            if torch.distributed.is_initialized():  # a process that failed would end here
                torch.distributed.destroy_process_group()
        return Finished(folder, [0], [""], [""], time.monotonic() - begun)

    return run


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six days of 3000 learnable rows, made by python -m dlrm.prep."""
    folder = tmp_path_factory.mktemp("toy")
    for words in (
        ["toy", folder / "tsv", "--days", 6, "--rows", 3000, "--seed", 1],
        ["run", "--input_dir", folder / "tsv", "--output_dir", folder / "npy"],
    ):
        done = python("-m", "dlrm.prep", *words)
        assert done.returncode == 0, done.stderr
    return folder / "npy"
