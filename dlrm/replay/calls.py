"""Calls of the C library by their names in a trace: each is made again by the function of that name.

In: a traced call, and a thread that plays. Out: the call, on the file below the root. `KNOWN_CALLS` has those
that can be made again. DFTracer records no descriptors: a call is made through the descriptor of its file
that its own thread opened last, else any thread of its process. Where the trace tells the place of a read or
write, the descriptor is moved there first if it is elsewhere.
"""

import ctypes
import errno
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from common.descriptors import close_descriptor, open_descriptor, opening
from common.errors import UserError, os_errors_as_user_errors, printable
from dlrm.replay.files import FilePlan, find_open_flags, find_stream_mode
from dlrm.replay.paths import MappedPaths
from dlrm.replay.plan import TracedCall

AT_FDCWD = -100
WAIT_SECONDS = 60.0  # for a file that another rank is to make
UNTRACED_SECONDS = 2.0  # for a folder or file that no call of the trace makes
MOST_MOVED = 0x7FFFF000  # bytes that Linux moves in a read(2) or write(2) at most
NOT_MAPPED = (0, 0, 0, 0)
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE)
_REMEDIES = {
    errno.ENOSPC: "free space there, or name another --root",
    errno.EDQUOT: "free space there, or name another --root",
    errno.EXDEV: "folders below --root are on several file systems: name another --root",
    errno.EROFS: "name another --root",
    errno.EACCES: "name another --root",
    errno.ENAMETOOLONG: "name a shorter --root",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EINVAL: "this file system may not take the file's flags, such as O_DIRECT: name another --root",
}

_LONG, _INT, _SIZE, _POINTER, _TEXT = (
    ctypes.c_long, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p,
)  # fmt: skip
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    **dict.fromkeys(("open", "open64"), (_INT, [_TEXT, _INT, _INT])),
    **dict.fromkeys(("openat", "openat64"), (_INT, [_INT, _TEXT, _INT, _INT])),
    **dict.fromkeys(("creat", "creat64", "mkdir", "chmod", "access"), (_INT, [_TEXT, _INT])),
    **dict.fromkeys(("close", "fsync", "fdatasync"), (_INT, [_INT])),
    **dict.fromkeys(("read", "write"), (_LONG, [_INT, _POINTER, _SIZE])),
    **dict.fromkeys(("pread", "pread64", "pwrite", "pwrite64"), (_LONG, [_INT, _POINTER, _SIZE, _LONG])),
    **dict.fromkeys(("readv", "writev"), (_LONG, [_INT, _POINTER, _INT])),
    **dict.fromkeys(("preadv", "preadv64", "pwritev", "pwritev64"), (_LONG, [_INT, _POINTER, _INT, _LONG])),
    **dict.fromkeys(("lseek", "lseek64"), (_LONG, [_INT, _LONG, _INT])),
    **dict.fromkeys(("posix_fallocate", "posix_fallocate64"), (_INT, [_INT, _LONG, _LONG])),
    **dict.fromkeys(("posix_fadvise", "posix_fadvise64"), (_INT, [_INT, _LONG, _LONG, _INT])),
    **dict.fromkeys(("mmap", "mmap64"), (_POINTER, [_POINTER, _SIZE, _INT, _INT, _INT, _LONG])),
    "munmap": (_INT, [_POINTER, _SIZE]),
    **dict.fromkeys(("unlink", "remove", "rmdir"), (_INT, [_TEXT])),
    **dict.fromkeys(("rename", "link", "symlink"), (_INT, [_TEXT, _TEXT])),
    "readlink": (_LONG, [_TEXT, _POINTER, _SIZE]),
    "opendir": (_POINTER, [_TEXT]),
    "closedir": (_INT, [_POINTER]),
    **dict.fromkeys(
        ("statvfs", "statvfs64", "stat", "stat64", "lstat", "lstat64"), (_INT, [_TEXT, _POINTER])
    ),
    **dict.fromkeys(("fstat", "fstat64"), (_INT, [_INT, _POINTER])),
    **dict.fromkeys(("fopen", "fopen64"), (_POINTER, [_TEXT, _TEXT])),
    "fdopen": (_POINTER, [_INT, _TEXT]),
    "fileno": (_INT, [_POINTER]),
    **dict.fromkeys(("fclose", "fflush", "ftell", "ftello"), (_LONG, [_POINTER])),
    "rewind": (None, [_POINTER]),
    **dict.fromkeys(("fseek", "fseeko", "fseeko64"), (_INT, [_POINTER, _LONG, _INT])),
    **dict.fromkeys(
        ("fread", "fwrite", "fread_unlocked", "fwrite_unlocked"), (_SIZE, [_POINTER, _SIZE, _SIZE, _POINTER])
    ),
}


