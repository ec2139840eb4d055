"""Memory that the ranks of one host share: numbered messages through a file of each rank in /dev/shm.

Each rank owns one file. It writes message number c into slot c % SLOTS and then its counter; the others wait
for the counter, read their part, and mark it as read, which frees the slot. The files never have a name, so
they are gone when the ranks have ended, however they end: the others open them through /proc/PID/fd.
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
STRIDE = 1 << 33  # bytes between slots: address space, which takes no memory until it is written to
SPINS = 200  # checks of a counter before sleeping: about 100 microseconds
CHECK_SECONDS = 0.2  # between checks whether a peer that is waited for is still alive


class NotShared(Exception):
    """A rank cannot open the others' files; raised on all ranks."""


class ShmChannels:
    """All ranks' files, mapped: counters, then slots.

    store: of torch.distributed, for the files' paths. timeout: seconds to wait for a peer's data.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        """rank, size: of the process group, all ranks of which are on this host."""
        self.rank, self.size, self.timeout = rank, size, timeout
        self.peers = [peer for peer in range(size) if peer != rank]
        self.files = _open_files(store, rank, size)
        self.maps = [mmap.mmap(file, HEADER + SLOTS * STRIDE) for file in self.files]
        views = [np.frombuffer(view, np.int64, SLOTS * (1 + 3 * size)) for view in self.maps]
        # of each rank and slot: number of its latest message + 1; begin and end of each peer's part of it;
        # number + 1 of the message of each peer that it has read last
        self.posted = [view[:SLOTS] for view in views]
        self.parts = [view[SLOTS : SLOTS * (1 + 2 * size)].reshape(SLOTS, size, 2) for view in views]
        self.read = [view[SLOTS * (1 + 2 * size) :].reshape(size, SLOTS) for view in views]
        self.reserved = [0] * SLOTS
        self.pending: list[ArrivingMessage | None] = [None] * SLOTS
        self.count = 0

    def begin_message(self, size: int) -> tuple[int, torch.Tensor]:
        """(number of the next message, uint8 [size] to write it to). Waits until all have read the slot."""
        number, slot = self.count, self.count % SLOTS
        self.count += 1
        arriving = self.pending[slot]
        if arriving is not None:
            arriving.receive_parts()
        for peer in self.peers:
            done = self.read[peer][self.rank]
            self._wait_until(lambda done=done: done[slot] > number - SLOTS or number < SLOTS, peer)
        if size > self.reserved[slot]:
            self._reserve_memory(slot, size)
        return number, self.view_part(self.rank, number, 0, size)

    def send_message(self, number: int, parts: Sequence[tuple[int, int]]) -> None:
        """Publish a message that was written: bytes parts[p][0] to parts[p][1] - 1 of it are for peer p."""
        slot = number % SLOTS
        self.parts[self.rank][slot] = parts
        self.posted[self.rank][slot] = number + 1  # written last: x86 keeps the order of stores

    def post_copy(self, data: torch.Tensor, parts: Sequence[tuple[int, int]]) -> int:
        """Send a copy of `data` (uint8 [n]); parts: see `send`. Returns the message's number."""
        number, target = self.begin_message(data.numel())
        for begin, end in {parts[peer] for peer in self.peers}:  # not this rank's own
            target[begin:end].copy_(data[begin:end])
        self.send_message(number, parts)
        return number

    def _reserve_memory(self, slot: int, size: int) -> None:
        """Allocate the slot's memory now: a lack of it is an error here, but a SIGBUS during a copy."""
        if size > STRIDE:
            raise RuntimeError(
                f"{size} bytes in one message, {FOLDER} has slots of {STRIDE}: give --no-cpu_fast_path"
            )
        try:
            os.posix_fallocate(self.files[self.rank], HEADER + slot * STRIDE, size)
        except OSError as error:
            raise RuntimeError(
                f"{FOLDER}: {error.strerror}: {size} bytes needed; enlarge it, or give --no-cpu_fast_path"
            ) from None
        self.reserved[slot] = size

    def view_part(self, rank: int, number: int, begin: int, end: int) -> torch.Tensor:
        """Bytes begin to end - 1 of a rank's message, uint8, without a copy."""
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        start = HEADER + number % SLOTS * STRIDE + begin
        return torch.frombuffer(self.maps[rank], dtype=torch.uint8, count=end - begin, offset=start)

    def await_part(self, peer: int, number: int, part: int) -> torch.Tensor:
        """The part for rank `part` of the peer's message, uint8, without a copy. Waits for it."""
        slot = number % SLOTS
        posted = self.posted[peer]
        self._wait_until(lambda: posted[slot] > number, peer)
        begin, end = self.parts[peer][slot][part].tolist()
        return self.view_part(peer, number, begin, end)

    def mark_read(self, peer: int, number: int) -> None:
        """Mark the peer's message as read by this rank."""
        self.read[self.rank][peer][number % SLOTS] = number + 1

    def _wait_until(self, ready: Callable[[], bool], peer: int) -> None:
        for _ in range(SPINS):
            if ready():
                return
            os.sched_yield()
        start = checked = now = time.monotonic()
        while not ready():
            time.sleep(min(max(2e-5, (now - start) / 16), 1e-3))  # short sleeps after short waits
            now = time.monotonic()
            if now - checked > CHECK_SECONDS:
                checked = now
                if self._has_ended(peer) and not ready():
                    raise RuntimeError(f"rank {peer} has ended while rank {self.rank} waited for its data")
            if now - start > self.timeout:
                raise RuntimeError(f"rank {peer} has sent nothing to rank {self.rank} in {self.timeout:g} s")

    def _has_ended(self, peer: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.files[peer], fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self.files[peer], fcntl.LOCK_UN)
            return True
        return False


def _open_files(store: Any, rank: int, size: int) -> list[int]:
    """Descriptors of all ranks' files, in rank order. NotShared on all ranks where one cannot open all."""
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
    """A file without a name; None where the file system cannot make one."""
    try:
        file = os.open(FOLDER, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, HEADER)
        os.ftruncate(file, HEADER + SLOTS * STRIDE)
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel releases it when this process ends
    except OSError:
        os.close(file)
        return None
    return file


def _open_file(location: bytes) -> int | None:
    """Another rank's file: only a file without a name, of this user, in FOLDER and of the right size."""
    if not re.fullmatch(rb"[0-9]{1,10}/fd/[0-9]{1,10}", location):
        return None
    path = f"/proc/{location.decode()}"
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
    """The others' messages of one number, copied to their targets when needed, or when the slot is.

    place: called once for each peer with (peer, uint8 bytes for this rank).
    """

    def __init__(
        self, segments: ShmChannels, number: int, place: Callable[[int, torch.Tensor], object]
    ) -> None:
        self._segments, self._number = segments, number
        self._place: Callable[[int, torch.Tensor], object] | None = place  # (peer, its bytes for this rank)
        segments.pending[number % SLOTS] = self

    def receive_parts(self) -> None:
        if self._place is None:
            return
        segments, number = self._segments, self._number
        for peer in segments.peers:
            self._place(peer, segments.await_part(peer, number, segments.rank))
            segments.mark_read(peer, number)
        self._place = None
        segments.pending[number % SLOTS] = None
