"""Learning rates, step by step, against a stateful scheduler of torch's kind and the published formulas."""

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from dlrm.runtime.errors import UserError
from dlrm.trainer.lr_schedule import SCHEDULES, Schedule, learning_rate, set_lr


class Policy(LRScheduler):
    """MLCommons' policy from its description: linear warm-up, hold, quadratic decay, the last rate kept."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, start: int, steps: int) -> None:
        self.policy = warmup, start, steps
        self.kept: list[Any] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        warmup, start, steps = self.policy
        count = self._step_count
        if count < warmup:
            self.kept = [base * (1.0 - (warmup - count) / warmup) for base in self.base_lrs]
            return self.kept
        if start <= count < start + steps:
            factor = ((steps - (count - start)) / steps) ** 2
            self.kept = [max(1e-7, base * factor) for base in self.base_lrs]
            return self.kept
        return self.kept if steps > 0 and self.kept else self.base_lrs


@pytest.mark.parametrize(
    "warmup, start, steps",
    [
        (0, 0, 0),
        (5, 0, 0),
        (5, 8, 10),
        (2750, 49315, 27772),
        (1, 1, 7),
        (4, 4, 1),
        (0, 0, 12),
        (0, 6, 6),
        (2, 9, 3),
    ],
)
@pytest.mark.parametrize("base", [15.0, 0.005, 1e-6])
def test_mlperf_equals_the_stateful_scheduler(warmup: int, start: int, steps: int, base: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    reference = Policy(optimizer, warmup, start, steps)
    schedule = Schedule("mlperf", warmup, start, steps)
    last = start + steps + 20
    looked_at = {*range(60), *range(max(0, start - 3), start + 40), *range(last - 40, last)}
    for step in range(last):
        if step in looked_at:
            assert learning_rate(step, base, schedule) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-12
            ), step
        optimizer.step()
        reference.step()


def test_mlperf_by_hand() -> None:
    schedule = Schedule("mlperf", warmup_steps=4, decay_start=8, decay_steps=2)
    rates = [learning_rate(step, 8.0, schedule) for step in range(12)]
    assert rates == [2.0, 4.0, 6.0, 6.0, 6.0, 6.0, 6.0, 8.0, 2.0, 2.0, 2.0, 2.0]


def test_nvidia_by_hand() -> None:
    schedule = Schedule("nvidia", warmup_steps=4, decay_start=6, decay_steps=4, end_factor=0.1)
    rates = [learning_rate(step, 1.0, schedule) for step in range(12)]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 9 / 16, 4 / 16, 0.1, 0.1, 0.1, 0.1]
    assert rates == pytest.approx(expected)
    halved = Schedule("nvidia", warmup_steps=4, warmup_factor=1)
    assert learning_rate(0, 1.0, halved) == pytest.approx(1 - 3 / 8)
    assert learning_rate(100, 1.0, Schedule("nvidia")) == 1.0


def test_change_jumps_once() -> None:
    schedule = Schedule("change", change_step=3, change_to=0.5)
    assert [learning_rate(step, 2.0, schedule) for step in range(5)] == [2, 2, 2, 0.5, 0.5]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_is_a_number(name: str) -> None:
    schedule = Schedule(name, 3, 5, 7, change_step=2, change_to=1.0)
    assert all(math.isfinite(learning_rate(step, 3.0, schedule)) for step in range(30))


def test_mistakes_are_reported() -> None:
    with pytest.raises(UserError, match="cosine is unknown"):
        Schedule("cosine")
    with pytest.raises(UserError, match="start the decay later"):
        Schedule("mlperf", warmup_steps=10, decay_start=5, decay_steps=3)
    with pytest.raises(UserError, match="not be negative"):
        Schedule("mlperf", warmup_steps=-1)


def test_set_lr_reaches_every_group() -> None:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 9.0}], lr=1.0)
    set_lr(optimizer, 0.25)
    for weight in weights:
        weight.grad = torch.ones(1)
    optimizer.step()
    assert [weight.item() for weight in weights] == [0.75, 0.75]
