"""A run that was stopped and resumed equals one that was not."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from support.ranks import LiveRanks, metrics, same, words

from dlrm.runtime.errors import STOPPED


@pytest.fixture(scope="module")
def never_stopped(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with LiveRanks(folder, 2, *words(toy)) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr
    return folder


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_and_run_again_equals_never_stopped(
    toy: Path, never_stopped: Path, tmp_path: Path, which: signal.Signals
) -> None:
    if signal.getsignal(which) is signal.SIG_IGN:
        pytest.skip("these tests were started where Ctrl-C is not heard")
    with LiveRanks(tmp_path, 2, *words(toy)) as ranks:
        ranks.until_step(22)
        ranks.signal(which, rank=1)  # one rank hears it, both stop
        assert ranks.wait() == [STOPPED, STOPPED], ranks.stderr
    assert which.name in ranks.stderr and len(ranks.stderr.splitlines()) == 1
    assert metrics(tmp_path) == metrics(never_stopped)[: len(metrics(tmp_path))]
    assert not (tmp_path / "results.json").exists()
    with LiveRanks(tmp_path, 2, *words(toy)) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr
    same(never_stopped, tmp_path)


VALIDATE_EVERY = 8  # steps


def has_begun_to_validate(folder: Path, before: int) -> bool:
    """Whether the newest of more than `before` lines reports a step after which a validation comes."""
    lines = metrics(folder)
    return len(lines) > before and "loss" in lines[-1] and lines[-1]["step"] % VALIDATE_EVERY == 0


@pytest.mark.mpi
def test_stopped_again_and_again_mostly_while_it_validates(toy: Path, tmp_path: Path) -> None:
    more = ["--validation_freq_within_epoch", VALIDATE_EVERY, "--report_every", 1, "--max_steps", 40]
    more += ["--test_batch_size", 4, "--limit_val_batches", 60]  # so that a validation takes long
    more += ["--limit_test_batches", 5]
    with LiveRanks(tmp_path / "whole", 2, *words(toy, *more)) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr
    stops = []
    for turn in range(4):
        with LiveRanks(tmp_path / "often", 2, *words(toy, *more)) as ranks:
            before = len(metrics(ranks.folder))
            ranks.until(lambda before=before, ranks=ranks: has_begun_to_validate(ranks.folder, before))
            ranks.signal(signal.SIGTERM, turn % 2)
            assert ranks.wait() == [STOPPED, STOPPED], ranks.stderr
        newest = max((tmp_path / "often" / "checkpoints").iterdir())
        stops.append(
            json.loads((newest / "checkpoint.json").read_text())["state"]["progress"]["validating_at"]
        )
    assert "step" in stops, "no stop was in a validation: nothing was tested"
    with LiveRanks(tmp_path / "often", 2, *words(toy, *more)) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr
    same(tmp_path / "whole", tmp_path / "often")


@pytest.mark.mpi
def test_a_clock_stops_it_too(toy: Path, tmp_path: Path) -> None:
    """--stop_before_walltime: without a signal."""
    more = ["--epochs", 1000, "--walltime", "1:00", "--stop_before_walltime", 50]
    with LiveRanks(tmp_path, 2, *words(toy, *more)) as ranks:
        assert ranks.wait() == [STOPPED, STOPPED], ranks.stderr
    assert "walltime" in ranks.stderr
    assert list((tmp_path / "checkpoints").glob("0*/checkpoint.json"))


@pytest.mark.mpi
@pytest.mark.parametrize(("launcher", "code"), [("mpiexec", STOPPED), ("torchrun", 1)])
def test_a_signal_to_the_launcher(toy: Path, tmp_path: Path, launcher: str, code: int) -> None:
    """PBS sends it to everybody, twice does no harm. torchrun has no exit code but 1."""
    with LiveRanks(tmp_path, 2, *words(toy, "--epochs", 100), launcher=launcher) as ranks:
        ranks.until_step(10)
        pids = ranks.pids()
        ranks.processes[0].terminate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it may have stopped already
                os.kill(pid, signal.SIGTERM)
        assert ranks.wait() == [code], ranks.stderr
    assert list((tmp_path / "checkpoints").glob("0*/checkpoint.json"))
