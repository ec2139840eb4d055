"""A table in a file: rows of [weights | optimizer state], raw float32, beside a small JSON description.

t_cat_0.rows   sparse: a block of rows is drawn and written when one of them is first read
t_cat_0.json   whose rows, which blocks there are, and whether the last user closed it in good order
Only plain pread and pwrite, in the order of the rows, so that a trace shows every byte.
"""

import json
import mmap
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.inputs import read_json_object
from common.lock import try_lock
from common.owned import write_whole
from dlrm.embeddings.tables import BLOCK, fill_shard
from dlrm.runtime.trace import opening, sync_to_disk

VERSION = 1
NEAR = 4 << 10  # rows this close are read by one call, with what lies between
LARGEST = 1 << 20  # bytes of one call
PIECE = 16 << 10  # bytes of one call that writes anew
LARGEST_DESCRIPTION = 1 << 30  # bytes
BUFFERS = 4 * BLOCK + 5 * LARGEST  # bytes at their most, of all that comes and goes here


def as_raw_bytes(values: np.ndarray) -> memoryview:
    whole: Any = np.ascontiguousarray(values, np.float32)
    return memoryview(whole).cast("B")


class RowFile:
    """Rows by number. One process at a time; `close` makes it good for the next."""

    def __init__(
        self, folder: Path, table: str, rows: int, dim: int, state: int, optimizer: str, seed: int,
        first: int = 0, total: int | None = None,
    ) -> None:  # fmt: skip
        self.table, self.rows, self.dim, self.seed, self.first = table, rows, dim, seed, first
        self.total = total or rows  # of the table of which this is a shard
        self.width = dim + state
        self.row_bytes = 4 * self.width
        self.step = max(1, BLOCK // dim)  # rows of a block, as `tables.fill` draws them
        self._skew = first % self.step  # blocks are the table's, whatever the shard
        name = table if rows == self.total else f"{table}.{first}-{first + rows}"
        self.path, self.about = folder / f"{name}.rows", folder / f"{name}.json"
        self.bytes_read = self.bytes_written = 0
        self.blocks = np.zeros(-(-(rows + self._skew) // self.step), bool)  # in the file
        self.clean = True  # every row is of the same moment
        self.lock = threading.Lock()  # of the rows, while a checkpoint reads them on a thread
        self.counting = threading.Lock()
        self.before_write: Callable[[np.ndarray], None] | None = None
        self._aside: Any = None
        self._facts = {
            "version": VERSION, "table": table, "rows": rows, "dim": dim, "state": state, "dtype": "float32",
            "optimizer": optimizer, **({"first": first, "total": total} if rows != self.total else {}),
        }  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with opening:  # the tracer would lose a file that another thread opens meanwhile
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}: give another --persistent_path") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise UserError(f"{self.path}: is not a file: give another --persistent_path")
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            self._lock()
            self.new = not os.path.lexists(self.about)
            if self.new:
                self._begin()
            else:
                self._open()
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if not try_lock(self._file):
            raise UserError(
                f"{self.path}: another job trains this table: wait for it, or give another --persistent_path"
            )

    def _begin(self) -> None:
        if os.fstat(self._file).st_size:
            raise UserError(
                f"{self.path}: rows without {self.about.name}, not a store: move it away, or give another "
                "--persistent_path"
            )
        self._size(self.rows * self.row_bytes)
        self._describe()

    def _size(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise self._failed(error) from None

    def _open(self) -> None:
        try:
            found = read_json_object(self.about, LARGEST_DESCRIPTION)
            if self.about.is_symlink() or type(found["clean"]) is not bool or type(found["seed"]) is not int:
                raise ValueError("a link, or values of another kind")
            blocks = np.frombuffer(bytes.fromhex(found["blocks"]), np.uint8)
            if len(blocks) != -(-len(self.blocks) // 8) or not 0 <= found["seed"] < 1 << 63:
                raise ValueError("values out of range")
            self.clean, self.seed = found["clean"], found["seed"]
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.about}: not the description of a store ({str(error)[:200]}): give another "
                f"--persistent_path, or move {self.path.name} and it away"
            ) from None
        for key, value in self._facts.items():
            if type(found.get(key)) is not type(value) or found[key] != value:
                raise UserError(
                    f"{self.path}: made with {key} {str(found.get(key))[:100]}, this job has {value}: "
                    "give the options that it was made with, or another --persistent_path"
                )
        size = os.fstat(self._file).st_size
        if size != self.rows * self.row_bytes:
            raise UserError(
                f"{self.path}: {size} bytes, {self.rows * self.row_bytes} expected, it was cut off: "
                f"remove it and {self.about.name}, then go on from a checkpoint"
            )
        self.blocks = np.unpackbits(blocks, count=len(self.blocks)).astype(bool)

    def _describe(self) -> None:
        facts = {
            **self._facts, "seed": self.seed, "clean": self.clean,
            "blocks": np.packbits(self.blocks).tobytes().hex(),
        }  # fmt: skip
        try:
            with opening:
                write_whole(self.about, json.dumps(facts).encode(), durable=True)
            sync_to_disk(
                self.about.parent
            )  # else a power cut could bring back a description that calls it clean
        except UserError as error:
            raise UserError(f"{error}: make room, or give another --persistent_path") from None
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: {error.strerror}: make room, or give another --persistent_path; a run with "
            "checkpoints goes on from the last one"
        )

    def soil(self) -> None:
        """Rows are about to change: until `close` the store says so."""
        if self.clean:
            self.clean = False
            self._describe()

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Rows in ascending order of `ids`, at most `few`, no row twice; a read row can be changed."""
        for block in np.unique(self.block_of(ids)):
            if not self.blocks[block]:
                self.make(int(block))
        return self.get(ids)

    def block_of(self, ids: np.ndarray) -> np.ndarray:
        return (ids + self._skew) // self.step

    def made(self, ids: np.ndarray) -> np.ndarray:
        """Those of them that are in the file."""
        return ids[self.blocks[self.block_of(ids)]]

    @property
    def few(self) -> int:
        """Rows that are read together in little memory, wherever they lie."""
        return max(1, LARGEST // (NEAR + self.row_bytes))

    def places(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """(position, bytes) of what `read` would read of these rows, in ascending order."""
        ids = self.made(ids)
        if not len(ids):
            return []
        starts, stops = self._runs(ids, NEAR // self.row_bytes)
        sizes = (ids[stops - 1] + 1 - ids[starts]) * self.row_bytes
        return list(zip((ids[starts] * self.row_bytes).tolist(), sizes.tolist(), strict=True))

    def expect(self, places: list[tuple[int, int]]) -> None:
        """Of what is not in the page cache the disk reads many at once; `read` alone waits for each."""
        for place, size in places:
            os.posix_fadvise(self._file, place, size, os.POSIX_FADV_WILLNEED)

    def get(self, ids: np.ndarray) -> np.ndarray:
        starts, stops = self._runs(ids, NEAR // self.row_bytes)
        first, sizes = ids[starts], ids[stops - 1] + 1 - ids[starts]
        parts = self._pread((sizes * self.row_bytes).tolist(), (first * self.row_bytes).tolist())
        at = ids - np.repeat(first - np.cumsum(sizes) + sizes, stops - starts)
        return np.frombuffer(parts, np.float32).reshape(-1, self.width)[at]

    def write(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Rows in ascending order of `ids`, each of them read before."""
        if not len(ids):
            return
        with self.lock:
            if self.before_write is not None:
                self.before_write(ids)
            self._put(ids, values)

    def _put(self, ids: np.ndarray, values: np.ndarray) -> None:
        starts, stops = self._runs(ids, 0)
        view, ends = as_raw_bytes(values), (stops * self.row_bytes).tolist()
        begins = (starts * self.row_bytes).tolist()
        places = (ids[starts] * self.row_bytes).tolist()
        for begin, end, place in zip(begins, ends, places, strict=True):
            self._pwrite(view[begin:end], place)

    def _runs(self, ids: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Where stretches of nearly adjacent rows start and stop, none of them longer than LARGEST."""
        apart = np.diff(ids) > gap + 1
        if len(ids) > 1 and (ids[-1] - ids[0]) * self.row_bytes > LARGEST:
            window = max(1, LARGEST // self.row_bytes)
            apart |= np.diff(ids // window) != 0
        cuts = np.flatnonzero(apart) + 1
        return np.concatenate(([0], cuts)), np.concatenate((cuts, [len(ids)]))

    def _pread(self, sizes: list[int], places: list[int]) -> bytes:
        file, total = self._file, sum(sizes)
        try:
            data = b"".join([os.pread(file, size, at) for size, at in zip(sizes, places, strict=True)])
        except OSError as error:
            raise self._failed(error) from None
        if len(data) != total:
            raise UserError(f"{self.path}: ends too early, another program cut it: go on from a checkpoint")
        with self.counting:
            self.bytes_read += total
        return data

    def _pwrite(self, data: Any, place: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done:], place + done)
        except OSError as error:
            raise self._failed(error) from None
        with self.counting:
            self.bytes_written += done

    # --- many rows side by side

    def span(self, block: int) -> tuple[int, int]:
        low = block * self.step - self._skew
        return max(0, low), min(low + self.step, self.rows)

    def parts(self, block: int) -> Iterator[tuple[int, int]]:
        """A block in portions that take little memory."""
        first, last = self.span(block)
        wide = max(1, LARGEST // self.row_bytes)
        for low in range(first, last, wide):
            yield low, min(low + wide, last)

    def stretch(self, low: int, high: int) -> np.ndarray:
        """Rows that lie side by side in the file."""
        data = self._pread([(high - low) * self.row_bytes], [low * self.row_bytes])
        return np.frombuffer(bytearray(data), np.float32).reshape(-1, self.width)

    def pieces(self, block: int) -> Iterator[np.ndarray]:
        """The rows of a block, from the file or as they begin, a portion at a time."""
        if self.blocks[block]:
            yield from (self.stretch(*part) for part in self.parts(block))
        else:
            yield from self.drawn(block)

    def drawn(self, block: int) -> Iterator[np.ndarray]:
        """Its first values."""
        first, last = self.span(block)
        # the same that a table in memory begins with; a map, because malloc would keep what is freed
        room: Any = mmap.mmap(-1, 4 * (last - first) * self.dim)
        weights = torch.frombuffer(room, dtype=torch.float32).view(last - first, self.dim)
        fill_shard(weights, self.first + first, 0, self.total, self.dim, self.table, self.seed, None)
        for low, high in self.parts(block):
            values = np.zeros((high - low, self.width), np.float32)
            values[:, : self.dim] = weights[low - first : high - first].numpy()
            yield values

    def make(self, block: int) -> None:
        """Its first values into the file."""
        self.soil()
        for (low, _), values in zip(self.parts(block), self.pieces(block), strict=True):
            self._renew(low, values)
        self.blocks[block] = True

    def _renew(self, first: int, values: np.ndarray) -> None:
        """In pieces: what the kernel keeps as one large piece makes changing a row cost 8 us instead of 1."""
        data = as_raw_bytes(values)
        for begin in range(0, len(data), PIECE):
            self._pwrite(data[begin : begin + PIECE], first * self.row_bytes + begin)

    def fill(self, block: int, columns: slice, values: np.ndarray, alone: bool) -> None:
        """These columns of a block; the others become 0, if `alone`, or stay as they are in the file."""
        self.soil()
        first, _ = self.span(block)
        for low, high in self.parts(block):
            rows = np.zeros((high - low, self.width), np.float32) if alone else self.stretch(low, high)
            rows[:, columns] = values[low - first : high - first]
            self._renew(low, rows)
        self.blocks[block] = True

    def aside(self) -> int:
        """An empty file without a name, for old values that a checkpoint still needs."""
        if self._aside is None:
            with opening:
                self._aside = tempfile.TemporaryFile(dir=self.path.parent, buffering=0)  # noqa: SIM115
        os.ftruncate(self._aside.fileno(), 0)
        return self._aside.fileno()

    def close(self, good: bool = True) -> None:
        """With `good`, every changed row has been written: the next job can go on from here."""
        if good and not self.clean:
            os.fsync(self._file)
            self.clean = True
            self._describe()
        with opening:
            os.close(self._file)
            if self._aside is not None:
                self._aside.close()
