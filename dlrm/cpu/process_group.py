"""Ranks of one host exchange tensors through shared memory: a torch.distributed backend, CPU only.

The two collectives of every training step, all-to-all and the sum of gradients, copy through /dev/shm;
all others go to gloo, and everything does where this room has nothing to offer: several hosts, one rank,
a processor without x86's ordered stores, a small /dev/shm, ranks that cannot see each other's processes.
"""

import contextlib
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist

from common.owned import remove_dead_segments
from dlrm.cpu.shared_memory import FOLDER, HEADER, SLOTS, STRIDE, ArrivingMessage, NotShared, ShmChannels

NAME = "shared"  # for dist.init_process_group, after `register_backends`
GLOO = "gloo_uneven"  # likewise: without shared memory
ENOUGH = 1 << 28  # free bytes in FOLDER per rank, for the exchange to be used


def register_backends() -> None:
    """Make the backends' names known to torch.distributed."""
    for name, create in ((NAME, _create_shared), (GLOO, _create_gloo)):
        if not hasattr(dist.Backend, name.upper()):
            dist.Backend.register_backend(name, create, devices=["cpu"])


def _create_shared(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    store.set(f"host{rank}", _shared_memory_id(size))
    group = _create_gloo(store, rank, size, timeout)
    hosts = {store.get(f"host{peer}") for peer in range(size)}
    if size > 1 and len(hosts | {b""}) == 2:
        remove_dead_segments(FOLDER, (0, HEADER, HEADER + SLOTS * STRIDE))
        with contextlib.suppress(NotShared):
            return ShmProcessGroup(ShmChannels(store, rank, size, timeout.total_seconds()), group.gloo)
    return group


def _create_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    gloo._set_sequence_number_for_group()
    return gloo if size == 1 else UnevenGloo(gloo)


def _shared_memory_id(size: int) -> str:
    """The same on ranks that can share memory, different or empty where they cannot."""
    if platform.machine() != "x86_64" or not os.path.isdir(FOLDER):
        return f"none {platform.node()} {os.getpid()}"
    if shutil.disk_usage(FOLDER).free < size * ENOUGH:
        return f"full {platform.node()} {os.getpid()}"
    with open("/proc/sys/kernel/random/boot_id") as text:
        return f"{text.read().strip()} {os.stat(FOLDER).st_dev} {os.stat('/proc/self/ns/pid').st_ino}"


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _FinishedWork(dist._Work):
    """A collective that is over, with the future that DistributedDataParallel asks for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class _ReceivingWork(dist._Work):
    """An all-to-all that was posted; what the others sent is copied when it is waited for."""

    def __init__(self, arriving: ArrivingMessage) -> None:
        super().__init__()
        self._arriving = arriving

    def wait(self, timeout: Any = None) -> bool:
        self._arriving.finish()
        return True

    def get_future(self) -> Any:
        self._arriving.finish()
        return _FinishedWork([]).get_future()


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
        return _FinishedWork(gathered)


class ShmProcessGroup(UnevenGloo):
    """The process group: all-to-all and sums through `ShmChannels`, all others through gloo."""

    def __init__(self, segments: ShmChannels, gloo: Any) -> None:
        super().__init__(gloo)
        self.segments = segments

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors = tensors if isinstance(tensors, list) else [tensors]
        opts = dist.AllreduceOptions() if opts is None else opts
        floats = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
        if opts.reduceOp != dist.ReduceOp.SUM or not floats:
            return self.gloo.allreduce(tensors, opts)
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(-1)
            self._sum(flat)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))
        return _FinishedWork(tensors)

    def _sum(self, flat: torch.Tensor) -> None:
        """In place. Each rank adds up one section, in rank order, and gives it to all: equal bits."""
        segments, rank, size = self.segments, self.segments.rank, self.segments.size
        width = flat.element_size()
        share = -(-flat.numel() // size) * width
        data = _as_bytes(flat)
        cuts = [min(share * peer, data.numel()) for peer in range(size + 1)]
        number = segments.post(data, list(pairwise(cuts)))
        mine = flat[cuts[rank] // width : cuts[rank + 1] // width]
        parts = [
            segments.await_part(peer, number, rank).view(flat.dtype) if peer != rank else mine.clone()
            for peer in range(size)
        ]
        torch.add(parts[0], parts[1], out=mine)
        for part in parts[2:]:
            mine.add_(part)
        for peer in segments.peers:
            segments.done(peer, number)
        total = _as_bytes(mine)
        number = segments.post(total, [(0, total.numel())] * size)
        for peer in segments.peers:
            data[cuts[peer] : cuts[peer + 1]].copy_(segments.await_part(peer, number, rank))
            segments.done(peer, number)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Any,
        input_splits: Any,
        opts: Any = None,
    ) -> Any:
        segments = self.segments
        goes = _split_sizes(input, input_splits, segments.size)
        comes = _split_sizes(output, output_splits, segments.size)
        if not output.is_contiguous():
            raise ValueError("all-to-all needs a contiguous output")
        (begin, end), (to, until) = goes[segments.rank], comes[segments.rank]
        data = _as_bytes(input)
        _as_bytes(output)[to:until].copy_(data[begin:end])
        target, rank = _as_bytes(output), segments.rank

        def place(peer: int, part: torch.Tensor) -> None:
            begin, end = comes[peer]
            if part.numel() != end - begin:
                sent, wanted = part.numel(), end - begin
                raise RuntimeError(f"rank {peer} sent {sent} bytes where rank {rank} expected {wanted}")
            target[begin:end].copy_(part)

        return _ReceivingWork(ArrivingMessage(segments, segments.post(data, goes), place))


def _through_gloo(name: str) -> Callable[..., Any]:
    def call(self: UnevenGloo, *arguments: Any, **options: Any) -> Any:
        return getattr(self.gloo, name)(*arguments, **options)

    return call


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
setattr(ShmProcessGroup, "alltoall_base", ShmProcessGroup.all_to_all_single)  # noqa: B010 (its older name)


def _split_sizes(tensor: torch.Tensor, splits: Sequence[int], size: int) -> list[tuple[int, int]]:
    """First and last byte of each rank's rows."""
    rows = list(splits) or [tensor.size(0) // size] * size
    if sum(rows) != tensor.size(0):
        raise ValueError(f"splits {rows} do not add up to the {tensor.size(0)} rows of the tensor")
    row = tensor.element_size() * math.prod(tensor.shape[1:])
    return list(pairwise(accumulate([0, *(count * row for count in rows)])))
