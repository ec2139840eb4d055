"""Stopped and run again equals never stopped."""

import json
import signal
from pathlib import Path

import pytest
from alive import Alive, metrics

from dlrm.errors import STOPPED

TOY = ["--preset", "toy", "--report_every", 5, "--batch_size", 128, "--epochs", 2]


def words(toy: Path, *more: object) -> list[object]:
    return [*TOY, "--in_memory_binary_criteo_path", toy, *more]


@pytest.fixture(scope="module")
def never_stopped(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with Alive(folder, 2, *words(toy)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said
    return folder


def same(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (first, second))
    for key in ("val_aurocs", "test_auroc", "steps", "samples", "val_samples", "test_samples"):
        assert one[key] == two[key], key


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_and_run_again_equals_never_stopped(
    toy: Path, never_stopped: Path, tmp_path: Path, which: signal.Signals
) -> None:
    with Alive(tmp_path, 2, *words(toy)) as ranks:
        ranks.until_step(22)
        ranks.signal(which, rank=1)  # one rank hears it, both stop
        assert ranks.wait(20) == [STOPPED, STOPPED], ranks.said
    assert which.name in ranks.said and len(ranks.said.splitlines()) == 1
    assert metrics(tmp_path) == metrics(never_stopped)[: len(metrics(tmp_path))]
    assert not (tmp_path / "results.json").exists()
    with Alive(tmp_path, 2, *words(toy)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said
    same(never_stopped, tmp_path)
