"""Files and folders that this program makes, and the only module that removes or replaces any.

No path that a user gave is removed or overwritten unless this module can prove that the program made it:

WorkFolders   Intermediate files, in a folder of their own. It is made under an unguessable name, with a mark
              inside that records the kind, the token in the folder's name, its inode and its owner. Removing
              one checks all of these, follows no link, stays on the device, and removes only files whose
              names the kind knows. Anything else in it stays, and then the folder stays too.
OutputFolder  Results, in a folder that the user gave. FOLDER/.dlrm-io.json (the ledger) lists what was put
              there, by name, size and time of change. Only a file that is still as listed is replaced or
              removed. It also has the folder's own inode, by which a copy is recognised.
write_file    One file that the user gave (-o FILE). An existing one is not replaced, unless it is empty or
              the caller recognizes its contents as the program's own.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import read_bytes

MARK = ".dlrm-io-made-this.json"
LEDGER = ".dlrm-io.json"
VERSION = 1


# --- folders of intermediate files


@dataclass(frozen=True)
class WorkFolders:
    """One kind of intermediate folders, e.g. checkpoints that are being written."""

    name: str  # part of the folders' names
    files: re.Pattern[str]  # matches what the program puts into them: paths relative to the folder, with /

    def make_folder(self, parent: Path, mode: int = 0o700, step: int | None = None) -> Path:
        """Make a new folder inside `parent`, which is made too if it is missing. `mode`: who may read it,
        less the umask; by default only this user. `step` goes into its name, for the readers of a trace.
        """
        token = secrets.token_hex(8)
        label = "" if step is None else f"step-{step}-"
        folder = parent / f".dlrm-io-{self.name}-{label}{token}"
        with os_errors_as_user_errors(folder):
            parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(folder, mode)
            try:
                mark = self._describe_mark(token, os.lstat(folder))
                _write_new(folder / MARK, json.dumps(mark).encode(), mode & 0o666)
            except BaseException:
                self._remove_unmarked(folder)
                raise
        return folder

    def find_folders(self, parent: Path) -> list[Path]:
        """The folders of this kind that earlier processes of this user left in `parent`, oldest first."""
        try:
            with os.scandir(parent) as entries:
                found = [Path(entry.path) for entry in entries if self._parse_token(entry.name)]
        except OSError:
            return []
        return sorted(filter(self.is_ours, found), key=lambda path: path.lstat().st_mtime_ns)

    def remove_unmarked(self, parent: Path) -> None:
        """Remove folders of this kind's name that are empty or contain only an empty mark: a process was
        killed while it made or removed them. Call it only where no other process can be making one: with a
        lock held.
        """
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            for entry in list(entries):
                if self._parse_token(entry.name) and entry.is_dir(follow_symlinks=False):
                    self._remove_unmarked(Path(entry.path))

    def _remove_unmarked(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
            if names == [MARK] and _is_empty_file(folder / MARK):
                os.unlink(folder / MARK)
            os.rmdir(folder)  # fails unless it is empty

    def is_ours(self, folder: Path) -> bool:
        """Whether `make_folder` made this folder: name, mark, inode, owner and device agree. Those of a link
        or a copy do not.
        """
        token = self._parse_token(folder.name)
        try:
            status, mark = os.lstat(folder), os.lstat(folder / MARK)
            if not token or not stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(mark.st_mode):
                return False
            same_device = mark.st_dev == status.st_dev == os.lstat(folder.parent).st_dev
            content = json.loads(read_bytes(folder / MARK, 4096))
        except (OSError, ValueError, UserError, RecursionError):
            return False
        return same_device and status.st_uid == os.geteuid() and content == self._describe_mark(token, status)

    def publish_folder(self, folder: Path, final: Path) -> None:
        """Rename a finished folder to `final`, which must not exist. Its mark stays inside."""
        if not self.is_ours(folder):
            raise UserError(f"{printable(folder)}: was not made by this program, or was changed since")
        with os_errors_as_user_errors(final):
            if os.path.lexists(final):
                raise UserError(f"{printable(final)}: exists already; move it away")
            os.rename(folder, final)

    def holds_only_own_files(self, final: Path) -> bool:
        """Whether a folder under any name was made by `make_folder`, and has no other files in it than this
        program's. False for a copy: it has another inode.
        """
        if not self._find_published_token(final):
            return False
        _, foreign = _find_files(final, "", self.files, os.lstat(final).st_dev)
        return not foreign

    def remove_published(self, final: Path) -> bool:
        """Remove a published folder. It is renamed first: a process that is killed meanwhile must not leave a
        folder under the final name with some files missing. False, and nothing is changed, unless the folder
        `holds_only_own_files`.
        """
        token = self._find_published_token(final)
        if not token or not self.holds_only_own_files(final):
            return False
        leaving = final.with_name(f".dlrm-io-{self.name}-{token}")
        with os_errors_as_user_errors(final):
            if os.path.lexists(leaving):
                return False
            os.rename(final, leaving)
        return not self.remove_folder(leaving)

    def _find_published_token(self, final: Path) -> str:
        """The token in the mark of a folder that `make_folder` made, whatever its name is now; else ""."""
        try:
            status, mark = os.lstat(final), os.lstat(final / MARK)
            if not stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(mark.st_mode):
                return ""
            content = json.loads(read_bytes(final / MARK, 4096))
            token = content["token"]
            known = isinstance(token, str) and re.fullmatch("[0-9a-f]{16}", token)
            owned = status.st_uid == os.geteuid() and mark.st_dev == status.st_dev
            return token if known and owned and content == self._describe_mark(token, status) else ""
        except (OSError, ValueError, KeyError, TypeError, UserError, RecursionError):
            return ""

    def remove_folder(self, folder: Path) -> list[Path]:
        """Remove the program's files, and the folder if nothing else is in it; returns what is left."""
        if not self.is_ours(folder):
            return [folder]
        with os_errors_as_user_errors(folder):
            left = _remove_files(folder, self.files, os.lstat(folder).st_dev)
            if not left:
                os.unlink(folder / MARK)
                os.rmdir(folder)
        return left

    def remove_file(self, folder: Path, name: str) -> None:
        """Remove one file of a folder for which `is_ours` was true; a missing one is not an error."""
        if self.files.fullmatch(name):
            with os_errors_as_user_errors(folder / name), contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name)

    def _parse_token(self, name: str) -> str:
        found = re.fullmatch(rf"\.dlrm-io-{re.escape(self.name)}-(?:step-[0-9]+-)?([0-9a-f]{{16}})", name)
        return found[1] if found else ""

    def _describe_mark(self, token: str, status: os.stat_result) -> dict[str, Any]:
        """The mark. Without the device: that of a network file system differs from node to node."""
        return {
            "made_by": "dlrm-io", "kind": self.name, "token": token, "inode": status.st_ino,
            "owner": status.st_uid, "note": "intermediate files; can be deleted when no run uses them",
        }  # fmt: skip


