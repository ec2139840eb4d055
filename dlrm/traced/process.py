"""Tracing of one process of a traced script: started before anything is imported, ended after everything.

Also of the processes that the script starts with multiprocessing: those that are forked go on in a trace of
their own, and those that are spawned start one in `start_spawned`.
"""

import atexit
import multiprocessing.spawn
import os
from pathlib import Path
from typing import Any, NoReturn

from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks, find_ranks
from dlrm.traced import hooks
from dlrm.traced.steps import steps

VARIABLE = "DLRM_TRACED_RUN"  # the run folder, for spawned processes
SPAWNED = "import dlrm.traced.process as traced; traced.start_spawned(); "

_exit = os._exit
_pid = 0  # of the process whose steps are counted


def start(folder: Path, here: Ranks, role: str) -> None:
    """Open this process's trace, which is closed when the process has ended all else."""
    global _pid
    trace.start_tracing(folder, here, role, folders=_list_folders())
    _pid = os.getpid()
    atexit.register(_stop)
    os._exit = _stop_and_exit
    os.environ[VARIABLE] = str(folder.absolute())
    multiprocessing.spawn.get_command_line = _make_command_line


def start_spawned() -> None:
    """Called first of all in a process that multiprocessing has spawned."""
    folder = os.environ.get(VARIABLE)
    if folder and not trace.is_tracing():
        os.environ.pop("DFTRACER_LOG_FILE", None)  # set by DFTracer in the parent
        start(Path(folder), find_ranks(), "worker")
        hooks.install(quiet=True)


def _list_folders() -> dict[str, str]:
    folder = os.environ.get("DATASET_DIR")
    return {"DATASET_DIR": folder} if folder else {}


def _stop_and_exit(code: int) -> NoReturn:
    """os._exit, by which forked processes end: without it their last second would be missing."""
    _stop()
    _exit(code)


def _stop() -> None:
    if os.getpid() == _pid:  # a forked process has no steps of its own
        steps.close()
        steps.close_profile()
    trace.stop_tracing()


def _make_command_line(**values: Any) -> list[str]:
    """The command of a spawned process."""
    made = _command_line(**values)
    if "-c" in made:
        at = made.index("-c") + 1
        made[at] = SPAWNED + made[at]
    return made


_command_line = multiprocessing.spawn.get_command_line
