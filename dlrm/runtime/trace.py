"""Record what this process does, with DFTracer: spans, instants, counters. Costs nothing while not tracing.

The only module that imports dftracer, and only in `start_tracing`. What is in RUN/trace/*.pfw.gz:
  metadata (CM)   rank, local_rank, world_size, host, role, once per process; thread_name, once per thread;
                  file_system, JSON, once per folder; io_error, why the kernel's counters are missing
  spans           cat is that of DFTracer's AI logging where it has one (ai_root, the whole process; pipeline,
                  dataloader, data, compute, comm, device, checkpoint), else the phase (startup, train, eval,
                  ssd, prep) or torchrec (the patches); args are epoch, step, and bytes, file, batch where
                  there are any
  instants        duration 0; cat `clock`, name `barrier`, arg `when` (start, end): all ranks leave a barrier
  counters        cat `counter`, name of the counter, arg `value`; proc/...: the kernel's, of this process
  POSIX calls     by interception, each with its file, offset and bytes
A process that forks (workers of a DataLoader) continues in a file of its own, with the parent's rank.
"""

import contextlib
import ctypes
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable
from common.owned import discard_empty_folder, discard_file
from dlrm.runtime.device_io import IoCounters, IoRecorder, find_file_systems
from dlrm.runtime.node_counters import NodeCounters, wants_node_counters
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.tracer_variables import PINNED, UNSET, find_traced_folders

F = TypeVar("F", bound=Callable[..., Any])

FLUSH_MS = 1000  # a killed process loses at most what it did in this time
BUFFER_BYTES = 64 << 10  # DFTracer writes when its buffer has so much text: one gzip member each time
PAD_BYTES = 15 << 10  # DFTracer takes no record of more than 16 KiB
MAX_INT = (1 << 31) - 1  # DFTracer takes no larger number, and raises TypeError: bytes of a file may be more
MIN_EVENTS = 3  # DFTracer deletes the file of a process that logged fewer events

_flushing = threading.Lock()  # held while a buffer is on its way into the file, and while this process forks

_native: Any = None  # dftracer's C++ module while tracing, else None
_context: dict[str, tuple[int, int]] = {}  # args of every span (epoch, step), in the form that DFTracer takes
_identity: dict[str, int | str] = {}  # the metadata that says whose file this is
_flusher: "_Flusher | None" = None
_io: IoRecorder | None = None
_node: NodeCounters | None = None  # of the first rank of a node
_begin = 0  # of tracing
_folder: Path | None = None  # of the trace files
_made_folders: list[Path] = []  # by this process


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """fsync a file's bytes, or a folder's names."""
    descriptor = open_descriptor(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        close_descriptor(descriptor)


def is_tracing() -> bool:
    return _native is not None


def check_name(folder: Path) -> None:
    """UserError on all ranks where DFTracer cannot take the name of a folder for traces."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        refused = UserError(
            f"{printable(folder)}: is not UTF-8, as the name of a trace must be; name another folder"
        )
        refused.shared = True
        raise refused from None


def start_tracing(
    run_dir: str | os.PathLike[str],
    here: Ranks,
    role: str,
    flush_ms: int = FLUSH_MS,
    folders: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Open this process's trace file. From here on every read and write is recorded.

    role      "train" or "prep": the start of the file's name
    flush_ms  a killed process loses at most the events of this time
    folders   what it is for -> a folder or file, whose file system is recorded beside the run folder's
    """
    global _native, _folder, _io, _node, _begin
    traced_folders = find_traced_folders(os.environ)
    with_node = wants_node_counters(os.environ, traced=True)
    folder = Path(run_dir).absolute() / "trace"
    check_name(folder)
    try:
        with os_errors_as_user_errors(folder), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            _made_folders.append(folder)
    except UserError as error:
        refused = UserError(f"{error}: name another folder, where the trace can be written")
        refused.shared = here.nodes == 1  # ranks of several nodes may see different disks
        raise refused from None
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ.update(
        DFTRACER_ENABLE="1",
        DFTRACER_INC_METADATA="1",
        DFTRACER_INIT="FUNCTION",
        DFTRACER_BIND_SIGNALS="0",
        DFTRACER_DATA_DIR=traced_folders,  # not as the argument data_dirs: "all" would be a folder there
        DFTRACER_WRITE_BUFFER_SIZE=str(BUFFER_BYTES),
        **PINNED,
    )
    if with_node and role == "train" and here.local_rank == 0:
        _node = NodeCounters(Path(run_dir), here)
    counters = IoCounters()
    file_systems = []
    if here.local_rank == 0:
        file_systems = find_file_systems({**(folders or {}), "run folder": run_dir}, with_layout=here.first)
    # the C++ module directly: importing dftracer.python installs handlers for SIGINT, SIGTERM and SIGABRT
    import dftracer.dftracer as native

    native.initialize(log_file=str(folder / f"{role}{here.rank:05d}"), data_dirs=None, process_id=-1)
    if _native is None and not _identity:  # only once: a fork hook cannot be removed
        os.register_at_fork(
            before=_flush_before_fork, after_in_parent=_flushing.release, after_in_child=_restart_after_fork
        )
    _native, _folder, _begin = native, folder, native.get_time()
    _set_identity(here, role)
    _record_identity(flush_ms)
    for each in file_systems:
        _record_note("file_system", json.dumps(each))
    _io = IoRecorder(counters, counter, lambda text: _record_note("io_error", text))
    _io.sample()
    _io.start()


def stop_tracing() -> None:
    """Flush and close. May be called twice, from a signal handler, or without `start_tracing`."""
    global _native, _flusher, _io, _node
    recorder, _io = _io, None
    node, _node = _node, None
    if recorder is not None:
        recorder.stop()
    native, _native = _native, None
    flusher, _flusher = _flusher, None
    if flusher is not None:
        flusher.stop()
    if native is not None:
        if _begin:  # when no other thread writes any more
            _log(native, "ai_root", "ai_root", _begin, native.get_time() - _begin, {})
        native.finalize()
        _context.clear()
    if node is not None:
        node.stop()


def discard_tracing() -> None:
    """Stop, and remove this process's trace file: its run was refused the folder that it is in."""
    files, node = [], _node
    if _native is not None and _folder is not None:
        # DFTracer names the file by itself; it is open from the start
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(f"/proc/self/fd/{number}"))
                if path.parent == _folder.resolve() and path.name.endswith(".pfw.gz"):
                    files.append(path)
    stop_tracing()
    for path in set(files):
        discard_file(path)
    if node is not None:
        node.discard()
    for folder in _made_folders:
        discard_empty_folder(folder)
    _made_folders.clear()


