"""Ranks of one host exchange tensors through shared memory: a torch.distributed backend, CPU only.

The two collectives of every training step, all-to-all and the sum of gradients, copy through /dev/shm;
all others go to gloo, and everything does where this room has nothing to offer: several hosts, one rank,
a processor without x86's ordered stores, a small /dev/shm.

Each rank owns one file. It writes collective number c into slot c % SLOTS and then its counter; the others
wait for the counter, read what is theirs, and say so, which frees the slot. The files have no name once
all ranks have opened them, so nothing is left behind, however a rank ends.
"""

import contextlib
import fcntl
import math
import mmap
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

NAME = "shared"  # for dist.init_process_group, after `register`
FOLDER = "/dev/shm"
SLOTS = 4
HEADER = 1 << 20
STRIDE = 1 << 33  # between slots: room that costs nothing until it is written to
ENOUGH = 1 << 28  # free bytes in FOLDER per rank, for the exchange to be used
SPINS = 200  # looks at a counter before sleeping: about 100 microseconds
CHECK_SECONDS = 1.0  # between looks whether a silent peer still lives


def register() -> None:
    """Make the backend's name known to torch.distributed."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _create, devices=["cpu"])


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    store.set(f"host{rank}", _host(size))
    if size > 1 and len({store.get(f"host{peer}") for peer in range(size)} | {b""}) == 2:
        return Group(Segments(store, rank, size, timeout.total_seconds()), gloo)
    gloo._set_sequence_number_for_group()
    return gloo


def _host(size: int) -> str:
    """The same on ranks that can share memory, different or empty where they cannot."""
    if platform.machine() != "x86_64" or not os.path.isdir(FOLDER):
        return f"none {platform.node()} {os.getpid()}"
    if shutil.disk_usage(FOLDER).free < size * ENOUGH:
        return f"full {platform.node()} {os.getpid()}"
    with open("/proc/sys/kernel/random/boot_id") as text:
        return f"{text.read().strip()} {os.stat(FOLDER).st_dev}"


class Segments:
    """Every rank's file, mapped: counters in front, slots behind."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.peers = [peer for peer in range(size) if peer != rank]
        path = f"{FOLDER}/dlrm-{os.getpid()}-{time.monotonic_ns()}"
        mine = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(mine, 0, HEADER)
            os.ftruncate(mine, HEADER + SLOTS * STRIDE)
            fcntl.flock(mine, fcntl.LOCK_EX)  # the kernel lets go of it when this process ends
            store.set(f"file{rank}", path)
            paths = [store.get(f"file{peer}").decode() for peer in range(size)]
            self.files = [mine if peer == rank else os.open(paths[peer], os.O_RDWR) for peer in range(size)]
            store.set(f"opened{rank}", "")
            store.wait([f"opened{peer}" for peer in range(size)])
        finally:
            os.unlink(path)
        self.maps = [mmap.mmap(file, HEADER + SLOTS * STRIDE) for file in self.files]
        views = [np.frombuffer(view, np.int64, SLOTS * (1 + 3 * size)) for view in self.maps]
        # of each rank, slot by slot: its latest collective + 1; each peer's bytes of it; what it has read
        self.posted = [view[:SLOTS] for view in views]
        self.parts = [view[SLOTS : SLOTS * (1 + 2 * size)].reshape(SLOTS, size, 2) for view in views]
        self.read = [view[SLOTS * (1 + 2 * size) :].reshape(size, SLOTS) for view in views]
        self.reserved = [0] * SLOTS
        self.pending: list[Any] = [None] * SLOTS
        self.count = 0

    def post(self, data: torch.Tensor, parts: Sequence[tuple[int, int]]) -> int:
        """Write bytes, of which peer p reads parts[p][0] to parts[p][1]. Returns the collective's number."""
        number, slot = self.count, self.count % SLOTS
        self.count += 1
        if self.pending[slot] is not None:
            self.pending[slot].finish()
        for peer in self.peers:  # the slot's last message must have been read
            done = self.read[peer][self.rank]
            self._until(lambda done=done: done[slot] > number - SLOTS or number < SLOTS, peer)
        if data.numel() > self.reserved[slot]:
            self._reserve(slot, data.numel())
        target = self.view(self.rank, number, 0, data.numel())
        for begin, end in {parts[peer] for peer in self.peers}:  # not this rank's own
            target[begin:end].copy_(data[begin:end])
        self.parts[self.rank][slot] = parts
        self.posted[self.rank][slot] = number + 1  # last: x86 keeps the order of stores
        return number

    def _reserve(self, slot: int, size: int) -> None:
        """Memory for the slot now, where a lack of it is an error and not a SIGBUS in mid-copy."""
        if size > STRIDE:
            raise RuntimeError(
                f"{size} bytes in one message: more than the {STRIDE} of shared memory's slots"
            )
        try:
            os.posix_fallocate(self.files[self.rank], HEADER + slot * STRIDE, size)
        except OSError as error:
            raise RuntimeError(f"{FOLDER}: {error.strerror}: {size} bytes to exchange; enlarge it") from None
        self.reserved[slot] = size

    def view(self, rank: int, number: int, begin: int, end: int) -> torch.Tensor:
        """Bytes of a message where they are."""
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        start = HEADER + number % SLOTS * STRIDE + begin
        return torch.frombuffer(self.maps[rank], dtype=torch.uint8, count=end - begin, offset=start)

    def await_part(self, peer: int, number: int, part: int) -> torch.Tensor:
        """What `peer` posted under this number for `part`, once it is there."""
        slot = number % SLOTS
        posted = self.posted[peer]
        self._until(lambda: posted[slot] > number, peer)
        begin, end = self.parts[peer][slot][part].tolist()
        return self.view(peer, number, begin, end)

    def done(self, peer: int, number: int) -> None:
        self.read[self.rank][peer][number % SLOTS] = number + 1

    def _until(self, ready: Callable[[], bool], peer: int) -> None:
        for _ in range(SPINS):
            if ready():
                return
            os.sched_yield()
        begun = checked = time.monotonic()
        pause = 2e-5
        while not ready():
            time.sleep(pause)
            pause = min(pause * 1.5, 1e-3)
            now = time.monotonic()
            if now - checked > CHECK_SECONDS:
                checked = now
                if self._dead(peer) and not ready():
                    raise RuntimeError(f"rank {peer} has ended while rank {self.rank} waited for its data")
            if now - begun > self.timeout:
                raise RuntimeError(f"rank {peer} has sent nothing to rank {self.rank} in {self.timeout:g} s")

    def _dead(self, peer: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.files[peer], fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self.files[peer], fcntl.LOCK_UN)
            return True
        return False


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _Done(dist._Work):
    """A collective that is over, with the future that DistributedDataParallel asks for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class _Receive(dist._Work):
    """An all-to-all that was posted; what the others sent is copied when it is waited for."""

    def __init__(
        self, segments: Segments, number: int, output: torch.Tensor, parts: list[tuple[int, int]]
    ) -> None:
        super().__init__()
        self._segments, self._number, self._parts = segments, number, parts
        self._output: torch.Tensor | None = output
        segments.pending[number % SLOTS] = self

    def wait(self, timeout: Any = None) -> bool:
        self.finish()
        return True

    def get_future(self) -> Any:
        self.finish()
        return _Done([]).get_future()

    def finish(self) -> None:
        if self._output is None:
            return
        segments, target = self._segments, _bytes(self._output)
        for peer in segments.peers:
            part = segments.await_part(peer, self._number, segments.rank)
            begin, end = self._parts[peer]
            if part.numel() != end - begin:
                sent, wanted = part.numel(), end - begin
                raise RuntimeError(
                    f"rank {peer} sent {sent} bytes where rank {segments.rank} expected {wanted}"
                )
            target[begin:end].copy_(part)
            segments.done(peer, self._number)
        self._output = None
        segments.pending[self._number % SLOTS] = None


class Group(dist.ProcessGroup):
    """The process group: all-to-all and sums through `Segments`, all others through gloo."""

    def __init__(self, segments: Segments, gloo: Any) -> None:
        super().__init__(segments.rank, segments.size)  # type: ignore[call-arg]
        self._segments, self._gloo = segments, gloo
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        tensors = tensors if isinstance(tensors, list) else [tensors]
        opts = dist.AllreduceOptions() if opts is None else opts
        floats = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
        if opts.reduceOp != dist.ReduceOp.SUM or not floats:
            return self._gloo.allreduce(tensors, opts)
        for tensor in tensors:
            flat = tensor.detach().contiguous().view(-1)
            self._sum(flat)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))
        return _Done(tensors)

    def _sum(self, flat: torch.Tensor) -> None:
        """In place. Each rank adds up one section, in rank order, and gives it to all: equal bits."""
        segments, rank, size = self._segments, self._segments.rank, self._segments.size
        width = flat.element_size()
        share = -(-flat.numel() // size) * width
        data = _bytes(flat)
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
        total = _bytes(mine)
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
        segments = self._segments
        goes = _parts(input, input_splits, segments.size)
        comes = _parts(output, output_splits, segments.size)
        if not output.is_contiguous():
            raise ValueError("all-to-all needs a contiguous output")
        (begin, end), (to, until) = goes[segments.rank], comes[segments.rank]
        data = _bytes(input)
        _bytes(output)[to:until].copy_(data[begin:end])
        return _Receive(segments, segments.post(data, goes), output, comes)


def _through_gloo(name: str) -> Callable[..., Any]:
    def call(self: Group, *arguments: Any, **options: Any) -> Any:
        return getattr(self._gloo, name)(*arguments, **options)

    return call


# by hand: left to torch's own dispatch to the registered backend, allgather and broadcast hang (torch 2.13)
for _name, _gloo_name in {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    **{
        name: name
        for name in (
            "_allgather_base", "_reduce_scatter_base", "allgather", "allgather_coalesced",
            "allreduce_coalesced", "alltoall", "barrier", "broadcast", "gather", "monitored_barrier",
            "recv", "recv_anysource", "reduce", "reduce_scatter", "scatter", "send",
        )
    },
}.items():  # fmt: skip
    setattr(Group, _name, _through_gloo(_gloo_name))
setattr(Group, "alltoall_base", Group.all_to_all_single)  # noqa: B010 (its older name)


def _parts(tensor: torch.Tensor, splits: Sequence[int], size: int) -> list[tuple[int, int]]:
    """First and last byte of each rank's rows."""
    rows = list(splits) or [tensor.size(0) // size] * size
    if sum(rows) != tensor.size(0):
        raise ValueError(f"splits {rows} do not add up to the {tensor.size(0)} rows of the tensor")
    row = tensor.element_size() * math.prod(tensor.shape[1:])
    return list(pairwise(accumulate([0, *(count * row for count in rows)])))
