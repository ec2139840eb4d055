"""torchrec's train pipelines: a step for each batch that `progress` has trained, an evaluated one likewise.

The stages inside are torchrec's own markers, which the patches record.
"""

import functools
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import replace
from dlrm.traced.steps import steps


def hook(library: ModuleType) -> None:
    for kind in vars(library).values():
        if isinstance(kind, type) and issubclass(kind, library.TrainPipeline) and "progress" in vars(kind):
            replace(kind, "progress", _wrap_progress, library)


def _wrap_progress(original: Any) -> Any:
    @functools.wraps(original)
    def progress(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        if steps.in_pipeline or not trace.is_tracing():
            return original(pipeline, *args, **kwargs)
        training = getattr(getattr(pipeline, "_model", None), "training", True)
        steps.close()
        begin = (training and steps.begin_profile()) or trace.get_time()
        if training:
            steps.by_pipeline = True
            steps.epoch = _count_epoch(pipeline, args or kwargs.values())
            trace.set_context(step=steps.step + 1, epoch=steps.epoch)
        steps.in_pipeline += 1
        try:
            found = original(pipeline, *args, **kwargs)
        finally:
            steps.in_pipeline -= 1
        if training:
            trace.record_span("train", "step", begin, trace.get_time())
            steps.step += 1
            steps.end_profile()
        else:
            trace.record_span("eval", "eval_step", begin, trace.get_time())
        return found

    return progress


def _count_epoch(pipeline: Any, given: Any) -> int:
    """From 0; another iterator than the last one begins another epoch."""
    iterator = next(iter(given), None)
    last, epoch = getattr(pipeline, "_traced_epoch", (None, -1))
    if iterator is not last:
        epoch += 1
        pipeline._traced_epoch = (iterator, epoch)
    return epoch