class CLibrary:
    """The functions by name. To be made after tracing has begun, so that the tracer sees the calls."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"this system's C library has no {name}")


@dataclass
class OpenFile:
    """A descriptor, or a stream of stdio with one."""

    descriptor: int
    stream: int | None  # FILE*
    thread: int  # tid in the trace of who opened it
    reads: bool
    writes: bool
    position: int | None = 0  # None: not known, as of O_APPEND


@dataclass
class ReplayOutcome:
    """What a thread's calls gave, and how that differs from the trace."""

    calls: int = 0
    moved: Counter[str] = field(default_factory=Counter)  # "read", "write" -> bytes
    differences: Counter[str] = field(default_factory=Counter)  # what -> calls
    # calls that failed, of which the trace does not say how they ended
    failed: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "ReplayOutcome") -> None:
        self.calls += other.calls
        self.moved += other.moved
        self.differences += other.differences
        self.failed += other.failed


class ProcessFiles:
    """The open files of one traced process, by path below the root."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, list[OpenFile]] = defaultdict(list)
        # path -> place in the file, bytes, address, inode
        self.mapped: dict[str, tuple[int, int, int, int]] = {}
        self.tried: Counter[str] = Counter()  # path -> how often it was opened, or that failed

    def add(self, path: str, file: OpenFile) -> None:
        with self._lock:
            self._open[path].append(file)

    def count_try(self, path: str) -> None:
        with self._lock:
            self.tried[path] += 1

    def find(self, path: str, thread: int, stream: bool, op: str, position: int | None) -> OpenFile | None:
        """The descriptor that a call was most likely made through."""
        with self._lock:
            fit = [
                file for file in self._open.get(path, ())
                if (file.stream is not None or not stream)
                and not (op == "read" and not file.reads) and not (op == "write" and not file.writes)
            ]  # fmt: skip
            if not fit:
                return None
            return max(
                enumerate(fit),
                key=lambda each: (
                    (each[1].stream is not None) == stream,
                    position is not None and each[1].position == position,
                    each[1].thread == thread,
                    each[0],
                ),
            )[1]

    def remove(self, path: str, file: OpenFile) -> None:
        with self._lock:
            self._open[path].remove(file)
            if not self._open[path]:
                del self._open[path]


@dataclass(frozen=True)
class CallSettings:
    """What the user chose of what a trace leaves open."""

    overwrite: bool = False  # files may be there already: O_EXCL is left out
    advice: int | None = None  # which advice posix_fadvise gives; None: it is not called


class Caller:
    """Makes the calls of one traced thread.

    files: the open files of its process. library: all functions. buffer, pattern: addresses of memory to read
    into, and of made-up bytes to write, each as large as the largest request.
    is_stopped: whether another thread has failed, so that waiting is in vain.
    """

    def __init__(
        self, thread: int, files: ProcessFiles, library: CLibrary, paths: MappedPaths, plan: FilePlan,
        buffer: int, pattern: int, settings: CallSettings, is_stopped: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.thread, self.files, self.library = thread, files, library
        self.paths, self.plan, self.settings, self.is_stopped = paths, plan, settings, is_stopped
        self.buffer, self.pattern = buffer, pattern
        self.outcome = ReplayOutcome()
        self._scratch = ctypes.addressof(_SCRATCH)

    def make(self, call: TracedCall) -> None:
        self.outcome.calls += 1
        KNOWN_CALLS[call.name](self, call)

    # --- opening and closing

    def open(self, call: TracedCall) -> None:
        path, flags = self.paths.find(call.path), find_open_flags(call)
        if flags is None:
            changes = path in self.plan.changed
            flags = os.O_RDWR | os.O_CREAT if changes else os.O_RDONLY
        if self.settings.overwrite:
            flags &= ~os.O_EXCL
        stream = call.name.startswith("fopen")
        mode = (find_stream_mode(call) or ("r+" if flags & os.O_RDWR else "r")).encode(errors="replace")
        if path in self.plan.kept and flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC):
            self.outcome.differences["for reading only, since the file was there before"] += 1
            flags, mode = flags & ~(os.O_ACCMODE | os.O_CREAT | os.O_TRUNC), b"r"

        def open_once() -> int | None:
            raw, permissions = os.fsencode(path), call.argument("mode", 0o644) | 0o600
            function = getattr(self.library, call.name)
            with opening:
                if stream:
                    return function(raw, mode)
                if call.name.startswith("openat"):
                    return function(AT_FDCWD, raw, flags, permissions)
                if call.name.startswith("creat"):
                    return function(raw, permissions)
                return function(raw, flags, permissions)

        if path in self.plan.absent and not call.unused:
            # not to be tried in vain: two opens of a file would hide from the replay's own trace where its
            # reads and writes are
            self._wait_for(path, bool(flags & os.O_CREAT))
        found = open_once()
        if found in (None, -1) and ctypes.get_errno() == errno.ENOENT and not call.unused:
            self._wait_for(path, bool(flags & os.O_CREAT))
            found = open_once()
        if found is None or found == -1:
            self.files.count_try(path)
            self._check_error(call, path, tolerated=call.unused)
            return
        descriptor = self.library.fileno(found) if stream else found
        access = flags & os.O_ACCMODE
        file = OpenFile(
            descriptor, found if stream else None, self.thread, access != os.O_WRONLY, access != os.O_RDONLY,
            None if flags & os.O_APPEND else 0,
        )  # fmt: skip
        grow = self.plan.grow.get(path, 0)
        if grow and file.writes and os.fstat(descriptor).st_size < grow:
            os.ftruncate(descriptor, grow)  # as the run did by a call that is not traced
        self.files.add(path, file)
        self.files.count_try(path)

    def _wait_for(self, path: str, makes: bool) -> None:
        """Until there is such a file; of one that the call itself makes, such a folder."""
        wanted, begun = os.path.dirname(path) if makes else path, time.monotonic()
        while not os.path.lexists(wanted) and not self.is_stopped():
            waited = time.monotonic() - begun
            if makes and waited > UNTRACED_SECONDS:
                os.makedirs(wanted, exist_ok=True)
            elif path in self.plan.remade and waited > UNTRACED_SECONDS:
                self._make_file(path, self.plan.remade[path])
            elif waited > WAIT_SECONDS:
                raise UserError(
                    f"{printable(path)}: is not there after {WAIT_SECONDS:.0f} s; in the run it was: made by "
                    "a call that is not in the trace, or by a rank that is not replayed (--ranks)"
                )
            time.sleep(0.001)

    def _make_file(self, path: str, size: int) -> None:
        """A sparse one, as a program that is not traced did in the run; it may be there by now."""
        with os_errors_as_user_errors(path), suppress(FileExistsError):
            made = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.ftruncate(made, size)
            close_descriptor(made)
            self.outcome.differences["made again, which no traced call did: sparse"] += 1

    def open_stream(self, call: TracedCall) -> None:
        """fdopen: the stream takes the descriptor over."""
        path = self.paths.find(call.path)
        file = self.files.find(path, self.thread, False, "", None)
        if file is None or file.stream is not None:
            self.outcome.differences[f"{call.name} without an open file"] += 1
            return
        mode = "r+" if file.reads and file.writes else "w" if file.writes else "r"
        file.stream = self.library.fdopen(file.descriptor, mode.encode())

    def close(self, call: TracedCall) -> None:
        path = self.paths.find(call.path)
        file = self.files.find(path, self.thread, call.name == "fclose", "", None)
        if file is None:
            self.outcome.differences["closed, and not opened in the trace: not replayed"] += 1
            return
        self.files.remove(path, file)
        with opening:
            if file.stream is not None:
                self.library.fclose(file.stream)
            else:
                self.library.close(file.descriptor)

    # --- moving bytes

    def move(self, call: TracedCall) -> None:
        """read, pread, readv and the like, on descriptors and streams."""
        path, name = self.paths.find(call.path), call.name
        positioned, stream = name.startswith("p"), name.startswith("f")
        file = self._find_file(call, path, stream)
        if call.position is None:
            self.outcome.differences[
                "at an offset that the trace leaves open: done at the file's position"
            ] += 1
        elif not positioned and file.position != call.position:
            self._seek(file, call.position)
        wanted = self._find_size(call, path)
        memory = self.buffer if call.op == "read" else self.pattern
        function = getattr(self.library, name)
        if stream:
            item = max(1, call.item or 1)
            moved = function(memory, item, wanted // item, file.stream) * item
        else:
            arguments: list[Any] = [memory, wanted]
            if name.removeprefix("p").startswith(("readv", "writev")):
                pieces = _split_pieces(memory, wanted, call.iovcnt or 1)
                arguments = [ctypes.addressof(pieces), len(pieces)]
            if positioned:
                arguments.append(call.position if call.position is not None else file.position or 0)
            moved = function(file.descriptor, *arguments)
        if moved < 0:
            self._check_error(call, path, tolerated=call.failed)
            return
        self.outcome.moved[call.op] += moved
        if moved != call.moved:
            if call.op == "write":
                self._check_space(call, path, file)
            self.outcome.differences[f"{call.op}s that moved other numbers of bytes"] += 1
        if not positioned and file.position is not None:
            file.position += moved

    def _find_size(self, call: TracedCall, path: str) -> int:
        """Bytes to ask for. A file that changes may be larger now than when the run found its end."""
        asked = call.count if call.count is not None else call.moved
        if call.name.startswith("f"):
            asked *= max(1, call.item or 1)
        if call.op == "write" and call.failed:
            return 0  # it moved nothing in the run, and would now
        if call.op == "write" or path in self.plan.changed and not call.failed:
            asked = call.moved
        return max(0, min(asked, find_largest_request(call)))

    def _find_file(self, call: TracedCall, path: str, stream: bool) -> OpenFile:
        """A descriptor for a call: of a file that another thread opens, once it has. A file that was open
        before tracing began is opened now.
        """
        begun = time.monotonic()
        while True:
            file = self.files.find(path, self.thread, stream, call.op, call.position)
            if file is not None:
                return file
            if self.files.tried[path] >= call.opens or time.monotonic() - begun > WAIT_SECONDS:
                break
            if self.is_stopped():
                break
            time.sleep(0.001)
        self.outcome.differences["on a file that the trace does not open: opened at its first use"] += 1
        flags = os.O_RDWR | os.O_CREAT if path in self.plan.changed else os.O_RDONLY
        self._wait_for(path, bool(flags & os.O_CREAT))
        with opening:
            opened = self.library.open64(os.fsencode(path), flags | os.O_CLOEXEC, 0o644)
            taken = self.library.fdopen(opened, b"r+" if flags & os.O_RDWR else b"r") if stream else None
        if opened < 0:
            self._check_error(call, path, tolerated=False)
        file = OpenFile(opened, taken, self.thread, True, bool(flags & os.O_RDWR))
        self.files.add(path, file)
        return file

    def _seek(self, file: OpenFile, position: int) -> None:
        self.outcome.differences["seeks added"] += 1
        if file.stream is not None:
            self.library.fseek(file.stream, position, os.SEEK_SET)
        else:
            self.library.lseek64(file.descriptor, position, os.SEEK_SET)
        file.position = position

    def _check_space(self, call: TracedCall, path: str, file: OpenFile) -> None:
        """A write that moved less than in the trace: the disk is full, and the next write says so."""
        status = os.fstatvfs(file.descriptor)
        if not status.f_bavail:
            raise UserError(f"{call.name} of {printable(path)}: {os.strerror(errno.ENOSPC)}; "
                            f"{_REMEDIES[errno.ENOSPC]}")  # fmt: skip

    def seek(self, call: TracedCall) -> None:
        path, stream = self.paths.find(call.path), call.name.startswith(("f", "r"))
        file = self._find_file(call, path, stream)
        function = getattr(self.library, call.name)
        if call.name.startswith(("ftell", "rewind")):
            function(file.stream)
            file.position = 0 if call.name == "rewind" else file.position
            return
        offset, whence = call.position or 0, call.whence if call.whence is not None else os.SEEK_SET
        if stream:
            failed = function(file.stream, offset, whence)
            file.position = offset if whence == os.SEEK_SET and not failed else None
            return
        place = function(file.descriptor, offset, whence)
        if place < 0:
            self._check_error(call, path, tolerated=True)
        else:
            file.position = place

    # --- other calls on an open file

    def synchronize(self, call: TracedCall) -> None:
        path, stream = self.paths.find(call.path), call.name == "fflush"
        file = self._find_file(call, path, stream)
        result = getattr(self.library, call.name)(file.stream if stream else file.descriptor)
        if result < 0:
            self._check_error(call, path, tolerated=call.failed)

    def allocate(self, call: TracedCall) -> None:
        path = self.paths.find(call.path)
        file = self._find_file(call._replace(op="write"), path, False)
        length = call.argument("len", 0)
        if length and (code := getattr(self.library, call.name)(file.descriptor, call.position or 0, length)):
            ctypes.set_errno(code)
            self._check_error(call, path, tolerated=call.failed)

    def advise(self, call: TracedCall) -> None:
        path = self.paths.find(call.path)
        file = self._find_file(call, path, False)
        function = getattr(self.library, call.name)
        if code := function(
            file.descriptor, call.position or 0, call.argument("len", 0), self.settings.advice
        ):
            ctypes.set_errno(code)
            self._check_error(call, path, tolerated=True)

    def map(self, call: TracedCall) -> None:
        """A file's largest mapping stays, for spans that copy from it: its end is not in the trace."""
        path = self.paths.find(call.path)
        file = self._find_file(call._replace(op="read"), path, False)
        length = call.argument("length", 0)
        if not length:
            return
        function = getattr(self.library, call.name)
        address = function(None, length, 1, 1, file.descriptor, call.position or 0)  # to read, shared
        if address in (None, ctypes.c_void_p(-1).value):
            self._check_error(call, path, tolerated=call.failed)
        elif self.files.mapped.get(path, NOT_MAPPED)[1] >= length:
            self.library.munmap(address, length)
        else:
            inode = os.fstat(file.descriptor).st_ino
            self.files.mapped[path] = call.position or 0, length, address, inode

    def copy_mapped(self, path: str | None, begin: int, size: int) -> None:
        """Copy what a span says that it copied from a mapped file: `size` bytes from place `begin` on."""
        mapped = self.paths.find(path or "/")
        first, length, address, inode = self.files.mapped.get(mapped, NOT_MAPPED)
        begin = max(begin - first, 0)
        # memory behind a file's end must not be touched, and the name may be another file's now
        if not 0 < size <= length - begin or not _holds(mapped, inode, first + begin + size):
            self.outcome.differences["copies from files that the trace does not map: not replayed"] += 1
            return
        for place in range(begin, begin + size, len(_SCRATCH)):
            ctypes.memmove(self._scratch, address + place, min(len(_SCRATCH), begin + size - place))

    # --- calls on names

    def call_on_name(self, call: TracedCall) -> None:
        """Calls whose result the trace does not hold: an error is counted, not fatal."""
        path = self.paths.find(call.path)
        raw, name = os.fsencode(path), call.name
        function = getattr(self.library, name)
        if name in ("mkdir", "chmod"):
            result = function(raw, call.argument("mode", 0o777) | 0o600)
        elif name == "access":
            result = function(raw, os.F_OK)
        elif name == "readlink":
            result = function(raw, self._scratch, len(_SCRATCH))
        elif name in ("rename", "link"):
            if call.other is None:
                self.outcome.differences[f"{name} of which the trace names one file: not replayed"] += 1
                return
            if name == "rename":
                self._wait_until_whole(path)
            result = function(raw, os.fsencode(self.paths.find(call.other)))
        elif name == "opendir":
            result = function(raw)
            if result:
                self.library.closedir(result)
        elif name in ("unlink", "remove", "rmdir"):
            result = function(raw)
        else:
            result = function(raw, self._scratch)
        if result is None or result < 0:
            self._check_error(call, path, tolerated=True)

    def _wait_until_whole(self, path: str) -> None:
        """Until other ranks have written what is to be renamed, as they had in the run. They may be on
        another host, so the files themselves are looked at.
        """
        begun = time.monotonic()
        for file, size in self.plan.whole.get(path, {}).items():
            while not os.path.exists(file) or os.stat(file).st_size < size:
                if time.monotonic() - begun > WAIT_SECONDS or self.is_stopped():
                    self.outcome.differences["renamed before another rank had written all of it"] += 1
                    return
                time.sleep(0.001)

    def link_by_name(self, call: TracedCall) -> None:
        """symlink: the target is below the root, whatever the link of the run pointed to."""
        if call.other is None:
            self.outcome.differences["symlink of which the trace names one file: not replayed"] += 1
            return
        target = os.path.normpath(os.path.join("/", os.path.dirname(call.other), call.text))
        path = self.paths.find(call.other)
        if self.library.symlink(os.fsencode(self.paths.find(target)), os.fsencode(path)) < 0:
            self._check_error(call, path, tolerated=True)

    def look_at_descriptor(self, call: TracedCall) -> None:
        path = self.paths.find(call.path)
        file = self._find_file(call, path, False)
        getattr(self.library, call.name)(file.descriptor, self._scratch)

    def _check_error(self, call: TracedCall, path: str, tolerated: bool) -> None:
        code = ctypes.get_errno()
        if tolerated and code not in _FATAL:
            if not call.failed and not call.unused:
                self.outcome.failed[f"{call.name} ({os.strerror(code)})"] += 1
            return
        remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
        raise UserError(f"{call.name} of {printable(path)}: {os.strerror(code)}{remedy}")


