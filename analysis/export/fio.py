"""A run as logs that fio replays: one of version 3 for each thread, a job file, and a script for the files.

In: RUN. Out: a folder with logs/*.log, replay.fio, make_files.sh (files of the sizes that the requests need)
and files.json (which of them stands for which file of the run). fio knows reads, writes, fsync and fdatasync:
other calls are counted in the job file. It takes no paths with blanks and makes no folders, so all files lie
in one folder, files/, under names of their own. It renames nothing: what a file is renamed to is its name
from the beginning.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from analysis.run_folder.outputs import has_header, results_in
from analysis.tables.gather import shorten_losses
from analysis.tables.read import read_rank
from analysis.trace.classify import is_kernel_file, is_program_file
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.source import FileSource
from common.errors import UserError, os_errors_as_user_errors, printable

HEADER = "fio version 3 iolog"
JOB_HEADER = "# made by python -m analysis export fio"
_NAME = 100  # characters of a file's own name that are kept: fio reads 255 of a path
_ACTIONS = {"read": "read", "write": "write", "fsync": "sync", "fdatasync": "datasync"}


@dataclass
class _FioFiles:
    """The names under which fio sees the files of the run, and how large they must be."""

    renamed: dict[str, tuple[int, str]]  # path in the trace -> when (us) it was renamed, and to what
    names: dict[str, str] = field(default_factory=dict)  # path in the trace -> path for fio
    sizes: dict[str, int] = field(default_factory=dict)  # path for fio -> bytes
    taken: set[str] = field(default_factory=set)

    def find_name(self, path: str, ts: int) -> str:
        """ts: of the call, in us."""
        when, target = self.renamed.get(path, (ts, path))
        path = target if ts <= when else path
        if path not in self.names:
            plain = re.sub(r"[^A-Za-z0-9._-]", "_", path.rpartition("/")[2][-_NAME:]) or "_"
            name, number = plain, 1
            while name in self.taken:
                number += 1
                name = f"{plain}~{number}"
            self.taken.add(name)
            self.names[path] = f"files/{name}"
        return self.names[path]

    def need(self, name: str, size: int) -> None:
        self.sizes[name] = max(size, self.sizes.get(name, 0))


@dataclass
class _Counts:
    """What the logs hold, and what they lack."""

    requests: Counter[str] = field(default_factory=Counter)  # "read", "write" -> how many
    bytes: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)  # names of calls that fio does not know
    at_end: int = 0  # reads that moved nothing
    guessed: int = 0  # requests whose offset the trace leaves open
    kernel: int = 0  # calls on files of /proc, /sys and /dev
    program: int = 0  # calls on files of programs and of the system, which are not wanted
    unnamed: int = 0  # calls whose file the trace does not name
    lost: list[str] = field(default_factory=list)  # what the traces lack


def write_fio_job(run: str, folder: Path, data_only: bool) -> str:
    """Write the logs of all ranks of the last launch into `folder`, which is made; gives what to print.

    data_only: leave out files of programs and of the system.
    """
    planned = plan_launches(FileSource(run))
    last = max(job.launch for job in planned)
    if not folder.parent.is_dir():
        raise UserError(f"-o {printable(folder)}: {printable(folder.parent)} is not a folder; name another")
    with os_errors_as_user_errors(folder):
        folder.mkdir(exist_ok=True)
    counts, logs = _Counts(), {}
    with results_in(folder, complete="logs/") as results:
        ranks = [_read_calls(job, counts) for job in planned if job.launch == last]
        files = _FioFiles(_list_renamed(calls for _, calls in ranks))
        if data_only:
            ranks = [(rank, _leave_out_programs(calls, counts)) for rank, calls in ranks]
        starts = [calls["ts"].min() for _, calls in ranks if len(calls)]
        if not starts:
            raise UserError(f"{printable(run)}: the traces hold no calls; was all I/O traced?")
        for rank, calls in ranks:
            for name, thread in _split_threads(rank, calls):
                lines = list(_make_log(thread, min(starts), files, counts))  # type: ignore[type-var]
                if len(lines) > 1:
                    logs[name] = f"logs/{name}.log"
                    text = "\n".join([*lines, ""])
                    results.write(logs[name], text.encode(), has_header([HEADER.encode()]))
        if not logs:
            raise UserError(f"{printable(run)}: the traces hold no reads and writes of files")
        job = _make_job(run, logs, counts, last)
        results.write("replay.fio", job.encode(), has_header([JOB_HEADER.encode()]))
        script = _make_script(files)
        results.write("make_files.sh", script.encode(), has_header([b"#!/bin/sh\n" + JOB_HEADER.encode()]))
        mapping = {fio: path for path, fio in files.names.items() if fio in files.sizes}
        text = json.dumps(mapping, indent=1, ensure_ascii=True) + "\n"
        results.write("files.json", text.encode(), lambda _: False)
    text = (
        f"{printable(folder)}: {len(logs)} logs, {counts.requests['read']:,} reads of "
        f"{counts.bytes['read']:,} bytes, {counts.requests['write']:,} writes of "
        f"{counts.bytes['write']:,} bytes, {len(files.sizes):,} files"
    )
    if last > 1:
        text += f"; of launch {last}, the last one"
    words = [text, *_describe_lacks(counts)]
    quoted = shlex.quote(str(folder))
    return "\n".join([*words, f"to replay it: cd {quoted} && sh make_files.sh && fio replay.fio"])


def _read_calls(job: Launch, counts: _Counts) -> tuple[int, pl.DataFrame]:
    """(rank, its calls in the order of time)."""
    wanted = ("pid", "tid", "name", "op", "ts", "path", "other", "position", "size")
    events = read_rank(job.rank, job.files, job.clock, details=True)
    counts.lost += [process.lost for process in events.processes if process.lost]
    return job.rank, events.calls.select(wanted).sort("ts", maintain_order=True)


def _list_renamed(ranks: Iterable[pl.DataFrame]) -> dict[str, tuple[int, str]]:
    """Path -> when (us) it was renamed for the last time, and to what: such as results that get their name
    once they are whole.
    """
    found = {}
    for calls in ranks:
        renames = calls.filter(pl.col("name") == "rename").select("path", "ts", "other").drop_nulls()
        found |= {path: (ts, other) for path, ts, other in renames.iter_rows()}
    return found


def _leave_out_programs(calls: pl.DataFrame, counts: _Counts) -> pl.DataFrame:
    names = calls["path"].drop_nulls().unique()
    unwanted = [name for name in names if is_program_file(name) and not is_kernel_file(name)]
    kept = calls.filter(~pl.col("path").is_in(unwanted).fill_null(False))
    counts.program += len(calls) - len(kept)
    return kept


def _split_threads(rank: int, calls: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    for (pid, tid), thread in calls.group_by("pid", "tid", maintain_order=True):
        yield f"rank{rank:05d}-{pid}-{tid}", thread


def _make_log(thread: pl.DataFrame, begin: int, files: _FioFiles, counts: _Counts) -> Iterator[str]:
    """The lines of a thread's log; times count from `begin` (us).

    A file is opened where the thread first uses it and closed with the thread's close: fio has one descriptor
    of a file in each log.
    """
    yield HEADER
    added, opened = set[str](), set[str]()
    ends: dict[str, int] = {}  # where the last request of a file ended
    columns = thread.drop("other").with_columns(pl.col(pl.Categorical).cast(pl.String))
    for _, _, call, op, ts, path, position, size in columns.iter_rows():
        if path is None or is_kernel_file(path):
            counts.unnamed += path is None
            counts.kernel += path is not None
            continue
        at = ts - begin
        name = files.find_name(path, ts)
        if op == "close":
            if name in opened:
                opened.remove(name)
                yield f"{at} {name} close"
            continue
        action = _ACTIONS.get(op) or _ACTIONS.get(call)
        if action is None:
            if op != "open" and op != "seek":  # they are in the logs as opens and offsets
                counts.other[call] += 1
            continue
        if op in ("read", "write"):
            if not size:
                counts.at_end += 1
                continue
            if position is None:
                counts.guessed += 1
                position = ends.get(name, 0)
            ends[name] = position + size
            files.need(name, position + size)
            counts.requests[op] += 1
            counts.bytes[op] += size
        else:
            position = size = 0
            files.need(name, 0)
        if name not in added:
            added.add(name)
            yield f"{at} {name} add"
        if name not in opened:
            opened.add(name)
            yield f"{at} {name} open"
        yield f"{at} {name} {action} {position} {size}"


def _describe_lacks(counts: _Counts) -> list[str]:
    """A line for each thing that the logs lack."""
    found = shorten_losses(counts.lost)
    if counts.other:
        named = ", ".join(f"{call} {n:,}" for call, n in counts.other.most_common())
        found.append(f"calls that fio has no action for: {named}")
    if counts.at_end:
        found.append(f"reads and writes that moved no byte, left out: {counts.at_end:,}")
    if counts.guessed:
        found.append(
            f"requests whose offset the trace leaves open, placed behind the one before: {counts.guessed:,}"
        )
    if counts.kernel:
        found.append(f"calls on files of /proc, /sys and /dev, left out: {counts.kernel:,}")
    if counts.program:
        found.append(
            f"calls on files of programs and of the system, left out (--data_only): {counts.program:,}"
        )
    if counts.unnamed:
        found.append(f"calls whose file the trace does not name, left out: {counts.unnamed:,}")
    return found


def _make_job(run: str, logs: dict[str, str], counts: _Counts, launch: int) -> str:
    """The job file: all logs at once, each by a process of its own."""
    lines = [
        f"{JOB_HEADER}, from {printable(run)}" + (f", launch {launch}" if launch > 1 else ""),
        "# In this folder: sh make_files.sh, then fio replay.fio. files/ may be a link to the file system to",
        "# be measured. Requests keep the times of the trace (replay_no_stall=1: as fast as possible); each",
        "# log goes on by itself: no thread waits for another. fio drops a file's pages from the page cache",
        "# first (invalidate=0: it does not). files.json says which file of the run each one stands for.",
        *(f"# {line}" for line in _describe_lacks(counts)),
        "[global]",
        "ioengine=psync",
    ]
    for name, log in logs.items():
        lines += [f"[{name}]", f"read_iolog={log}"]
    return "\n".join([*lines, ""])


def _make_script(files: _FioFiles) -> str:
    """A shell script that makes the files: sparse, or with REAL=1 of bytes that no file system compresses."""
    lines = [
        "#!/bin/sh",
        f"{JOB_HEADER}",
        "# Make the files that replay.fio uses, in files/ below the current folder. What is there",
        "# and large enough stays. Files are sparse; REAL=1 sh make_files.sh writes random bytes.",
        "set -eu",
        "mkdir -p files",
        "make() {  # make SIZE FILE",
        '    if [ -e "$2" ] && [ "$(stat -c %s "$2")" -ge "$1" ]; then return; fi',
        '    if [ -n "${REAL:-}" ]; then head -c "$1" /dev/urandom > "$2"; else truncate -s "$1" "$2"; fi',
        "}",
        *(f"make {size} {name}" for name, size in sorted(files.sizes.items())),
    ]
    return "\n".join([*lines, ""])
