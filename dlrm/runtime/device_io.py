"""What this process moved, by the kernel's count, and the file systems of its folders: for the trace.

In: /proc/self/io, /proc/self/stat, /proc/self/schedstat, /proc/self/mountinfo, and on Lustre `lfs getstripe`.
Out: counters, which say how much came from a device and how much from memory, and how long the main thread
waited for a core (docs/traces.md lists them); and one note for each folder. `dlrm/runtime/trace.py` records
both.
"""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

PREFIX = "proc/"  # of the counters' names
COUNTED = (  # in /proc/self/io; its calls are in the trace one by one
    "rchar", "wchar", "read_bytes", "write_bytes", "cancelled_write_bytes",
)  # fmt: skip
FAULTS = {"minor_faults": 7, "major_faults": 9}  # fields of /proc/self/stat, counted from the state
CORE_WAIT = "core_wait_us"
SECONDS = 5  # between two samples
LFS_SECONDS = 5  # `lfs` asks a server, which may be down
# Mount options that change how a file system reads, writes or caches; the others are left out.
TELLING = re.compile(
    r"(ro|rw|sync|async|dirsync|dax|noatime|relatime|strictatime|lazytime|(no|local)?flock|(no)?lazystatfs|"
    r"(no)?checksum|hard|soft|nocto|cto|noac|ac|fsc|nolock|(no)?barrier|(no)?discard|nconnect=.*|vers=.*|"
    r"proto=.*|[rw]size=.*|ac(reg|dir)?(min|max|timeo)=.*|lookupcache=.*|cache=.*|size=.*|huge=.*|data=.*|"
    r"compress.*|stripe=.*|sunit=.*|swidth=.*|local_lock=.*|read_ahead.*|max_read=.*)"
)
_WHOLE = re.compile(r"-?\d{1,18}")
_LAYOUT = re.compile(r"(?:lmm_|lcme_extent\.e_|\b)(stripe_count|stripe_size|pool|end):\s+(\S+)")


