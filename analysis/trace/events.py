"""The traces of a run as columns.

`read_processes` gives the processes that wrote them, `load_events` all events in one table, `read_batches`
the same in constant memory. Hashes are resolved, ranks are known, and different hosts are on one clock.

Columns: rank, pid, tid, cat, name, ts and dur (us), file, offset, count, ret, bytes, epoch, step, batch,
value (counters), split, when, args (JSON of what is left). Metadata and DFTracer's own start and end
events are not rows. What could not be read is in `TracedProcess.lost`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl

from analysis.trace.arguments import read_argument_of
from analysis.trace.clocks import make_clocks
from analysis.trace.columns import COLUMNS, make_event_frame
from analysis.trace.lines import Opener, ReadLoss, open_trace, read_blocks, read_tail
from analysis.trace.nodes import is_service_file
from analysis.trace.process import TracedProcess
from analysis.trace.scan import (
    COUNTER,
    EVENT,
    MAX_TS,
    MAX_WHOLE,
    METADATA,
    STRING,
    SUM,
    EventBlock,
    scan_block,
)
from analysis.trace.strings import BACKSLASH, ID, PAD, StringTable, compiled
from common.errors import UserError, os_errors_as_user_errors, printable

__all__ = [
    "COLUMNS",
    "TracedProcess",
    "TraceReader",
    "read_batches",
    "find_trace_files",
    "read_heads",
    "load_events",
    "read_processes",
]
HEAD_BYTES = 1 << 20  # of text: who wrote a file is said at its beginning
TAIL_BYTES = 64 << 10, 1 << 20  # of a file: the end's marks are looked for in so much, then in so much of it
MARKS_APART = 16 << 10  # bytes of text: marks of one barrier are not further apart
HEAD_BLOCKS = 400  # a barrier at the start that comes later than this is not looked for
MAX_RECORDS = 200_000  # of metadata in a file: each is parsed alone
MAX_RANKS = 1 << 20
MAX_LEVELS, MAX_FOLDERS = 5, 200  # of folders that are searched for traces
MAX_SUMMED = 1000  # names of calls whose sums are counted, of a process
MAX_THREADS = 1 << 16  # whose names are kept, of a process
_ARGS = b'"args":{"hhash":"'
MAX_FILE_SYSTEMS = 100  # that are kept, of a process
_NOTE = 16 << 10  # characters of what is known of one: DFTracer takes no longer records
MAX_CLOCK_LINE = 4096  # bytes of a barrier's event
_LABEL = 255  # characters of a host's or a thread's name that are kept


def find_trace_files(run_dir: str | Path) -> list[Path]:
    """The trace files of a run: RUN/trace, or any folder of DFTracer files, or one file."""
    with os_errors_as_user_errors(run_dir):
        return _list_files(Path(run_dir))


def _list_files(run: Path) -> list[Path]:
    shown = printable(run)
    if not run.exists():
        raise UserError(f"{shown}: no such folder; give the folder of a run, e.g. results/<name>")
    if run.is_file():
        if not run.name.endswith((".pfw", ".pfw.gz")):
            raise UserError(f"{shown}: DFTracer's files end in .pfw.gz or .pfw; give one, or a run folder")
        return [run]
    for folder in (run / "trace", run):
        listed = _list_traces(folder)
        found = sorted((path for path in listed if not is_service_file(path)), key=_make_sort_key)
        if found:
            return found
        if listed:
            raise UserError(
                f"{shown}: only counters of dftracer_service are in it, no trace of a program: give the "
                "folder of a run, and to perfetto this one by --node_counters"
            )
    if below := _list_traced_folders(run):
        raise UserError(
            f"{shown}: no traces (*.pfw.gz) in it, but in folders of it: give one of them, e.g. "
            f"{printable(below[0])}"
        )
    raise UserError(f"{shown}: no traces (*.pfw.gz) in it or in its trace/ folder; was the run traced?")


def _list_traced_folders(folder: Path) -> list[Path]:
    """Folders of it that hold traces, as in MLPerf Storage's results; a few levels down only."""
    found, level = [], [folder]
    for _ in range(MAX_LEVELS):
        with suppress(OSError):
            level = sorted(
                each for parent in level[:MAX_FOLDERS] for each in parent.iterdir() if each.is_dir()
            )
        found = [each for each in level[:MAX_FOLDERS] if _list_traces(each)]
        if found:
            break
    return found