def _find_files(
    folder: Path, below: str, files: re.Pattern[str], device: int
) -> tuple[list[os.DirEntry[str]], list[Path]]:
    """(own, foreign) files and folders in `folder`, without its mark. Own are this user's on `device` whose
    path in the work folder matches `files`. The files of an own folder come before it; a folder that holds
    a foreign one is in neither list. `below`: the path of `folder` in the work folder, "" or with a / behind.
    """
    own: list[os.DirEntry[str]] = []
    foreign: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            name, status = f"{below}{entry.name}", entry.stat(follow_symlinks=False)
            ours = status.st_dev == device and status.st_uid == os.geteuid()
            if not below and entry.name == MARK:
                continue
            if ours and stat.S_ISDIR(status.st_mode) and files.fullmatch(name + "/"):
                inside = _find_files(Path(entry.path), name + "/", files, device)
                own += inside[0] if inside[1] else [*inside[0], entry]
                foreign += inside[1]
            elif ours and stat.S_ISREG(status.st_mode) and files.fullmatch(name):
                own.append(entry)
            else:
                foreign.append(Path(entry.path))
    return own, foreign


def _remove_files(folder: Path, files: re.Pattern[str], device: int) -> list[Path]:
    """Remove the own files and folders in `folder`, see `_find_files`; returns the foreign ones."""
    own, foreign = _find_files(folder, "", files, device)
    for entry in own:
        if entry.is_dir(follow_symlinks=False):
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
    return foreign


def identify_folder(status: os.stat_result) -> str:
    """DEVICE:INODE, which proves later that a folder is still the same."""
    return f"{status.st_dev}:{status.st_ino}"


