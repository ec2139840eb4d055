"""When the loop reports, validates and stops, what it counts, and how many batches it takes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dlrm.runtime.errors import UserError
from dlrm.trainer import loop
from dlrm.trainer.meter import ThroughputMeter

ROWS, BATCHES = 3, 10


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Numbers:
    """An epoch of batches; counts those that were taken."""

    def __init__(self) -> None:
        self.batch_number, self.epochs = -1, []

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[int]:
        for _ in range(BATCHES):
            self.batch_number += 1
            yield self.batch_number

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.batch_number}


class Ahead:
    """Takes two batches ahead, like torchrec's pipeline; the loss is the batch's number, of `odd` NaN."""

    def __init__(self, odd: int = -1) -> None:
        self.waiting: list[int] = []
        self.odd = odd

    def progress(self, batches: Iterator[int]) -> tuple[torch.Tensor, torch.Tensor, None]:
        while len(self.waiting) < 3 and (batch := next(batches, None)) is not None:
            self.waiting.append(batch)
        batch = self.waiting.pop(0)
        loss = float("nan") if batch == self.odd else float(batch)
        return torch.tensor(loss), torch.zeros(ROWS), None


class Course:
    """A training that writes down what happens."""

    def __init__(self, scores: float = 0.5, odd: int = -1, **limits: Any) -> None:
        self.batches, self.progress = Numbers(), loop.Progress()
        self.reports: list[tuple[int, float]] = []
        self.validated: list[int] = []
        self.rates: list[int] = []

        def set_next_lr() -> float:
            self.rates.append(self.progress.step)
            return 0.1 * self.progress.step

        def validate() -> dict[str, Any]:
            self.validated.append(self.progress.step)
            return {"auroc": scores * self.progress.step, "seconds": 0.0}

        self.target_reached = loop.run_training(
            Ahead(odd), self.batches, self.progress, loop.Limits(**limits), set_next_lr, validate,
            lambda **report: self.reports.append((report["step"], report["loss"])),
            ThroughputMeter(torch.device("cpu")), loop.Hooks(),
        )  # fmt: skip


def test_two_epochs() -> None:
    done = Course(epochs=2, report_every=4, validation_freq=3, evaluate_on_epoch_end=True)
    # the first step ends the warm-up, an epoch's end reports what is left
    assert [step for step, _ in done.reports] == [1, 5, 9, 10, 14, 18, 20]
    assert [loss for _, loss in done.reports] == [0, 2.5, 6.5, 9, 11.5, 15.5, 18.5]
    assert done.validated == [3, 6, 9, 10, 12, 15, 18, 20]
    assert done.progress.val_scores == [5, 10]  # of epochs only
    assert done.rates == list(range(20)) and done.progress.lr == pytest.approx(1.9)
    assert (done.target_reached, done.progress.epoch, done.batches.epochs) == (False, 2, [0, 1])
    assert (done.progress.samples, done.progress.timed_samples) == (20 * ROWS, 19 * ROWS)
    assert done.progress.position is None


def test_a_limit_takes_no_batch_too_many() -> None:
    done = Course(epochs=5, max_steps=7, report_every=100)
    assert [step for step, _ in done.reports] == [1, 7]
    assert (done.progress.step, done.batches.batch_number) == (7, 6)
    assert done.progress.position == {"number": 6}
    over = Course(epochs=5, max_steps=13, report_every=100)
    assert (over.progress.step, over.progress.epoch, over.batches.batch_number) == (13, 1, 12)


def test_the_position_is_that_of_the_step_not_of_the_batches_ahead() -> None:
    done = Course(max_steps=9, validation_freq=4, target_score=2.0)
    assert done.target_reached and done.validated == [4]
    assert done.progress.position == {"number": 3} and done.batches.batch_number == 5


def test_good_enough_at_an_epoch_ends_the_training() -> None:
    done = Course(epochs=3, evaluate_on_epoch_end=True, target_score=6.0)
    assert done.target_reached and done.validated == [10, 20] and done.progress.target_reached


def test_a_loss_that_is_not_a_number_is_reported_with_its_steps() -> None:
    with pytest.raises(UserError, match=r"the loss became nan in steps 6\.\.9"):
        Course(odd=7, report_every=4)


def test_steps_of_the_warm_up_are_not_timed() -> None:
    for warm, reports in ((0, [4, 8, 10]), (3, [3, 7, 10])):
        done = Course(report_every=4, warmup_steps=warm)
        assert [step for step, _ in done.reports] == reports
        assert (done.progress.samples, done.progress.timed_samples) == (10 * ROWS, (10 - warm) * ROWS)


def test_no_validation_before_its_first_step() -> None:
    done = Course(epochs=2, validation_freq=3, evaluate_on_epoch_end=True, first_validation=12)
    assert done.validated == [12, 15, 18, 20] and len(done.progress.val_scores) == 1
