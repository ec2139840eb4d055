"""torch.distributed: each collective and message as a span with its bytes, and the clocks of the hosts.

Those that DistributedDataParallel makes itself run in C++: see data_parallel.
"""

import functools
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced import clocks
from dlrm.traced.hooks import replace

# function -> the argument that holds what this rank sends, or receives: its place and its name
COLLECTIVES: dict[str, tuple[int, str] | None] = {
    "all_reduce": (0, "tensor"), "reduce": (0, "tensor"), "broadcast": (0, "tensor"),
    "all_gather": (1, "tensor"), "all_gather_into_tensor": (1, "input_tensor"), "gather": (0, "tensor"),
    "scatter": (0, "tensor"), "reduce_scatter": (1, "input_list"), "reduce_scatter_tensor": (1, "input"),
    "all_to_all": (1, "input_tensor_list"), "all_to_all_single": (1, "input"),
    "send": (0, "tensor"), "recv": (0, "tensor"), "isend": (0, "tensor"), "irecv": (0, "tensor"),
    "barrier": None, "monitored_barrier": None, "all_gather_object": None, "gather_object": None,
    "broadcast_object_list": None, "scatter_object_list": None,
}  # fmt: skip


def hook(torch: ModuleType) -> None:
    if not torch.distributed.is_available():
        return
    inner, outer = torch.distributed.distributed_c10d, torch.distributed
    for name, counted in COLLECTIVES.items():
        if hasattr(inner, name):
            replace(
                inner, name, lambda original, counted=counted: _as_collective(torch, original, counted), torch
            )
            setattr(outer, name, getattr(inner, name))
    replace(
        torch._C._distributed_c10d.Work, "wait", lambda original: _as_collective(torch, original, None), torch
    )
    for name, wrap in (
        ("init_process_group", clocks.wrap_init), ("destroy_process_group", clocks.wrap_destroy),
    ):  # fmt: skip
        replace(inner, name, lambda original, wrap=wrap: wrap(torch, original), torch)
        setattr(outer, name, getattr(inner, name))


def _as_collective(torch: Any, function: Any, counted: tuple[int, str] | None) -> Any:
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # torch.compile looks through this: it must see torch's function and nothing else
        if torch.compiler.is_compiling() or not trace.is_tracing():
            return function(*args, **kwargs)
        size = {"bytes": _count_bytes(counted, args, kwargs)} if counted else {}
        with trace.span("comm", name, **size):
            return function(*args, **kwargs)

    return call


def _count_bytes(counted: tuple[int, str], args: Any, kwargs: Any) -> int:
    place, name = counted
    value = args[place] if len(args) > place else kwargs.get(name)
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(getattr(each, "nbytes", 0) for each in tensors)
