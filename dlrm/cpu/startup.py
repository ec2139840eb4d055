"""What makes a run start sooner: work at start-up that nothing here needs is skipped."""

import importlib
import mmap
from contextlib import suppress
from typing import Any

LARGE = 32 << 20  # bytes of a tensor
PLAIN = {"size", "dtype", "device"}  # arguments of torch.zeros that `skip_first_weights` supports


def import_optimizers() -> None:
    """Import torch.distributed.optim, of which torchrec needs a few lines, without compiling TorchScript.

    It would compile optimizers for remote parameters, which takes half a second and which nothing here uses.
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


def skip_first_weights() -> Any:
    """A context in which torchrec does not draw first weights for tables that are filled afterwards.

    Only a fill with a generator of its own is done, as `tables.initialize_tables` has. Large zeros on the CPU
    are memory that the kernel clears when it is first touched, and not a second time before.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    fills = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.nn.init.uniform_, torch.nn.init.normal_)

    class SkipFills(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in fills and kwargs.get("generator") is None:
                return args[0] if args else kwargs["tensor"]
            if func is torch.zeros and str(kwargs.get("device", "cpu")) == "cpu" and kwargs.keys() <= PLAIN:
                like = torch.empty(*args, **{**kwargs, "device": "meta"})
                if like.nbytes >= LARGE:
                    return torch.frombuffer(map_zeros(like.nbytes), dtype=like.dtype).view(like.shape)
            return func(*args, **kwargs)

    return SkipFills()


def map_zeros(size: int) -> mmap.mmap:
    """Zeroed bytes that take no memory before they are used; in huge pages where the kernel has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
