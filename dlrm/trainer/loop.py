"""The training and the evaluation loop. It knows neither the command line nor files, nor torch.

In: a torchrec train pipeline, batches, a Progress. Out: the Progress, advanced in place after every step, so
that a checkpoint can be taken between any two steps and the loop can start again from it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from dlrm.runtime import trace
from dlrm.runtime.errors import UserError


class BatchIterable(Sized, Iterable[Any], Protocol):
    """This rank's batches of one split; `len` is the number of batches in a whole epoch."""

    batch_number: int  # of the last batch, counted over all epochs

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last."""
        ...


class MetricCollector(Protocol):
    """Gathers the outputs of an evaluation on this rank."""

    def update(self, scores: Any, labels: Any, /) -> None:
        """Of one batch, [n] each: tensors in a training."""
        ...

    def compute(self) -> dict[str, Any]:
        """The metrics over the rows of all ranks. A collective."""
        ...


LogMetrics = Callable[..., None]  # one line of metrics.jsonl, as keyword arguments


@dataclass
class Progress:
    """How far the training has come. A checkpoint stores all of it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    lr: float = 0.0  # of the last step
    samples: int = 0  # rows trained on, all ranks
    seconds: float = 0.0  # spent training; without evaluation, checkpoints and warm-up
    timed_samples: int = 0  # rows trained on in those seconds
    val_scores: list[float | None] = field(default_factory=list)  # one per validated epoch
    position: dict[str, Any] | None = None  # in the rows, after the last step; None: start of the epoch
    validating_at: str | None = None  # "epoch" or "step": a validation is running, at the end of which
    target_reached: bool = False  # a validation reached --validation_auroc
    best_score: float | None = None  # of all validations
    best_epoch: float | None = None  # epochs trained until then, with the fraction of the last one
    loss_scale: float = 1.0  # of fp16
    steps_since_overflow: int = 0  # or since the loss scale changed
    skipped_steps: int = 0  # whose gradients overflowed


@dataclass(frozen=True)
class Limits:
    """When to report, to validate and to stop."""

    epochs: int = 1
    max_steps: int | None = None
    report_every: int = 20  # steps
    warmup_steps: int = 1  # not timed: allocations and first connections
    validation_freq: int | None = None  # steps
    first_validation: int = 0  # step before which there is none
    target_score: float | None = None  # stop once a validation reaches it
    score_metric: str = "auroc"  # the metric that is compared with it
    evaluate_on_epoch_end: bool = False


class Hooks:
    """Called between the parts of a training. This class does nothing; checkpointing overrides it."""

    def before_batch(self) -> None:
        """Called on every rank before every batch, of training and of evaluation. May raise Stopped."""

    def after_step(self) -> None: ...

    def after_validation(self) -> None: ...

    def after_epoch(self) -> None: ...


class Meter(Protocol):
    """Mean loss over all ranks, and samples per second, since the last report: `meter.ThroughputMeter`."""

    steps: int
    click_share: float | None  # of the labels between the last two calls of reduce_and_reset

    def add_step(self, loss: Any, rows: int, labels: Any = None) -> None:
        """`loss`: the mean over this rank's `rows` rows."""
        ...

    def reduce_and_reset(self) -> tuple[float, int, float]:
        """(mean loss, rows, seconds) since the last call. A collective: called at the same step."""
        ...

    def exclude_time(self, seconds: float) -> None:
        """Do not count these seconds: they were spent on a validation or a checkpoint."""
        ...


