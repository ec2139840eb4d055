"""Reads and writes at offsets, by calls that the tracer records. Bytes are counted per file; an OSError
becomes a UserError that names the file.
"""

import io
import json
import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular, read_json
from common.owned import finish_file
from dlrm.prep.job import workers

LARGEST_JSON = 1 << 30  # bytes of a JSON file in a work folder: the plan has a few dozen per piece

# absolute path -> bytes that this process read or wrote; `analysis check` compares them with the trace
bytes_read: dict[str, int] = defaultdict(int)
bytes_written: dict[str, int] = defaultdict(int)
workers.counters += [bytes_read, bytes_written]
_counters_lock = threading.Lock()


def view_bytes(data: Any) -> memoryview:
    """The bytes of a buffer. An array without columns has none, and Python cannot cast it."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


class OffsetFile:
    """One open file. Threads may share it, except for `read_into`, which moves the file position.

    `mode`: "r" to read, "w" to write at offsets (what is there stays), "a" to append.
    """

    def __init__(self, path: Path, mode: str = "r") -> None:
        self.path = path
        with os_errors_as_user_errors(path):
            if mode == "r":
                self._fd = open_regular(path)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = open_descriptor(path, flags | (os.O_APPEND if mode == "a" else 0), 0o666)
        self._raw = io.FileIO(self._fd, closefd=False) if mode == "r" else None
        self._read = self._written = self._at = 0

    def __enter__(self) -> "OffsetFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            close_descriptor(self._fd)
            self._fd = -1
            with _counters_lock:
                if self._read:
                    bytes_read[os.path.abspath(self.path)] += self._read
                if self._written:
                    bytes_written[os.path.abspath(self.path)] += self._written

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, size: int) -> None:
        """Truncate or extend the file. Skipped if it has that size already: ext4 flushes a file that was
        truncated to 0 bytes to disk when it is closed.
        """
        with os_errors_as_user_errors(self.path):
            if self.size != size:
                os.ftruncate(self._fd, size)

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes from this offset; fewer only at the end of the file."""
        with os_errors_as_user_errors(self.path):
            data = os.pread(self._fd, count, offset)
            self._read += len(data)
            while len(data) < count:
                more = os.pread(self._fd, count - len(data), offset + len(data))
                if not more:
                    break
                self._read += len(more)
                data += more
        return data

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill the buffer from this offset, without a copy. Returns the bytes read: fewer only at the end."""
        assert self._raw is not None
        done = 0
        with os_errors_as_user_errors(self.path):
            if offset != self._at:
                self._raw.seek(offset)
            self._at = -1  # unknown after an error
            while done < len(view) and (count := self._raw.readinto(view[done:])):
                done += count
        self._at = offset + done
        self._read += done
        return done

    def read_array(self, count: int, offset: int, dtype: Any) -> np.ndarray:
        """1-d array of `count` items. For intermediate files: a shorter file is a UserError."""
        dtype = np.dtype(dtype)
        data = self.read(count * dtype.itemsize, offset)
        if len(data) != count * dtype.itemsize:
            raise UserError(f"{printable(self.path)}: shorter than it should be; start again with --restart")
        return np.frombuffer(data, dtype)

    def write(self, data: Any, offset: int) -> int:
        """Write all of a buffer at this offset; returns the offset after it."""
        view = view_bytes(data)
        with os_errors_as_user_errors(self.path):
            while view:
                count = os.pwrite(self._fd, view, offset)
                self._written += count
                offset += count
                view = view[count:]
        return offset

    def append(self, data: Any) -> None:
        view = view_bytes(data)
        with os_errors_as_user_errors(self.path):
            while view:
                count = os.write(self._fd, view)
                self._written += count
                view = view[count:]


def write_atomically(path: Path, value: Any) -> None:
    """Write a file of a work folder under another name and rename it: it exists whole or not at all.

    `value`: bytes, an array, or a dict or list, which is written as JSON.
    """
    data = json.dumps(value).encode() if isinstance(value, dict | list) else value
    partial = path.with_name(path.name + ".partial")
    with OffsetFile(partial, "w") as file:
        file.resize(0)
        file.write(data, 0)
    finish_file(partial, path)


def read_json_file(path: Path) -> Any:
    """The value of a JSON file of a work folder."""
    return read_json(path, LARGEST_JSON)


def format_bytes(count: float) -> str:
    """A number of bytes in the largest decimal unit that leaves at least 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
