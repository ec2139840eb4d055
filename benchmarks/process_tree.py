"""What a process and all below it take of the machine, for benchmarks that watch a command from outside."""

import re
from contextlib import suppress
from pathlib import Path


def list_processes(pid: int) -> list[int]:
    """A process and all below it."""
    children = list[str]()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):  # of each thread those that it started
        with suppress(OSError):  # it has ended
            children += path.read_text().split()
    return [pid, *(each for child in children for each in list_processes(int(child)))]


def read_memory(pid: int) -> int:
    """Bytes that a process has for itself alone, or 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(found) << 10 for found in re.findall(r"Private_\w+:\s+(\d+) kB", text))


def count_disk_bytes(folder: Path) -> int:
    """Bytes that the files in a folder take, while others add and remove some."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it is gone
            total += path.lstat().st_blocks * 512
    return total