_SCRATCH = ctypes.create_string_buffer(4096)  # for what calls return and the replay does not read


class _Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _split_pieces(memory: int, size: int, count: int) -> Any:
    """An iovec array of `count` pieces that are `size` bytes together."""
    count = max(1, min(count, 1024))
    each = size // count
    lengths = [each] * (count - 1) + [size - each * (count - 1)]
    return (_Piece * count)(*((memory + each * n, length) for n, length in enumerate(lengths)))


def _holds(path: str, inode: int, size: int) -> bool:
    """Whether the path still is this file, of at least `size` bytes."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return status.st_ino == inode and status.st_size >= size


def find_largest_request(call: TracedCall) -> int:
    """Bytes that a read or write moves at most, whatever a damaged trace says."""
    if call.op not in ("read", "write"):
        return 0
    if not call.name.startswith("f"):
        return min(max(call.moved, call.count or 0), MOST_MOVED)
    return max(call.moved, (call.count or 0) * max(1, call.item or 1))


ADVISING = ("posix_fadvise", "posix_fadvise64")  # known only with a `CallSettings.advice`


def _list_calls() -> dict[str, Callable[[Caller, TracedCall], None]]:
    groups = {
        Caller.open: ("open", "open64", "openat", "openat64", "creat", "creat64", "fopen", "fopen64"),
        Caller.open_stream: ("fdopen",),
        Caller.close: ("close", "fclose"),
        Caller.move: (
            "read", "pread", "pread64", "readv", "preadv", "preadv64", "fread", "fread_unlocked",
            "write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev64", "fwrite", "fwrite_unlocked",
        ),
        Caller.seek: ("lseek", "lseek64", "fseek", "fseeko", "fseeko64", "ftell", "ftello", "rewind"),
        Caller.synchronize: ("fsync", "fdatasync", "fflush"),
        Caller.allocate: ("posix_fallocate", "posix_fallocate64"),
        Caller.advise: ADVISING,
        Caller.map: ("mmap", "mmap64"),
        Caller.call_on_name: (
            "mkdir", "rmdir", "unlink", "remove", "rename", "link", "chmod", "access", "readlink", "opendir",
            "statvfs", "statvfs64", "stat", "stat64", "lstat", "lstat64",
        ),
        Caller.link_by_name: ("symlink",),
        Caller.look_at_descriptor: ("fstat", "fstat64"),
    }  # fmt: skip
    return {name: function for function, names in groups.items() for name in names}


KNOWN_CALLS = _list_calls()