def _list_traces(folder: Path) -> list[Path]:
    """By their names alone: one that is not a file is refused when it is opened, not skipped."""
    if not folder.is_dir():
        return []
    return [folder / name for name in os.listdir(folder) if name.endswith((".pfw.gz", ".pfw"))]


class TraceReader:
    """Iterate over the blocks of one trace file; `process` and `paths` fill up on the way."""

    def __init__(
        self,
        path: Path,
        strings: StringTable,
        paths: dict[int, int] | None = None,
        opened: Opener = open_trace,
        block_bytes: int = 0,
    ) -> None:
        """strings: where texts get their numbers, shared by several files. paths: number of a file's hash ->
        number of its path. opened: opens the file and gives its lines. block_bytes: of text, about; 0:
        as usual.
        """
        self.opened, self.block_bytes = opened, block_bytes
        self.process = TracedProcess(path)
        self.strings = strings
        self.records = 0
        # file hash -> path, both as numbers; shared between the files of a run: a forked process
        # inherits its parent's hashes and does not write them again
        self.paths: dict[int, int] = {} if paths is None else paths

    def __iter__(self) -> Iterator[EventBlock]:
        process = self.process
        for text in read_blocks(process.path, process.loss, self.opened, self.block_bytes):
            size = len(text)
            text += bytes(PAD)
            block = scan_block(np.frombuffer(text, np.uint8), size, self.strings)
            for place in block.bad:
                self._salvage_record(bytes(text[place : text.index(b"\n", place)]))
            process.bad_lines += block.n_bad - len(block.bad)
            self._read_records(block)
            if process.pid < 0 and len(block):
                process.pid = int(block.pid[0])
            is_event = block.ph == EVENT
            self._count_sums(block)
            process.events += int(np.count_nonzero(is_event))
            if is_event.any():
                ts = block.ts[is_event]
                first, last = int(ts.min()), int((ts + block.dur[is_event]).max())
                process.first = min(process.first, first) if process.first else first
                process.last = max(process.last, last)
            yield block
        process.events -= process.ended  # the end record does not count itself
        if process.sums and process.sums > process.events:
            raise UserError(
                f"{printable(process.path)}: holds sums of many calls, not the calls "
                f"({process.describe_sums()}; DFTRACER_ENABLE_AGGREGATION=1): record the trace without that "
                "variable"
            )

    def _count_sums(self, block: EventBlock) -> None:
        """Sums of many calls, which earlier versions of DFTracer wrote as counters, and real counters."""
        process = self.process
        others = np.flatnonzero((block.ph == SUM) | (block.ph == COUNTER))
        if not len(others):
            return
        calls = read_argument_of(block, others, ID["dft_cnt"])
        is_sum = (block.ph[others] == SUM) | (calls >= 0)
        process.counters += int(np.count_nonzero(~is_sum))
        process.sums += int(np.count_nonzero(is_sum))
        chosen = others[is_sum]
        pairs, of_row = np.unique(
            block.cat[chosen].astype(np.int64) << 32 | block.name[chosen], return_inverse=True
        )
        counts = np.bincount(of_row, calls[is_sum].clip(1, MAX_WHOLE), len(pairs))
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            name = f"{self.strings.text(pair >> 32)}/{self.strings.text(pair & 0xFFFFFFFF)}"
            if name in process.summed or len(process.summed) < MAX_SUMMED:
                process.summed[name] = process.summed.get(name, 0) + int(count)

    def _read_records(self, block: EventBlock) -> None:
        """Names of files all at once; other metadata, start and end, barriers: few, so one by one."""
        special = (block.ph == METADATA) | (block.cat == ID["dftracer"]) | (block.cat == ID["clock"])
        found = np.flatnonzero(special)
        self.records += len(found)
        beyond = min(len(found), max(0, self.records - MAX_RECORDS))
        self.process.bad_lines += beyond
        found = self._read_file_names(block, found[: len(found) - beyond])
        for i in found.tolist():
            args = block.args(i, self.strings)
            if block.ph[i] == METADATA:
                self._read_metadata(int(block.name[i]), int(block.tid[i]), args)
            elif block.cat[i] == ID["clock"]:
                _read_clock_mark(self.process, int(block.ts[i]), args)
            elif block.name[i] == ID["start"]:
                self._read_start(args)
            elif block.name[i] == ID["end"]:
                self.process.ended = True
                self.process.expected = take_whole_number(args.get("num_events"), MAX_WHOLE, 0)

    def _read_file_names(self, block: EventBlock, found: np.ndarray) -> np.ndarray:
        """Take in the hashes of files among these records; returns the records that are left."""
        named = (block.ph[found] == METADATA) & (block.name[found] == ID["FH"])
        rows = found[named]
        pairs = np.full((2, len(rows)), -1, np.int64)
        strings = self.strings
        _pair_texts(
            rows, block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, ID["value"], ID["name"],
            strings.pool, strings.starts, pairs,
        )  # fmt: skip
        plain = (pairs >= 0).all(axis=0)
        self.paths.update(zip(pairs[0, plain].tolist(), pairs[1, plain].tolist(), strict=True))
        return np.sort(np.concatenate([found[~named], rows[~plain]]))

    def _read_start(self, args: dict) -> None:
        self.process.parent = take_whole_number(args.get("ppid"), 1 << 32, -1)
        folder = self.paths.get(self.strings.add(str(args.get("cwd", ""))), -1)
        if folder >= 0 and not self.process.folder:
            self.process.folder = self.strings.text(folder)

    def _read_metadata(self, kind: int, tid: int, args: dict) -> None:
        """Take in one metadata event. kind: number of its name (FH, HH, SH, CM). tid: the thread that wrote
        it. args: of the event, as in the file.
        """
        key, value = str(args.get("name", "")), args.get("value", "")
        process = self.process
        if kind == ID["FH"]:
            hashed, path = self.strings.add(str(value)), self.strings.add(key)
            if hashed < 0 or path < 0:
                process.bad_lines += 1
            else:
                self.paths[hashed] = path
        elif kind == ID["HH"]:
            process.host = process.host or printable(key[:_LABEL])
        elif kind == ID["CM"] and key in ("rank", "local_rank", "world_size"):
            number = take_whole_number(value, MAX_RANKS, -1)
            process.bad_lines += number < 0
            if number >= 0:
                setattr(process, key, number)
        elif kind == ID["CM"] and key in ("host", "role"):
            setattr(process, key, printable(str(value)[:_LABEL]))
        elif kind == ID["CM"] and key == "thread_name" and len(process.threads) < MAX_THREADS:
            process.threads[tid] = str(value)[:_LABEL]
        elif kind == ID["CM"] and key == "file_system" and len(process.file_systems) < MAX_FILE_SYSTEMS:
            process.file_systems.append(str(value)[:_NOTE])
        elif kind == ID["CM"] and key == "io_error":
            process.io_error = printable(str(value)[:_LABEL])

    def _salvage_record(self, line: bytes) -> None:
        """A path with a quote in it makes DFTracer write a record that is not JSON."""
        if found := _parse_record(line):
            kind, key, value = (part.decode(errors="replace") for part in found)
            self._read_metadata(ID.get(kind, 0), 0, {"name": key, "value": value})
        else:
            self.process.bad_lines += 1


