"""What the tests of training share: a small dataset made by the real preprocessing, and real ranks."""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ranks import Finished, Train, on_ranks, python

# Ranks wait without spinning: other work gets the cores, and no warning depends on the load.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell: the programs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that tests interrupt would ignore it, too


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
def other_columns(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """`other_columns(numerical, categorical)`: a folder with 3 days of text in `tsv`, and its dataset in
    `npy`, by the reference engine. Made once.
    """
    from dlrm.prep.__main__ import main

    @functools.cache
    def make(numerical: int, categorical: int) -> Path:
        folder = tmp_path_factory.mktemp(f"columns{numerical}+{categorical}")
        counts = ["--num_numerical", str(numerical), "--num_categorical", str(categorical)]
        tsv, npy = str(folder / "tsv"), str(folder / "npy")
        assert main(["toy", tsv, "--days", "3", "--rows", "500", *counts]) == 0
        assert main(["run", "--input_dir", tsv, "--output_dir", npy, "--engine", "plain"]) == 0
        return folder

    return make


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
