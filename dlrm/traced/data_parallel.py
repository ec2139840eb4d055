"""DistributedDataParallel: a span for what a backward pass waits at its end for the ranks' sums of gradients.

The sums run in C++, where nothing can be wrapped. DDP takes their times itself, for its own log, on some
steps: here on all, on CPUs. On a GPU its timers would make the loop wait for the GPU: there is no span.
"""

import functools
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import replace
from dlrm.traced.steps import after_backward

_waiting: list[Any] = []  # modules whose forward pass has begun, and whose gradients will be summed
_timed: set[int] = set()  # modules (id) that take the times of every step


def hook(torch: ModuleType) -> None:
    if not torch.distributed.is_available():
        return
    wrapped = functools.partial(_wrap_pre_forward, torch)
    replace(torch.nn.parallel.DistributedDataParallel, "_pre_forward", wrapped, torch)
    after_backward.append(record_sums)


def _wrap_pre_forward(torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def begin_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(module, *args, **kwargs)
        if torch.compiler.is_compiling() or not trace.is_tracing():
            return found
        if torch.is_grad_enabled() and module.require_backward_grad_sync and _takes_times(module):
            _waiting.append(module)
        return found

    return begin_forward


def _takes_times(module: Any) -> bool:
    if id(module) not in _timed:
        if module.device_type != "cpu":
            return False
        module._set_ddp_runtime_logging_sample_rate(1)
        _timed.add(id(module))
    return True


def record_sums() -> None:
    """At the end of a backward pass."""
    while _waiting:
        module = _waiting.pop()
        module.logger.set_runtime_stats_and_log()
        found = module._get_ddp_logging_data()
        begin, end = (found.get(f"backward_comm_time_{which}", 0) // 1000 for which in ("start", "end"))
        computed = found.get("backward_compute_time_end", 0) // 1000
        if 0 < begin <= end:
            exposed = min(max(begin, computed), end)
            trace.record_span(
                "communication", "all_reduce", exposed, end,
                bytes=found.get("total_parameter_size_bytes", 0), hidden_us=exposed - begin,
            )  # fmt: skip
