"""The traces of a run as columns: `processes` who wrote them, `load` all events in one table, `batches` in
constant memory. Hashes are resolved, ranks are known, times of different hosts stand on one clock.

Columns: rank, pid, tid, cat, name, ts and dur (us), file, offset, count, ret, bytes, epoch, step, batch,
value (counters), split, when, args (JSON of what is left). Metadata and DFTracer's own start and end
events are no rows. What could not be read is in `Process.lost`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from analysis.columns import COLUMNS, frame
from analysis.errors import AnalysisError
from analysis.lines import Loss, blocks
from analysis.scan import EVENT, METADATA, Block, scan
from analysis.strings import ID, PAD, Strings

__all__ = [
    "COLUMNS",
    "Process",
    "Reader",
    "batches",
    "files",
    "heads",
    "launches",
    "load",
    "offsets",
    "processes",
    "skew",
]
HEAD_BLOCKS = 100  # a barrier at the start that comes later than this is not looked for
_SALVAGE = re.compile(rb'"name":"(\w\w)".*"args":\{"hhash":"\w*","name":"(.*)","value":"(.*)"\}\}\s*$')


@dataclass
class Process:
    """One trace file and the process that wrote it."""

    path: Path
    rank: int = -1
    local_rank: int = -1
    world_size: int = -1
    host: str = ""
    role: str = ""
    pid: int = -1
    threads: dict[int, str] = field(default_factory=dict)  # tid -> name
    barriers: dict[str, int] = field(default_factory=dict)  # "start", "end" -> us on this host's clock
    events: int = 0  # as DFTracer counts them
    first: int = 0  # us
    last: int = 0
    ended: bool = False  # the process closed its trace
    expected: int = 0  # events that the process says it wrote
    bad_lines: int = 0
    loss: Loss = field(default_factory=Loss)

    @property
    def lost(self) -> str:
        """What this trace lacks, as one sentence; empty when it is whole."""
        parts = []
        if not self.ended:
            parts.append("no end record (killed or still running): what was not yet flushed is missing")
        elif self.expected > self.events:
            parts.append(f"{self.expected - self.events} of {self.expected} events missing")
        if self.loss.cut:
            parts.append("the gzip stream is cut")
        if self.loss.bytes:
            parts.append(f"{self.loss.bytes} bytes unreadable")
        if self.bad_lines:
            parts.append(f"{self.bad_lines} lines are not JSON")
        return f"{self.path.name}: " + "; ".join(parts) if parts else ""


def files(run_dir: str | Path) -> list[Path]:
    """The trace files of a run: RUN/trace, or any folder of DFTracer files, or one file."""
    run = Path(run_dir)
    if not run.exists():
        raise AnalysisError(f"{run}: no such folder; give the folder of a run, e.g. results/<name>")
    if run.is_file():
        return [run]
    for folder in (run / "trace", run):
        found = sorted([*folder.glob("*.pfw.gz"), *folder.glob("*.pfw")], key=_parents_first)
        if found:
            return found
    raise AnalysisError(f"{run}: no traces (*.pfw.gz) in it or in its trace/ folder; was the run traced?")


class Reader:
    """Iterate over the blocks of one trace file; `process` and `paths` fill up on the way."""

    def __init__(self, path: Path, strings: Strings, paths: dict[int, int] | None = None) -> None:
        self.process = Process(path)
        self.strings = strings
        # file hash -> path, both as numbers; shared between the files of a run: a forked process
        # inherits its parent's hashes and does not write them again
        self.paths: dict[int, int] = {} if paths is None else paths

    def __iter__(self) -> Iterator[Block]:
        process = self.process
        for text in blocks(process.path, process.loss):
            size = len(text)
            text += bytes(PAD)
            block = scan(np.frombuffer(text, np.uint8), size, self.strings)
            for place in block.bad:
                self._salvage(bytes(text[place : text.index(b"\n", place)]))
            self._records(block)
            if process.pid < 0 and len(block):
                process.pid = int(block.pid[0])
            is_event = block.ph == EVENT
            process.events += int(np.count_nonzero(is_event))
            if is_event.any():
                ts = block.ts[is_event]
                first, last = int(ts.min()), int((ts + block.dur[is_event]).max())
                process.first = min(process.first, first) if process.first else first
                process.last = max(process.last, last)
            yield block
        process.events -= process.ended  # the end record does not count itself

    def _records(self, block: Block) -> None:
        """Metadata, start and end, barriers: few, so one by one."""
        special = (block.ph == METADATA) | (block.cat == ID["dftracer"]) | (block.cat == ID["clock"])
        for i in np.flatnonzero(special).tolist():
            args = block.args(i, self.strings)
            if block.ph[i] == METADATA:
                self._metadata(int(block.name[i]), int(block.tid[i]), args)
            elif block.cat[i] == ID["clock"] and "when" in args:
                self.process.barriers.setdefault(str(args["when"]), int(block.ts[i]))
            elif block.name[i] == ID["end"]:
                self.process.ended = True
                self.process.expected = int(args.get("num_events", 0))

    def _metadata(self, kind: int, tid: int, args: dict) -> None:
        key, value = str(args.get("name", "")), args.get("value", "")
        process = self.process
        if kind == ID["FH"]:
            self.paths[self.strings.add(str(value))] = self.strings.add(key)
        elif kind == ID["HH"]:
            process.host = process.host or key
        elif kind == ID["CM"] and key in ("rank", "local_rank", "world_size"):
            setattr(process, key, int(value))
        elif kind == ID["CM"] and key in ("host", "role"):
            setattr(process, key, str(value))
        elif kind == ID["CM"] and key == "thread_name":
            process.threads[tid] = str(value)

    def _salvage(self, line: bytes) -> None:
        """A path with a quote in it makes DFTracer write a record that is no JSON."""
        if found := _SALVAGE.search(line):
            kind, key, value = (group.decode(errors="replace") for group in found.groups())
            self._metadata(ID.get(kind, 0), 0, {"name": key, "value": value})
        else:
            self.process.bad_lines += 1


def processes(run_dir: str | Path) -> list[Process]:
    """One record per trace file, by rank; reads every file once."""
    found = []
    strings = Strings()
    for path in files(run_dir):
        reader = Reader(path, strings)
        for _ in reader:
            pass
        found.append(reader.process)
    return ranked(found)


def heads(run_dir: str | Path) -> list[Process]:
    """Who wrote each trace file, by rank, from its first events; of several hosts up to the first barrier."""
    strings = Strings()
    readers = [Reader(path, strings) for path in files(run_dir)]
    rest = [iter(reader) for reader in readers]
    for blocks_of in rest:
        next(blocks_of, None)
    if len({reader.process.host for reader in readers}) > 1:
        for reader, blocks_of in zip(readers, rest, strict=True):
            for number, _ in enumerate(blocks_of):
                if "start" in reader.process.barriers or number == HEAD_BLOCKS:
                    break
    return ranked([reader.process for reader in readers])


def ranked(found: list[Process]) -> list[Process]:
    """In the order of ranks; traces that were not made by dlrm get the order of the files."""
    for number, process in enumerate(found):
        if process.rank < 0:
            process.rank = number
    return sorted(found, key=lambda p: (p.rank, _parents_first(p.path)))


def _parents_first(path: Path) -> tuple[bool, str]:
    """A forked process does not repeat the file names that its parent has written."""
    return "-fork." in path.name, path.name


def batches(path: str | Path, columns: Sequence[str] = COLUMNS) -> Iterator[pl.DataFrame]:
    """The events of one trace file, a table per block of text, on the file's own clock."""
    reader = Reader(Path(path), Strings())
    for block in reader:
        yield frame(block, reader.strings, reader.paths, max(0, reader.process.rank), columns)


