"""Which calls on which files a process made: by its trace, and by strace."""

import gzip
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

OPERATIONS = {
    "open": "open", "open64": "open", "openat": "open", "creat": "open", "creat64": "open",
    "read": "read", "pread": "read", "pread64": "read", "readv": "read", "preadv": "read", "fread": "read",
    "write": "write", "pwrite": "write", "pwrite64": "write", "writev": "write", "pwritev": "write",
    "fwrite": "write", "fsync": "sync", "fdatasync": "sync", "copy_file_range": "copy", "sendfile": "copy",
}  # fmt: skip
STRACED = (
    "open,openat,creat,read,pread64,readv,preadv,write,pwrite64,writev,pwritev,fsync,fdatasync,"
    "copy_file_range,sendfile"
)


def list_strace_words(folder: Path) -> list[str]:
    """What stands before a rank's command so that strace writes its calls to FOLDER/calls.RANK; nothing where
    strace is not installed.
    """
    if shutil.which("strace") is None:
        return []
    command = f'exec strace -f -y --seccomp-bpf -e trace={STRACED} -o "{folder}/calls.$RANK" "$@"'
    return ["bash", "-c", command, "bash"]


class FileCalls(NamedTuple):
    """By (file, operation): calls, and the bytes that they moved. A trace does not say which open failed."""

    count: Counter[tuple[str, str]]
    bytes: Counter[tuple[str, str]]

    def add(self, file: str, operation: str, returned: int) -> None:
        self.count[file, operation] += 1
        self.bytes[file, operation] += max(0, returned) if operation in ("read", "write") else 0

    def below(self, folder: Path, *without: str) -> dict[tuple[str, str], tuple[int, int]]:
        """(calls, bytes) of the files in a folder, by path in it; `without`: what a path must not hold."""
        head = f"{folder}/"
        return {
            (file.removeprefix(head), name): (count, self.bytes[file, name])
            for (file, name), count in self.count.items()
            if file.startswith(head) and not any(part in file for part in without)
        }


def read_events(run: Path) -> list[dict[str, Any]]:
    """Every event of a run folder's traces, by Python's own gzip and json."""
    found = []
    for path in sorted((run / "trace").glob("*.pfw.gz")):
        with gzip.open(path, "rt", errors="replace") as lines:  # dftracer cuts long texts anywhere
            found += [json.loads(line.strip().rstrip(",")) for line in lines if line.startswith("{")]
    return found


def count_traced_calls(events: list[dict[str, Any]]) -> FileCalls:
    names = {e["args"]["value"]: e["args"]["name"] for e in events if e["name"] == "FH"}
    found = FileCalls(Counter(), Counter())
    for event in events:
        args = event.get("args", {})
        name = OPERATIONS.get(event["name"])
        if event.get("cat") in ("POSIX", "STDIO") and name and "fhash" in args:
            found.add(names[args["fhash"]], name, int(args.get("ret", 0)))
    return found


def join_cut_lines(log: str) -> Iterator[str]:
    """The lines of strace's log; a call that another thread's line cut in two is whole, where it ended."""
    begun: dict[str, str] = {}  # by thread
    for line in log.splitlines():
        thread = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in line:
            yield begun.pop(thread, "") + line.partition(" resumed>")[2]
        else:
            yield line


def count_strace_calls(log: str) -> FileCalls:
    """From a log of strace -f -y -e trace=STRACED. What opendir opens is not in a trace."""
    found = FileCalls(Counter(), Counter())
    for line in join_cut_lines(log):
        if "O_DIRECTORY" in line:
            continue
        if call := re.search(r'\b(open|openat|creat)\((?:\w+<([^>]*)>, )?"([^"]*)"', line):
            found.add(os.path.join(call[2] or "", call[3]), "open", 0)
        elif call := re.search(r"\b([a-z_0-9]+)\(\d+<([^>]*)>.*\)\s+= (-?\d+)(?: |$)", line):
            found.add(call[2], OPERATIONS[call[1]], int(call[3]))
    return found


PLACED = "openat,open,creat,close,lseek,read,pread64,readv,preadv,write,pwrite64,writev,pwritev,ftruncate"


def list_strace_requests(log: str) -> Counter[tuple[str, str, int, int]]:
    """(file, read or write, offset, bytes moved) of each call of one process, by a log of strace -f -y -e
    trace=PLACED. Offsets are followed from open, lseek, read and write, descriptor by descriptor.
    """
    found: Counter[tuple[str, str, int, int]] = Counter()
    position: dict[str, int] = {}  # descriptor -> where it is
    for line in join_cut_lines(log):
        if opened := re.search(r"\b(?:open|openat|creat)\(.*= (\d+)<", line):
            position[opened[1]] = 0
        elif call := re.search(r"\b([a-z_0-9]+)\((\d+)<([^>]*)>(.*)\)\s+= (-?\d+)", line):
            name, descriptor, file, arguments, result = call[1], call[2], call[3], call[4], int(call[5])
            if name == "lseek" and result >= 0:
                position[descriptor] = result
            elif name in OPERATIONS and result >= 0:
                placed = name.startswith("p")
                at = int(arguments.rpartition(", ")[2]) if placed else position.get(descriptor, 0)
                found[file, OPERATIONS[name], at, result] += 1
                if not placed:
                    position[descriptor] = at + result
    return found
