"""DistributedDataParallel: a span for what a backward pass waits at its end for the ranks' sums of gradients.

The sums run in C++, where nothing can be wrapped. DDP takes their times itself, for its own log, on some
steps: here on all, on CPUs. On a GPU its timers would make the loop wait for the GPU: there is no span.
"""

import functools
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import note_misfit, replace
from dlrm.traced.steps import after_backward

_waiting: list[Any] = []  # modules whose forward pass has begun, and whose gradients will be summed
_timed: dict[int, int] = {}  # modules (id) that take the times of every step -> when the latest sum ended, us
_misfit = False  # this version of torch takes other times


def hook(torch: ModuleType) -> None:
    if not torch.distributed.is_available():
        return
    wrapped = functools.partial(_wrap_pre_forward, torch)
    replace(torch.nn.parallel.DistributedDataParallel, "_pre_forward", wrapped, torch)
    after_backward.append(lambda: _record_quietly(torch))


def _wrap_pre_forward(torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def begin_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(module, *args, **kwargs)
        if torch.compiler.is_compiling() or not trace.is_tracing():
            return found
        if torch.is_grad_enabled() and module.require_backward_grad_sync and module.device_type == "cpu":
            if id(module) not in _timed:
                module._set_ddp_runtime_logging_sample_rate(1)
                _timed[id(module)] = 0
            if not any(each is module for each in _waiting):
                _waiting.append(module)
        return found

    return begin_forward


def _record_quietly(torch: ModuleType) -> None:
    """The script must not fail where a record does."""
    global _misfit
    try:
        if not _misfit:
            _record_sums()
    except Exception as error:
        _misfit = True
        note_misfit(torch, "sums of gradients", f"{type(error).__name__}: {error}")


def _record_sums() -> None:
    """At the end of a backward pass, which need not be that of every module that waits for one."""
    for module in list(_waiting):
        module.logger.set_runtime_stats_and_log()
        found = module._get_ddp_logging_data()
        begin, end = (found.get(f"backward_comm_time_{which}", 0) // 1000 for which in ("start", "end"))
        if end <= _timed[id(module)]:
            continue
        _timed[id(module)] = end
        _waiting.remove(module)
        computed = found.get("backward_compute_time_end", 0) // 1000
        exposed = min(max(begin, computed), end)
        trace.record_span(
            "comm", "all_reduce", exposed, end,
            bytes=found.get("total_parameter_size_bytes", 0), hidden_us=exposed - begin,
        )  # fmt: skip