@compiled
def _pair_texts(rows, arg_begin, arg_key, arg_kind, arg_val, first, second, pool, starts, pairs):
    """Fills `pairs` (int64 [2, rows]) with the numbers of the texts of two arguments of these events. What is
    no text, or has a backslash in it (its number stands for the text as it is in the file), is left at -1.
    """
    for k in range(len(rows)):
        for j in range(arg_begin[rows[k]], arg_begin[rows[k] + 1]):
            place = 0 if arg_key[j] == first else 1 if arg_key[j] == second else -1
            if place < 0:
                continue
            pairs[place, k] = -1
            if arg_kind[j] == STRING:
                number = arg_val[j]
                plain = True
                for at in range(starts[number], starts[number + 1]):
                    plain &= pool[at] != BACKSLASH
                if plain:
                    pairs[place, k] = number


def _read_clock_mark(process: TracedProcess, at: int, args: dict) -> None:
    """The end of a barrier, or a clock's offset. The first of a kind counts."""
    when, ahead = args.get("when"), str(args.get("ahead_us", ""))
    error = take_whole_number(args.get("error_us"), MAX_TS, -1)
    if when not in ("start", "end"):
        return
    if not ahead:
        process.barriers.setdefault(when, at)
    elif error >= 0 and re.fullmatch(r"-?[0-9]{1,16}", ahead):
        process.offsets.setdefault(when, (at, int(ahead), error))


