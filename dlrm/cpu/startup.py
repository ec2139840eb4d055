"""What makes a run begin sooner: work at start-up that nothing here needs, left undone."""

import gc
import importlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# huge pages for large tensors: some thousand page faults less in each step. torch looks when it is imported.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
LARGE = 32 << 20  # bytes of a tensor
PLAIN = {"size", "dtype", "device"}  # what torch.zeros may be told of such a one


def before_torch() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def importing() -> Iterator[None]:
    """Import torch, torchrec and what builds on them within."""
    before_torch()
    gc.disable()  # nothing that is imported is garbage
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # nor will it be


def import_optimizers() -> None:
    """torch.distributed.optim, which torchrec needs a few lines of, without half a second of TorchScript.

    It compiles optimizers for remote parameters when it is imported; without it they are plain Python.
    """
    import torch.jit

    state: Any = getattr(torch.jit, "_state", None)
    if not all(hasattr(state, name) for name in ("disable", "enable", "_enabled")) or not state._enabled:
        return
    state.disable()
    try:
        importlib.import_module("torch.distributed.optim")
    finally:
        state.enable()


def unfilled() -> Any:
    """A context in which torchrec does not draw first weights for tables that are filled afterwards.

    Only a fill that names its own generator, as `tables.initialise` does, is done. Large zeros on the CPU are
    memory that the kernel clears when it is first touched, and not a second time before.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    fills = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.nn.init.uniform_, torch.nn.init.normal_)

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in fills and kwargs.get("generator") is None:
                return args[0] if args else kwargs["tensor"]
            if func is torch.zeros and str(kwargs.get("device", "cpu")) == "cpu" and kwargs.keys() <= PLAIN:
                like = torch.empty(*args, **{**kwargs, "device": "meta"})
                if like.nbytes >= LARGE:
                    return torch.frombuffer(untouched(like.nbytes), dtype=like.dtype).view(like.shape)
            return func(*args, **kwargs)

    return Unfilled()


def untouched(size: int) -> mmap.mmap:
    """Bytes that are zero, in huge pages where there are."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
