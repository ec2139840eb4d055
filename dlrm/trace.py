"""Record what this process does, with DFTracer: start, span, instant, counter, stop. Free when off.

The only module that imports dftracer, and only after `start`. What lands in RUN/trace/*.pfw.gz:
  metadata (CM)   rank, local_rank, world_size, host, role, once per process; thread_name, once a thread
  spans           cat is the room (startup, data, train, eval, checkpoint, prep; torchrec from the patches),
                  args carry epoch, step, and bytes, file, batch where there are any
  instants        duration 0; cat `clock`, name `barrier`, arg `when` (start, end): all ranks at one moment
  counters        cat `counter`, name of the counter, arg `value`
  POSIX calls     by interception, each with its file, offset and bytes
"""

import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from dlrm.ranks import Ranks

F = TypeVar("F", bound=Callable[..., Any])

FLUSH_MS = 1000  # a killed process loses at most this much
BUFFER_BYTES = 1 << 20

_native: Any = None  # dftracer's C++ module while tracing, else None
_always: dict[str, int] = {}  # args that every span carries: epoch, step


def on() -> bool:
    return _native is not None


def start(run_dir: str | os.PathLike[str], here: Ranks, role: str, flush_ms: int = FLUSH_MS) -> None:
    """Open this process's trace file. Everything it reads or writes from here on is recorded."""
    global _native
    folder = Path(run_dir) / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        DFTRACER_ENABLE="1",
        DFTRACER_INC_METADATA="1",
        DFTRACER_INIT="FUNCTION",
        DFTRACER_BIND_SIGNALS="0",
        DFTRACER_DATA_DIR="all",  # as the argument data_dirs, "all" would be a folder of that name
        DFTRACER_TRACE_INTERVAL_MS=str(flush_ms),
        DFTRACER_WRITE_BUFFER_SIZE=str(BUFFER_BYTES),
    )
    # the C++ module itself: dftracer.python would take over SIGINT, SIGTERM and SIGABRT at import
    import dftracer.dftracer as native

    native.initialize(log_file=str(folder / f"{role}{here.rank:05d}"), data_dirs=None, process_id=-1)
    _native = native
    identity = {
        "rank": here.rank, "local_rank": here.local_rank, "world_size": here.world_size,
        "host": here.host, "role": role,
    }  # fmt: skip
    for key, value in identity.items():
        native.log_metadata_event(key=key, value=str(value))
    name_thread("main")


def stop() -> None:
    """Flush and close. Safe to call twice, or when never started."""
    global _native
    if _native is not None:
        native, _native = _native, None
        native.finalize()
        _always.clear()


def set_context(**args: int) -> None:
    """Arguments that every later span carries (epoch, step)."""
    _always.update(args)


def name_thread(name: str) -> None:
    if _native is not None:
        threading.current_thread().name = name
        _native.log_metadata_event(key="thread_name", value=name)


class span:
    """`with span("data", "read", bytes=n):` or `@span("eval", "auroc")`. Closed on exceptions too."""

    __slots__ = ("_cat", "_name", "_args", "_begun")

    def __init__(self, cat: str, name: str, **args: int | float | str) -> None:
        self._cat, self._name, self._args = cat, name, args
        self._begun = 0

    def __enter__(self) -> "span":
        if _native is not None:
            _native.enter_event()
            self._begun = _native.get_time()
        return self

    def __exit__(self, *_: object) -> None:
        if _native is not None and self._begun:
            _log(self._cat, self._name, self._begun, _native.get_time() - self._begun, self._args)
            _native.exit_event()

    def update(self, **args: int | float | str) -> None:
        self._args.update(args)

    def __call__(self, function: F) -> F:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with span(self._cat, self._name, **self._args):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]


def instant(cat: str, name: str, **args: int | float | str) -> None:
    if _native is not None:
        _log(cat, name, _native.get_time(), 0, args)


def counter(name: str, value: float) -> None:
    instant("counter", name, value=float(value))


def _log(cat: str, name: str, begun: int, duration: int, args: dict[str, int | float | str]) -> None:
    ints: dict[str, tuple[int, int]] = {key: (0, value) for key, value in _always.items()}
    floats: dict[str, tuple[int, float]] = {}
    strings: dict[str, tuple[int, str]] = {}
    for key, value in args.items():
        if isinstance(value, int):
            ints[key] = (0, int(value))
        elif isinstance(value, float):
            floats[key] = (0, value)
        else:
            strings[key] = (0, str(value))
    _native.log_event(
        name=name, cat=cat, start_time=begun, duration=duration,
        int_args=ints, float_args=floats, string_args=strings,
    )  # fmt: skip
