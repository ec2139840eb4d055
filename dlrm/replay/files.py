"""The files that a replay needs below its root: which must be there first, and how large.

In: the calls of all ranks. Out: files and folders, made before the first call. A file that the run itself
made is not made here; one that it found is. Files of the same name that are there already are used if they
are large enough and only read; else they are refused, unless the user allows to overwrite them.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.memory import format_size
from dlrm.replay.order import Thread
from dlrm.replay.paths import MappedPaths
from dlrm.replay.plan import RankPlan, TracedCall

STREAM_BLOCK = 4096  # bytes that stdio reads at once
BLOCK = 1 << 20  # bytes that are written at once into a file of real bytes
# calls that need an open file
ON_DESCRIPTORS = (
    "read", "pread", "pread64", "readv", "preadv", "preadv64", "fread", "fread_unlocked",
    "lseek", "lseek64", "fseek", "fseeko", "fseeko64", "ftell", "ftello", "rewind", "fsync", "fdatasync",
    "fflush", "mmap", "mmap64", "fstat", "fstat64", "posix_fallocate", "posix_fallocate64",
)  # fmt: skip


@dataclass
class FileUse:
    """What the calls of a run tell about one file or folder. Times are us on the run's clock."""

    created: int | None = None  # when the run made it: opened it with O_CREAT, or renamed something to it
    found: int | None = None  # when the run first needed it to be there
    is_folder: bool = False
    read_end: int = 0  # bytes from the beginning to the end of the last read
    written_end: int = 0
    written: int = 0  # bytes of all writes
    writer: Thread | None = None  # the first one that wrote
    appended: bool = False  # opened with O_APPEND: where writes go depends on how large it is
    # how large it must be for reads of what other threads write, or of what no traced call has written
    grow: int = 0
    changed: bool = False  # written, cut, removed or renamed
    # when the run last made it, took its name away, and opened it as one that is there
    made: int = -1
    gone: int = -1
    opened: int = -1
    writers: set[int] = field(default_factory=set)  # ranks

    @property
    def is_there_first(self) -> bool:
        """Whether it must be there before the run begins."""
        return self.found is not None and (self.created is None or self.found < self.created)

    @property
    def first(self) -> int | None:
        times = [time for time in (self.created, self.found) if time is not None]
        return min(times) if times else None

    def merge(self, other: "FileUse") -> None:
        """With what another rank did to the file."""
        if (self.written and other.read_end) or (self.read_end and other.written):
            self.grow = max(self.grow, self.read_end, other.read_end)
        self.grow = max(self.grow, other.grow)
        for name in ("created", "found"):
            times = [time for time in (getattr(self, name), getattr(other, name)) if time is not None]
            setattr(self, name, min(times, default=None))
        self.is_folder |= other.is_folder
        self.changed |= other.changed
        self.appended |= other.appended
        for name in ("read_end", "written_end", "made", "gone", "opened"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.written += other.written
        self.writers |= other.writers


class Renaming(NamedTuple):
    when: int  # us
    source: str
    target: str
    rank: int


@dataclass
class RunUse:
    """What the calls of some ranks, or of all, tell about files."""

    files: dict[str, FileUse] = field(default_factory=dict)
    renamed: list[Renaming] = field(default_factory=list)
    named: set[str] = field(default_factory=set)  # all names that calls have, whatever they do with them

    def use(self, path: str) -> FileUse:
        return self.files.setdefault(path, FileUse())

    def merge(self, other: "RunUse") -> None:
        for path, use in other.files.items():
            self.use(path).merge(use)
        self.renamed += other.renamed
        self.named |= other.named

    def follow_renamed_folders(self) -> None:
        """What is found in a folder that got its name by renaming was in the folder of the old name."""
        for when, source, target, _ in sorted(self.renamed):
            for path in [p for p in self.files if p.startswith(f"{target}/")]:
                use, origin = self.files[path], source + path[len(target) :]
                if not use.is_there_first or use.found is None or use.found < when:
                    continue
                before = self.use(origin)
                if before.first is None or before.first > when:
                    before.found = when
                before.read_end = max(before.read_end, use.read_end)
                use.created = when


def list_uses(plans: Iterable[RankPlan]) -> RunUse:
    """What the calls of these ranks tell about the files that they use."""
    run = RunUse()
    for plan in plans:
        for ts, thread, call in plan.calls:
            run.named |= {call.path} if call.other is None else {call.path, call.other}
            _add_use(run, ts, thread, call)
            if call.name in ON_DESCRIPTORS and not call.failed and run.use(call.path).first is None:
                run.use(call.path).found = ts  # opened before tracing began
            if call.op == "write" and not call.failed:
                run.use(call.path).writers.add(plan.rank)
            elif call.name == "rename" and call.other is not None:
                run.renamed.append(Renaming(ts, call.path, call.other, plan.rank))
    return run


def _add_use(run: RunUse, ts: int, thread: Thread, call: TracedCall) -> None:
    """Add to `run` what a call shows of its file: whether it was there before, how large it must be, whether
    the run made or changed it.
    """
    if call.op == "open":
        _add_open(run, ts, call)
    elif call.op in ("read", "write", "seek", "map") and not call.failed:
        use = run.use(call.path)
        if call.op == "write":
            use.changed = True
            use.written += call.moved
            use.writer = use.writer or thread
            begin = call.position if call.position is not None else use.written_end
            use.written_end = max(use.written_end, begin + call.moved)
        else:
            end = _find_needed_end(call, use)
            if end > use.written_end and use.created != ts and _may_be_found(use, ts):
                use.found = ts if use.created is None else use.created - 1
            use.read_end = max(use.read_end, end)
            if end > use.written_end or use.writer not in (None, thread):
                use.grow = max(use.grow, end)
    elif call.name == "mkdir":
        use = run.use(call.path)
        use.is_folder = True
        use.created = ts if use.created is None else use.created
    elif call.name == "opendir":
        use = run.use(call.path)
        use.is_folder = True
        use.found = ts if use.first is None else use.found
    elif call.name in ("rename", "link") and call.other is not None:
        source, target = run.use(call.path), run.use(call.other)
        if source.first is None:
            source.found = ts
        source.changed = True
        if call.name == "rename":
            source.gone = ts
        target.made = ts
        target.created = ts if target.created is None else target.created
        target.changed = True
    elif call.name == "symlink" and call.other is not None:
        run.use(call.other).created = run.use(call.other).made = ts
    elif call.name.startswith("posix_fallocate"):
        use, length = run.use(call.path), call.argument("len", 0)
        use.changed = True
        use.written += length
        use.written_end = max(use.written_end, (call.position or 0) + length)
    elif call.name in ("unlink", "remove", "rmdir", "chmod"):
        run.use(call.path).changed = True
        if call.name in ("unlink", "remove") and not call.failed:
            run.use(call.path).gone = ts


def _add_open(run: RunUse, ts: int, call: TracedCall) -> None:
    """The same of an open: without O_CREAT the file was there before; with it, it may be the run's own."""
    flags = find_open_flags(call)
    if flags is not None and flags & os.O_TRUNC:
        run.use(call.path).changed = True
    if flags is None or not flags & os.O_CREAT:
        if call.unused:
            return  # perhaps there was no such file
        use = run.use(call.path)
        use.opened = ts if flags is not None else use.opened
        if use.first is None:
            use.found = ts
    else:
        use = run.use(call.path)
        use.made = ts
        if use.first is None:
            use.created = ts
    if flags is not None:
        use.is_folder |= bool(flags & os.O_DIRECTORY)
        use.appended |= bool(flags & os.O_APPEND)


def _find_needed_end(call: TracedCall, use: FileUse) -> int:
    """How large the file must be for the call to give what it gave (bytes)."""
    if call.op == "read":
        end = (call.position if call.position is not None else use.read_end) + call.moved
        in_full = call.count is not None and call.moved == call.count * max(1, call.item or 1)
        # a stream reads whole blocks, and did not find the file's end
        return -(-end // STREAM_BLOCK) * STREAM_BLOCK if call.name.startswith("f") and in_full else end
    if call.op == "map":
        return (call.position or 0) + call.argument("length", 0)
    return max(0, call.moved - (call.position or 0)) if call.whence == os.SEEK_END else 0


def _may_be_found(use: FileUse, ts: int) -> bool:
    """Whether a file that was opened with O_CREAT, and never written before, was there already."""
    return use.found is None and use.written_end == 0 and not use.changed and ts > 0


_FLAGS_OF_MODES = {
    "r": os.O_RDONLY, "r+": os.O_RDWR, "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC, "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
}  # fmt: skip


def find_open_flags(call: TracedCall) -> int | None:
    """open(2)'s flags of any call that opens; None where the trace does not say."""
    if call.flags is not None:
        return call.flags
    if call.name.startswith("creat"):
        return os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    mode = find_stream_mode(call)
    if mode is None:
        return None
    return _FLAGS_OF_MODES.get(mode[:1] + "+" * ("+" in mode))


def find_stream_mode(call: TracedCall) -> str | None:
    """fopen(3)'s mode."""
    mode = call.list_other_arguments().get("mode")
    # without what may follow a comma: a conversion of characters, which glibc loads code for
    return mode.partition(",")[0] if isinstance(mode, str) and mode[:1] in tuple("rwa") else None


# --- making them


@dataclass
class FilePlan:
    """What is to be done below the root before the first call."""

    folders: list[str] = field(default_factory=list)  # to be made
    sizes: dict[str, int] = field(default_factory=dict)  # files to be there -> bytes
    absent: set[str] = field(default_factory=set)  # files that the run makes itself
    changed: set[str] = field(default_factory=set)  # those of all that the run changes
    grow: dict[str, int] = field(default_factory=dict)  # files of the run -> bytes to have at once
    # files that were removed, and opened again, though no traced call made them in between -> bytes
    remade: dict[str, int] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)  # all paths that calls name
    written: int = 0  # bytes that the run's files may need
    kept: set[str] = field(default_factory=set)  # files that were there, which are opened for reading only
    # what is renamed once -> files of other ranks in it, or itself, and how large they must be before
    whole: dict[str, dict[str, int]] = field(default_factory=dict)


def plan_files(run: RunUse, paths: MappedPaths) -> FilePlan:
    """All keys are paths below the root."""
    run.follow_renamed_folders()
    found = FilePlan(named={paths.find(path) for path in run.named})
    above = {folder for path in run.files for folder in _list_folders_above(path)}
    for path, use in sorted(run.files.items()):
        mapped, is_folder = paths.find(path), use.is_folder or path in above
        if use.changed:
            found.changed.add(mapped)
        if use.first is None:
            continue
        if use.opened > use.gone > use.made:
            found.remade[mapped] = use.read_end
        if is_folder and use.read_end:  # files without a name (O_TMPFILE) have the folder's in the trace
            found.grow[mapped] = use.read_end
        if use.is_there_first and is_folder:
            found.folders.append(mapped)
        elif use.is_there_first:
            found.sizes[mapped] = use.read_end
        elif not is_folder:
            found.absent.add(mapped)
            if use.grow > use.written_end * use.appended:
                found.grow[mapped] = use.grow
        made_by_run = any(
            (made := run.files.get(folder)) is not None
            and made.created is not None
            and made.created <= use.first
            for folder in _list_folders_above(path)
        )
        if not made_by_run:
            found.folders.append(os.path.dirname(mapped))
        if not is_folder:
            found.written += min(use.written, use.written_end)
    found.whole = _list_whole(run, paths)
    return found


def _list_whole(run: RunUse, paths: MappedPaths) -> dict[str, dict[str, int]]:
    """`FilePlan.whole`: such as the folder of a checkpoint, which one rank renames once all have written."""
    times = Counter(renaming.source for renaming in run.renamed)
    found = {}
    for _, source, _, rank in run.renamed:
        if times[source] == 1:
            found[paths.find(source)] = {
                paths.find(path): use.written_end for path, use in run.files.items()
                if use.writers - {rank} and (path == source or path.startswith(f"{source}/"))
            }  # fmt: skip
    return {source: files for source, files in found.items() if files}


def _list_folders_above(path: str) -> Iterator[str]:
    while (above := os.path.dirname(path)) not in (path, "/"):
        yield above
        path = above


def make_files(root: Path, plan: FilePlan, real_bytes: bool, overwrite: bool) -> set[str]:
    """Make what is missing below the root, or raise a UserError before anything is changed. Returns the files
    that were there and must stay as they are.
    """
    _check_links(root, plan)
    kept = set() if overwrite else {path for path in plan.named if os.path.isfile(path)}
    present = {path: _find_size(path) for path in (*plan.sizes, *sorted(plan.absent))}
    for path in sorted({*plan.changed, *plan.absent}):
        if not overwrite and os.path.lexists(path):
            raise UserError(
                f"{printable(path)}: exists, and the replay would change it; name another --root, or give "
                "--overwrite"
            )
    missing = {}
    for path, size in plan.sizes.items():
        found = present[path]
        if found is not None and found < size and not overwrite:
            raise UserError(
                f"{printable(path)}: has {found:,} bytes, the replay reads up to byte {size:,}; --overwrite "
                "makes it larger, or name another --root"
            )
        if found is None or found < size:
            missing[path] = size
    _check_space(root, sum(missing.values()) * real_bytes + plan.written)
    with os_errors_as_user_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    for path in dict.fromkeys([*plan.folders, *map(os.path.dirname, missing)]):
        with os_errors_as_user_errors(path):
            os.makedirs(path, exist_ok=True)
    for path in plan.absent:
        if present[path] is not None:
            with os_errors_as_user_errors(path):
                os.truncate(path, 0)
    for path, size in missing.items():
        with os_errors_as_user_errors(path):
            _make_file(path, size, real_bytes)
    return kept


def _check_links(root: Path, plan: FilePlan) -> None:
    """UserError where a link, or a file in place of a folder, is on the way to any name below the root: it
    could lead out of it.
    """
    folders = set(plan.folders)
    for path in sorted({*plan.named, *plan.folders}):
        folders |= {above for above in _list_folders_above(path) if above.startswith(f"{root}/")}
        if os.path.islink(path):
            raise UserError(f"{printable(path)}: is a link; a replay follows none; name another --root")
    for path in sorted(folders):
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
            raise UserError(
                f"{printable(path)}: is a link or a file where the replay needs a folder; name another --root"
            )


def _find_size(path: str) -> int | None:
    """The size of a file below the root that a replay may use; None where there is none."""
    with os_errors_as_user_errors(path):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{printable(path)}: is not a plain file; name another --root")
    if status.st_nlink > 1:
        raise UserError(f"{printable(path)}: is a file with several names; name another --root")
    return status.st_size


def _check_space(root: Path, needed: int) -> None:
    above = next(each for each in (root, *root.parents) if each.exists())
    with os_errors_as_user_errors(above):
        status = os.statvfs(above)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise UserError(
            f"{printable(root)}: the replay writes up to {format_size(needed)}, and {format_size(free)} are "
            "free; free some, or name another --root"
        )


def _make_file(path: str, size: int, real_bytes: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = open_descriptor(path, flags, 0o644)
    try:
        if not real_bytes:
            os.ftruncate(descriptor, size)
            return
        done = 0
        while done < size:
            done += os.write(descriptor, os.urandom(min(BLOCK, size - done)))
    finally:
        close_descriptor(descriptor)
