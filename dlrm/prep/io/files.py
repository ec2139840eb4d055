"""Reading and writing at offsets, with calls that the tracer sees, counted per file, errors as one line."""

import io
import json
import os
import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular, read_json
from common.owned import finish_file
from dlrm.runtime.trace import opening

LARGEST_JSON = 1 << 30  # of a work folder's plan: a few dozen bytes a piece

bytes_read: dict[str, int] = defaultdict(int)
bytes_written: dict[str, int] = defaultdict(int)
_counting = threading.Lock()


os_errors_as_user_errors = os_errors_as_user_errors


class OffsetFile:
    """One open file. Threads may share it, but for `read_into`, which moves its position."""

    def __init__(self, path: Path, mode: str = "r") -> None:
        self.path = path
        with os_errors_as_user_errors(path), opening:
            if mode == "r":
                self._fd = open_regular(path)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(path, flags | (os.O_APPEND if mode == "a" else 0), 0o666)
        self._raw = io.FileIO(self._fd, closefd=False) if mode == "r" else None
        self._read = self._written = self._at = 0

    def __enter__(self) -> "OffsetFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            with opening:
                os.close(self._fd)
            self._fd = -1
            with _counting:
                if self._read:
                    bytes_read[os.path.abspath(self.path)] += self._read
                if self._written:
                    bytes_written[os.path.abspath(self.path)] += self._written

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, size: int) -> None:
        """Not when it has that size: ext4 writes a file that was cut to nothing back to disk on closing."""
        with os_errors_as_user_errors(self.path):
            if self.size != size:
                os.ftruncate(self._fd, size)

    def read(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the file."""
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
        """Fill the buffer from this offset, without a copy; returns how much there was."""
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
        """`count` items, or an error: our own intermediate file is cut."""
        dtype = np.dtype(dtype)
        data = self.read(count * dtype.itemsize, offset)
        if len(data) != count * dtype.itemsize:
            raise UserError(f"{printable(self.path)}: shorter than it should be; start again with --restart")
        return np.frombuffer(data, dtype)

    def write(self, data: Any, offset: int) -> int:
        """All of it, at this offset; returns the offset behind it."""
        view = memoryview(data).cast("B")
        with os_errors_as_user_errors(self.path):
            while view:
                count = os.pwrite(self._fd, view, offset)
                self._written += count
                offset += count
                view = view[count:]
        return offset

    def append(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        with os_errors_as_user_errors(self.path):
            while view:
                count = os.write(self._fd, view)
                self._written += count
                view = view[count:]


def write_atomically(path: Path, value: Any) -> None:
    """A file of a work folder that is there whole or not at all: bytes, an array, or a value as JSON."""
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
    """Bytes with a unit that leaves digits before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
