"""Files and folders that this program makes, and the only module that removes or replaces any.

No path that a user named is removed or overwritten unless this module can prove that the program made it:

WorkFolders   intermediate files, in a folder of their own: freshly made under an unguessable name, with a
              mark inside that names the kind, the token of the folder's name, its inode and its owner.
              Removing one checks all of these, follows no link, crosses to no other device and takes only
              files whose names the kind knows; what else lies there stays, and the folder with it.
OutputFolder  results, in a folder that the user named. FOLDER/.dlrm-io.json lists what was put there, by
              name, size and time of change. Only a file that is still as listed is replaced or removed.
write_file    one file that the user named (-o FILE): never over an existing one, unless it is empty or the
              caller recognises its content as the program's own.
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

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import read_bytes

MARK = ".dlrm-io-made-this.json"
LEDGER = ".dlrm-io.json"
VERSION = 1


# --- folders of intermediate files


@dataclass(frozen=True)
class WorkFolders:
    """One kind of intermediate folders: `name` goes into their names, `files` matches what the program puts
    into them (paths relative to the folder, with /).
    """

    name: str
    files: re.Pattern[str]

    def make(self, parent: Path, mode: int = 0o700, step: int | None = None) -> Path:
        """A new one inside `parent`, which is made if it is missing. Others cannot read it, unless `mode`
        (less the umask) says so. `step` goes into its name, for those who look at a trace.
        """
        token = secrets.token_hex(8)
        label = "" if step is None else f"step-{step}-"
        folder = parent / f".dlrm-io-{self.name}-{label}{token}"
        with os_errors_as_user_errors(folder):
            parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(folder, mode)
            try:
                mark = self._mark(token, os.lstat(folder))
                _write_new(folder / MARK, json.dumps(mark).encode(), mode & 0o666)
            except BaseException:
                self._remove_unmarked(folder)
                raise
        return folder

    def find(self, parent: Path) -> list[Path]:
        """Those that earlier processes of this user left in `parent`, oldest first."""
        try:
            with os.scandir(parent) as entries:
                found = [Path(entry.path) for entry in entries if self._token(entry.name)]
        except OSError:
            return []
        return sorted(filter(self.is_ours, found), key=lambda path: path.lstat().st_mtime_ns)

    def remove_unmarked(self, parent: Path) -> None:
        """Folders by our name that are empty, or hold an empty mark: their making, or their removal, was cut
        short. Only where no other process can be making one: with a lock, or a name that is one output's.
        """
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            for entry in list(entries):
                if self._token(entry.name) and entry.is_dir(follow_symlinks=False):
                    self._remove_unmarked(Path(entry.path))

    def _remove_unmarked(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
            if names == [MARK] and _is_empty_file(folder / MARK):
                os.unlink(folder / MARK)
            os.rmdir(folder)  # fails where anything lies in it

    def is_ours(self, folder: Path) -> bool:
        """Name, mark, inode, owner and device agree; a link or a copy is not ours."""
        token = self._token(folder.name)
        try:
            status, mark = os.lstat(folder), os.lstat(folder / MARK)
            if not token or not stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(mark.st_mode):
                return False
            same_device = mark.st_dev == status.st_dev == os.lstat(folder.parent).st_dev
            content = json.loads(read_bytes(folder / MARK, 4096))
        except (OSError, ValueError, UserError, RecursionError):
            return False
        return same_device and status.st_uid == os.geteuid() and content == self._mark(token, status)

    def publish(self, folder: Path, final: Path) -> None:
        """Give a finished folder a name of its own, under which nothing lies; its mark stays inside."""
        if not self.is_ours(folder):
            raise UserError(f"{printable(folder)}: was not made by this program, or was changed since")
        with os_errors_as_user_errors(final):
            if os.path.lexists(final):
                raise UserError(f"{printable(final)}: is there already; move it away")
            os.rename(folder, final)

    def made(self, final: Path) -> bool:
        """Whether a folder under any name was made by `make` and holds nothing but this program's files. A
        copy does not count: its inode is another.
        """
        return bool(self._published_token(final)) and not _foreign_files(
            final, "", self.files, os.lstat(final).st_dev
        )

    def withdraw(self, final: Path) -> bool:
        """Remove a published folder: it loses its name first, so that nobody takes it for whole. False, and
        nothing done, where it was not `made` by this program or something else lies in it.
        """
        token = self._published_token(final)
        if not token or not self.made(final):
            return False
        leaving = final.with_name(f".dlrm-io-{self.name}-{token}")
        with os_errors_as_user_errors(final):
            if os.path.lexists(leaving):
                return False
            os.rename(final, leaving)
        return not self.remove(leaving)

    def _published_token(self, final: Path) -> str:
        try:
            status, mark = os.lstat(final), os.lstat(final / MARK)
            if not stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(mark.st_mode):
                return ""
            content = json.loads(read_bytes(final / MARK, 4096))
            token = content["token"]
            known = isinstance(token, str) and re.fullmatch("[0-9a-f]{16}", token)
            owned = status.st_uid == os.geteuid() and mark.st_dev == status.st_dev
            return token if known and owned and content == self._mark(token, status) else ""
        except (OSError, ValueError, KeyError, TypeError, UserError, RecursionError):
            return ""

    def remove(self, folder: Path) -> list[Path]:
        """Remove what the program put there, and the folder; returns what was left because it is not ours."""
        if not self.is_ours(folder):
            return [folder]
        with os_errors_as_user_errors(folder):
            left = _remove_files(folder, "", self.files, os.lstat(folder).st_dev)
            if not left:
                os.unlink(folder / MARK)
                os.rmdir(folder)
        return left

    def remove_file(self, folder: Path, name: str) -> None:
        """One file of a folder that `is_ours` has been asked of; none there is fine."""
        if self.files.fullmatch(name):
            with os_errors_as_user_errors(folder / name), contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name)

    def _token(self, name: str) -> str:
        found = re.fullmatch(rf"\.dlrm-io-{re.escape(self.name)}-(?:step-[0-9]+-)?([0-9a-f]{{16}})", name)
        return found[1] if found else ""

    def _mark(self, token: str, status: os.stat_result) -> dict[str, Any]:
        """No device: that of a network file system differs from node to node."""
        return {
            "made_by": "dlrm-io", "kind": self.name, "token": token, "inode": status.st_ino,
            "owner": status.st_uid, "note": "intermediate files; can be deleted when no run uses them",
        }  # fmt: skip


def _foreign_files(folder: Path, below: str, files: re.Pattern[str], device: int) -> list[Path]:
    """What `_remove_files` would leave."""
    left: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            name, status = f"{below}{entry.name}", entry.stat(follow_symlinks=False)
            ours = status.st_dev == device and status.st_uid == os.geteuid()
            if not below and entry.name == MARK:
                continue
            if ours and stat.S_ISDIR(status.st_mode) and files.fullmatch(name + "/"):
                left += _foreign_files(Path(entry.path), name + "/", files, device)
            elif not (ours and stat.S_ISREG(status.st_mode) and files.fullmatch(name)):
                left.append(Path(entry.path))
    return left


def _remove_files(folder: Path, below: str, files: re.Pattern[str], device: int) -> list[Path]:
    left: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            name, status = f"{below}{entry.name}", entry.stat(follow_symlinks=False)
            ours = status.st_dev == device and status.st_uid == os.geteuid()
            if not below and entry.name == MARK:
                continue
            if ours and stat.S_ISDIR(status.st_mode) and files.fullmatch(name + "/"):
                inside = _remove_files(Path(entry.path), name + "/", files, device)
                left += inside
                if not inside:
                    os.rmdir(entry.path)
            elif ours and stat.S_ISREG(status.st_mode) and files.fullmatch(name):
                os.unlink(entry.path)
            else:
                left.append(Path(entry.path))
    return left


def remove_made_folder(folder: Path, identity: str, files: re.Pattern[str]) -> list[Path]:
    """Remove a folder that the caller has made a moment ago, as its device and inode (`DEVICE:INODE`) prove,
    and of its contents only files that `files` matches; returns what was left because it is not ours.
    """
    with os_errors_as_user_errors(folder):
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or f"{status.st_dev}:{status.st_ino}" != identity:
            return [folder]
        left = _remove_files(folder, "", files, status.st_dev)
        if not left:
            os.rmdir(folder)
    return left


# --- results in a folder of the user's


class OutputFolder:
    """What this program has put into a folder that a user named. `names` are relative to it, with /.
    `scratch`: a work folder on the same file system, where a killed process leaves its half-written list.
    """

    def __init__(self, folder: str | os.PathLike[str], scratch: Path | None = None) -> None:
        self.folder = Path(folder)
        self.scratch = scratch or self.folder
        self._made: dict[str, list[list[int]]] = {}  # name -> the [size, mtime_ns] that are ours: new, before
        self._growing: dict[str, int] = {}  # name -> inode of a file that is appended to, or of a folder
        self._named: set[str] = set()  # by this object; what the list says of others may change meanwhile
        made, growing = _read_ledger(self.folder / LEDGER)
        self._made.update(made)
        self._growing.update(growing)

    def owns(self, name: str) -> bool:
        """Whether the file is there and as the program left it."""
        try:
            status = os.lstat(self.folder / name)
        except OSError:
            return False
        if status.st_uid == os.geteuid() and status.st_ino == self._growing.get(name):
            return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        return stat.S_ISREG(status.st_mode) and _print(status) in self._made.get(name, [])

    def names(self) -> list[str]:
        """All that the list has, whether it is still there or not."""
        return list(self._made)

    def listed_sizes(self, name: str) -> set[int]:
        """Of a listed file; empty where the program has never made one of this name here."""
        return {size for size, _ in self._made.get(name, [])}

    def own_names(self) -> list[str]:
        """What was put there and is as the program left it."""
        return [name for name in self._made if self.owns(name)]

    def refuse_foreign(
        self, names: Iterable[str], remedy: str = "move it away or name another folder"
    ) -> None:
        """UserError for the first of these names under which something lies that is not the program's own, or
        where the list of what is our own cannot be written because a foreign file has its name.
        """
        self._refuse_foreign_ledger()
        for name in names:
            _refuse_linked_folders(self.folder, name)
            path = self.folder / name
            if os.path.lexists(path) and not self.owns(name) and not _is_empty_file(path):
                raise UserError(
                    f"{printable(path)}: was not made by this program, or was changed since; {remedy}"
                )

    def publish(self, made: Mapping[str, Path]) -> None:
        """Give finished files (name -> where it lies, on the same file system) their names, over own ones, in
        the order given.
        """
        self.refuse_foreign(made)
        for name, path in made.items():
            with os_errors_as_user_errors(path):
                self._expect(name, os.lstat(path))
        self._save()
        for name, path in made.items():
            with os_errors_as_user_errors(self.folder / name):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, self.folder / name)

    def write(self, name: str, data: bytes | str, mode: int = 0o666) -> None:
        """A whole file, or none. `mode`: who may read it, less the umask."""
        with self.writing(name, mode) as partial:
            _append(partial, data.encode() if isinstance(data, str) else data)

    @contextmanager
    def writing(self, name: str, mode: int = 0o666) -> Iterator[Path]:
        """A new, empty file to be filled by any means; it gets its name at the end of the block, if that is
        left without an error, and is removed otherwise.
        """
        self.refuse_foreign([name])
        target = self.folder / name
        with os_errors_as_user_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
            _write_new(partial, b"", mode)
        try:
            yield partial
            self.publish({name: partial})
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def open_growing(self, name: str) -> int:
        """A descriptor of a file that is appended to, made if it is missing. It stays ours however long it
        grows: while a program writes, size and time cannot be listed.
        """
        self.refuse_foreign([name])
        path = self.folder / name
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os_errors_as_user_errors(path):
            descriptor = os.open(path, flags, 0o666)
            try:
                self._named.add(name)
                self._growing[name] = os.fstat(descriptor).st_ino
                self._save()
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def make_folder(self, name: str, known: bool = False) -> Path:
        """A folder of our own inside this one. `known`: the caller has seen that the one there is ours."""
        self.refuse_foreign([] if known else [name])
        path = self.folder / name
        with os_errors_as_user_errors(path):
            if not os.path.lexists(path):
                os.mkdir(path)
            self._named.add(name)
            self._growing[name] = os.lstat(path).st_ino
            self._save()
        return path

    def set_aside(self, name: str) -> str | None:
        """Give an own file the next free name of the kind stem-1.ext, stem-2.ext; None: there is none."""
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
        self._named |= {name, other}
        for listed in (self._made, self._growing):
            if name in listed:
                listed[other] = listed.pop(name)  # type: ignore[assignment,index]
        self._save()
        return other

    def adopt(self, names: Iterable[str]) -> None:
        """List files that this process has just made by other means, as they are now."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._expect(name, os.lstat(self.folder / name))
        self._save()

    def remove(self, name: str) -> bool:
        """Remove an own file; False where it is not, or not as the program left it."""
        if not self.owns(name):
            return False
        with os_errors_as_user_errors(self.folder / name):
            os.unlink(self.folder / name)
        return True

    def remove_folder(self) -> bool:
        """Remove all own files and then the folder; False when something else lies in it."""
        for name in list(self._made):
            self.remove(name)
        for below in sorted({str(Path(name).parent) for name in self._made if "/" in name}, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(self.folder / below)
        rest = set(os.listdir(self.folder))
        if rest - {LEDGER}:
            return False
        if rest:
            os.unlink(self.folder / LEDGER)
        os.rmdir(self.folder)
        return True

    def _expect(self, name: str, status: os.stat_result) -> None:
        """The file that is to come, and the one that lies there until then, however often this is cut off."""
        self._named.add(name)
        found = [_print(status)]
        if self.owns(name):
            found.append(_print(os.lstat(self.folder / name)))
        self._made[name] = found[: 1 if found[0] == found[-1] else 2]

    def _refuse_foreign_ledger(self) -> None:
        path = self.folder / LEDGER
        if os.path.lexists(path) and not _is_ledger(path):
            raise UserError(f"{printable(path)}: was not made by this program; move it away")

    def _save(self) -> None:
        """The list comes before the files: a kill in between leaves a listed file that is not there."""
        path = self.folder / LEDGER
        self._refuse_foreign_ledger()
        made, growing = _read_ledger(path)  # another command may have added its own meanwhile
        self._made |= {name: prints for name, prints in made.items() if name not in self._named}
        self._growing |= {name: inode for name, inode in growing.items() if name not in self._named}
        partial = self.scratch / f"{LEDGER}.{secrets.token_hex(8)}.partial"
        note = "what dlrm-io put into this folder: name, size, time of change; only these may be replaced"
        values = {
            "made_by": "dlrm-io",
            "version": VERSION,
            "note": note,
            "files": self._made,
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


def _print(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


def _read_ledger(path: Path) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """What the list says of files and of growing ones; empty where there is none, or none of ours."""
    try:
        listed = json.loads(read_bytes(path, 16 << 20))
        if listed["made_by"] != "dlrm-io" or path.is_symlink():
            return {}, {}
        made = {
            str(name): [[int(size), int(changed)] for size, changed in prints]
            for name, prints in listed["files"].items()
        }
        return made, {str(name): int(inode) for name, inode in listed.get("growing", {}).items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}, {}


def _is_ledger(path: Path) -> bool:
    try:
        return json.loads(read_bytes(path, 16 << 20))["made_by"] == "dlrm-io" and not path.is_symlink()
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_empty_file(path: Path) -> bool:
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _refuse_linked_folders(folder: Path, name: str) -> None:
    """A link inside the folder would lead writes to somewhere else. The folder itself may be one."""
    for parent in list(Path(name).parents)[:-1]:
        path = folder / parent
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise UserError(
                f"{printable(path)}: is a link or a file, a folder of results is expected; move it away"
            )


# --- shared memory


def remove_dead_segments(folder: str, sizes: Iterable[int]) -> None:
    """Remove shared memory that ended runs of this user, of earlier versions, left in `folder` under a name:
    dlrm-PID-TIME, of one of these sizes, and no process holds its lock. Newer ones never have a name.
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
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
                if ours and status.st_size in sizes:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.lstat(path), status):
                        os.unlink(path)
            finally:
                os.close(descriptor)


# --- single files


@contextmanager
def write_file(
    path: Path, is_own: Callable[[Path], bool] = lambda _: False, option: str = "", mode: int = 0o666
) -> Iterator[Path]:
    """A new file to be filled, which becomes `path` at the end of the block. `is_own`: may an existing file
    be replaced? `option` (e.g. "-o") opens the message. `mode`: who may read it, less the umask.
    """
    named = f"{option} {printable(path)}".lstrip()
    if os.path.lexists(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{named}: is there and is not a plain file; name another")
        if not _is_empty_file(path) and not is_own(path):
            raise UserError(f"{named}: is there and was not made by this command; remove it or name another")
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
    """A file in a folder that is the program's own (a work folder, a cache): whole or not at all. `durable`:
    its bytes are on the disk before it gets its name.
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
    """A file in a folder that is the program's own is complete, and gets the name that says so."""
    with os_errors_as_user_errors(path):
        os.replace(partial, path)


def discard_file(path: Path) -> None:
    """A file in a folder that is the program's own is not needed any more; none there is fine."""
    with os_errors_as_user_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def discard_empty_folder(path: Path) -> None:
    """A folder that this process has made is not needed any more; it stays where something lies in it."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _write_new(path: Path, data: bytes, mode: int = 0o600, durable: bool = False) -> None:
    """A file that was not there before; an existing one or a link is an error."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        _write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os_errors_as_user_errors(path):
            _write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
