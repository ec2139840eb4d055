"""Ranks of one host exchange tensors through shared memory: a torch.distributed backend, CPU only.

The two collectives of every training step, all-to-all and the sum of gradients, copy through /dev/shm.
All others use gloo, and all do where shared memory does not work: several hosts, one rank, a processor
without x86's ordered stores, a small /dev/shm, ranks that cannot see each other's processes.
"""

import contextlib
import math
import os
import platform
import shutil
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist

from common.owned import remove_dead_segments
from dlrm.cpu.shared_memory import FOLDER, HEADER, SLOTS, STRIDE, ArrivingMessage, NotShared, ShmChannels
from dlrm.runtime import gloo, trace
from dlrm.runtime.gloo import FinishedWork, UnevenGloo

NAME = "shared"  # for dist.init_process_group, after `register_backend`
ENOUGH = 1 << 28  # free bytes in FOLDER per rank, for shared memory to be used


def register_backend(device: torch.device) -> str:
    """Make the backend known to torch.distributed; returns its name. The hook `choose_backend`."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _create_shared, devices=["cpu"])
    return NAME


def _create_shared(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """What torch.distributed calls for the backend: a ShmProcessGroup where all ranks can share memory, else
    gloo's. `store`: torch's, with a prefix of this group.
    """
    store.set(f"host{rank}", _make_shared_memory_id(size))
    group = gloo.create_gloo(store, rank, size, timeout)
    hosts = {store.get(f"host{peer}") for peer in range(size)}
    if size > 1 and len(hosts | {b""}) == 2:
        remove_dead_segments(FOLDER, (0, HEADER, HEADER + SLOTS * STRIDE))
        with contextlib.suppress(NotShared):
            return ShmProcessGroup(ShmChannels(store, rank, size, timeout.total_seconds()), group.gloo)
    return group


def _make_shared_memory_id(size: int) -> str:
    """A text that is the same on ranks that can share memory, and different on all others."""
    if platform.machine() != "x86_64" or not os.path.isdir(FOLDER):
        return f"none {platform.node()} {os.getpid()}"
    if shutil.disk_usage(FOLDER).free < size * ENOUGH:
        return f"full {platform.node()} {os.getpid()}"
    with open("/proc/sys/kernel/random/boot_id") as text:
        return f"{text.read().strip()} {os.stat(FOLDER).st_dev} {os.stat('/proc/self/ns/pid').st_ino}"


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _ReceivingWork(dist._Work):
    """An all-to-all that was posted; what the others sent is copied when it is waited for."""

    def __init__(self, arriving: ArrivingMessage) -> None:
        super().__init__()
        self._arriving = arriving

    def wait(self, timeout: Any = None) -> bool:
        self._arriving.receive_parts()
        return True

    def get_future(self) -> Any:
        self._arriving.receive_parts()
        return FinishedWork([]).get_future()


class ShmProcessGroup(UnevenGloo):
    """The process group: all-to-all and sums through `ShmChannels`, all other collectives through gloo."""

    def __init__(self, segments: ShmChannels, gloo: Any) -> None:
        super().__init__(gloo)
        self.segments = segments

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors = tensors if isinstance(tensors, list) else [tensors]
        opts = dist.AllreduceOptions() if opts is None else opts
        floats = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
        if opts.reduceOp != dist.ReduceOp.SUM or not floats:
            return self.gloo.allreduce(tensors, opts)
        # DistributedDataParallel calls this inside the backward pass, which is compute but for this span
        with trace.span("comm", "all_reduce", bytes=sum(tensor.nbytes for tensor in tensors)):
            for tensor in tensors:
                flat = tensor.detach().contiguous().view(-1)
                self._sum_in_place(flat)
                if not tensor.is_contiguous():
                    tensor.detach().copy_(flat.view(tensor.shape))
        return FinishedWork(tensors)

    def _sum_in_place(self, flat: torch.Tensor) -> None:
        """Sum `flat` [n] over the ranks, in place, with the same bits on all ranks.

        Each rank sums one section, in rank order, and sends it to all.
        """
        segments, rank, size = self.segments, self.segments.rank, self.segments.size
        width = flat.element_size()
        section = -(-flat.numel() // size) * width
        data = _as_bytes(flat)
        cuts = [min(section * peer, data.numel()) for peer in range(size + 1)]
        number = segments.post_copy(data, list(pairwise(cuts)))
        mine = flat[cuts[rank] // width : cuts[rank + 1] // width]
        parts = [
            segments.await_part(peer, number, rank).view(flat.dtype) if peer != rank else mine.clone()
            for peer in range(size)
        ]
        torch.add(parts[0], parts[1], out=mine)
        for part in parts[2:]:
            mine.add_(part)
        for peer in segments.peers:
            segments.mark_read(peer, number)
        total = _as_bytes(mine)
        number = segments.post_copy(total, [(0, total.numel())] * size)
        for peer in segments.peers:
            data[cuts[peer] : cuts[peer + 1]].copy_(segments.await_part(peer, number, rank))
            segments.mark_read(peer, number)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Any,
        input_splits: Any,
        opts: Any = None,
    ) -> Any:
        """input [rows to send, ...] -> output [rows received, ...], in the order of the ranks.
        `output_splits`, `input_splits`: rows from and to each rank; empty: the same number for each.
        """
        segments = self.segments
        sent = _split_sizes(input, input_splits, segments.size)
        received = _split_sizes(output, output_splits, segments.size)
        if not output.is_contiguous():
            raise ValueError("all-to-all needs a contiguous output")
        (begin, end), (to, to_end) = sent[segments.rank], received[segments.rank]
        data = _as_bytes(input)
        _as_bytes(output)[to:to_end].copy_(data[begin:end])
        target, rank = _as_bytes(output), segments.rank

        def place_part(peer: int, part: torch.Tensor) -> None:
            begin, end = received[peer]
            if part.numel() != end - begin:
                sizes = f"{part.numel()} bytes, rank {rank} expected {end - begin}"
                raise RuntimeError(f"rank {peer} sent {sizes}")
            target[begin:end].copy_(part)

        return _ReceivingWork(ArrivingMessage(segments, segments.post_copy(data, sent), place_part))


setattr(ShmProcessGroup, "alltoall_base", ShmProcessGroup.all_to_all_single)  # noqa: B010 (torch's older name for it)


def _split_sizes(tensor: torch.Tensor, splits: Sequence[int], size: int) -> list[tuple[int, int]]:
    """First byte, and byte after the last, of each rank's rows. splits: rows of each rank; empty: equal."""
    rows = list(splits) or [tensor.size(0) // size] * size
    if sum(rows) != tensor.size(0):
        raise ValueError(f"splits {rows} do not add up to the {tensor.size(0)} rows of the tensor")
    row = tensor.element_size() * math.prod(tensor.shape[1:])
    return list(pairwise(accumulate([0, *(count * row for count in rows)])))
