"""What a process and all below it take of the machine, for benchmarks that watch a command from outside."""

import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Usage:
    """What a command took, with all that it started."""

    code: int  # its exit code
    output: str  # what it printed, on both streams
    seconds: float
    processor_seconds: float
    memory: int  # the most bytes at one time
    disk: dict[str, int]  # name -> the most bytes of that folder


def watch_command(
    words: Sequence[object], folders: Mapping[str, Path] | None = None, every: float = 0.2
) -> Usage:
    """Run a command in the project's folder, and look every so many seconds at what it takes."""
    folders = folders or {}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=log, stderr=log)
        memory, disk = 0, dict.fromkeys(folders, 0)
        while process.poll() is None:
            memory = max(memory, sum(map(read_memory, list_processes(process.pid))))
            for name, folder in folders.items():
                disk[name] = max(disk[name], count_disk_bytes(folder))
            time.sleep(every)
        seconds = time.perf_counter() - begun
        log.seek(0)
        output = log.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(process.returncode, output, seconds, used, memory, disk)


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