def _parse_record(line: bytes) -> tuple[bytes, bytes, bytes] | None:
    """A metadata record that is not JSON -> its kind, name and value. Searched once from either end."""
    line = line.rstrip(b" \r,")
    at = line.find(_ARGS)
    if at < 0 or not line.endswith(b'"}}'):
        return None
    kind = line.find(b'"name":"', 0, at)
    hashed, found, rest = line[at + len(_ARGS) : -3].partition(b'","name":"')
    name, found_too, value = rest.rpartition(b'","value":"')
    if kind < 0 or line[kind + 10 : kind + 11] != b'"' or not (found and found_too and hashed.isalnum()):
        return None
    return line[kind + 8 : kind + 10], name, value


def take_whole_number(value: object, most: int, otherwise: int) -> int:
    """A number from 0 to `most`, perhaps as text, else `otherwise`."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if not isinstance(value, int | float) or not 0 <= value <= most:
        return otherwise
    return int(value)


def read_processes(run_dir: str | Path) -> list[TracedProcess]:
    """One record per trace file, by rank; reads every file once."""
    found = []
    strings = StringTable()
    for path in find_trace_files(run_dir):
        reader = TraceReader(path, strings)
        for _ in reader:
            pass
        found.append(reader.process)
    return assign_ranks(found)


def read_heads(run_dir: str | Path, opened: Opener = open_trace) -> list[TracedProcess]:
    """The process of each trace file, by rank, from its first events; of several hosts with both barriers."""
    paths = find_trace_files(run_dir)
    with ThreadPoolExecutor(max_workers=min(len(paths), os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda path: _read_head(path, opened), paths))
        if len({process.host for process in found}) > 1:
            list(pool.map(lambda process: _read_marks(process, opened), found))
    return assign_ranks(found)


def _read_head(path: Path, opened: Opener) -> TracedProcess:
    """From the file's first stretch."""
    reader = TraceReader(path, StringTable(), opened=opened, block_bytes=HEAD_BYTES)
    next(iter(reader), None)
    return reader.process


def _read_marks(process: TracedProcess, opened: Opener) -> None:
    """The clock's marks at the start and at the end of a file. Of what is between nothing is parsed."""
    blocks = read_blocks(process.path, ReadLoss(), opened, HEAD_BYTES)
    for text in islice(blocks, 0 if "start" in process.barriers else HEAD_BLOCKS):
        _parse_marks(process, _list_mark_lines(text, b'"start"'))
        if "start" in process.barriers:
            break
    read_end_marks(process, opened)


