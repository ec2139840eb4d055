"""What is wrapped, and when: a table of libraries, and the functions that wrap their parts once imported.

A hook that does not fit (another version of a library) says so in one line, and the script goes on untraced
in that one thing. Hooks change no result: a wrapper calls the library's function and passes on what it gets.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dlrm.runtime import trace

# library, once it is imported -> files of this folder whose `hook(library)` is called, in this order
HOOKS: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy_files",),
    "torch": ("steps", "data_loaders", "collectives", "data_parallel", "checkpoints"),
    "torchrec": (),
    "torch.distributed.checkpoint": ("distributed_checkpoints",),
    "torchrec.distributed.train_pipeline.train_pipelines": ("pipelines",),
    "safetensors": ("safetensors_files",),
    "safetensors.torch": ("safetensors_files",),
}

_quiet = False


def install(quiet: bool) -> None:
    """Hook every library of the table, now where it is imported already. `quiet`: another rank says what does
    not fit.
    """
    global _quiet
    _quiet = quiet
    sys.meta_path.insert(0, _Watcher())
    for name in HOOKS:
        if name in sys.modules:
            apply(sys.modules[name])


def apply(library: ModuleType) -> None:
    """Call the hooks of a library that has just been imported."""
    for file in HOOKS[library.__name__]:
        try:
            importlib.import_module(f"dlrm.traced.{file}").hook(library)
        except Exception as error:  # whatever another version of the library makes of it
            note_misfit(library, file.replace("_", " "), f"{type(error).__name__}: {error}")


def note_misfit(library: ModuleType, what: str, why: str) -> None:
    if not _quiet:
        version = getattr(library, "__version__", "") or getattr(
            sys.modules.get(library.__name__.partition(".")[0]), "__version__", "of an unknown version"
        )
        line = why.splitlines()[0][:200]
        print(
            f"dlrm.traced: {library.__name__} {version}: {what} not traced ({line}); the run goes on",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def replace(owner: Any, name: str, wrap: Callable[[Any], Any], library: ModuleType) -> None:
    """Replace an attribute by `wrap(original)`; print a line where there is none."""
    original = getattr(owner, name, None)
    if original is None:
        note_misfit(library, name, "there is no such name")
        return
    if not getattr(original, "is_traced", False):
        made = wrap(original)
        made.is_traced = True
        setattr(owner, name, made)


def as_span(cat: str, name: str, describe: Callable[..., dict[str, Any]] | None = None) -> Callable[..., Any]:
    """What wraps a function so that each call is a span; `describe(*args, **kwargs)` gives its arguments."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not trace.is_tracing():
                return function(*args, **kwargs)
            with trace.span(cat, name, **(describe(*args, **kwargs) if describe else {})):
                return function(*args, **kwargs)

        return call

    return wrap


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a library, and calls its hooks when it has run."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in HOOKS or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_hook(module: ModuleType) -> None:
                with trace.span("startup", "imports", library=fullname):
                    run(module)
                apply(module)

            spec.loader.exec_module = run_and_hook  # type: ignore[method-assign]
        return spec
