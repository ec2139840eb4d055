"""A table in a file: rows of [weights | optimizer state], raw float32, with a small JSON description.

t_cat_0.rows   a sparse file: a block of rows gets its first values when one of them is first read
t_cat_0.json   which table, which blocks have been written, and whether the last job closed it ("clean")
Only pread and pwrite are used, in the order of the rows, so that a trace shows every byte.
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

from common.descriptors import close_descriptor, open_descriptor, opening
from common.errors import UserError
from common.inputs import read_json_object
from common.lock import try_lock
from common.owned import write_whole
from dlrm.embeddings.tables import BLOCK, fill_shard
from dlrm.runtime.trace import sync_to_disk

VERSION = 1
MERGE_GAP = 4 << 10  # bytes between two rows up to which one call reads both and what is between them
MAX_CALL_BYTES = 1 << 20  # of one read or write
WRITE_PIECE_BYTES = 16 << 10  # of one write of whole blocks
MAX_DESCRIPTION_BYTES = 1 << 30
BUFFER_BYTES = 4 * BLOCK + 5 * MAX_CALL_BYTES  # at most, of all buffers of one table


def as_raw_bytes(values: np.ndarray) -> memoryview:
    """The float32 values in row order."""
    whole: Any = np.ascontiguousarray(values, np.float32)
    return memoryview(whole).cast("B")


class RowFile:
    """Reads and writes rows by number: float32 [dim + state] each. Open in one process at a time.

    A shard has its own file: `rows` rows of the table's `total`, beginning with number `first`, or `dim` of
    its `total_dim` columns, beginning with `first_column`. `seed` draws first values; a file that exists
    keeps its own. After `close` another job can continue from it.
    """

    def __init__(
        self, folder: Path, table: str, rows: int, dim: int, state: int, optimizer: str, seed: int,
        first: int = 0, total: int | None = None, first_column: int = 0, total_dim: int | None = None,
    ) -> None:  # fmt: skip
        """`state`: floats of the optimizer's state in each row. `optimizer`: its name; a file of another one
        is refused. The rest: see the class.
        """
        self.table, self.rows, self.dim, self.seed, self.first = table, rows, dim, seed, first
        self.total, self.first_column, self.total_dim = total or rows, first_column, total_dim or dim
        self.width = dim + state
        self.row_bytes = 4 * self.width
        self.step = max(1, BLOCK // self.total_dim)  # rows of a block, as `tables.fill_shard` draws them
        # rows of the first block before the shard: blocks are the table's, a shard may begin within one
        self._rows_before = first % self.step
        name = table if rows == self.total else f"{table}.{first}-{first + rows}"
        if dim != self.total_dim:
            name += f".columns-{first_column}-{first_column + dim}"
        self.path, self.description_path = folder / f"{name}.rows", folder / f"{name}.json"
        self.bytes_read = self.bytes_written = 0
        self.blocks = np.zeros(-(-(rows + self._rows_before) // self.step), bool)  # written to the file
        self.clean = True  # every row is of the same step
        # held while rows are written, or read for a checkpoint on another thread
        self.lock = threading.Lock()
        self.count_lock = threading.Lock()
        # gets the ids of rows that are about to be overwritten
        self.before_write: Callable[[np.ndarray], None] | None = None
        self._old_values: Any = None
        self._description = {
            "version": VERSION, "table": table, "rows": rows, "dim": dim, "state": state, "dtype": "float32",
            "optimizer": optimizer, **({"first": first, "total": total} if rows != self.total else {}),
            **({"first_column": first_column, "total_dim": total_dim} if dim != self.total_dim else {}),
        }  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._file = open_descriptor(self.path, flags, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}: give another --persistent_path") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise UserError(f"{self.path}: is not a file: give another --persistent_path")
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            self._take_lock()
            self.new = not os.path.lexists(self.description_path)
            if self.new:
                self._create_file()
            else:
                self._open_file()
        except BaseException:
            close_descriptor(self._file)
            raise

    def _take_lock(self) -> None:
        if not try_lock(self._file):
            raise UserError(
                f"{self.path}: another job trains this table: wait for it, or give another --persistent_path"
            )

    def _create_file(self) -> None:
        if os.fstat(self._file).st_size:
            raise UserError(
                f"{self.path}: rows without {self.description_path.name}, not a row file: move it away, or "
                "give another --persistent_path"
            )
        self._resize_file(self.rows * self.row_bytes)
        self._write_description()

    def _resize_file(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise self._make_disk_error(error) from None

    def _open_file(self) -> None:
        try:
            found = read_json_object(self.description_path, MAX_DESCRIPTION_BYTES)
            if (
                self.description_path.is_symlink()
                or type(found["clean"]) is not bool
                or type(found["seed"]) is not int
            ):
                raise ValueError("a link, or values of another kind")
            blocks = np.frombuffer(bytes.fromhex(found["blocks"]), np.uint8)
            if len(blocks) != -(-len(self.blocks) // 8) or not 0 <= found["seed"] < 1 << 63:
                raise ValueError("values out of range")
            self.clean, self.seed = found["clean"], found["seed"]
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.description_path}: not the description of a row file ({str(error)[:200]}): give "
                f"another --persistent_path, or move {self.path.name} and it away"
            ) from None
        for key, value in self._description.items():
            if type(found.get(key)) is not type(value) or found[key] != value:
                raise UserError(
                    f"{self.path}: made with {key} {str(found.get(key))[:100]}, this job has {value}: "
                    "give the options that it was made with, or another --persistent_path"
                )
        size = os.fstat(self._file).st_size
        if size != self.rows * self.row_bytes:
            raise UserError(
                f"{self.path}: {size} bytes, {self.rows * self.row_bytes} expected, it was cut off: "
                f"remove it and {self.description_path.name}, then resume from a checkpoint"
            )
        self.blocks = np.unpackbits(blocks, count=len(self.blocks)).astype(bool)

    def _write_description(self) -> None:
        facts = {
            **self._description, "seed": self.seed, "clean": self.clean,
            "blocks": np.packbits(self.blocks).tobytes().hex(),
        }  # fmt: skip
        try:
            write_whole(self.description_path, json.dumps(facts).encode(), durable=True)
            # else a power cut could bring back a description that calls it clean
            sync_to_disk(self.description_path.parent)
        except UserError as error:
            raise UserError(f"{error}: free some space, or give another --persistent_path") from None
        except OSError as error:
            raise self._make_disk_error(error) from None

    def _make_disk_error(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: {error.strerror}: free some space, or give another --persistent_path; a run with "
            "checkpoints resumes from the last one"
        )

    def mark_dirty(self) -> None:
        """Rows will change: until `close` the description says that they may be of different steps."""
        if self.clean:
            self.clean = False
            self._write_description()

    def read(self, ids: np.ndarray) -> np.ndarray:
        """float32 [ids, width]. `ids`: int64, ascending, no row twice, at most `rows_per_call`.

        Blocks that are not in the file yet get their first values, so every row that was read can be written.
        """
        for block in np.unique(self.find_block(ids)):
            if not self.blocks[block]:
                self.write_first_values(int(block))
        return self.read_stored(ids)

    def find_block(self, ids: np.ndarray) -> np.ndarray:
        return (ids + self._rows_before) // self.step

    def find_stored(self, ids: np.ndarray) -> np.ndarray:
        """Those of these rows that are in the file."""
        return ids[self.blocks[self.find_block(ids)]]

    @property
    def rows_per_call(self) -> int:
        """How many rows one `read` takes: within MAX_CALL_BYTES, wherever the rows are in the file."""
        return max(1, MAX_CALL_BYTES // (MERGE_GAP + self.row_bytes))

    def find_ranges(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """(position, bytes) of what `read` would read for these rows, which are in ascending order."""
        ids = self.find_stored(ids)
        if not len(ids):
            return []
        starts, stops = self._find_runs(ids, MERGE_GAP // self.row_bytes)
        sizes = (ids[stops - 1] + 1 - ids[starts]) * self.row_bytes
        return list(zip((ids[starts] * self.row_bytes).tolist(), sizes.tolist(), strict=True))

    def announce_reads(self, ranges: list[tuple[int, int]]) -> None:
        """Let the kernel read these ranges into the page cache, many at once; `read` would wait for each."""
        for position, size in ranges:
            os.posix_fadvise(self._file, position, size, os.POSIX_FADV_WILLNEED)

    def read_stored(self, ids: np.ndarray) -> np.ndarray:
        """As `read`, of rows that are in the file."""
        starts, stops = self._find_runs(ids, MERGE_GAP // self.row_bytes)
        first, sizes = ids[starts], ids[stops - 1] + 1 - ids[starts]
        parts = self._pread((sizes * self.row_bytes).tolist(), (first * self.row_bytes).tolist())
        at = ids - np.repeat(first - np.cumsum(sizes) + sizes, stops - starts)
        return np.frombuffer(parts, np.float32).reshape(-1, self.width)[at]

    def write(self, ids: np.ndarray, values: np.ndarray) -> None:
        """`values`: float32 [ids, width]. `ids`: ascending, each of them read before."""
        if not len(ids):
            return
        with self.lock:
            if self.before_write is not None:
                self.before_write(ids)
            self._write_runs(ids, values)

    def _write_runs(self, ids: np.ndarray, values: np.ndarray) -> None:
        starts, stops = self._find_runs(ids, 0)
        view, ends = as_raw_bytes(values), (stops * self.row_bytes).tolist()
        begins = (starts * self.row_bytes).tolist()
        places = (ids[starts] * self.row_bytes).tolist()
        for begin, end, place in zip(begins, ends, places, strict=True):
            self._pwrite(view[begin:end], place)

    def _find_runs(self, ids: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops in `ids` of runs with gaps of at most `gap` rows, up to MAX_CALL_BYTES long."""
        apart = np.diff(ids) > gap + 1
        if len(ids) > 1 and (ids[-1] - ids[0]) * self.row_bytes > MAX_CALL_BYTES:
            window = max(1, MAX_CALL_BYTES // self.row_bytes)
            apart |= np.diff(ids // window) != 0
        cuts = np.flatnonzero(apart) + 1
        return np.concatenate(([0], cuts)), np.concatenate((cuts, [len(ids)]))

    def _pread(self, sizes: list[int], places: list[int]) -> bytes:
        file, total = self._file, sum(sizes)
        try:
            data = b"".join([os.pread(file, size, at) for size, at in zip(sizes, places, strict=True)])
        except OSError as error:
            raise self._make_disk_error(error) from None
        if len(data) != total:
            raise UserError(f"{self.path}: ends too early, another program cut it: resume from a checkpoint")
        with self.count_lock:
            self.bytes_read += total
        return data

    def _pwrite(self, data: Any, place: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done:], place + done)
        except OSError as error:
            raise self._make_disk_error(error) from None
        with self.count_lock:
            self.bytes_written += done

    # --- whole blocks

    def find_block_range(self, block: int) -> tuple[int, int]:
        """Numbers of a block's first row and of the row after its last."""
        low = block * self.step - self._rows_before
        return max(0, low), min(low + self.step, self.rows)

    def split_block(self, block: int) -> Iterator[tuple[int, int]]:
        """A block as ranges of rows of at most MAX_CALL_BYTES."""
        first, last = self.find_block_range(block)
        portion = max(1, MAX_CALL_BYTES // self.row_bytes)
        for low in range(first, last, portion):
            yield low, min(low + portion, last)

    def read_range(self, low: int, high: int) -> np.ndarray:
        """Rows low to high - 1, as a writable float32 array [rows, width]."""
        data = self._pread([(high - low) * self.row_bytes], [low * self.row_bytes])
        return np.frombuffer(bytearray(data), np.float32).reshape(-1, self.width)

    def read_block(self, block: int) -> Iterator[np.ndarray]:
        """The rows of a block, from the file or with their first values, a portion at a time."""
        if self.blocks[block]:
            yield from (self.read_range(*part) for part in self.split_block(block))
        else:
            yield from self.draw_first_values(block)

    def draw_first_values(self, block: int) -> Iterator[np.ndarray]:
        """A block's first values: drawn weights, optimizer state 0; a portion at a time."""
        first, last = self.find_block_range(block)
        # the values that a table in memory starts with; a map, because malloc would keep what is freed
        memory: Any = mmap.mmap(-1, 4 * (last - first) * self.dim)
        weights = torch.frombuffer(memory, dtype=torch.float32).view(last - first, self.dim)
        fill_shard(
            weights, self.first + first, self.first_column, self.total, self.total_dim, self.table, self.seed,
            None,
        )  # fmt: skip
        for low, high in self.split_block(block):
            values = np.zeros((high - low, self.width), np.float32)
            values[:, : self.dim] = weights[low - first : high - first].numpy()
            yield values

    def write_first_values(self, block: int) -> None:
        """Write a block's first values to the file."""
        self.mark_dirty()
        for (low, _), values in zip(self.split_block(block), self.read_block(block), strict=True):
            self._write_in_pieces(low, values)
        self.blocks[block] = True

    def _write_in_pieces(self, first: int, values: np.ndarray) -> None:
        """In small writes: a large one makes large folios, where changing a row takes 8 us instead of 1."""
        data = as_raw_bytes(values)
        for begin in range(0, len(data), WRITE_PIECE_BYTES):
            self._pwrite(data[begin : begin + WRITE_PIECE_BYTES], first * self.row_bytes + begin)

    def fill_block(self, block: int, columns: slice, values: np.ndarray, zero_others: bool) -> None:
        """Overwrite these columns of a block; the others become 0 with `zero_others`, else they stay."""
        self.mark_dirty()
        first, _ = self.find_block_range(block)
        for low, high in self.split_block(block):
            rows = (
                np.zeros((high - low, self.width), np.float32) if zero_others else self.read_range(low, high)
            )
            rows[:, columns] = values[low - first : high - first]
            self._write_in_pieces(low, rows)
        self.blocks[block] = True

    def open_old_values(self) -> int:
        """Descriptor of an empty file without a name, for old values that a snapshot still needs."""
        if self._old_values is None:
            with opening:
                self._old_values = tempfile.TemporaryFile(dir=self.path.parent, buffering=0)  # noqa: SIM115
        os.ftruncate(self._old_values.fileno(), 0)
        return self._old_values.fileno()

    def close(self, complete: bool = True) -> None:
        """With `complete`, every changed row has been written: another job can continue from the file."""
        if complete and not self.clean:
            os.fsync(self._file)
            self.clean = True
            self._write_description()
        with opening:
            os.close(self._file)
            if self._old_values is not None:
                self._old_values.close()