def read_end_marks(process: TracedProcess, opened: Opener = open_trace) -> None:
    """The clock's marks at the end, from the file's last stretch alone."""
    lines: list[bytes] = []
    for size in TAIL_BYTES:
        text = read_tail(process.path, size, opened)
        lines = _list_mark_lines(text, b'"end"')[-100:]
        if lines and text.find(lines[0]) > MARKS_APART:  # none of them came before
            break
    _parse_marks(process, lines)


def _list_mark_lines(text: bytes | bytearray, when: bytes) -> list[bytes]:
    """The lines that may be marks of a clock at the start or the end."""
    lines, at = [], text.find(b'"clock"')
    while at >= 0:
        begin, end = text.rfind(b"\n", 0, at) + 1, text.find(b"\n", at)
        end = end if end >= 0 else len(text)
        if end - begin < MAX_CLOCK_LINE and when in (line := bytes(text[begin:end])):
            lines.append(line)
        at = text.find(b'"clock"', end)
    return lines


def _parse_marks(process: TracedProcess, lines: Sequence[bytes]) -> None:
    if not lines:
        return
    text = bytearray(b"\n".join([*lines, b""]))
    size, strings = len(text), StringTable()
    block = scan_block(np.frombuffer(text + bytes(PAD), np.uint8), size, strings)
    for i in np.flatnonzero(block.cat == ID["clock"]).tolist():
        _read_clock_mark(process, int(block.ts[i]), block.args(i, strings))


def assign_ranks(found: list[TracedProcess]) -> list[TracedProcess]:
    """In the order of ranks; traces that were not made by dlrm get the order of the files."""
    named = max((process.rank for process in found), default=-1)
    of_pid: dict[tuple[str, int], int] = {}
    for process in sorted(found, key=lambda p: "-fork." in p.path.name):
        if process.rank < 0 and "-fork." in process.path.name:
            process.rank = of_pid.get((process.host, process.parent), -1)  # a worker is of its parent's rank
        if process.rank < 0:
            named += 1
            process.rank = named
        of_pid[process.host, process.pid] = process.rank
    return sorted(found, key=lambda p: (p.rank, _make_sort_key(p.path)))


def _make_sort_key(path: Path) -> tuple[bool, str]:
    """Parents come first: a forked process does not repeat the file names that its parent has written."""
    return "-fork." in path.name, path.name


def read_batches(path: str | Path, columns: Sequence[str] = COLUMNS) -> Iterator[pl.DataFrame]:
    """The events of one trace file, a table per block of text, on the file's own clock."""
    reader = TraceReader(Path(path), StringTable())
    for block in reader:
        yield make_event_frame(block, reader.strings, reader.paths, max(0, reader.process.rank), columns)


def load_events(run_dir: str | Path, columns: Sequence[str] = COLUMNS) -> pl.DataFrame:
    """All events of a run, on one clock, ordered by time. `columns`: only these (less memory)."""
    strings, paths, found, tables = StringTable(), {}, [], []
    for path in find_trace_files(run_dir):
        reader = TraceReader(path, strings, paths)
        found.append(reader.process)
        tables.append([make_event_frame(block, strings, paths, 0, (*columns, "ts")) for block in reader])
    assign_ranks(found)
    known = make_clocks(found)
    parts = []
    for process, own in zip(found, tables, strict=True):
        for table in own:
            table = known[process.path].correct_frame(table)
            if "rank" in columns:
                table = table.with_columns(pl.lit(process.rank, pl.Int32).alias("rank"))
            parts.append(table)
    if not parts:
        raise UserError(f"{run_dir}: the traces hold no events")
    return pl.concat(parts, how="vertical").sort("ts").select(columns)
