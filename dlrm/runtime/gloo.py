"""The process group of CPU ranks: gloo, which also gathers parts of different sizes."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "gloo_uneven"  # for dist.init_process_group, after `register_backend`


def register_backend() -> str:
    """Make the backend known to torch.distributed; returns its name."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, create_gloo, devices=["cpu"])
    return NAME


def create_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """The process group on this store: of one rank torch's own, of several `UnevenGloo`."""
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    gloo._set_sequence_number_for_group()
    return gloo if size == 1 else UnevenGloo(gloo)


class FinishedWork(dist._Work):
    """A collective that is over, with the future that DistributedDataParallel asks for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class UnevenGloo(dist.ProcessGroup):
    """gloo, which also gathers parts of different sizes: the last batch may have a row less on some ranks."""

    def __init__(self, gloo: Any) -> None:
        super().__init__(gloo.rank(), gloo.size())  # type: ignore[call-arg]
        self.gloo = gloo
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        (gathered, *_), (mine, *_) = outputs, inputs
        if len({part.shape for part in gathered}) == 1:
            return self.gloo.allgather(outputs, inputs, *([opts] if opts else []))
        longest = max(part.numel() for part in gathered)
        padded = torch.nn.functional.pad(mine.detach().reshape(-1), (0, longest - mine.numel()))
        whole = [torch.empty_like(padded) for _ in gathered]
        self.gloo.allgather([whole], [padded]).wait()
        for part, all_of_it in zip(gathered, whole, strict=True):
            part.copy_(all_of_it[: part.numel()].view(part.shape))
        return FinishedWork(gathered)


def _through_gloo(name: str) -> Callable[..., Any]:
    def call_gloo(self: UnevenGloo, *arguments: Any, **options: Any) -> Any:
        return getattr(self.gloo, name)(*arguments, **options)

    return call_gloo


# by hand: left to torch's own dispatch to the registered backend, allgather and broadcast hang (torch 2.13)
for _name, _gloo_name in {
    "all_gather_single": "_allgather_base",
    "all_to_all_single": "alltoall_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    **{
        name: name
        for name in (
            "_allgather_base", "_reduce_scatter_base", "allgather_coalesced", "allreduce",
            "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather",
            "monitored_barrier", "recv", "recv_anysource", "reduce", "reduce_scatter", "scatter", "send",
        )
    },
}.items():  # fmt: skip
    setattr(UnevenGloo, _name, _through_gloo(_gloo_name))
