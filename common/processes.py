"""What /proc says about a process. Read with `opening` held: see common/descriptors.py."""

from pathlib import Path

from common.descriptors import opening

START_TIME = 19  # its place in the fields of `read_process_stat`


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
