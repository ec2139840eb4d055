"""Steps and epochs of a plain PyTorch loop, from its batches and the steps of its optimizers.

A step begins when a batch is asked for and ends with the last optimizer's step before the next batch is
asked for. So several optimizers of one iteration are one step, and so are the batches whose gradients are
accumulated. A loop without a DataLoader has a step whenever an optimizer steps again. Batches that are
fetched without gradients are an evaluation. Where torchrec's pipelines train, they count (`pipelines`).

An epoch is one way through a loader, from its first batch until there is none left, or until the last step of
a loop that is left early. Where several loaders are gone through at once, it is the first one's.
"""

import contextlib
import functools
import importlib
import os
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks
from dlrm.traced.hooks import replace


class Steps:
    """The steps of this process so far. Only its main thread's batches and optimizers count."""

    def __init__(self) -> None:
        self.step = 0  # steps that are done
        self.in_pipeline = 0  # how many calls of a pipeline's progress are going on, one inside the other
        self.by_pipeline = False  # a pipeline has trained: optimizers do not count steps
        self._begin = self._end = 0  # of the step that goes on; `_end`: of its latest optimizer's step
        self._idle_since = 0  # when something ended that belongs to no step
        self._stepped: set[int] = set()  # optimizers, in this step
        self._fetches = False  # batches are fetched here
        self._eval_begin = self._eval_end = 0
        self._optimizer_begin = 0
        self._last_end = 0  # of the latest step
        self.epoch = 0  # of the latest step
        self._iterator: weakref.ref[Any] | None = None  # of the epoch that goes on
        self._epoch_begin = self._epoch_number = 0  # of that epoch
        self._steps_before = 0  # steps that were done when it began
        self._profiler: Any = None

    def profile(self, folder: str | os.PathLike[str], here: Ranks, steps: tuple[int, int]) -> None:
        """Run torch.profiler on these steps, from the first to the last."""
        from dlrm.runtime.step_profiler import StepProfiler

        self._profiler = StepProfiler(folder, here, steps)

    def counts_here(self) -> bool:
        return not self.in_pipeline and threading.current_thread() is threading.main_thread()

    # --- batches

    def before_batch(self, training: bool, epoch: int, iterator: Any) -> None:
        """The loop asks for a batch. `training`: gradients are on. `epoch`: of the iterator."""
        if not self.counts_here():
            return
        now = trace.get_time()
        self.close_step()
        if not training:
            self._eval_begin = self._eval_begin or now
            return
        self._close_evaluation()
        self._fetches = True
        self._begin_epoch(now, epoch, iterator)
        self.epoch = epoch
        if not self._begin:
            self._begin = self.begin_profile() or now
            self._name_step()

    def after_batch(self, training: bool) -> None:
        if not training and self.counts_here():
            self._eval_end = trace.get_time()

    def after_last_batch(self, training: bool, iterator: Any) -> None:
        """There was no batch left: what was fetched since the last step was not trained on."""
        if not self.counts_here():
            return
        if training and self._iterator is not None and self._iterator() is iterator:
            self._close_epoch(trace.get_time())
        if training and not self._end:
            self._begin = 0
            self.end_profile()
        elif not training:
            self._eval_end = trace.get_time()
            self._close_evaluation()

    # --- optimizers

    def before_optimizer(self, optimizer: Any, *_: Any) -> None:
        if self.by_pipeline or not self.counts_here():
            return
        if not self._fetches and id(optimizer) in self._stepped:
            self.close_step()
        self._optimizer_begin = trace.get_time()
        if not self._begin:
            self._begin = (not self._fetches and self._idle_since) or self._optimizer_begin
            self._name_step()
        self._stepped.add(id(optimizer))

    def after_optimizer(self, *_: Any) -> None:
        if self._optimizer_begin and self.counts_here():
            self._end = trace.get_time()
            trace.record_span("compute", "optimizer", self._optimizer_begin, self._end)
            self._optimizer_begin = 0

    # --- steps

    def close_step(self) -> None:
        """Something begins that is not part of the step; recorded is what an optimizer has ended."""
        if self._end and self.counts_here():
            trace.record_span("train", "step", self._begin, self._end)
            self.step += 1
            self._idle_since = self._last_end = self._end
            self._begin = self._end = 0
            self._stepped.clear()
            self.end_profile()
            if not self._fetches:  # nothing tells when the next one begins, but for the end of this one
                self._idle_since = self.begin_profile() or self._idle_since

    def leave(self) -> None:
        """Something has ended that was not part of a step."""
        self._idle_since = trace.get_time()

    def close(self) -> None:
        """The script has ended, or something else counts its steps."""
        self.close_step()
        self._close_evaluation()
        self._close_epoch(self._last_end)

    def close_profile(self) -> None:
        """Write what was profiled, where the script has ended before the last of these steps."""
        if self._profiler is not None:
            self._profiler.close()

    def begin_profile(self) -> int:
        """Before a step: profile it, if that was asked for. When the step begins then, or 0."""
        if self._profiler is None:
            return 0
        self._profiler.begin_step(self.step + 1)
        return trace.get_time()

    def end_profile(self) -> None:
        """After a step."""
        if self._profiler is not None:
            self._profiler.end_step(self.step)

    def _close_evaluation(self) -> None:
        if self._eval_begin:
            trace.record_span("pipeline", "evaluate", self._eval_begin, self._eval_end)
            self._idle_since = self._eval_end
        self._eval_begin = self._eval_end = 0

    def _begin_epoch(self, now: int, epoch: int, iterator: Any) -> None:
        """Where none goes on. One whose loop was left has lost its iterator, or begins with it again."""
        going_on = self._iterator() if self._iterator is not None else None
        if going_on is None or (going_on is iterator and epoch != self._epoch_number):
            self._close_epoch(self._last_end)
            self._iterator = weakref.ref(iterator)
            self._epoch_begin, self._epoch_number, self._steps_before = now, epoch, self.step

    def _close_epoch(self, end: int) -> None:
        """Record it, if anything was trained in it."""
        if self._epoch_begin and self.step > self._steps_before:
            trace.record_span("pipeline", "epoch", self._epoch_begin, end, epoch=self._epoch_number)
        self._iterator, self._epoch_begin = None, 0

    def _name_step(self) -> None:
        trace.set_context(step=self.step + 1, epoch=self.epoch)


steps = Steps()
after_backward: list[Callable[[], None]] = []  # called at the end of each backward pass


def hook(torch: ModuleType) -> None:
    optimizer = importlib.import_module("torch.optim.optimizer")
    optimizer.register_optimizer_step_pre_hook(steps.before_optimizer)
    optimizer.register_optimizer_step_post_hook(steps.after_optimizer)
    replace(torch.autograd, "backward", _wrap_backward, torch)


def _wrap_backward(original: Any) -> Any:
    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> Any:
        if not trace.is_tracing():
            return original(*args, **kwargs)
        # a pipeline's stage of this name is a span already
        with contextlib.nullcontext() if steps.in_pipeline else trace.span("compute", "backward"):
            found = original(*args, **kwargs)
            for each in after_backward:
                each()
        return found

    return backward
