"""The training and the evaluation loop. Knows neither the command line nor files."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dlrm import trace
from dlrm.auroc import Predictions
from dlrm.errors import UserError


class Batches(Sized, Iterable[Any], Protocol):
    number: int  # of the batch given last, counted over all passes

    def set_epoch(self, epoch: int) -> None: ...


Report = Callable[..., None]


@dataclass
class Progress:
    """How far the training has come."""

    step: int = 0  # optimizer steps so far
    epoch: int = 0
    samples: int = 0  # rows trained on, all ranks
    seconds: float = 0.0  # spent training, evaluation and warm-up left out
    timed_samples: int = 0  # rows trained on in those seconds
    val_aurocs: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """When to look and when to stop."""

    epochs: int = 1
    max_steps: int | None = None
    report_every: int = 20
    warmup_steps: int = 1  # not timed: allocation, first contact
    validation_freq: int | None = None
    validation_auroc: float | None = None
    evaluate_on_epoch_end: bool = False


class Meter:
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


def fit(
    pipeline: Any,
    batches: Batches,
    progress: Progress,
    limits: Limits,
    next_lr: Callable[[], float],
    validate: Callable[[], dict[str, Any]],
    report: Report,
    device: torch.device,
) -> bool:
    """Train until the epochs are over, `max_steps` are done, or validation is good enough (True)."""
    meter = Meter(device)

    def judge() -> dict[str, Any]:
        result = validate()
        meter.leave_out(result["seconds"])
        return result

    while progress.epoch < limits.epochs:
        batches.set_epoch(progress.epoch)
        trace.set_context(epoch=progress.epoch)
        with trace.span("train", "epoch"):
            left = None if limits.max_steps is None else limits.max_steps - progress.step
            for lr in steps(pipeline, batches, progress, meter, next_lr, left):
                at_end = progress.step == limits.max_steps
                if meter.steps == limits.report_every or at_end or progress.step == limits.warmup_steps:
                    report_step(meter, progress, lr, report, timed=progress.step > limits.warmup_steps)
                due = limits.validation_freq and progress.step % limits.validation_freq == 0
                if due and good_enough(judge(), limits.validation_auroc):
                    return True
                if at_end:
                    return False
            if meter.steps:
                report_step(meter, progress, lr, report)
        progress.epoch += 1
        if limits.evaluate_on_epoch_end:
            result = judge()
            progress.val_aurocs.append(result["auroc"])
            if good_enough(result, limits.validation_auroc):
                return True
    return False


def steps(
    pipeline: Any,
    batches: Batches,
    progress: Progress,
    meter: Meter,
    next_lr: Callable[[], float],
    limit: int | None = None,
) -> Iterator[float]:
    """One epoch, a step at a time; yields the learning rate used, after the step is counted."""
    iterator = iter(batches)
    first = batches.number + 1
    count = len(batches) if limit is None else min(limit, len(batches))
    # the pipeline takes batches ahead: not more of them than there will be steps
    feed = itertools.islice(iterator, count)
    try:
        for batch in range(first, first + count):
            trace.set_context(step=progress.step)
            with trace.span("train", "step", batch=batch):
                lr = next_lr()
                loss, logits, _ = pipeline.progress(feed)
                meter.add(loss, len(logits))
            progress.step += 1
            yield lr
    finally:
        close = getattr(iterator, "close", None)
        if close:
            close()


def report_step(meter: Meter, progress: Progress, lr: float, report: Report, timed: bool = True) -> None:
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
            step=progress.step, epoch=progress.epoch, loss=loss, lr=lr, samples=progress.samples,
            samples_per_second=speed,
        )  # fmt: skip
        trace.counter("loss", loss)
        trace.counter("samples_per_second", speed)


def good_enough(result: dict[str, Any], wanted: float | None) -> bool:
    return wanted is not None and result["auroc"] is not None and result["auroc"] >= wanted


def evaluate(pipeline: Any, model: torch.nn.Module, batches: Batches, split: str) -> dict[str, Any]:
    """AUROC and its company over exactly the rows of the set."""
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    predictions = Predictions()
    iterator = iter(batches)
    with trace.span("eval", "evaluate", split=split), torch.no_grad():
        for batch in range(len(batches)):
            with trace.span("eval", "eval_step", batch=batch):
                _, logits, labels = pipeline.progress(iterator)
                predictions.add(logits, labels)
        with trace.span("eval", "auroc"):
            result = predictions.result()
    model.train(was_training)
    return {"split": split, **result, "seconds": time.perf_counter() - started}
