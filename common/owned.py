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

    def make(self, parent: Path) -> Path:
        """A new one inside `parent`, which is made if it is missing. Others cannot read it."""
        token = secrets.token_hex(8)
        folder = parent / f".dlrm-io-{self.name}-{token}"
        with os_errors_as_user_errors(folder):
            parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(folder, 0o700)
            try:
                mark = self._mark(token, os.lstat(folder))
                _write_new(folder / MARK, json.dumps(mark).encode())
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
        found = re.fullmatch(rf"\.dlrm-io-{re.escape(self.name)}-([0-9a-f]{{16}})", name)
        return found[1] if found else ""

    def _mark(self, token: str, status: os.stat_result) -> dict[str, Any]:
        """No device: that of a network file system differs from node to node."""
        return {
            "made_by": "dlrm-io", "kind": self.name, "token": token, "inode": status.st_ino,
            "owner": status.st_uid, "note": "intermediate files; can be deleted when no run uses them",
        }  # fmt: skip


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


# --- results in a folder of the user's


class OutputFolder:
    """What this program has put into a folder that a user named. `names` are relative to it, with /.
    `scratch`: a work folder on the same file system, where a killed process leaves its half-written list.
    """

    def __init__(self, folder: str | os.PathLike[str], scratch: Path | None = None) -> None:
        self.folder = Path(folder)
        self.scratch = scratch or self.folder
        self._made: dict[str, list[list[int]]] = {}  # name -> the [size, mtime_ns] that are ours: new, before
        with contextlib.suppress(UserError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            listed = json.loads(read_bytes(self.folder / LEDGER, 16 << 20))
            self._made = {
                str(name): [[int(size), int(changed)] for size, changed in prints]
                for name, prints in listed["files"].items()
            } if listed["made_by"] == "dlrm-io" else {}  # fmt: skip

    def owns(self, name: str) -> bool:
        """Whether the file is there and as the program left it."""
        try:
            status = os.lstat(self.folder / name)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and _print(status) in self._made.get(name, [])

    def names(self) -> list[str]:
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

    def write(self, name: str, data: bytes | str, mode: int = 0o600) -> None:
        """A whole file, or none. `mode`: who may read it, less the umask."""
        with self.writing(name, mode) as partial:
            _append(partial, data.encode() if isinstance(data, str) else data)

    @contextmanager
    def writing(self, name: str, mode: int = 0o600) -> Iterator[Path]:
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
        partial = self.scratch / f"{LEDGER}.{secrets.token_hex(8)}.partial"
        note = "what dlrm-io put into this folder: name, size, time of change; only these may be replaced"
        values = {"made_by": "dlrm-io", "version": VERSION, "note": note, "files": self._made}
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


# --- single files


@contextmanager
def write_file(
    path: Path, is_own: Callable[[Path], bool] = lambda _: False, option: str = ""
) -> Iterator[Path]:
    """A new file to be filled, which becomes `path` at the end of the block. `is_own`: may an existing file
    be replaced? `option` (e.g. "-o") opens the message.
    """
    named = f"{option} {printable(path)}".lstrip()
    if os.path.lexists(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UserError(f"{named}: is there and is not a plain file; name another")
        if not _is_empty_file(path) and not is_own(path):
            raise UserError(f"{named}: is there and was not made by this command; remove it or name another")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with os_errors_as_user_errors(path):
        _write_new(partial, b"", mode=0o666)
    try:
        yield partial
        with os_errors_as_user_errors(path):
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """A file in a folder that is the program's own (a work folder, a cache): whole or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    with os_errors_as_user_errors(path):
        try:
            _write_new(partial, data, mode=0o666)
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


def _write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A file that was not there before; an existing one or a link is an error."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        _write_all(descriptor, data)
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