def run_training(
    pipeline: Any,
    batches: BatchIterable,
    progress: Progress,
    limits: Limits,
    set_next_lr: Callable[[], float],
    validate: Callable[[], dict[str, Any]],
    log_metrics: LogMetrics,
    meter: Meter,
    hooks: Hooks,
    during_epoch: Callable[[int], AbstractContextManager[None]] = nullcontext,
    during_step: Callable[[int], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Train until the epochs are over, `max_steps` are done, or a validation reaches the target (True).

    pipeline      a torchrec TrainPipelineSparseDist over the model and its optimizer
    progress      where to start; advanced in place. A resumed training starts in the middle of an epoch, or
                  inside a validation, which then runs again from its first batch
    set_next_lr   sets the learning rate of the coming step and returns it
    validate      evaluates the validation split; its result has `limits.score_metric` and "seconds"
    during_epoch  a context manager around each epoch, given the epoch's number
    during_step   the same around each step, which counts from 1
    """

    def validate_at(point: str) -> bool:
        # set while the validation runs: a checkpoint taken inside it resumes with the same validation
        progress.validating_at = point
        result = validate()
        progress.validating_at = None
        meter.exclude_time(result["seconds"])
        score = result[limits.score_metric]
        if point == "epoch":
            progress.val_scores.append(score)
        target = limits.target_score
        progress.target_reached = target is not None and score is not None and score >= target
        return progress.target_reached

    # what a checkpoint may have left to do: nothing, or the rest of a validation
    if progress.target_reached or (progress.validating_at and validate_at(progress.validating_at)):
        return True
    while progress.epoch < limits.epochs and progress.step != limits.max_steps:
        batches.set_epoch(progress.epoch)
        trace.set_context(epoch=progress.epoch)
        trace.sample_io()
        with during_epoch(progress.epoch), trace.span("pipeline", "epoch"):
            steps_left = None if limits.max_steps is None else limits.max_steps - progress.step
            steps = train_steps(
                pipeline, batches, progress, meter, set_next_lr, hooks, steps_left, during_step
            )
            for _ in steps:
                at_end = progress.step == limits.max_steps
                if meter.steps == limits.report_every or at_end or progress.step == limits.warmup_steps:
                    report_steps(meter, progress, log_metrics, timed=progress.step > limits.warmup_steps)
                due = limits.validation_freq and progress.step % limits.validation_freq == 0
                if due and progress.step >= limits.first_validation and validate_at("step"):
                    return True
                if at_end:
                    return False
                hooks.after_step()
            if meter.steps:
                report_steps(meter, progress, log_metrics)
        trace.sample_io()
        progress.epoch, progress.position = progress.epoch + 1, None
        due = limits.evaluate_on_epoch_end and progress.step >= limits.first_validation
        if due and validate_at("epoch"):
            return True
        hooks.after_epoch()
    return False


def train_steps(
    pipeline: Any,
    batches: BatchIterable,
    progress: Progress,
    meter: Meter,
    set_next_lr: Callable[[], float],
    hooks: Hooks,
    limit: int | None = None,
    during_step: Callable[[int], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Train the rest of the epoch (at most `limit` steps); yields after each step, once it is counted."""
    iterator = iter(batches)
    first = batches.batch_number + 1
    count = len(batches) if limit is None else min(limit, len(batches))
    # The pipeline takes batches ahead of the step that it trains. So the position to resume from is not the
    # reader's own: it is remembered for each batch when it is taken, and used when that batch is trained.
    positions: dict[int, dict[str, Any]] = {}

    def take_batches() -> Iterator[Any]:
        # not more batches than there will be steps: one that is taken and not trained would be lost
        for batch in itertools.islice(iterator, count):
            positions[batches.batch_number] = batches.state_dict()
            yield batch

    feed = take_batches()
    try:
        for number in range(first, first + count):
            hooks.before_batch()
            trace.set_context(step=progress.step + 1)  # as log and metrics number it
            with during_step(progress.step + 1), trace.span("train", "step", batch=number):
                progress.lr = set_next_lr()
                loss, logits, labels = pipeline.progress(feed)
                meter.add_step(loss, len(logits), labels)
            progress.step += 1
            progress.position = positions.pop(number)
            yield
    finally:
        # also when the caller leaves the loop early: a reader's threads and files end here
        close = getattr(iterator, "close", None)
        if close:
            close()


def report_steps(meter: Meter, progress: Progress, log_metrics: LogMetrics, timed: bool = True) -> None:
    """Log loss and speed since the last report; UserError on all ranks where the loss is not finite.

    `timed`: count the steps in results.json's samples_per_second.
    """
    with trace.span("train", "report"):
        steps = meter.steps
        first = progress.step - steps + 1
        loss, rows, seconds = meter.reduce_and_reset()
        speed = rows / seconds
        more = {"samples_per_second": speed, "step_time": seconds / steps}
        if meter.click_share is not None:
            more["click_share"] = meter.click_share
        values = {"step": progress.step, "epoch": progress.epoch, "loss": loss, "lr": progress.lr}
        if not math.isfinite(loss):
            # the report says so too
            log_metrics(**values, samples=progress.samples, **more)
            error = UserError(
                f"the loss became {loss} in steps {first}..{progress.step}: "
                "lower --learning_rate, or look for NaN in the data with python -m dlrm.prep check"
            )
            error.shared = True  # the loss is the mean over all ranks: every rank raises this
            raise error
        progress.samples += rows
        if timed:
            progress.seconds += seconds
            progress.timed_samples += rows
        log_metrics(**values, samples=progress.samples, **more)
        trace.counter("loss", loss)
        trace.counter("samples_per_second", speed)


def evaluate(
    pipeline: Any,
    batches: BatchIterable,
    split: str,
    metrics: MetricCollector,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The metrics over exactly the rows of the split, with its name and the seconds that it took.

    The pipeline is not the one that trains: that one may have batches of the epoch in flight.
    """
    started = time.perf_counter()
    iterator = iter(batches)
    trace.sample_io()
    with trace.span("pipeline", "evaluate", split=split):
        for batch in range(len(batches)):
            before_batch()
            with trace.span("eval", "eval_step", batch=batch):
                _, logits, labels = pipeline.progress(iterator)
                metrics.update(logits, labels)
        with trace.span("eval", "metrics"):
            result = metrics.compute()
    trace.sample_io()
    return {"split": split, **result, "seconds": time.perf_counter() - started}
