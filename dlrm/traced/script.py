"""Runs a script or module as `python SCRIPT` or `python -m MODULE` would: __main__, argv, path, exit code,
traceback. In: what `options` found. Out: the end of the process.
"""

import argparse
import builtins
import importlib.machinery
import io
import os
import runpy
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, os_errors_as_user_errors, printable
from dlrm.traced.options import Chosen

HERE = str(Path(__file__).parent) + os.sep  # whose frames no traceback shows


@dataclass(frozen=True)
class Program:
    target: str  # a path as it was given, or a module's name
    words: tuple[str, ...]
    is_module: bool
    title: str


def find_program(chosen: Chosen) -> Program:
    """Change into the script's folder of work; UserError where it, or the script, is not there."""
    if chosen.directory:
        with os_errors_as_user_errors(chosen.directory):
            os.chdir(chosen.directory)
    if not chosen.is_module and not os.path.exists(chosen.target):
        error = UserError(f"{printable(os.path.abspath(chosen.target))}: no such script")
        error.shared = True  # every rank has the same words
        raise error
    title = chosen.title or os.path.basename(chosen.target.rstrip("/"))
    return Program(chosen.target, chosen.words, chosen.is_module, title)


_interrupted = False


def run_program(program: Program, when_refused: Callable[[], None]) -> None:
    """Run it to its end. Raises what ends Python with the same exit code; prints the script's traceback.

    when_refused: called where the script's argparse does not take its words.
    """
    global _interrupted
    try:
        _run_as_main(program)
    except SystemExit as error:
        if _is_by_argparse(error):
            when_refused()
        raise
    except BaseException as error:
        _hide_own_frames(error)
        sys.excepthook(type(error), error, error.__traceback__)
        _interrupted = isinstance(error, KeyboardInterrupt)
        sys.exit(1)


def _is_by_argparse(error: SystemExit) -> bool:
    """Whether a wrong option, or --help, ends the script: its words say so and it has done nothing."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_code.co_filename == argparse.__file__


def end_by_signal() -> None:
    """After Ctrl-C, as Python does, so that a shell sees that it was that. The last handler at exit."""
    if _interrupted:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _run_as_main(program: Program) -> None:
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    if program.is_module:
        sys.argv = ["-m", *program.words]
        _set_first_path(os.getcwd())
        # what `python -m` itself calls
        runpy._run_module_as_main(program.target)  # type: ignore[attr-defined]
        return
    sys.argv = [program.target, *program.words]
    if os.path.isdir(program.target) or program.target.endswith((".zip", ".pyz")):
        _set_first_path(os.path.abspath(program.target))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    path = os.path.abspath(program.target)
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
    with io.open_code(path) as file:
        text = file.read()
    exec(compile(text, path, "exec"), main.__dict__)


def _set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _hide_own_frames(error: BaseException) -> None:
    """Leave the frames of this folder out of the tracebacks of an error and of those that led to it."""
    for each in _list_chain(error):
        frames = []
        at = each.__traceback__
        while at is not None:
            if not at.tb_frame.f_code.co_filename.startswith(HERE):
                frames.append(at)
            at = at.tb_next
        trace = None
        for frame in reversed(frames):
            trace = types.TracebackType(trace, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
        each.__traceback__ = trace


def _list_chain(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [found for found in (each.__cause__, each.__context__) if found is not None]
