"""What /proc says about a process (read with `opening` held: see common/descriptors.py), and its workers."""

import ctypes
import os
import signal
from pathlib import Path

from common.descriptors import opening

START_TIME = 19  # its place in the fields of `read_process_stat`
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
# of this process among those that share a piece of work by forking; 0: the first, their parent
worker_number = 0


def read_process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ...; empty: no such process."""
    try:
        with opening:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return text.rpartition(")")[2].split()
    except OSError:
        return []


def read_start_time(pid: int) -> str:
    """In clock ticks since boot: tells a process from a later one with the same pid; "": no such process."""
    found = read_process_stat(pid)
    return found[START_TIME] if len(found) > START_TIME else ""


def end_with_parent(parent: int) -> None:
    """This process ends when its parent does. parent: its pid, as that process sees itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def begin_worker(parent: int) -> None:
    """What one of as many workers as there are cores does first, before it imports polars."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; only the parent says so
    os.environ["POLARS_MAX_THREADS"] = "1"
