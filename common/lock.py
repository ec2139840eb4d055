"""One writer at a time for a folder, across processes and nodes.

FolderLock(folder, purpose) holds a byte-range lock of an open file (F_OFD_SETLK) on FOLDER/.dlrm-io.lock:
the kernel takes it back when its owner dies, whatever the reason, and NFS, Lustre (mounted with `flock`, as
Polaris does), GPFS and BeeGFS carry such locks to every node, and take them back when a node is lost. A
flock(2) would be local to a node on some of these. Where the file system has no locks at all, a lock file
made with O_EXCL takes their place: it outlives a killed owner, is taken over where that owner can be seen to
be dead (same host), and is otherwise named with what to do.

The second writer learns who holds the lock, since when and on which host, as a UserError (exit code 2).
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import struct
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import UserError, os_errors_as_user_errors, printable

LOCK_NAME = ".dlrm-io.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system without locks answers
HELD = {errno.EACCES, errno.EAGAIN}


class FolderInUse(UserError):
    """Another process has the lock."""


class FolderLock:
    """Holds FOLDER for one writer; a context manager. `purpose` is what the second one reads, e.g.
    "preprocessing into it". Locks of different `name` have nothing to do with each other.
    """

    def __init__(self, folder: str | os.PathLike[str], purpose: str, name: str = LOCK_NAME) -> None:
        self.folder, self.purpose = Path(folder), purpose
        self.path = self.folder / name
        self._descriptor = -1
        self._marker: Path | None = None  # of the O_EXCL kind

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise UserError at once; the folder must exist."""
        with os_errors_as_user_errors(self.path):
            while self._descriptor < 0 and self._marker is None:
                self._try()

    def _try(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self.path, flags, 0o644)
        try:
            _lock_range(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in HELD:
                raise FolderInUse(self._told(_owner_soon(self.path))) from None
            if error.errno not in NO_LOCKS:
                raise
            self._mark()
            return
        # whoever had the lock before removed the file: what was locked may be a file without a name
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            same = False
        if not same:
            os.close(descriptor)
            return
        if os.fstat(descriptor).st_size and not _owner(self.path):
            os.close(descriptor)
            raise UserError(f"{printable(self.path)}: not a lock file of this program; move it away")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _description(self.purpose))
        self._descriptor = descriptor

    def _mark(self) -> None:
        """A file system without locks: a second file, made whole under another name and linked, which is
        atomic on NFS too.
        """
        marker = self.path.with_name(self.path.name + ".held")
        fresh = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, _description(self.purpose))
            os.link(fresh, marker)
        except FileExistsError:
            owner = _owner(marker)
            if not _is_dead(owner):
                raise FolderInUse(
                    f"{self._told(owner)} (this file system has no locks: if that process is gone, "
                    f"remove {printable(marker)})"
                ) from None
            os.unlink(marker)
        else:
            self._marker = marker
        finally:
            os.close(descriptor)
            os.unlink(fresh)

    def release(self) -> None:
        """Give it back. The file goes while the lock is still held, so that nothing is left behind."""
        if self._marker is not None:
            _unlink_quietly(self._marker)
            _unlink_quietly(self.path)
            self._marker = None
        if self._descriptor >= 0:
            _unlink_quietly(self.path)
            os.close(self._descriptor)
            self._descriptor = -1

    def _told(self, owner: dict[str, Any]) -> str:
        if not owner:
            return f"{printable(self.folder)}: in use by another process; wait for it or name another folder"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return (
            f"{printable(self.folder)}: in use since {since} by process {owner['pid']} of {owner['user']} on "
            f"{owner['host']} ({owner['purpose']}); wait for it, end it, or name another folder"
        )


def try_lock(descriptor: int) -> bool:
    """Lock an open file for its only writer; False: another process, here or on another node, has it. True
    also where the file system has no locks. Closing the file gives it back.
    """
    try:
        _lock_range(descriptor)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        if error.errno not in HELD:
            raise
        return False
    return True


def _lock_range(descriptor: int) -> None:
    """The whole file, for as long as this open file lives; not blocking."""
    kind, whence, start, length, pid = fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0
    wanted = struct.pack("hhqqi4x", kind, whence, start, length, pid)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kernel or file system without the OFD kind


def _start_time(pid: int) -> str:
    """Tells a process from a later one of the same number; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _description(purpose: str) -> bytes:
    return json.dumps({
        "host": socket.gethostname(), "pid": os.getpid(), "start_time": _start_time(os.getpid()),
        "user": os.environ.get("USER") or str(os.getuid()), "since": time.time(), "purpose": purpose,
        "command": sys.argv[:1],
    }).encode()  # fmt: skip


def _owner(path: Path) -> dict[str, Any]:
    """Who wrote this lock file; empty where it cannot be told (yet)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            owner = json.loads(os.read(descriptor, 4096))
        finally:
            os.close(descriptor)
        return {
            "host": printable(owner["host"]), "pid": int(owner["pid"]), "user": printable(owner["user"]),
            "since": float(owner["since"]), "purpose": printable(owner["purpose"]),
            "start_time": str(owner["start_time"]),
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _owner_soon(path: Path) -> dict[str, Any]:
    """The same of a lock that is held: its owner may be about to write who it is."""
    for _ in range(20):
        if owner := _owner(path):
            return owner
        time.sleep(0.01)
    return {}


def _is_dead(owner: dict[str, Any]) -> bool:
    return (
        bool(owner)
        and owner["host"] == socket.gethostname()
        and _start_time(owner["pid"]) != owner["start_time"]
    )


def _unlink_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):  # the lock is what counts, its file may stay
        os.unlink(path)
