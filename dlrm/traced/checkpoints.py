"""torch.save and torch.load: each as a span with its file and bytes, and each byte of a file in calls.

torch writes a file that is given by its path through a C++ stream, which DFTracer cannot follow: here it
gets a Python file, as torch itself does where a path is not ASCII. What it writes then is the same but for
the name of the folder inside the file, which no reader looks at.
"""

import functools
import os
import threading
from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.hooks import replace
from dlrm.traced.numpy_files import note_mapped
from dlrm.traced.steps import steps

_open_spans: list[str] = []  # the files of the checkpoints that are saved or loaded now, in all threads


def hook(torch: ModuleType) -> None:
    serialization = torch.serialization
    for name, direction in (("save", "save"), ("load", "load")):
        replace(serialization, name, lambda original, to=direction: as_checkpoint(original, to), torch)
        setattr(torch, name, getattr(serialization, name))
    replace(serialization, "_open_zipfile_writer_file", _wrap_writer, torch)


def as_checkpoint(function: Any, direction: str) -> Any:
    """A function that saves or loads, as a span. Its file is the first of its arguments that is a path.

    torch.distributed.checkpoint saves tensors to memory by torch.save, and writes that: such parts of a
    checkpoint, within its span or in a thread behind it, are no checkpoints of their own.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not trace.is_tracing():
            return function(*args, **kwargs)
        path = find_path(args, kwargs)
        if not path and (_open_spans or threading.current_thread() is not threading.main_thread()):
            return function(*args, **kwargs)
        steps.close_step()
        _open_spans.append(path)
        try:
            with trace.span("checkpoint", direction, **({"file": path} if path else {})) as span:
                found = function(*args, **kwargs)
                if path and os.path.isfile(path):
                    span.update(bytes=os.path.getsize(path))
        finally:
            _open_spans.pop()
            steps.leave()
        if direction == "load" and kwargs.get("mmap") and path:
            note_mapped(path, 0, os.path.getsize(path))
        return found

    return call


def find_path(args: Any, kwargs: Any) -> str:
    """The file or folder among a function's arguments, absolute; or nothing."""
    for each in (*args, *kwargs.values()):
        name = getattr(each, "name", None) if hasattr(each, "fileno") else each
        if isinstance(name, str | os.PathLike) and (os.sep in os.fspath(name) or os.path.exists(name)):
            return os.path.abspath(name)
    return ""


def _wrap_writer(original: Any) -> Any:
    torch_buffer = original.__init__.__globals__["_open_zipfile_writer_buffer"]

    class _open_zipfile_writer_file(torch_buffer):
        def __init__(self, name: Any) -> None:
            self.stream = open(name, "wb", buffering=0)  # noqa: SIM115
            super().__init__(self.stream)

        def __exit__(self, *args: Any) -> None:
            try:
                super().__exit__(*args)
            finally:
                self.stream.close()

    return _open_zipfile_writer_file