def change_identity(here: Ranks) -> None:
    """This process turns out to be another rank than its launcher said. A worker stays its parent's."""
    recorded = (_identity.get("rank"), _identity.get("world_size"))
    if _identity.get("role") != "worker" and recorded != (here.rank, here.world_size):
        _set_identity(here, str(_identity.get("role", "")))
        _write_identity()


def _set_identity(here: Ranks, role: str) -> None:
    _identity.update(
        rank=here.rank, local_rank=here.local_rank, world_size=here.world_size, host=here.host, role=role
    )


def _write_identity() -> None:
    for key, value in _identity.items():
        _record_note(key, str(value))


def set_context(**args: int) -> None:
    """Arguments of every span from here on (epoch, step)."""
    _context.update((key, (0, value)) for key, value in args.items())


def name_thread(name: str) -> None:
    """Name the calling thread in the trace."""
    if _native is not None:
        threading.current_thread().name = name
        _native.log_metadata_event(key="thread_name", value=_plain_value(name))


def make_named_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all have this name in the trace."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=name_thread, initargs=(name,))


def _record_note(key: str, text: str) -> None:
    if _native is not None:
        _native.log_metadata_event(key=key, value=_plain_value(text))


def sample_io() -> None:
    """Record what this process moved up to now, by the kernel's count: at the joints of a run, so that each
    of its parts has its own share. It is done every few seconds anyway.
    """
    if _io is not None:
        _io.sample()


def _record_identity(flush_ms: int) -> None:
    """Write whose file this is, and start the thread that flushes it."""
    global _flusher
    _write_identity()
    name_thread("main")
    for _ in range(MIN_EVENTS):
        _log(_native, "dftracer", "keep", _native.get_time(), 0, {})
    _flusher = _Flusher(_native, flush_ms)
    _flusher.start()


def _flush_before_fork() -> None:
    """What the C library has not yet written of the trace, a child would write again, into its own file."""
    _flushing.acquire()
    if _native is not None:
        ctypes.CDLL(None).fflush(None)


def _restart_after_fork() -> None:
    """In the child of a fork: DFTracer has opened a new file for it, still without the metadata."""
    global _io, _node, _begin
    _begin = 0
    _node = None
    _flushing.release()
    _io = None  # the kernel adds a child's counters to its parent's when it has ended
    if _native is not None:
        _identity["role"] = "worker"
        _record_identity(_flusher.flush_ms if _flusher else FLUSH_MS)


