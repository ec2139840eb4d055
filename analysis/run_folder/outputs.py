"""Where the analysis writes, and how it recognises its own files: only those are ever replaced.

In a run folder the list of common.owned names the files that are ours. A file that the list lacks, because an
earlier version of this program made it or because the folder was copied, is known by its content: a page by
the checksum in its last line, summary.json by its keys, a table by its header, a trace by its first packet.
A file named with -o is known by its content alone.

Files are made in a folder of their own inside the run folder and get their names together, under a lock: of
two commands at work on one run the last one leaves all of its files, and nothing half-written is ever seen.
"""

import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular, read_bytes
from common.lock import FolderInUse, FolderLock
from common.owned import OutputFolder, WorkFolders, write_file

WORK = WorkFolders("analysis", re.compile(r"\d+|\.dlrm-io\.lock(\.held)?"))
LOCK = ".dlrm-io-analysis.lock"
LOCK_SECONDS = 60  # to wait for another command: it holds the lock while it renames its files
UNUSED_SECONDS = 60  # a younger work folder may not have its lock yet
MAX_PAGE_BYTES = 64 << 20
TRACE_MARK = b"made by python -m analysis perfetto"
_SEAL = re.compile(
    rb"<!-- made by python -m analysis (\w+); sha256 of all before this line: ([0-9a-f]{64}) -->\n"
)
# packet { compressed_packets, and packet { sequence 1, process { pid, name
_COMPRESSED = re.compile(rb"\x0a[\x80-\xff]{0,4}[\x00-\x7f]\x92\x03[\x80-\xff]{0,4}[\x00-\x7f]")
_PROCESS = re.compile(rb"\x0a.\x50\x01\xda\x02.\x08[\x80-\xff]{0,9}[\x00-\x7f]\x32.rank ", re.S)
_PAGE_BEGIN = b'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
_PAGE_SCRIPT = b"// Draws every <figure data-spec> from its JSON."
_SUMMARY_KEYS = ("run", "ranks", "hosts", "events", "calls", "metrics")
_EARLIER_SUMMARY_KEYS = ("run", "ranks", "hosts", "events", "calls", "headline", "findings", "notes")
_COMPARISON_KEYS = ("settings", "says", "metrics", "findings")

_PUBLISHING = threading.Lock()  # some file systems lock for a process, not for each of its threads

IsOwn = Callable[[Path], bool]


# --- own files by their content


def seal_page(page: str, command: str) -> bytes:
    """A page with a last line by which this program recognises it, as long as it is unchanged."""
    data = page.encode()
    digest = hashlib.sha256(data).hexdigest()
    last = f"<!-- made by python -m analysis {command}; sha256 of all before this line: {digest} -->\n"
    return data + last.encode()


def is_own_page(path: Path, command: str) -> bool:
    data = _read_content(path)
    begin = data.rfind(b"<!-- made by")
    found = _SEAL.fullmatch(data[begin:]) if begin >= 0 else None
    return (
        found is not None
        and found[1] == command.encode()
        and hashlib.sha256(data[:begin]).hexdigest() == found[2].decode()
    )


def is_earlier_page(path: Path) -> bool:
    """As versions before the checksum left them."""
    data = _read_content(path)
    return (
        data.startswith(_PAGE_BEGIN) and data.endswith(b"</script></body></html>\n") and _PAGE_SCRIPT in data
    )


def is_own_summary(path: Path) -> bool:
    return _has_keys(path, (_SUMMARY_KEYS, _EARLIER_SUMMARY_KEYS))


def is_own_comparison(path: Path) -> bool:
    return _has_keys(path, (_COMPARISON_KEYS,))


def _has_keys(path: Path, beginnings: Sequence[tuple[str, ...]]) -> bool:
    """Whether it is JSON as this program writes it that begins with some of these keys."""
    data = _read_content(path)
    try:
        value = json.loads(data)
        keys = tuple(value)
        return json.dumps(value, indent=1) + "\n" == data.decode() and any(
            keys[: len(known)] == known for known in beginnings
        )
    except (ValueError, TypeError, RecursionError):
        return False


def has_header(headers: Sequence[bytes]) -> IsOwn:
    """A table whose first line is one of these."""
    longest = max(map(len, headers)) + 1
    return lambda path: _read_content(path, longest, part=True).startswith(tuple(headers))


def is_own_trace(path: Path) -> bool:
    """The first packet is the mark, or, as earlier versions wrote, describes the process of a rank."""
    begin = _read_content(path, 1 << 16, part=True)
    if begin.startswith(mark_packet()):
        return True
    found = _COMPRESSED.match(begin)
    if not found:
        return False
    try:
        first = zlib.decompressobj().decompress(begin[found.end() :], 64)
    except zlib.error:
        return False
    return _PROCESS.match(first) is not None


def mark_packet() -> bytes:
    """What a trace begins with: a packet of text (TracePacket.for_testing.str), which viewers pass over."""
    text = b"\x0a" + bytes([len(TRACE_MARK)]) + TRACE_MARK
    body = b"\xa2\x38" + bytes([len(text)]) + text
    return b"\x0a" + bytes([len(body)]) + body