class IoCounters:
    """The kernel's counters of this process, of all its threads, and of its children that have ended."""

    def __init__(self) -> None:
        self.error = ""  # why /proc/self/io cannot be read
        self._io = self._open("/proc/self/io")
        self._stat = self._open("/proc/self/stat")
        try:  # of the main thread, whichever reads it; not every kernel has it, and nothing else needs it
            self._schedule: int | None = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._schedule = None

    def _open(self, path: str) -> int | None:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._fail(path, error)
            return None

    def _fail(self, path: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        self.error = self.error or f"{path}: {reason}"

    def read(self) -> dict[str, int]:
        """Name -> value since the process began; what cannot be read is left out."""
        found: dict[str, int] = {}
        if self._io is not None:
            try:
                lines = os.pread(self._io, 4096, 0).decode().splitlines()
                values = dict(line.split(":") for line in lines)
                found = {name: int(values[name]) for name in COUNTED}
            except (OSError, ValueError, KeyError) as error:
                self._fail("/proc/self/io", error)
        if self._stat is not None:
            try:
                # the name of the command, in parentheses, may hold anything
                fields = os.pread(self._stat, 4096, 0).rpartition(b")")[2].split()
                found |= {name: int(fields[at]) for name, at in FAULTS.items()}
            except (OSError, ValueError, IndexError) as error:
                self._fail("/proc/self/stat", error)
        if self._schedule is not None:
            # on a core, ready to run but on none (both in ns), how often it was on one
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[CORE_WAIT] = int(os.pread(self._schedule, 4096, 0).split()[1]) // 1000
        return found

    def close(self) -> None:
        for handle in (self._io, self._stat, self._schedule):
            if handle is not None:
                os.close(handle)
        self._io = self._stat = self._schedule = None


class IoRecorder(threading.Thread):
    """Records the counters every SECONDS, and whenever `sample` is called.

    counters        opened before the tracer starts, so that reading them is not an event of the trace
    record_counter  takes a counter's name and value
    record_error    takes why the counters cannot be read; called once
    """

    def __init__(
        self,
        counters: IoCounters,
        record_counter: Callable[[str, int], None],
        record_error: Callable[[str], None],
    ) -> None:
        super().__init__(name="io-counters", daemon=True)
        self._counters = counters
        self._record_counter, self._record_error = record_counter, record_error
        self._busy = threading.Lock()  # held while something is recorded
        self._ended = threading.Event()
        self._error_is_recorded = False

    def sample(self) -> None:
        """Record the counters as they are now, unless another thread is just doing it."""
        # never waits: a signal's handler may be here while its own thread holds the lock
        if not self._ended.is_set() and self._busy.acquire(blocking=False):
            try:
                for name, value in self._counters.read().items():
                    self._record_counter(PREFIX + name, value)
                if self._counters.error and not self._error_is_recorded:
                    self._error_is_recorded = True
                    self._record_error(self._counters.error)
            finally:
                self._busy.release()

    def run(self) -> None:
        while not self._ended.wait(SECONDS):
            self.sample()

    def stop(self) -> None:
        """Record the counters for the last time; when this returns, nothing more is recorded."""
        self.sample()
        self._ended.set()
        if self._busy.acquire(timeout=10):
            self._busy.release()
        self._counters.close()


def list_folders(options: Any) -> dict[str, str]:
    """The folders and files that these options name (dataclasses in one another): --option -> path."""
    found: dict[str, str] = {}
    for each in fields(options):
        value = getattr(options, each.name)
        if is_dataclass(value):
            found |= list_folders(value)
        elif isinstance(value, str | Path) and each.name.endswith(("_dir", "_path", "_root")):
            found["--" + each.name] = str(value)
    return found


def find_file_systems(
    folders: Mapping[str, str | os.PathLike[str]], with_layout: bool
) -> list[dict[str, object]]:
    """What is known of the file system of each of these folders or files: its role, its path, and what
    `find_file_system` says. Called before the tracer starts.

    folders: what it is for -> path. with_layout: ask Lustre how it is striped.
    """
    found: dict[str, dict[str, object]] = {}
    deadline = time.monotonic() + LFS_SECONDS
    for role, path in folders.items():
        real = os.path.realpath(path)
        if real in found:
            continue
        found[real] = {"folder": role, "path": real, **find_file_system(real)}
        if with_layout and found[real].get("type") == "lustre":
            found[real]["layout"] = read_layout(real, deadline - time.monotonic())
    return list(found.values())


def find_file_system(path: str | os.PathLike[str]) -> dict[str, object]:
    """Type, mount point, source and telling options of the file system that `path` is on, or would be on if
    it existed. Empty where that is not known.
    """
    real = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, object] = {}
    longest = 0
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(rest) < 3:
            continue
        mount = _decode_octal(fields[4])
        inside = mount == "/" or real == mount or real.startswith(mount + "/")
        if inside and len(mount) >= longest:  # of two at one place the later one hides the other
            longest = len(mount)
            options = dict.fromkeys([*fields[5].split(","), *rest[2].split(",")])
            found = {
                "type": rest[0], "mount": mount, "source": _decode_octal(rest[1]),
                "options": ",".join(option for option in options if TELLING.fullmatch(option)),
            }  # fmt: skip
    return found


def _decode_octal(text: str) -> str:
    """mountinfo writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def read_layout(path: str, seconds: float = LFS_SECONDS) -> list[dict[str, int | str]]:
    """How Lustre stripes a file, or the largest file of a folder, or else new files of the folder: an entry
    per component, with stripe_count (-1: over all targets), stripe_size, and where they are known pool and
    end (where the component ends). Empty without `lfs`, or when it gives no answer within `seconds`.
    """
    lfs = shutil.which("lfs")
    if not lfs or seconds <= 0:
        return []
    target, flags = path, []
    if os.path.isdir(path):
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            files = [(entry.stat().st_size, entry.path) for entry in entries if entry.is_file()]
            target = max(files)[1] if files else path
        flags = ["-d"] if target == path else []
    try:
        asked = subprocess.Popen(
            [lfs, "getstripe", *flags, target], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, errors="replace",
        )  # fmt: skip
        text, _ = asked.communicate(timeout=seconds)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        asked.kill()  # and not waited for: it may hang in the kernel
        return []
    return [] if asked.returncode else parse_layout(text)


def parse_layout(text: str) -> list[dict[str, int | str]]:
    """What `lfs getstripe` prints, of a plain or a progressive layout, as `read_layout` gives it."""
    found: list[dict[str, int | str]] = []
    end: str | None = None
    for name, value in _LAYOUT.findall(text):
        if name == "end":  # of the component whose stripes follow
            end = value
        elif name == "stripe_count" and _WHOLE.fullmatch(value):
            found.append({name: int(value)} if end is None else {name: int(value), "end": end})
        elif name != "stripe_count" and found:
            found[-1].setdefault(name, int(value) if _WHOLE.fullmatch(value) else value)
    return found
