"""Memory that the ranks of one host share: numbered messages through a file of each rank in /dev/shm.

Each rank owns one file. It writes message number c into slot c % SLOTS and then its counter; the others
wait for the counter, read what is theirs, and say so, which frees the slot. The files never have a name, so
nothing is left behind, however a rank ends: the others open them through /proc/PID/fd.
"""

import contextlib
import fcntl
import mmap
import os
import re
import stat
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
CHECK_SECONDS = 0.2  # between looks whether a silent peer still lives


class NotShared(Exception):
    """A rank cannot open the others' files: all ranks raise it."""


class ShmChannels:
    """Every rank's file, mapped: counters in front, slots behind."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.peers = [peer for peer in range(size) if peer != rank]
        self.files = _open_files(store, rank, size)
        self.maps = [mmap.mmap(file, HEADER + SLOTS * STRIDE) for file in self.files]
        views = [np.frombuffer(view, np.int64, SLOTS * (1 + 3 * size)) for view in self.maps]
        # of each rank, slot by slot: its latest collective + 1; each peer's bytes of it; what it has read
        self.posted = [view[:SLOTS] for view in views]
        self.parts = [view[SLOTS : SLOTS * (1 + 2 * size)].reshape(SLOTS, size, 2) for view in views]
        self.read = [view[SLOTS * (1 + 2 * size) :].reshape(size, SLOTS) for view in views]
        self.reserved = [0] * SLOTS
        self.pending: list[ArrivingMessage | None] = [None] * SLOTS
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


def _open_files(store: Any, rank: int, size: int) -> list[int]:
    files: list[int] = []
    try:
        mine = _make_file()
        store.set(f"file{rank}", f"{os.getpid()}/fd/{mine}" if mine is not None else "none")
        paths = [bytes(store.get(f"file{peer}")) for peer in range(size)]
        for peer in range(size):
            opened = mine if peer == rank else _open_file(paths[peer])
            if opened is not None:
                files.append(opened)
        store.set(f"opened{rank}", "yes" if len(files) == size else "no")
        if any(store.get(f"opened{peer}") != b"yes" for peer in range(size)):
            raise NotShared
        return files
    except BaseException:
        for file in files:
            os.close(file)
        raise


def _make_file() -> int | None:
    """Without a name; None where the file system has no such files."""
    try:
        file = os.open(FOLDER, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, HEADER)
        os.ftruncate(file, HEADER + SLOTS * STRIDE)
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel lets go of it when this process ends
    except OSError:
        os.close(file)
        return None
    return file


def _open_file(place: bytes) -> int | None:
    """Another rank's: a nameless file of this user in FOLDER, of the right size, and nothing else."""
    if not re.fullmatch(rb"[0-9]{1,10}/fd/[0-9]{1,10}", place):
        return None
    path = f"/proc/{place.decode()}"
    try:
        if not _is_segment(os.stat(path)):
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    if _is_segment(os.fstat(file)):
        return file
    os.close(file)
    return None


def _is_segment(status: os.stat_result) -> bool:
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and status.st_nlink == 0
        and status.st_size == HEADER + SLOTS * STRIDE
        and status.st_dev == os.stat(FOLDER).st_dev
    )


class ArrivingMessage:
    """What the others send under a number: put in its place when it is wanted, or when its slot is."""

    def __init__(
        self, segments: ShmChannels, number: int, place: Callable[[int, torch.Tensor], object]
    ) -> None:
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
