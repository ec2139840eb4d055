"""Learning rates as pure functions of the step (the first is step 0).

torch's schedulers keep state from step to step, which a checkpoint would have to store. A function of the
step alone gives a resumed run exactly the rates of one that never stopped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dlrm.runtime.errors import UserError

MLPERF_FLOOR = 1e-7  # MLCommons' decay ends at this rate, not at zero


@dataclass(frozen=True)
class Schedule:
    """A schedule and its parameters, in steps. The names are those of MLCommons' --lr_* flags; `power`,
    `end_factor` and `warmup_factor` are NVIDIA's.
    """

    name: str = "constant"
    warmup_steps: int = 0
    decay_start: int = 0
    decay_steps: int = 0
    power: float = 2.0
    end_factor: float = 0.0
    warmup_factor: int = 0
    change_step: int = 0
    change_to: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(
                f"learning rate schedule {self.name} is unknown; choose from {', '.join(SCHEDULES)}"
            )
        if min(self.warmup_steps, self.decay_start, self.decay_steps, self.change_step) < 0:
            raise UserError("--lr_warmup_steps, --lr_decay_start and --lr_decay_steps must not be negative")
        decays = self.name in ("mlperf", "nvidia") and self.decay_steps > 0
        if decays and self.decay_start < self.warmup_steps:
            raise UserError(
                f"--lr_decay_start {self.decay_start} is before the warm-up's end, "
                f"--lr_warmup_steps {self.warmup_steps}: start the decay later"
            )


def constant_rate(step: int, base: float, schedule: Schedule) -> float:
    """The same rate at every step. Like all of SCHEDULES: `step` counts from 0, `base` is --learning_rate."""
    return base


def mlperf_rate(step: int, base: float, schedule: Schedule) -> float:
    """MLCommons' LRPolicyScheduler, with its two surprises: it counts steps from 1, and between and after the
    phases it holds the last rate.

    So with a decay the rate between warm-up and decay is (warmup - 1) / warmup of the base, and after the
    decay it is the last step's. Without a decay the rate after the warm-up is the base.
    """
    count = step + 1
    warmup, start, steps = schedule.warmup_steps, schedule.decay_start, schedule.decay_steps
    if count < warmup:
        return base * (1.0 - (warmup - count) / warmup)
    if steps == 0:
        return base
    if count < start:
        return base * (1.0 - 1 / warmup) if warmup > 1 else base
    done = min(count, start + steps - 1) - start
    return max(MLPERF_FLOOR, base * ((steps - done) / steps) ** 2)


def nvidia_rate(step: int, base: float, schedule: Schedule) -> float:
    """NVIDIA's schedule: linear warm-up from 1 - 2^-factor, hold, polynomial decay to `end_factor` of the
    base.
    """
    count = step + 1
    warmup, start, steps = schedule.warmup_steps, schedule.decay_start, schedule.decay_steps
    if count <= warmup:
        return base * (1 - (warmup - count) / (warmup * 2**schedule.warmup_factor))
    if steps == 0 or count <= start:
        return base
    if count > start + steps:
        return base * schedule.end_factor
    return base * max(((start + steps - count) / steps) ** schedule.power, schedule.end_factor)


def changed_rate(step: int, base: float, schedule: Schedule) -> float:
    """One jump (--change_lr): `change_to` from step `change_step` on."""
    return schedule.change_to if step >= schedule.change_step else base


SCHEDULES: dict[str, Callable[[int, float, Schedule], float]] = {
    "constant": constant_rate,
    "mlperf": mlperf_rate,
    "nvidia": nvidia_rate,
    "change": changed_rate,
}


def learning_rate(step: int, base: float, schedule: Schedule) -> float:
    """The rate that step `step` trains with; `base` is --learning_rate."""
    return SCHEDULES[schedule.name](step, base, schedule)


class HasGroups(Protocol):
    @property
    def param_groups(self) -> Iterable[Any]: ...


def set_lr(optimizer: HasGroups, lr: float) -> None:
    """Set it for all parameters, before the step's `zero_grad`: there the fused optimizers, which update the
    tables in the backward pass, read it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
