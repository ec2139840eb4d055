"""Learning rates as pure functions of the step: what step `n` (the first is 0) trains with.

Nothing is remembered between calls, so a resumed run goes on exactly where it stopped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from dlrm.runtime.errors import UserError

MLPERF_FLOOR = 1e-7  # MLCommons' decay ends here, not at zero


@dataclass(frozen=True)
class Schedule:
    """Names of MLCommons' --lr_* flags; `power`, `end_factor`, `warmup_factor` are NVIDIA's."""

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
    return base


def mlperf_rate(step: int, base: float, schedule: Schedule) -> float:
    """MLCommons' LRPolicyScheduler: it counts from 1 and, before and after a decay, holds the last rate.

    So a run that decays holds (warmup - 1) / warmup of the base between warm-up and decay, and ends on the
    last step's rate; a run that does not decay goes to the base.
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
    """NVIDIA's: linear warm-up from 1 - 2^-factor, hold, polynomial decay to `end_factor` of the base."""
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
    return SCHEDULES[schedule.name](step, base, schedule)


class HasGroups(Protocol):
    @property
    def param_groups(self) -> Iterable[Any]: ...


def set_lr(optimizer: HasGroups, lr: float) -> None:
    """For all parameters. Tables fused in backward take it up at the next `zero_grad`, so call this first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