def remove_made_folder(folder: Path, identity: str, files: re.Pattern[str]) -> list[Path]:
    """Remove a folder that the caller has just made, and those of its files that match `files`; returns what
    is left. `identity`: that of `identify_folder` when the folder was made.
    """
    with os_errors_as_user_errors(folder):
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or identify_folder(status) != identity:
            return [folder]
        left = _remove_files(folder, files, status.st_dev)
        if not left:
            os.rmdir(folder)
    return left


# --- results in a folder of the user's


class OutputFolder:
    """What this program has put into a folder that a user gave. All names are relative to it, with /.

    scratch  a work folder on the same file system, in which new versions of the ledger are written
    """

    def __init__(self, folder: str | os.PathLike[str], scratch: Path | None = None) -> None:
        self.folder = Path(folder)
        self.scratch = scratch or self.folder
        # The ledger: name -> the [size, mtime_ns] that are the program's own. Two of them while a file is
        # being replaced, of the new file and of the one before: a kill in between leaves one or the other.
        self._files: dict[str, list[list[int]]]
        self._growing: dict[str, int]  # name -> inode of a file that is appended to, or of a folder
        self._listed_folder: int | None  # inode of the folder for which the ledger was begun
        # Names that this object has changed. Other processes may change the ledger's other entries meanwhile.
        self._changed_names: set[str] = set()
        self._files, self._growing, self._listed_folder = _read_ledger(self.folder / LEDGER)

    def owns(self, name: str) -> bool:
        """Whether the file exists and is as the program left it."""
        try:
            status = os.lstat(self.folder / name)
        except OSError:
            return False
        if status.st_uid == os.geteuid() and status.st_ino == self._growing.get(name):
            return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        return stat.S_ISREG(status.st_mode) and _take_fingerprint(status) in self._files.get(name, [])

    def is_copy(self) -> bool:
        """Whether the ledger was copied with the folder, so that its times and inodes are another one's."""
        return self._listed_folder not in (None, _read_folder_inode(self.folder))

    def list_names(self) -> list[str]:
        """All names in the ledger, whether the files still exist or not."""
        return list(self._files)

    def has_listed_size(self, name: str) -> bool:
        """Whether the file has a size that the ledger has of it; also where the ledger has none, because the
        program never made one of this name, or appends to it.
        """
        sizes = [] if name in self._growing else [size for size, _ in self._files.get(name, [])]
        return not sizes or os.lstat(self.folder / name).st_size in sizes

    def list_own_names(self) -> list[str]:
        """The names of the files that exist and are as the program left them."""
        return [name for name in self._files if self.owns(name)]

    def refuse_foreign(
        self, names: Iterable[str], remedy: str = "move it away or name another folder"
    ) -> None:
        """UserError for the first of these names that is taken by a file that is not the program's own; also
        where a foreign file has the ledger's name.
        """
        self._refuse_foreign_ledger()
        for name in names:
            _refuse_linked_folders(self.folder, name)
            path = self.folder / name
            if os.path.lexists(path) and not self.owns(name) and not _is_empty_file(path):
                raise UserError(
                    f"{printable(path)}: was not made by this program, or was changed since; {remedy}"
                )

    def publish_files(self, made: Mapping[str, Path]) -> None:
        """Move finished files (name -> its present path, on the same file system) to their names, in this
        order. Own files of these names are replaced.
        """
        self.refuse_foreign(made)
        for name, path in made.items():
            with os_errors_as_user_errors(path):
                self._record_replacement(name, os.lstat(path))
        self._write_ledger()
        for name, path in made.items():
            with os_errors_as_user_errors(self.folder / name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, self.folder / name)

    def write(self, name: str, data: bytes | str, mode: int = 0o666) -> None:
        """Write a file: the whole of it appears at once, or nothing. `mode`: who may read it, less the
        umask.
        """
        with self.write_partial(name, mode) as partial:
            _append_bytes(partial, data.encode() if isinstance(data, str) else data)

    @contextmanager
    def write_partial(self, name: str, mode: int = 0o666) -> Iterator[Path]:
        """Yields the path of a new, empty file to be filled. It gets its name at the end of the block; if the
        block raises, it is removed.
        """
        self.refuse_foreign([name])
        target = self.folder / name
        with os_errors_as_user_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
            _write_new(partial, b"", mode)
        try:
            yield partial
            self.publish_files({name: partial})
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def open_growing(self, name: str) -> int:
        """A descriptor of a file to append to, made if it is missing. The ledger knows it by its inode:
        while it grows, its size and time change.
        """
        self.refuse_foreign([name])
        path = self.folder / name
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os_errors_as_user_errors(path):
            descriptor = open_descriptor(path, flags, 0o666)
            try:
                self._changed_names.add(name)
                self._growing[name] = os.fstat(descriptor).st_ino
                self._write_ledger()
            except BaseException:
                close_descriptor(descriptor)
                raise
        return descriptor

    def make_folder(self, name: str, known: bool = False) -> Path:
        """Make a folder inside this one, recorded as the program's own. `known`: the caller has checked that
        an existing one is.
        """
        self.refuse_foreign([] if known else [name])
        path = self.folder / name
        with os_errors_as_user_errors(path):
            if not os.path.lexists(path):
                os.mkdir(path)
            self._changed_names.add(name)
            self._growing[name] = os.lstat(path).st_ino
            self._write_ledger()
        return path

    def set_aside(self, name: str) -> str | None:
        """Rename an own file to the next free name of STEM-1.EXT, STEM-2.EXT, ...; None: there is no such
        file.
        """
        path = self.folder / name
        if not os.path.lexists(path):
            return None
        self.refuse_foreign([name])
        number = 1
        while os.path.lexists(path.with_name(f"{path.stem}-{number}{path.suffix}")):
            number += 1
        other = f"{path.stem}-{number}{path.suffix}"
        with os_errors_as_user_errors(path):
            os.rename(path, path.with_name(other))
        self._changed_names |= {name, other}
        for listed in (self._files, self._growing):
            if name in listed:
                listed[other] = listed.pop(name)  # type: ignore[assignment,index]
        self._write_ledger()
        return other

    def record_files(self, names: Iterable[str], copied: bool = False) -> None:
        """Record files that this process has just written by other means, as they are now. `copied`: these
        are the program's own files of a copy, which is not a copy any more.
        """
        if copied:
            self._listed_folder = None
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._record_replacement(name, os.lstat(self.folder / name))
        self._write_ledger()

    def remove_file(self, name: str) -> bool:
        """Remove an own file; False where it does not exist, or is not as the program left it."""
        if not self.owns(name):
            return False
        with os_errors_as_user_errors(self.folder / name):
            os.unlink(self.folder / name)
        return True

    def remove_folder(self) -> bool:
        """Remove all own files, then the folder; False where something else is in it, which stays."""
        for name in list(self._files):
            self.remove_file(name)
        for below in sorted({str(Path(name).parent) for name in self._files if "/" in name}, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(self.folder / below)
        rest = set(os.listdir(self.folder))
        if rest - {LEDGER}:
            return False
        if rest:
            os.unlink(self.folder / LEDGER)
        os.rmdir(self.folder)
        return True

    def _record_replacement(self, name: str, status: os.stat_result) -> None:
        """Record the file that is about to get this name, and the own file that has it until then."""
        self._changed_names.add(name)
        found = [_take_fingerprint(status)]
        if self.owns(name):
            found.append(_take_fingerprint(os.lstat(self.folder / name)))
        self._files[name] = found[: 1 if found[0] == found[-1] else 2]

    def _refuse_foreign_ledger(self) -> None:
        path = self.folder / LEDGER
        if os.path.lexists(path) and not _is_ledger(path):
            raise UserError(f"{printable(path)}: was not made by this program; move it away")

    def _write_ledger(self) -> None:
        """Write the ledger. Always before the files themselves: a kill in between then leaves an entry
        without a file, and never a file without an entry, which nothing would remove again.
        """
        path = self.folder / LEDGER
        self._refuse_foreign_ledger()
        files, growing, _ = _read_ledger(path)  # another command may have added entries meanwhile
        self._files |= {name: prints for name, prints in files.items() if name not in self._changed_names}
        self._growing |= {name: inode for name, inode in growing.items() if name not in self._changed_names}
        partial = self.scratch / f"{LEDGER}.{secrets.token_hex(8)}.partial"
        note = "what dlrm-io put into this folder: name, size, time of change; only these may be replaced"
        values = {
            "made_by": "dlrm-io",
            "version": VERSION,
            "note": note,
            "folder": self._listed_folder or _read_folder_inode(self.folder),
            "files": self._files,
            "growing": self._growing,
        }
        with os_errors_as_user_errors(path):
            try:
                _write_new(partial, json.dumps(values, indent=0).encode(), mode=0o666)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise


def _take_fingerprint(status: os.stat_result) -> list[int]:
    """What the ledger records of a file."""
    return [status.st_size, status.st_mtime_ns]


def _read_folder_inode(folder: Path) -> int | None:
    try:
        return os.stat(folder).st_ino
    except OSError:
        return None


def _read_ledger(path: Path) -> tuple[dict[str, list[list[int]]], dict[str, int], int | None]:
    """(files, growing files, inode of the folder) of the ledger; nothing where there is none, or not this
    program's.
    """
    try:
        listed = json.loads(read_bytes(path, 16 << 20))
        if listed["made_by"] != "dlrm-io" or path.is_symlink():
            return {}, {}, None
        made = {
            str(name): [[int(size), int(changed)] for size, changed in prints]
            for name, prints in listed["files"].items()
        }
        growing = {str(name): int(inode) for name, inode in listed.get("growing", {}).items()}
        folder = listed.get("folder")
        return made, growing, folder if type(folder) is int else None
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}, {}, None


