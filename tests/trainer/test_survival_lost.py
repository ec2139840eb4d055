"""A rank that is killed or suspended at any time: the others end soon, name it, and the next run resumes."""

import gzip
import json
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ranks import LiveRanks, metrics, same, words

HOST = socket.gethostname()
PATIENT = ["--timeout", 600]  # a killed rank is noticed long before
BOUND = 120  # seconds, however busy the machine
LONG = ["--epochs", 60]  # still training when the signal comes, however slow the test
EACH = ["--checkpoint_every_steps", 7, "--trace"]


def have_started(ranks: LiveRanks) -> bool:
    return len(ranks.pids()) == ranks.count and (ranks.folder / "trace").exists()


MOMENTS: dict[str, tuple[list[object], Callable[[LiveRanks], object]]] = {
    "start-up": (["--timeout", 8], have_started),
    "step": (PATIENT, lambda ranks: any(line["step"] > 20 for line in metrics(ranks.folder))),
    "evaluation": (
        [*PATIENT, "--validation_freq_within_epoch", 1],
        lambda ranks: sum("auroc" in line for line in metrics(ranks.folder)) > 5,
    ),
    "checkpoint": (
        [*PATIENT, "--checkpoint_every_steps", 1],
        lambda ranks: (
            len(list((ranks.folder / "checkpoints").glob("0*"))) > 2
            and list((ranks.folder / "checkpoints").glob(".dlrm-io-checkpoint-*"))
        ),
    ),
}


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_rank_is_named_and_the_others_end(toy: Path, tmp_path: Path, moment: str, rank: int) -> None:
    more, reached = MOMENTS[moment]
    with LiveRanks(tmp_path, 2, *words(toy, *EACH, *LONG, *more)) as ranks:
        ranks.until(lambda: reached(ranks))
        ranks.signal(signal.SIGKILL, rank)
        begun = time.monotonic()
        codes = ranks.wait(BOUND + 10)
        took = time.monotonic() - begun
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (codes, ranks.stderr)
    assert took < BOUND, took
    killed = f"rank {rank} on {HOST} was killed by signal 9"
    assert killed in ranks.stderr or moment == "start-up" and f"rank {rank}" in ranks.stderr, ranks.stderr
    assert "Traceback" not in ranks.stderr and len(ranks.stderr.splitlines()) == 1
    survivors = list((tmp_path / "trace").glob(f"train{1 - rank:05d}-*.pfw.gz"))
    assert survivors and count_readable_lines(survivors[0]) > 10
    ranks.until_gone()


def count_readable_lines(path: Path) -> int:
    """Whole lines of a trace whose writer may not have closed it."""
    lines = []
    try:
        with gzip.open(path, "rt") as trace:
            for line in trace:
                lines.append(line)
    except EOFError:
        pass
    return sum(bool(json.loads(line.rstrip(",\n"))) for line in lines if line.startswith("{"))


SAVING = ["--epochs", 4, "--checkpoint_every_steps", 9, "--timeout", 20]  # where no connection breaks


def find_newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("0*-step-*")), default="")


def kill_behind_a_checkpoint(toy: Path, folder: Path, rank: int, wait: float) -> None:
    """Start, see the next checkpoint appear, and kill a rank (or, -1, all) so many seconds later."""
    with LiveRanks(folder, 2, *words(toy, *SAVING)) as ranks:
        before = find_newest(folder / "checkpoints")
        ranks.until(lambda: find_newest(folder / "checkpoints") > before)
        time.sleep(wait)
        kill(ranks, rank)


def kill(ranks: LiveRanks, rank: int) -> None:
    """Kill a rank (or, -1, all) and wait until the others have ended, too."""
    for process in ranks.processes if rank < 0 else [ranks.processes[rank]]:
        process.kill()
    assert -signal.SIGKILL in ranks.wait(BOUND), "the training was over before it was killed"


def train_to_the_end(folder: Path, options: list[object]) -> Path:
    with LiveRanks(folder, 2, *options) as ranks:
        assert ranks.wait(BOUND) == [0, 0], ranks.stderr
    return folder