def load(run_dir: str | Path, columns: Sequence[str] = COLUMNS) -> pl.DataFrame:
    """All events of a run, on one clock, ordered by time. `columns`: only these (less memory)."""
    strings, paths, found, tables = Strings(), {}, [], []
    for path in files(run_dir):
        reader = Reader(path, strings, paths)
        found.append(reader.process)
        tables.append([frame(block, strings, paths, 0, (*columns, "ts")) for block in reader])
    ranked(found)
    shifts = offsets(found)
    parts = []
    for process, own in zip(found, tables, strict=True):
        for table in own:
            table = table.with_columns(pl.col("ts") + shifts[process.path])
            if "rank" in columns:
                table = table.with_columns(pl.lit(process.rank, pl.Int32).alias("rank"))
            parts.append(table)
    if not parts:
        raise AnalysisError(f"{run_dir}: the traces hold no events")
    return pl.concat(parts, how="vertical").sort("ts").select(columns)


def launches(found: Iterable[Process]) -> list[list[Process]]:
    """The traces by the job that wrote them, in the order of time: a run that was stopped has several.

    Each rank is in a job once. What forked, or has no barrier, goes with the latest job begun before it.
    """
    made: list[list[Process]] = []
    starters = sorted((p for p in found if "start" in p.barriers), key=lambda p: p.barriers["start"])
    for process in starters:
        if not made or any(p.rank == process.rank or p.world_size != process.world_size for p in made[-1]):
            made.append([])
        made[-1].append(process)
    begun = [min(p.first for p in job) for job in made]
    for process in found:
        if "start" not in process.barriers:
            made = made or [[]]
            before = [number for number, at in enumerate(begun) if at <= process.first]
            made[max(before, default=0)].append(process)
    return made


def offsets(found: Iterable[Process]) -> dict[Path, int]:
    """What to add to each trace's times so that the barrier at a job's start is one moment on every host.

    Ranks of one host share its clock, so they share the offset: the median of what their barriers say.
    """
    return {path: shift for job in launches(list(found)) for path, shift in _offsets(job).items()}


def _offsets(found: list[Process]) -> dict[Path, int]:
    hosts = {p.host for p in found}
    base = [p.barriers["start"] for p in found if "start" in p.barriers]
    if len(hosts) < 2 or not base:
        return {p.path: 0 for p in found}
    first = min(found, key=lambda p: p.rank).host
    moment = {
        host: np.median(
            [p.barriers["start"] for p in found if p.host == host and "start" in p.barriers] or [np.nan]
        )
        for host in hosts
    }
    reference = moment[first] if not np.isnan(moment[first]) else min(base)
    shift = {host: 0 if np.isnan(at) else round(float(reference - at)) for host, at in moment.items()}
    return {p.path: shift[p.host] for p in found}


def skew(found: Iterable[Process]) -> dict[str, int]:
    """How far the clocks were apart at each barrier, in us: over all ranks of a job, as recorded."""
    apart: dict[str, int] = {}
    for job in launches(list(found)):
        for when in ("start", "end"):
            at = [p.barriers[when] for p in job if when in p.barriers]
            if len(at) > 1:
                apart[when] = max(apart.get(when, 0), max(at) - min(at))
    return apart
