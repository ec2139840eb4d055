"""Memory limits for one file at a time, without control groups: the page cache is trimmed between steps.

A mapped file keeps its most recently used pages. Their order costs it nothing here, nor does the choice of
what leaves, nor handing changed pages to the disk: it only waits, a batch later, until they are written. A
kernel that has to find out by itself is not faster. A row cache keeps the pages of three batches' misses.
"""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np

PAGE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)
WAIT_BEFORE, WRITE, WAIT_AFTER = 1, 2, 4  # of sync_file_range


def fetch_memory() -> None:
    """A virtual machine's unused memory goes back to its host; a page cache fills slowly until it is back."""
    with mmap.mmap(-1, 2 << 30) as memory:
        for page in range(0, len(memory), PAGE):
            memory[page] = 1


def _sync(file: int, begin: int, size: int, how: int) -> float:
    """Seconds. Size 0: to the end."""
    begun = time.perf_counter()
    if LIBC.sync_file_range(file, ctypes.c_int64(begin), ctypes.c_int64(size), how):
        raise OSError(ctypes.get_errno(), "sync_file_range")
    return time.perf_counter() - begun


def drop_from_cache(file: int) -> None:
    """Nothing of the file stays in the page cache."""
    _sync(file, 0, 0, WAIT_BEFORE | WRITE | WAIT_AFTER)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def find_runs(pages: np.ndarray) -> list[tuple[int, int]]:
    """(first byte, bytes) of pages that follow each other; the pages are in ascending order."""
    cuts = np.flatnonzero(np.diff(pages) > 1) + 1
    return [(int(run[0]) * PAGE, len(run) * PAGE) for run in np.split(pages, cuts) if len(run)]


class Leaving:
    """Pages on their way out of the page cache: to the disk after one batch, gone after the next."""

    def __init__(self, file: int) -> None:
        self.file, self.pages = file, np.empty(0, np.int64)

    def evict_pages(self, pages: np.ndarray, needed: np.ndarray) -> float:
        """These from now on, those of the last call at once but for `needed`; seconds to wait for writes."""
        seconds = _sync(self.file, 0, 0, WAIT_BEFORE)
        for begin, size in find_runs(np.setdiff1d(self.pages, needed)):
            os.posix_fadvise(self.file, begin, size, os.POSIX_FADV_DONTNEED)
        for begin, size in find_runs(pages):
            _sync(self.file, begin, size, WRITE)
        self.pages = pages
        return seconds


def find_pages(rows: np.ndarray, row_bytes: int) -> np.ndarray:
    first = rows * row_bytes
    return np.unique(np.concatenate((first // PAGE, (first + row_bytes - 1) // PAGE)))


def count_resident_bytes(path: Path) -> int:
    """Bytes of a file in the page cache."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as whole:
        here = (ctypes.c_ubyte * -(-len(whole) // PAGE))()
        start = ctypes.c_char.from_buffer(whole)
        LIBC.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(whole)), here)
        del start
        return int((np.frombuffer(bytes(here), np.uint8) & 1).sum()) * PAGE


def count_pages_read() -> int:
    """That this process has had fetched from disks so far, by reads, by faults and by announcing them."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("\nread_bytes: ")[1].split("\n")[0]) // PAGE


def random_reads(path: Path, at_once: int, seconds: float = 1.0) -> float:
    """4 KiB reads per second at random places, past the page cache, by so many processes."""
    pages = path.stat().st_size // PAGE
    children, ends = [], []
    for seed in range(at_once):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            places = (np.random.default_rng(seed).integers(0, pages, 1 << 18) * PAGE).tolist()
            file, page, done = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, PAGE), 0
            begun = time.perf_counter()
            while time.perf_counter() - begun < seconds:
                os.preadv(file, [page], places[done])
                done += 1
            os.write(writer, str(done / (time.perf_counter() - begun)).encode())
            os._exit(0)
        os.close(writer)
        children.append(child)
        ends.append(reader)
    total = sum(float(os.read(reader, 100)) for reader in ends)
    for child, reader in zip(children, ends, strict=True):
        os.waitpid(child, 0)
        os.close(reader)
    return total


class Bounded:
    """A mapped file of which at most `budget` bytes are in memory after each `trim_to_budget`."""

    def __init__(self, path: Path, budget: float) -> None:
        self.file = os.open(path, os.O_RDWR)
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)
        self.map = mmap.mmap(self.file, 0)
        self.map.madvise(mmap.MADV_RANDOM)  # a fault reads a page, not its neighbours
        self.used = np.zeros(-(-len(self.map) // PAGE), np.int64)  # when, 0: not in memory
        self.most, self.now = int(budget // PAGE), 0
        self.leaving = Leaving(self.file)

    def mark_used(self, pages: np.ndarray) -> np.ndarray:
        """These were used now; those that are to leave, in ascending order."""
        self.now += 1
        self.used[pages] = self.now
        held = np.flatnonzero(self.used)
        over = len(held) - self.most
        if over <= 0:
            return held[:0]
        gone = np.sort(held[np.argpartition(self.used[held], over - 1)[:over]])
        self.used[gone] = 0
        return gone

    def trim_to_budget(self, pages: np.ndarray) -> float:
        """After their use; seconds to wait for the disk."""
        gone = self.mark_used(pages)
        for begin, size in find_runs(gone):
            self.map.madvise(mmap.MADV_DONTNEED, begin, size)
        return self.leaving.evict_pages(gone, np.flatnonzero(self.used))

    def reload_used_pages(self) -> None:
        """In memory is what was used last, and nothing else."""
        self.map.madvise(mmap.MADV_DONTNEED)
        drop_from_cache(self.file)
        for page in np.flatnonzero(self.used).tolist():
            os.pread(self.file, PAGE, page * PAGE)