@pytest.fixture(scope="module")
def never_killed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_to_the_end(tmp_path_factory.mktemp("never killed") / "run", words(toy, *SAVING))


@pytest.mark.mpi
def test_after_a_kill_the_next_run_goes_on_as_if_nothing_had_been(
    toy: Path, never_killed: Path, tmp_path: Path
) -> None:
    for seed in range(3):  # somewhere, three times
        kill_behind_a_checkpoint(toy, tmp_path / "killed", seed % 2, random.Random(seed).random() / 20)
    same(never_killed, train_to_the_end(tmp_path / "killed", words(toy, *SAVING)))


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(34))  # three kills each
def test_many_kills(toy: Path, never_killed: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(1000 + seed)
    folder = tmp_path / "killed"
    (folder / "checkpoints" / "00000-step-1").mkdir(parents=True)
    foreign = [folder / "checkpoints" / "00000-step-1" / "notes", folder / "thesis.tex"]
    for path in foreign:
        path.write_text("somebody's")
    for _ in range(3):
        kill_behind_a_checkpoint(toy, folder, chance.choice([-1, 0, 1]), chance.random() / 10)
    same(never_killed, train_to_the_end(folder, words(toy, *SAVING)))
    assert all(path.read_text() == "somebody's" for path in foreign)


ANYWHERE = [*SAVING, "--validation_freq_within_epoch", 5, "--epochs", 2]


@pytest.fixture(scope="module")
def validating_never_killed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_to_the_end(tmp_path_factory.mktemp("validating") / "run", words(toy, *ANYWHERE))


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(18))  # three kills each
def test_many_kills_anywhere(toy: Path, validating_never_killed: Path, tmp_path: Path, seed: int) -> None:
    """In the start-up, in steps and in validations: a random time after the start, or after a report."""
    chance = random.Random(2000 + seed)
    for kind in ("start-up", "lines", chance.choice(["start-up", "lines"])):
        with LiveRanks(tmp_path, 2, *words(toy, *ANYWHERE)) as ranks:
            if kind == "lines":
                wanted = len(metrics(tmp_path)) + chance.randrange(1, 4)
                ranks.until(lambda wanted=wanted, ranks=ranks: len(metrics(ranks.folder)) >= wanted)
            time.sleep(chance.random() / (1 if kind == "start-up" else 20))
            kill(ranks, chance.choice([-1, 0, 1]))
    same(validating_never_killed, train_to_the_end(tmp_path, words(toy, *ANYWHERE)))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("", 0), pytest.param("", 1, marks=pytest.mark.slow), ("mpiexec", 0), ("torchrun", 1)],
)
def test_a_suspended_rank_counts_as_lost_after_the_timeout(
    toy: Path, tmp_path: Path, launcher: str, rank: int
) -> None:
    with LiveRanks(tmp_path, 2, *words(toy, "--timeout", 5, *LONG), launcher=launcher) as ranks:
        ranks.until_step(10)
        ranks.signal(signal.SIGSTOP, rank)
        begun = time.monotonic()
        assert 0 not in ranks.wait(60)  # the suspended one is killed, too
        assert time.monotonic() - begun > 3
        ranks.until_gone()
    assert f"rank {rank} on {HOST} sent no heartbeat for 5 s" in ranks.stderr, ranks.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_under_a_launcher(toy: Path, tmp_path: Path, launcher: str) -> None:
    with LiveRanks(
        tmp_path, 2, *words(toy, "--checkpoint_every_steps", 5, *LONG), launcher=launcher
    ) as ranks:
        ranks.until_step(15)
        ranks.signal(signal.SIGKILL, 1)
        assert ranks.wait(BOUND)[0] != 0
        assert launcher == "mpiexec" or f"rank 1 on {HOST} was killed by signal 9" in ranks.stderr, (
            ranks.stderr
        )
        ranks.until_gone()
    with LiveRanks(tmp_path, 2, *words(toy, "--max_steps", 40, *LONG)) as ranks:  # whoever starts them
        assert ranks.wait() == [0, 0], ranks.stderr
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] >= 40