def _is_ledger(path: Path) -> bool:
    try:
        return json.loads(read_bytes(path, 16 << 20))["made_by"] == "dlrm-io" and not path.is_symlink()
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_empty_file(path: Path) -> bool:
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _refuse_linked_folders(folder: Path, name: str) -> None:
    """UserError where a folder on the way to `name` is a link: it would lead a write to somewhere else. The
    output folder itself may be a link.
    """
    for parent in list(Path(name).parents)[:-1]:
        path = folder / parent
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise UserError(
                f"{printable(path)}: is a link or a file, a folder of results is expected; move it away"
            )


# --- shared memory


def remove_dead_segments(folder: str, sizes: Iterable[int]) -> None:
    """Remove shared memory that killed runs of earlier versions left in `folder` (/dev/shm).

    Only this user's files named dlrm-PID-TIME, of one of these sizes, whose process is gone and whose lock no
    process holds. This version's shared memory has no name, so it is freed with its last process.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if re.fullmatch(r"dlrm-[0-9]+-[0-9]+", entry.name)]
    except OSError:
        return
    for name in found:
        path = os.path.join(folder, name)
        if os.path.exists(f"/proc/{name.split('-')[1]}"):
            continue
        with contextlib.suppress(OSError):
            descriptor = open_descriptor(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
                if ours and status.st_size in sizes:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.lstat(path), status):
                        os.unlink(path)
            finally:
                close_descriptor(descriptor)


# --- single files


@contextmanager
def write_file(
    path: Path, is_own: Callable[[Path], bool] = lambda _: False, option: str = "", mode: int = 0o666
) -> Iterator[Path]:
    """Yields a new file to be filled, which is renamed to `path` at the end of the block.

    is_own  whether an existing file may be replaced; an empty one may be in any case
    option  e.g. "-o": the first word of the message
    mode    who may read it, less the umask
    """
    named = f"{option} {printable(path)}".lstrip()
    if os.path.lexists(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{named}: exists and is not a plain file; name another")
        if not _is_empty_file(path) and not is_own(path):
            raise UserError(f"{named}: exists and was not made by this command; remove it or name another")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with os_errors_as_user_errors(path):
        _write_new(partial, b"", mode=mode)
    try:
        yield partial
        with os_errors_as_user_errors(path):
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def write_whole(path: Path, data: bytes, durable: bool = False) -> None:
    """Write a file in a folder of the program's own (a work folder, a cache): the whole of it, or nothing.
    `durable`: fsync it before it gets its name.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with os_errors_as_user_errors(path):
        try:
            _write_new(partial, data, mode=0o666, durable=durable)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise


def finish_file(partial: Path, path: Path) -> None:
    """Rename a complete file, in a folder of the program's own, to the name that says that it is complete."""
    with os_errors_as_user_errors(path):
        os.replace(partial, path)


def discard_file(path: Path) -> None:
    """Remove a file in a folder of the program's own; a missing one is not an error."""
    with os_errors_as_user_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def discard_empty_folder(path: Path) -> None:
    """Remove a folder that this process has made; it stays where it holds anything."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _write_new(path: Path, data: bytes, mode: int = 0o600, durable: bool = False) -> None:
    """Make a new file; OSError where the path exists, also as a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = open_descriptor(path, flags, mode)
    try:
        _write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    finally:
        close_descriptor(descriptor)


def _append_bytes(path: Path, data: bytes) -> None:
    descriptor = open_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os_errors_as_user_errors(path):
            _write_all(descriptor, data)
    finally:
        close_descriptor(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