class _Flusher(threading.Thread):
    """Flushes the trace every `flush_ms`, so that a killed process loses no more than that.

    DFTracer writes only when its buffer is full, and has no call to flush it. So this thread fills the buffer
    with blanks (they compress to almost nothing), then makes the C library write its own buffer.
    """

    def __init__(self, native: Any, flush_ms: int) -> None:
        super().__init__(name="trace-flush", daemon=True)
        self.native, self.flush_ms = native, flush_ms
        self.done = threading.Event()
        self.libc = ctypes.CDLL(None)

    def run(self) -> None:
        blanks = " " * PAD_BYTES
        while not self.done.wait(self.flush_ms / 1000):
            with _flushing:
                for _ in range(BUFFER_BYTES // PAD_BYTES + 1):
                    self.native.log_metadata_event(key="flush", value=blanks)
                self.libc.fflush(None)

    def stop(self) -> None:
        self.done.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join(timeout=10)


class span:
    """`with span("data", "read", bytes=n):` or `@span("eval", "metrics")`. Ends on exceptions, too."""

    __slots__ = ("_cat", "_name", "_args", "_begin")

    def __init__(self, cat: str, name: str, **args: Any) -> None:
        self._cat, self._name, self._args = cat, name, args
        self._begin = 0

    def __enter__(self) -> "span":
        if _native is not None:
            self._begin = _native.get_time()
        return self

    def __exit__(self, *_: object) -> None:
        native = _native
        if native is not None and self._begin:
            _log(native, self._cat, self._name, self._begin, native.get_time() - self._begin, self._args)

    def update(self, **args: Any) -> None:
        """Add arguments that are known only later, such as the bytes read."""
        self._args.update(args)

    def __call__(self, function: F) -> F:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with span(self._cat, self._name, **self._args):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]


def get_time() -> int:
    """Now, on the trace's clock; 0 while not tracing."""
    native = _native
    return native.get_time() if native is not None else 0


def record_span(cat: str, name: str, begin: int, end: int, **args: Any) -> None:
    """A span whose beginning and end, by `get_time`, are known only afterwards."""
    native = _native
    if native is not None and begin:
        _log(native, cat, name, begin, max(0, end - begin), args)


def instant(cat: str, name: str, **args: Any) -> None:
    """An event without duration."""
    native = _native
    if native is not None:
        _log(native, cat, name, native.get_time(), 0, args)


def counter(name: str, value: float) -> None:
    instant("counter", name, value=value)


def _log(native: Any, cat: str, name: str, begin: int, duration: int, args: dict[str, Any]) -> None:
    """Give an event to DFTracer. `native`: its logger. `begin`, `duration`: in its clock, microseconds; 0: an
    instant. `args`: of the event, of any type; each becomes an int, a float or a text.
    """
    ints: dict[str, Any] = _context.copy()
    floats: dict[str, Any] = {}
    strings: dict[str, Any] = {}
    for key, value in args.items():
        kind = type(value)
        if kind is not int and kind is not float and kind is not str:
            value = _native_type(value)
            kind = type(value)
        if kind is int and abs(value) <= MAX_INT:
            ints[key] = (0, value)
        elif kind is int:
            strings[key] = (0, str(value))  # the analysis reads it as a number
        elif kind is str:
            strings[key] = (0, _plain_value(value))
        elif not math.isfinite(value):
            strings[key] = (0, str(value))  # JSON knows neither nan nor inf
        elif value.is_integer() and abs(value) < 1 << 53:
            # DFTracer writes six digits of a float
            if abs(value) <= MAX_INT:
                ints[key] = (0, int(value))
            else:
                strings[key] = (0, str(int(value)))
        else:
            floats[key] = (0, value)
    # by position (name, category, begin, duration, ints, strings, floats): keywords would cost a microsecond
    # for each event
    if strings or floats:
        native.log_event(name, cat, begin, duration, ints, strings, floats)
    else:
        native.log_event(name, cat, begin, duration, ints)


def _native_type(value: Any) -> Any:
    """bool, numpy and torch scalars, paths, None as int, float or str, the types that DFTracer takes."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else str(value)


@lru_cache(maxsize=1024)  # the names of files and splits repeat
def _plain_value(text: str) -> str:
    """Escaped for JSON: DFTracer writes strings between quotes as they are."""
    if text.isalnum():
        return text
    text = text.encode(errors="surrogateescape").decode(errors="replace")  # file names may be any bytes
    return json.dumps(text, ensure_ascii=False)[1:-1]
