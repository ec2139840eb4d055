"""One writer at a time for a folder, across processes and nodes.

FolderLock(folder, purpose) holds a byte-range lock of an open file (F_OFD_SETLK) on FOLDER/.dlrm-io.lock. The
kernel releases it when its owner dies, whatever the cause. NFS, Lustre (mounted with `flock`, as on Polaris),
GPFS and BeeGFS share such locks between all nodes, and release them when a node is lost. Why not flock(2): on
some of these it locks on one node only.

Where the file system has no locks at all, a lock file made with link(2) takes their place. It outlives a
killed owner. It is taken over where that owner is known to be dead (same host, no such process); else the
message says which file to remove.

A second writer gets a UserError (exit code 2) that says who has the lock, since when and on which host.
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

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import parse_json
from common.processes import read_start_time

LOCK_NAME = ".dlrm-io.lock"
MAX_OWNER_BYTES = 4096  # of a lock file
TEXTS = ("host", "user", "purpose", "start_time")  # of its entries
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # from a file system without locks
HELD = {errno.EACCES, errno.EAGAIN}  # another process has the lock
# struct flock: kind, whence, start, length (0: to the end), process
_LOCK_FORMAT = "hhqqi4x"
_WHOLE_FILE = struct.pack(_LOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class FolderInUse(UserError):
    """Another process has the lock."""


class FolderLock:
    """A lock on a folder; a context manager.

    purpose  what a second writer reads, e.g. "preprocessing into it"
    name     of the lock file in the folder; locks of different names are independent
    """

    def __init__(self, folder: str | os.PathLike[str], purpose: str, name: str = LOCK_NAME) -> None:
        self.folder, self.purpose = Path(folder), purpose
        self.path = self.folder / name
        self._descriptor = -1
        self._marker: Path | None = None  # the lock file that takes a lock's place

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise UserError at once; the folder must exist."""
        with os_errors_as_user_errors(self.path):
            while self._descriptor < 0 and self._marker is None:
                self._try_lock()

    def _try_lock(self) -> None:
        """Take the lock, or raise FolderInUse. Returns without it where the lock file was just replaced."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = open_descriptor(self.path, flags, 0o644)
        try:
            _lock_range(descriptor)
        except OSError as error:
            close_descriptor(descriptor)
            if error.errno in HELD:
                raise FolderInUse(self._describe_owner(_wait_for_owner(self.path))) from None
            if error.errno not in NO_LOCKS:
                raise
            self._link_marker()
            return
        # The owner before removes the file when it releases the lock. If that was after this process opened
        # it, the locked file has no name any more, and the next process would lock another one: try again.
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            same = False
        if not same:
            close_descriptor(descriptor)
            return
        if os.fstat(descriptor).st_size and not _read_owner(self.path):
            close_descriptor(descriptor)
            raise UserError(f"{printable(self.path)}: not a lock file of this program; move it away")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _describe_this_process(self.purpose))
        self._descriptor = descriptor

    def _link_marker(self) -> None:
        """On a file system without locks: write a file under another name, then link it to the marker's name.
        link(2) fails where that name is taken, and is atomic on NFS too.
        """
        marker = self.path.with_name(self.path.name + ".held")
        fresh = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        descriptor = open_descriptor(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, _describe_this_process(self.purpose))
            os.link(fresh, marker)
        except FileExistsError:
            owner = _read_owner(marker)
            if not _is_dead(owner):
                raise FolderInUse(
                    f"{self._describe_owner(owner)} (this file system has no locks: if that process is gone, "
                    f"remove {printable(marker)})"
                ) from None
            os.unlink(marker)
        else:
            self._marker = marker
        finally:
            close_descriptor(descriptor)
            os.unlink(fresh)

    def release(self) -> None:
        """Release the lock. The file is removed first, while the lock still protects it."""
        if self._marker is not None:
            _unlink_quietly(self._marker)
            _unlink_quietly(self.path)
            self._marker = None
        if self._descriptor >= 0:
            _unlink_quietly(self.path)
            close_descriptor(self._descriptor)
            self._descriptor = -1

    def _describe_owner(self, owner: dict[str, Any]) -> str:
        """The line that the second writer reads."""
        if not owner:
            return f"{printable(self.folder)}: in use by another process; wait for it or name another folder"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return (
            f"{printable(self.folder)}: in use since {since} by process {owner['pid']} of {owner['user']} on "
            f"{owner['host']} ({owner['purpose']}); wait for it, end it, or name another folder"
        )


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed. False: another process, here or on another node, has the lock.
    True also where the file system has no locks.
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


def find_lock_owner(folder: Path, name: str = LOCK_NAME) -> dict[str, Any]:
    """Who holds the lock on a folder (host, pid, user, since, purpose); empty where it is free.
    "unknown" in place of each where it is held and the lock file does not say by whom.

    The lock is not taken and nothing is written, so that other users' folders can be looked at.
    """
    marker = folder / f"{name}.held"
    if (owner := _read_owner(marker)) and not _is_dead(owner):
        return owner
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = open_descriptor(folder / name, flags)
    except OSError:
        return {}
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        held = struct.unpack(_LOCK_FORMAT, answer)[0] != fcntl.F_UNLCK
        since = os.fstat(descriptor).st_mtime
    except OSError:
        return {}
    finally:
        close_descriptor(descriptor)
    if not held:
        return {}
    return _read_owner(folder / name) or {**dict.fromkeys((*TEXTS, "pid"), "unknown"), "since": since}


def _lock_range(descriptor: int) -> None:
    """Lock the whole file until this descriptor is closed; OSError at once where another process has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kernel or file system without OFD locks


def _describe_this_process(purpose: str) -> bytes:
    """The contents of a lock file."""
    return json.dumps({
        "host": socket.gethostname(), "pid": os.getpid(), "start_time": read_start_time(os.getpid()),
        "user": os.environ.get("USER") or str(os.getuid()), "since": time.time(), "purpose": purpose,
        "command": sys.argv[:1],
    }).encode()  # fmt: skip


def _read_owner(path: Path) -> dict[str, Any]:
    """The process that wrote this lock file; empty where it is not written yet, or is not a lock file."""
    try:
        descriptor = open_descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            owner = parse_json(os.read(descriptor, MAX_OWNER_BYTES), printable(path))
        finally:
            close_descriptor(descriptor)
        texts = {name: printable(owner[name])[:200] for name in TEXTS}
        pid, since = owner["pid"], owner["since"]
        if type(pid) is not int or not 0 < pid < 1 << 31 or not 0 <= since < 1 << 33:
            return {}
        return {**texts, "pid": pid, "since": float(since)}
    except (OSError, UserError, KeyError, TypeError):
        return {}


def _wait_for_owner(path: Path) -> dict[str, Any]:
    """The same for a lock that is held: its owner writes the file only after it has the lock."""
    for _ in range(20):
        if owner := _read_owner(path):
            return owner
        time.sleep(0.01)
    return {}


def _is_dead(owner: dict[str, Any]) -> bool:
    return (
        bool(owner)
        and owner["host"] == socket.gethostname()
        and read_start_time(owner["pid"]) != owner["start_time"]
    )


def _unlink_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):  # the lock counts, not its file, which may stay
        os.unlink(path)
