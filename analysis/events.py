"""The traces of a run as columns: `processes` who wrote them, `load` all events in one table, `batches` in
constant memory. Hashes are resolved, ranks are known, times of different hosts stand on one clock.

Columns: rank, pid, tid, cat, name, ts and dur (us), file, offset, count, ret, bytes, epoch, step, batch,
value (counters), split, when, args (JSON of what is left). Metadata and DFTracer's own start and end
events are no rows. What could not be read is in `Process.lost`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl

from analysis.clocks import clocks
from analysis.columns import COLUMNS, frame
from analysis.lines import blocks, tail
from analysis.process import Process
from analysis.scan import EVENT, METADATA, Block, scan
from analysis.strings import ID, PAD, Strings
from common.errors import UserError

__all__ = [
    "COLUMNS",
    "Process",
    "Reader",
    "batches",
    "files",
    "heads",
    "load",
    "processes",
]
HEAD_BLOCKS = 100  # a barrier at the start that comes later than this is not looked for
_SALVAGE = re.compile(rb'"name":"(\w\w)".*"args":\{"hhash":"\w*","name":"(.*)","value":"(.*)"\}\}\s*$')


def files(run_dir: str | Path) -> list[Path]:
    """The trace files of a run: RUN/trace, or any folder of DFTracer files, or one file."""
    run = Path(run_dir)
    if not run.exists():
        raise UserError(f"{run}: no such folder; give the folder of a run, e.g. results/<name>")
    if run.is_file():
        if not run.name.endswith((".pfw", ".pfw.gz")):
            raise UserError(f"{run}: DFTracer's files end in .pfw.gz or .pfw; give one, or a run folder")
        return [run]
    for folder in (run / "trace", run):
        found = sorted([*folder.glob("*.pfw.gz"), *folder.glob("*.pfw")], key=_parents_first)
        if found:
            return found
    raise UserError(f"{run}: no traces (*.pfw.gz) in it or in its trace/ folder; was the run traced?")


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
    """Who wrote each trace file, by rank, from its first events; of several hosts with both barriers."""
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
            for at in end_barrier(reader.process.path):
                reader.process.barriers.setdefault("end", at)
    return ranked([reader.process for reader in readers])


def end_barrier(path: Path) -> list[int]:
    """When the barrier at the end was, from the file's last stretch alone."""
    found = []
    for line in tail(path).splitlines():
        if b'"clock"' in line and b'"end"' in line:
            with suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["args"]["when"] == "end":
                    found.append(int(event["ts"]))
    return found[-1:]


def ranked(found: list[Process]) -> list[Process]:
    """In the order of ranks; traces that were not made by dlrm get the order of the files."""
    named = max((process.rank for process in found), default=-1)
    for process in found:
        if process.rank < 0:
            named += 1
            process.rank = named
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
    known = clocks(found)
    parts = []
    for process, own in zip(found, tables, strict=True):
        for table in own:
            table = known[process.path].frame(table)
            if "rank" in columns:
                table = table.with_columns(pl.lit(process.rank, pl.Int32).alias("rank"))
            parts.append(table)
    if not parts:
        raise UserError(f"{run_dir}: the traces hold no events")
    return pl.concat(parts, how="vertical").sort("ts").select(columns)
