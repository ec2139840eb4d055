"""The training and the evaluation loop. Knows neither the command line nor files."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dlrm.runtime import trace
from dlrm.runtime.errors import UserError


class BatchIterable(Sized, Iterable[Any], Protocol):
    number: int  # of the batch given last, counted over all passes

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...


class MetricCollector(Protocol):
    """Gathers a model's outputs; `result` is the metrics over those of all ranks."""

    def add(self, scores: torch.Tensor, labels: torch.Tensor, /) -> None: ...

    def result(self) -> dict[str, Any]: ...


Report = Callable[..., None]


@dataclass
class Progress:
    """How far the training has come."""

    step: int = 0  # optimizer steps so far
    epoch: int = 0
    lr: float = 0.0  # of the last step
    samples: int = 0  # rows trained on, all ranks
    seconds: float = 0.0  # spent training, evaluation and warm-up left out
    timed_samples: int = 0  # rows trained on in those seconds
    val_aurocs: list[float | None] = field(default_factory=list)
    position: dict[str, Any] | None = None  # in the rows, after the last step; None: the epoch begins
    judging: str | None = None  # the validation under way: of an epoch, of a step
    good: bool = False  # validation reached what was wanted
    loss_scale: float = 1.0  # of fp16
    good_steps: int = 0  # since it changed
    skipped_steps: int = 0  # whose gradients overflowed


@dataclass(frozen=True)
class Limits:
    """When to look and when to stop."""

    epochs: int = 1
    max_steps: int | None = None
    report_every: int = 20
    warmup_steps: int = 1  # not timed: allocation, first contact
    validation_freq: int | None = None
    validation_auroc: float | None = None
    score: str = "auroc"  # the metric that says how good a validation was
    evaluate_on_epoch_end: bool = False


class Hooks:
    """What else happens between the parts of a training; this one does nothing."""

    def before_batch(self) -> None:
        """Every rank comes by here before every batch, of training and of evaluation. May raise."""

    def after_step(self) -> None: ...

    def after_validation(self) -> None: ...

    def after_epoch(self) -> None: ...


class ThroughputMeter:
    """Mean loss over all ranks and samples per second, from one report to the next."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss x rows, rows
        self._since = time.perf_counter()
        self.steps = 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        self._sums[0] += loss.detach() * rows
        self._sums[1] += rows
        self.steps += 1

    def read(self) -> tuple[float, int, float]:
        """Loss, rows, seconds since the last call. A collective: every rank calls it at the same step."""
        dist.all_reduce(self._sums)
        loss, rows = self._sums.tolist()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._sums.zero_()
        self.steps = 0
        return loss / max(rows, 1), int(rows), seconds

    def leave_out(self, seconds: float) -> None:
        """Time that was not training."""
        self._since += seconds

    def state(self) -> tuple[torch.Tensor, int]:
        """What has been gathered since the last report: this rank's sums, and the steps."""
        return self._sums, self.steps


def run_training(
    pipeline: Any,
    batches: BatchIterable,
    progress: Progress,
    limits: Limits,
    next_lr: Callable[[], float],
    validate: Callable[[], dict[str, Any]],
    report: Report,
    meter: ThroughputMeter,
    hooks: Hooks,
    during_epoch: Callable[[int], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Train until the epochs are over, `max_steps` are done, or validation is good enough (True).

    `progress` may stand anywhere: a training that was stopped goes on.
    """

    def good_enough(of: str) -> bool:
        progress.judging = of
        result = validate()
        progress.judging = None
        meter.leave_out(result["seconds"])
        if of == "epoch":
            progress.val_aurocs.append(result[limits.score])
        wanted, reached = limits.validation_auroc, result[limits.score]
        progress.good = wanted is not None and reached is not None and reached >= wanted
        return progress.good

    if progress.good or (progress.judging and good_enough(progress.judging)):
        return True
    while progress.epoch < limits.epochs and progress.step != limits.max_steps:
        batches.set_epoch(progress.epoch)
        trace.set_context(epoch=progress.epoch)
        with during_epoch(progress.epoch), trace.span("train", "epoch"):
            left = None if limits.max_steps is None else limits.max_steps - progress.step
            for _ in train_steps(pipeline, batches, progress, meter, next_lr, hooks, left):
                at_end = progress.step == limits.max_steps
                if meter.steps == limits.report_every or at_end or progress.step == limits.warmup_steps:
                    report_step(meter, progress, report, timed=progress.step > limits.warmup_steps)
                due = limits.validation_freq and progress.step % limits.validation_freq == 0
                if due and good_enough("step"):
                    return True
                if at_end:
                    return False
                hooks.after_step()
            if meter.steps:
                report_step(meter, progress, report)
        progress.epoch, progress.position = progress.epoch + 1, None
        if limits.evaluate_on_epoch_end and good_enough("epoch"):
            return True
        hooks.after_epoch()
    return False


def train_steps(
    pipeline: Any,
    batches: BatchIterable,
    progress: Progress,
    meter: ThroughputMeter,
    next_lr: Callable[[], float],
    hooks: Hooks,
    limit: int | None = None,
) -> Iterator[None]:
    """One epoch, or what is left of it, a step at a time; yields after the step is counted."""
    iterator = iter(batches)
    first = batches.number + 1
    count = len(batches) if limit is None else min(limit, len(batches))
    # the pipeline takes batches ahead: not more of them than there will be steps
    positions: dict[int, dict[str, Any]] = {}  # after each batch that was taken and not yet trained

    def take() -> Iterator[Any]:
        for each in itertools.islice(iterator, count):
            positions[batches.number] = batches.state_dict()
            yield each

    feed = take()
    try:
        for batch in range(first, first + count):
            hooks.before_batch()
            trace.set_context(step=progress.step)
            with trace.span("train", "step", batch=batch):
                progress.lr = next_lr()
                loss, logits, _ = pipeline.progress(feed)
                meter.add(loss, len(logits))
            progress.step += 1
            progress.position = positions.pop(batch)
            yield
    finally:
        close = getattr(iterator, "close", None)
        if close:
            close()


def report_step(meter: ThroughputMeter, progress: Progress, report: Report, timed: bool = True) -> None:
    with trace.span("train", "report"):
        first = progress.step - meter.steps + 1
        loss, rows, seconds = meter.read()
        if not math.isfinite(loss):
            error = UserError(
                f"the loss became {loss} in steps {first}..{progress.step}: "
                "lower --learning_rate, or look for NaN in the data with python -m dlrm.prep check"
            )
            error.shared = True
            raise error
        progress.samples += rows
        if timed:
            progress.seconds += seconds
            progress.timed_samples += rows
        speed = rows / seconds
        report(
            step=progress.step, epoch=progress.epoch, loss=loss, lr=progress.lr, samples=progress.samples,
            samples_per_second=speed,
        )  # fmt: skip
        trace.counter("loss", loss)
        trace.counter("samples_per_second", speed)


def evaluate(
    pipeline: Any,
    model: torch.nn.Module,
    batches: BatchIterable,
    split: str,
    predictions: MetricCollector,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The metrics over exactly the rows of the set."""
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    iterator = iter(batches)
    with trace.span("eval", "evaluate", split=split), torch.no_grad():
        for batch in range(len(batches)):
            before_batch()
            with trace.span("eval", "eval_step", batch=batch):
                _, logits, labels = pipeline.progress(iterator)
                predictions.add(logits, labels)
        with trace.span("eval", "auroc"):
            result = predictions.result()
    model.train(was_training)
    return {"split": split, **result, "seconds": time.perf_counter() - started}
