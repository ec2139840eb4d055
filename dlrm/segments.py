"""Memory that the ranks of one host share: numbered messages through a file of each rank in /dev/shm.

Each rank owns one file. It writes message number c into slot c % SLOTS and then its counter; the others
wait for the counter, read what is theirs, and say so, which frees the slot. The files have no name once
all ranks have opened them, so nothing is left behind, however a rank ends.
"""

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

FOLDER = "/dev/shm"
SLOTS = 4
HEADER = 1 << 20
STRIDE = 1 << 33  # between slots: room that costs nothing until it is written to
SPINS = 200  # looks at a counter before sleeping: about 100 microseconds
CHECK_SECONDS = 1.0  # between looks whether a silent peer still lives


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
        self.pending: list[Arriving | None] = [None] * SLOTS
        self.count = 0

    def begin(self, size: int) -> tuple[int, torch.Tensor]:
        """The next message's number, and room for its bytes once all have read what was there."""
        number, slot = self.count, self.count % SLOTS
        self.count += 1
        arriving = self.pending[slot]
        if arriving is not None:
            arriving.finish()
        for peer in self.peers:
            done = self.read[peer][self.rank]
            self._until(lambda done=done: done[slot] > number - SLOTS or number < SLOTS, peer)
        if size > self.reserved[slot]:
            self._reserve(slot, size)
        return number, self.view(self.rank, number, 0, size)

    def send(self, number: int, parts: Sequence[tuple[int, int]]) -> None:
        """The message is written: peer p may read bytes parts[p][0] to parts[p][1] of it."""
        slot = number % SLOTS
        self.parts[self.rank][slot] = parts
        self.posted[self.rank][slot] = number + 1  # last: x86 keeps the order of stores

    def post(self, data: torch.Tensor, parts: Sequence[tuple[int, int]]) -> int:
        """Send a copy of bytes. Returns the message's number."""
        number, target = self.begin(data.numel())
        for begin, end in {parts[peer] for peer in self.peers}:  # not this rank's own
            target[begin:end].copy_(data[begin:end])
        self.send(number, parts)
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
        begun = checked = now = time.monotonic()
        while not ready():
            time.sleep(min(max(2e-5, (now - begun) / 16), 1e-3))  # so that little is overslept
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


class Arriving:
    """What the others send under a number: put in its place when it is wanted, or when its slot is."""

    def __init__(self, segments: Segments, number: int, place: Callable[[int, torch.Tensor], object]) -> None:
        self._segments, self._number = segments, number
        self._place: Callable[[int, torch.Tensor], object] | None = place  # (peer, its bytes for this rank)
        segments.pending[number % SLOTS] = self

    def finish(self) -> None:
        if self._place is None:
            return
        segments, number = self._segments, self._number
        for peer in segments.peers:
            self._place(peer, segments.await_part(peer, number, segments.rank))
            segments.done(peer, number)
        self._place = None
        segments.pending[number % SLOTS] = None
