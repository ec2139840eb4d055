"""numpy's reads and writes of whole arrays, to the byte: np.load, np.save, np.fromfile, np.memmap.

numpy reads and writes through C streams on a copy of the descriptor, which DFTracer cannot follow. Here the
same bytes go through read and write. What a map touches is not a call: that it was mapped is recorded.
"""

import functools
import io
import os
import stat
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import replace

MOST = 1 << 30  # bytes of one call to read


def hook(numpy: ModuleType) -> None:
    replace(numpy, "fromfile", lambda original: _wrap_fromfile(numpy, original), numpy)
    replace(numpy.memmap, "__new__", _wrap_memmap, numpy)
    replace(numpy.lib.format, "write_array", _wrap_write_array, numpy)


def _wrap_fromfile(numpy: Any, original: Any) -> Any:
    @functools.wraps(original)
    def fromfile(
        file: Any, dtype: Any = float, count: int = -1, sep: str = "", offset: int = 0, **more: Any
    ) -> Any:
        kind = numpy.dtype(dtype) if trace.is_tracing() and not sep and not more else None
        if kind is None or kind.hasobject or kind.shape or not kind.itemsize or count < -1:
            return original(file, dtype, count, sep, offset, **more)
        if isinstance(file, str | bytes | os.PathLike):
            if offset < 0 or not os.path.isfile(file) or (count < 0 and offset > os.path.getsize(file)):
                return original(file, dtype, count, sep, offset)
            with open(file, "rb", buffering=0) as stream:
                stream.seek(offset)
                return _read_array(numpy, stream, kind, count, offset)
        begin = file.tell() + offset if _is_plain_file(file) else -1
        if begin < 0 or (count < 0 and begin > os.fstat(file.fileno()).st_size):  # numpy refuses that itself
            return original(file, dtype, count, sep, offset)
        if offset:
            file.seek(begin)
        # by the file itself: what it has in its buffer is not read again, and it knows where it is
        return _read_array(numpy, file, kind, count, begin)

    return fromfile


def _is_plain_file(file: Any) -> bool:
    if not isinstance(file, io.FileIO | io.BufferedReader | io.BufferedRandom):
        return False
    try:
        return file.readable() and file.seekable() and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _read_array(numpy: Any, stream: Any, kind: Any, count: int, begin: int) -> Any:
    """`count` items from this place on, where the file is, or all (-1), or as many as there are.

    Who asks for more than there are reads to the end of the file, as numpy does, a part of an item too.
    """
    there = max(0, os.fstat(stream.fileno()).st_size - begin)
    wanted = there // kind.itemsize * kind.itemsize if count < 0 else min(count * kind.itemsize, there)
    found = numpy.empty(-(-wanted // kind.itemsize), kind)
    view, done = memoryview(found.view(numpy.uint8))[:wanted] if wanted else memoryview(b""), 0
    name = stream.name if not isinstance(stream.name, int) else os.readlink(f"/proc/self/fd/{stream.name}")
    with trace.span("data", "read", file=os.fsdecode(name), offset=begin) as reading:
        while done < len(view):
            got = stream.readinto(view[done : done + MOST])
            if not got:
                break
            done += got
        reading.update(bytes=done)
    return found if done == found.nbytes else found[: done // kind.itemsize].copy()


def _wrap_memmap(original: Any) -> Any:
    @functools.wraps(original)
    def new(subtype: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(subtype, filename, *args, **kwargs)
        if trace.is_tracing() and getattr(made, "filename", None) is not None:
            note_mapped(str(made.filename), made.offset, made.nbytes)
        return made

    return staticmethod(new)


def note_mapped(file: str, offset: int, size: int) -> None:
    """A part of a file is now in memory's place; the kernel reads it when it is touched."""
    with trace.span("data", "read", file=os.path.abspath(file), offset=offset, bytes=size, mapped=1):
        pass


class _Writer:
    """Has a file's `write` and nothing else, so that numpy calls that."""

    def __init__(self, file: Any) -> None:
        self.write = file.write


def _wrap_write_array(original: Any) -> Any:
    @functools.wraps(original)
    def write_array(fp: Any, array: Any, *args: Any, **kwargs: Any) -> None:
        plain = isinstance(fp, io.FileIO | io.BufferedWriter | io.BufferedRandom)
        original(_Writer(fp) if plain and trace.is_tracing() else fp, array, *args, **kwargs)

    return write_array