def is_own_json_trace(path: Path) -> bool:
    return TRACE_MARK in _read_content(path, 128, part=True)


def _read_content(path: Path, limit: int = MAX_PAGE_BYTES, part: bool = False) -> bytes:
    """Of a plain file; nothing where it cannot be read or is larger. `part`: its beginning."""
    with suppress(UserError, OSError):
        if not path.is_symlink():
            if not part:
                return read_bytes(path, limit)
            with os.fdopen(open_regular(path), "rb") as file:
                return file.read(limit)
    return b""


# --- one file, named with -o


@contextmanager
def named_file(path: Path, is_own: IsOwn) -> Iterator[Path]:
    """A new file to be filled, which becomes `path`; never over a file that this command has not made."""
    if not path.parent.is_dir():
        raise UserError(
            f"-o {printable(path)}: cannot write there (no such folder); name another file with -o"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"-o {printable(path)}: cannot write there (no permission); name another file with -o"
        )
    with write_file(path, is_own, "-o") as partial:
        yield partial
        if os.path.lexists(path) and path.lstat().st_size and not is_own(path):
            raise UserError(
                f"-o {printable(path)}: another program has written it in the meantime; name another file"
            )


# --- files in a run folder


def find_output_folder(run: str | Path) -> Path:
    """Where the files of a run go: its folder, or the one that a single trace is in."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


class Results:
    """The files that a command makes for one folder, until they get their names."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self._work = folder, work
        self._made: dict[str, tuple[Path, IsOwn]] = {}

    def file(self, name: str, is_own: IsOwn) -> Path:
        """A file to be filled. `is_own`: whether a file of this name that is there already is ours, where
        the folder's list does not have it.
        """
        path = self._work / str(len(self._made))
        self._made[name] = path, is_own
        return path

    def write(self, name: str, data: bytes, is_own: IsOwn) -> None:
        """Write a file whole. is_own: whether a file of this name that is there may be replaced."""
        with os_errors_as_user_errors(self.folder / name), open(self.file(name, is_own), "wb") as file:
            file.write(data)

    def publish(self, complete: str = "") -> None:
        """`complete`: a folder in which own files of earlier times go if there are no new ones."""
        with _hold_lock(self.folder):
            output = OutputFolder(self.folder)
            known = _refuse_foreign(output, {name: is_own for name, (_, is_own) in self._made.items()})
            if known:
                output.record_files(known)
            for name in self._made:
                with os_errors_as_user_errors(self.folder / name):
                    (self.folder / name).parent.mkdir(exist_ok=True)
            for path, _ in self._made.values():
                os.chmod(path, 0o666 & ~_read_umask())
            output.publish_files({name: path for name, (path, _) in self._made.items()})
            for name in output.list_names():
                if complete and name.startswith(complete) and name not in self._made:
                    output.remove_file(name)


@contextmanager
def results_in(folder: Path, complete: str = "") -> Iterator[Results]:
    """New files for `folder`: all of them are there when the block is left without an error, else none."""
    _remove_unused(folder)
    work = WORK.make_folder(folder)
    try:
        with FolderLock(work, "analysing"):
            results = Results(folder, work)
            yield results
            results.publish(complete)
    finally:
        with suppress(UserError, OSError):  # the first error counts
            WORK.remove_folder(work)


def check_folder(folder: Path, names: dict[str, IsOwn], remedy: str) -> None:
    """UserError if the results cannot be written, or a foreign file is in the way. Called before the traces
    are read, which may take long.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{printable(folder)}: cannot be written to; {remedy}")
    _refuse_foreign(OutputFolder(folder), names, remedy)


def _refuse_foreign(output: OutputFolder, names: dict[str, IsOwn], remedy: str = "") -> list[str]:
    """UserError where one of these files is not this program's; returns those known only by their content."""
    known = []
    for name, is_own in names.items():
        path = output.folder / name
        if not os.path.lexists(path) or output.owns(name) or os.path.islink(path):
            continue
        # listed, but of another size: it was changed, so it is kept
        if output.has_listed_size(name) and path.is_file() and is_own(path):
            known.append(name)
    foreign = [name for name in names if name not in known]
    output.refuse_foreign(foreign, "move it away" + (f", or {remedy}" if remedy else ""))
    for name in known:
        if (above := (output.folder / name).parent) != output.folder and above.is_symlink():
            raise UserError(f"{printable(above)}: is a link, a folder of results is expected; move it away")
    return known


@contextmanager
def _hold_lock(folder: Path) -> Iterator[None]:
    """Against other processes, and against other threads of this one (`finish`)."""
    with _PUBLISHING:
        yield from _hold_folder_lock(folder)


def _hold_folder_lock(folder: Path) -> Iterator[None]:
    lock = FolderLock(folder, "writing results of the analysis", LOCK)
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            lock.acquire()
            break
        except FolderInUse:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _remove_unused(folder: Path) -> None:
    """Work folders of commands that were killed: no process holds their locks."""
    for work in WORK.find_folders(folder):
        with suppress(UserError, OSError):
            if time.time() - work.lstat().st_mtime > UNUSED_SECONDS:
                with FolderLock(work, "removing it"):
                    pass
                WORK.remove_folder(work)


def _read_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
