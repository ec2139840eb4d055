"""Is every byte in the trace? The bytes that the run counted, against the calls in the trace.

The run's count is in results.json: bytes_read and bytes_written, by rank and file. The trace's count is what
the read and write calls moved, by the same rank (its forked workers included) and file.
A launch that was stopped leaves no results.json: the bytes that its spans declare are compared, of data
(data/read) and of complete files of checkpoints (checkpoint/sync).
Beside it stands the kernel's own count of read calls, which knows no files: pipes and sockets are in it.
What cannot be compared is named: bytes of mapped files, files that the run does not count, and those of the
C library's streams, of which DFTracer does not record fprintf and fscanf.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis.tables.cores import Map, map_on_threads
from analysis.trace.arguments import READ, WRITE, count_moved_bytes, read_argument, read_real_argument
from analysis.trace.classify import KERNEL_COUNTERS, is_understood
from analysis.trace.columns import resolve_paths
from analysis.trace.events import TraceReader
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.nodes import list_losses
from analysis.trace.process import TracedProcess, is_forked
from analysis.trace.scan import STRING, EventBlock
from analysis.trace.source import EventBlockReader, FileSource, TraceSource
from analysis.trace.strings import ID, StringTable, unescape_text
from common.errors import UserError, printable
from common.inputs import read_json_object
from common.words import format_number

DIRECTIONS = {"bytes_read": READ, "bytes_written": WRITE}
Moved = dict[tuple[int, str], int]  # (READ, WRITE or one of these, file) -> bytes
SPANS = 3  # as a direction: bytes that data/read spans declare
MAPPED = 4  # the same of mapped files, whose pages no call reads
SAVED = 5  # bytes of checkpoint files that checkpoint/sync spans declare
STREAM = 6  # calls on streams, not bytes
_DECLARED = {SPANS: ("read", READ), SAVED: ("written", WRITE)}  # and the calls that they are held against
_NAMES = {READ: "read", WRITE: "written", MAPPED: "mapped", STREAM: "stream"}
# parts of paths of what every program loads: those bytes are not checked
_PROGRAM = re.compile(
    r"/site-packages/|/python3[^/]*/|\.so(\.[0-9.]+)?$|\.pyc?$|\.nb[ci]$|^/(proc|sys|dev|etc|usr)/"
)
# Python's tempfile tries whether a folder can be written: 4 bytes in a file that is gone at once
_PROBE, _PROBE_BYTES = re.compile(r"/[a-z0-9_]{8}$"), 4

# the name under which common/owned.py writes a file until it is complete, and the file's own in it
_UNFINISHED = re.compile(r"(?:\.(?!dlrm-io))?(.+)\.[0-9a-f]{16}\.partial")


@dataclass(frozen=True)
class CheckedFile:
    rank: int
    direction: str  # "read", "written"
    file: str
    counted: int
    traced: int
    launch: int = 1
    by_spans: bool = False  # counted from spans; those of data leave out headers and what a kill cut off

    @property
    def coverage(self) -> float:
        """Percent of the counted bytes that are in the trace."""
        return 100.0 * self.traced / self.counted if self.counted else 100.0

    @property
    def missed(self) -> int:
        """Bytes that one of the two lacks."""
        if self.by_spans and self.direction == "read":
            return max(0, self.counted - self.traced)
        return abs(self.counted - self.traced)


@dataclass(frozen=True)
class UncheckedBytes:
    """What one rank moved that cannot be compared with a second count."""

    rank: int
    direction: str  # "read", "written", "mapped", "stream"
    file: str
    bytes: int  # of a stream the calls


def check_run(
    run_dir: str | Path, source: TraceSource | None = None, over: Map = map_on_threads
) -> tuple[list[CheckedFile], list[TracedProcess], list[UncheckedBytes]]:
    """One row per launch, rank, direction and file that the run names; the processes hold what was lost; and
    what was not compared. over: see `sum_by_launch`.
    """
    launched = sum_by_launch(source or FileSource(run_dir), over, find_unlikely_files(run_dir))
    results = Path(run_dir) / "results.json"
    ended = _find_ended_launch([job for job, _ in launched])
    rows: list[CheckedFile] = []
    for number, (_, traced) in enumerate(launched):
        spans = any(kind in (SPANS, MAPPED, SAVED) for seen in traced.values() for kind, _ in seen)
        if number == ended and (os.path.lexists(results) or not spans):
            rows += _by_results(results, traced, number + 1)
        else:
            rows += _by_spans(traced, number + 1)
    unchecked = _list_unchecked(rows, launched)
    counted = ended >= 0 and os.path.lexists(results)  # if only that no file was read, as with random rows
    if not rows and not counted and not any(each.direction == "mapped" for each in unchecked):
        raise UserError(
            f"{printable(run_dir)}: no results.json and no data/read spans with bytes; nothing to compare"
        )
    processes = [process for job, _ in launched for process in job]
    return rows, processes, unchecked


def _list_unchecked(
    rows: list[CheckedFile], launched: list[tuple[list[TracedProcess], dict[int, Moved]]]
) -> list[UncheckedBytes]:
    """Mapped files, and files of calls that no row is about; not what belongs to the program itself."""
    names: dict[tuple[int, int, str], set[str]] = {}
    for row in rows:
        known = names.setdefault((row.launch, row.rank, row.direction), set())
        known |= _list_names(row.file)
    found: list[UncheckedBytes] = []
    for launch, (_, traced) in enumerate(launched, 1):
        for rank, seen in sorted(traced.items()):
            of_rank: list[UncheckedBytes] = []
            for (kind, file), amount in seen.items():
                direction = _NAMES.get(kind)
                if direction is None or not amount:
                    continue
                if kind != MAPPED and (
                    _is_of_program(file)
                    or file in names.get((launch, rank, direction), ())
                    or (kind == WRITE and amount == _PROBE_BYTES and _PROBE.search(file))
                ):
                    continue
                of_rank.append(UncheckedBytes(rank, direction, file, amount))
            found += sorted(of_rank, key=lambda each: each.file)
    return found


@lru_cache(1 << 16)  # all ranks have the same ones
def _is_of_program(file: str) -> bool:
    return not file.startswith("/") or _PROGRAM.search(file) is not None


def _find_ended_launch(jobs: list[list[TracedProcess]]) -> int:
    """The number of the launch that wrote results.json: it writes that after its last barrier."""
    ended = [number for number, job in enumerate(jobs) if any("end" in p.barriers for p in job)]
    begun = any("start" in p.barriers for job in jobs for p in job)
    return ended[-1] if ended else -1 if begun and len(jobs) > 1 else len(jobs) - 1


def _by_spans(traced: dict[int, Moved], launch: int) -> list[CheckedFile]:
    """A row per rank, direction and file that the launch's own spans name. `traced`: as in `_by_results`."""
    rows = []
    for rank, seen in sorted(traced.items()):
        for (kind, file), counted in sorted(seen.items(), key=lambda item: item[0][1]):
            if kind in _DECLARED:
                direction, calls = _DECLARED[kind]
                moved = _find_traced(seen, calls, file)
                rows.append(CheckedFile(rank, direction, file, counted, moved, launch, by_spans=True))
    return rows


def _by_results(path: Path, traced: dict[int, Moved], launch: int) -> list[CheckedFile]:
    """A row per rank, direction and file that results.json counts.

    traced: rank -> bytes in the trace, by direction and file.
    """
    try:
        results = read_json_object(path, paths=True)
    except UserError as error:
        raise UserError(f"{error}; did the run end?") from None
    rows = []
    for key, direction in DIRECTIONS.items():
        for rank, counted in sorted(_read_counts(results.get(key, {}), f"{printable(path)}: {key}").items()):
            seen = traced.get(rank, {})
            rows += [
                CheckedFile(
                    rank,
                    key.removeprefix("bytes_"),
                    file,
                    counted[file],
                    _find_traced(seen, direction, file),
                    launch,
                )
                for file in sorted(counted)
            ]
    if not any(results.get(key) for key in DIRECTIONS):
        raise UserError(
            f"{printable(path)}: has no bytes_read and no bytes_written to compare with the trace"
        )
    return rows


def _read_counts(value: Any, name: str) -> dict[int, dict[str, int]]:
    """{"0": {"/data/day_0": 123}}, and nothing else."""
    found: dict[int, dict[str, int]] = {}
    if not isinstance(value, dict):
        raise UserError(f"{name}: an object is expected, found {type(value).__name__}")
    for rank, files_of in value.items():
        if not re.fullmatch(r"[0-9]{1,7}", rank) or not isinstance(files_of, dict):
            raise UserError(f"{name}: {printable(rank)[:40]}: a rank and its files are expected")
        for file, amount in files_of.items():
            if type(amount) is not int or not 0 <= amount < 1 << 63:
                raise UserError(f"{name}: {rank}: {printable(file)}: a number of bytes is expected")
        found[int(rank)] = files_of
    return found


def find_unlikely_files(run_dir: str | Path) -> frozenset[str]:
    """Files that the run counts although they look like a program's, under all names that they may have in a
    trace. Sums of other such files, thousands on each rank, are not kept.
    """
    with suppress(UserError):  # where it matters, `_by_results` says what is wrong
        results = read_json_object(Path(run_dir) / "results.json", paths=True)
        counts = [_read_counts(results.get(key, {}), key) for key in DIRECTIONS]
        files = {file for each in counts for of_rank in each.values() for file in of_rank}
        return frozenset(name for file in files for name in _list_names(file) if _is_of_program(name))
    return frozenset()


def sum_by_launch(
    source: TraceSource, over: Map = map_on_threads, unlikely: frozenset[str] = frozenset()
) -> list[tuple[list[TracedProcess], dict[int, Moved]]]:
    """Per launch: the traced processes, and the bytes of every file by rank. over: where ranks are read, if
    the source is not a reading that is shared with other analyses. unlikely: see `find_unlikely_files`.
    """
    jobs = plan_launches(source)
    if isinstance(source, FileSource):
        sums = over(partial(sum_rank, unlikely=unlikely), jobs)
    else:
        sums = (sum_rank(job, unlikely, source) for job in jobs)
    found: dict[int, tuple[list[TracedProcess], dict[int, Moved]]] = {}
    for job, of_rank in zip(jobs, sums, strict=True):
        processes, by_rank = found.setdefault(job.launch, ([], {}))
        processes += of_rank.processes
        by_rank[job.rank] = of_rank.moved
    return list(found.values())


@dataclass
class RankSums:
    """Of one rank in one launch: its processes as read, and the bytes of every file but the program's."""

    processes: list[TracedProcess]
    moved: Moved


def sum_rank(job: Launch, unlikely: frozenset[str], source: TraceSource | None = None) -> RankSums:
    """Read the files of one rank. source: a reading that is shared with other analyses, else these files."""
    strings, paths, counts = StringTable(), {}, RankCounts(job)
    for path in job.files:
        reader = source.open_reader(path, strings, paths) if source else TraceReader(path, strings, paths)
        strings, paths = reader.strings, reader.paths
        for _ in counts.count_blocks(reader):
            pass
    return counts.sum_files(unlikely)


class RankCounts:
    """What the blocks of one rank's files say, added up while they are read, by whomever."""

    def __init__(self, job: Launch) -> None:
        self._job = job
        self._readers: list[EventBlockReader] = []
        self._moved: list[dict[tuple[int, int], int]] = []  # of each file

    def count_blocks(self, reader: EventBlockReader) -> Iterator[EventBlock]:
        """The blocks of the next file, counted on their way."""
        moved: dict[tuple[int, int], int] = {}
        by_kernel: list[float] = []  # all its samples
        unknown: dict[tuple[str, str], int] = {}
        self._readers.append(reader)
        self._moved.append(moved)
        for block in reader:
            _add_block(block, reader.strings, moved)
            _count_unknown_spans(block, reader.strings, unknown)
            by_kernel += _list_kernel_samples(block, reader.strings)
            yield block
        reader.process.unknown = unknown
        if by_kernel and reader.process.ended and not is_forked(reader.process):
            reader.process.reads = int(max(by_kernel) - min(by_kernel)), 0

    def sum_files(self, unlikely: frozenset[str]) -> RankSums:
        """When all files have been read. unlikely: see `find_unlikely_files`."""
        processes = [reader.process for reader in self._readers]
        folder = next((process.folder for process in processes if process.folder), "")
        seen: Moved = {}
        for reader, moved in zip(self._readers, self._moved, strict=True):
            hashes = np.array([hashed for hashed, _ in moved], np.int64)
            named = resolve_paths(hashes, reader.paths, reader.strings).tolist()
            for number, (_, direction), total in zip(named, moved, moved.values(), strict=True):
                file = os.path.join(folder, reader.strings.text(number))  # as the program named it
                seen[direction, file] = seen.get((direction, file), 0) + total
        for process in processes:
            process.rank = self._job.rank
            if process.reads:
                calls = sum(amount for (kind, _), amount in seen.items() if kind == READ)
                process.reads = process.reads[0], calls
        declared = {name for kind, file in seen if kind in (*_DECLARED, MAPPED) for name in _list_names(file)}
        kept = {
            (kind, file): amount
            for (kind, file), amount in seen.items()
            if not _is_of_program(file) or file in declared or file in unlikely
        }
        return RankSums(processes, kept)


def _list_kernel_samples(block: EventBlock, strings: StringTable) -> list[float]:
    """What the kernel had counted of the process's read calls, at each time that it was asked."""
    counters = np.flatnonzero(block.cat == ID["counter"])
    for name in np.unique(block.name[counters]).tolist():
        if strings.text(name) == f"{KERNEL_COUNTERS}rchar":
            values = read_real_argument(block, ID["value"])[counters[block.name[counters] == name]]
            return values[np.isfinite(values)].tolist()
    return []


def _count_unknown_spans(block: EventBlock, strings: StringTable, counts: dict[tuple[str, str], int]) -> None:
    """Adds those of this block to `counts`, as `TracedProcess.unknown` has them."""
    spans = block.is_event() & (block.cat != ID["POSIX"]) & (block.cat != ID["STDIO"])
    pairs = block.cat[spans].astype(np.int64) << 32 | block.name[spans]
    for pair, count in zip(*(each.tolist() for each in np.unique(pairs, return_counts=True)), strict=True):
        named = strings.text(pair >> 32), strings.text(pair & 0xFFFFFFFF)
        if not is_understood(*named):
            counts[named] = counts.get(named, 0) + count


def _add_block(block: EventBlock, strings: StringTable, sums: dict[tuple[int, int], int]) -> None:
    """Of calls the bytes, and those on streams, by file hash; bytes of spans data/read and checkpoint/sync by
    the file that they name.
    """
    kinds, amounts = count_moved_bytes(block, strings)
    spans = (block.cat == ID["data"]) & (block.name == ID["read"])
    declared = np.where(read_argument(block, ID["mapped"]) > 0, MAPPED, SPANS)
    streams = (block.cat == ID["STDIO"]) & block.is_event()
    synced = (block.cat == ID["checkpoint"]) & (block.name == ID["sync"])
    for key, wanted, kind, bytes_ in (
        (ID["fhash"], kinds > 0, kinds, amounts),
        (ID["fhash"], streams, np.full(len(block), STREAM), np.ones(len(block), np.int64)),
        (ID["file"], spans, declared, read_argument(block, ID["bytes"])),
        (ID["file"], synced, np.full(len(block), SAVED), read_argument(block, ID["size"])),
    ):
        owner = np.repeat(np.arange(len(block)), np.diff(block.arg_begin))
        where = np.flatnonzero((block.arg_key == key) & wanted[owner] & (block.arg_kind == STRING))
        named = (block.arg_val[where] << 3) | kind[owner[where]]
        unique, group = np.unique(named, return_inverse=True)
        totals = _sum_groups(group, bytes_[owner[where]], len(unique))
        for number, total in zip(unique.tolist(), totals, strict=True):
            sums[number >> 3, number & 7] = sums.get((number >> 3, number & 7), 0) + total


def _sum_groups(group: np.ndarray, amounts: np.ndarray, size: int) -> list[int]:
    """The sum of the amounts of each group. group: int64 [n], from 0 to size - 1; amounts: int64 [n]."""
    total = np.zeros(size, np.int64)
    np.add.at(total, group, amounts)
    return total.tolist()


def _find_traced(seen: Moved, direction: int, file: str) -> int:
    """A file may have been opened through a link or by a path with dots in it; and see `_as_traced`."""
    return sum(seen.get((direction, name), 0) for name in _list_names(file))


def _list_names(file: str) -> set[str]:
    names = {file, os.path.normpath(file)}
    with suppress(ValueError, OSError):  # a name with a zero byte, or in a loop of links
        names.add(os.path.realpath(file))
    return names | {each for name in names for each in _as_traced(name)}


def _as_traced(file: str) -> list[str]:
    """How DFTracer writes a path: quotes, backslashes and what is below a space become spaces (version 4), or
    nothing is escaped (before). What is not UTF-8 reads as the mark of that.
    """
    try:
        shown = file.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:  # a text of results.json that no file can have as its name
        return [file]
    return [shown, "".join(" " if c in '"\\' or c < " " else c for c in shown), unescape_text(shown.encode())]


def list_node_losses(run_dir: str | Path, processes: Iterable[TracedProcess]) -> list[str]:
    """What was not read or not understood of the run's counters of nodes, a sentence each."""
    return list_losses(run_dir, {process.host for process in processes})


def format_check(
    rows: list[CheckedFile], processes: Iterable[TracedProcess], unchecked: list[UncheckedBytes],
    node_losses: Iterable[str] = (),
) -> str:  # fmt: skip
    """A line per rank and direction, each file that is not covered to the byte, and what was not compared."""
    head = f"{'rank':>4}  {'':7}  {'files':>5}  {'counted by run':>16}  {'in the trace':>16}  coverage"
    lines = [head] if rows else []
    numbers = sorted({row.launch for row in rows})
    for number in numbers:
        own = [row for row in rows if row.launch == number]
        if own[0].by_spans:
            lines.append(
                f"launch {number} left no results.json: what its spans say of rows read and checkpoints "
                "written; headers of data files are not compared"
            )
        elif len(numbers) > 1:
            lines.append(f"launch {number}, from results.json:")
        lines += _format_sums(own)
    wrong = [row for row in rows if row.missed]
    for row in wrong[:50]:
        lines.append(
            f"rank {row.rank}: {printable(row.file)}: {row.direction} {row.counted:,} bytes, "
            f"traced {row.traced:,} ({format_share(row)})"
        )
    if len(wrong) > 50:
        lines.append(f"and {len(wrong) - 50} more files")
    processes = list(processes)
    lines += [f"lost: {process.lost}" for process in processes if process.lost]
    lines += [f"lost: {loss}" for loss in node_losses]
    lines += _format_unchecked(unchecked)
    lines += _format_kernel_count([process.reads for process in processes if process.reads])
    lines += _format_unknown_spans(processes)
    if not any(row.counted or row.traced for row in rows):
        why = "the run counted no bytes"
        if not rows and any(each.direction == "mapped" for each in unchecked):
            why = "no results.json, and the spans name mapped files only"
        lines.append(f"coverage unknown: {why}, so no bytes were compared")
        return "\n".join(lines)
    if wrong:
        verdict = "NOT every byte is in the trace"
    elif unchecked:
        verdict = "every byte that was compared is in the trace"
    else:
        verdict = "every byte is in the trace"
    lines.append(f"coverage {format_total(rows)}: {verdict}")
    return "\n".join(lines)


def _format_kernel_count(reads: list[tuple[int, int]]) -> list[str]:
    """A second count that no program makes, of whatever the calls read from. reads: of each rank."""
    counted, traced = (sum(each) for each in zip(*reads, strict=True)) if reads else (0, 0)
    if not counted:
        return []
    return [
        f"the kernel counted {counted:,} bytes of read calls of {format_number(len(reads), 'rank')} while "
        f"traced, pipes, sockets and /proc among them: {traced:,} ({traced / counted:.1%}) are in the trace"
    ]


def _format_unknown_spans(processes: Iterable[TracedProcess]) -> list[str]:
    """A line where there are spans that no dialect has."""
    counts: dict[tuple[str, str], int] = {}
    for process in processes:
        for named, count in process.unknown.items():
            counts[named] = counts.get(named, 0) + count
    if not counts:
        return []
    most = sorted(counts, key=lambda named: (-counts[named], named))
    names = ", ".join(printable("/".join(named))[:80] for named in most[:5])
    more = f" and {len(most) - 5} more names" if len(most) > 5 else ""
    spans = format_number(sum(counts.values()), "span")
    return [f"nothing is known about the names of {spans}: {names}{more}"]


def _format_unchecked(unchecked: list[UncheckedBytes]) -> list[str]:
    """Mapped files one by one, since they are missing in the trace; of the others, which it has, the sums."""
    lines = []
    mapped: dict[str, int] = {}
    for each in unchecked:
        if each.direction == "mapped":
            mapped[each.file] = mapped.get(each.file, 0) + each.bytes
    if mapped:
        lines.append(
            f"not compared: {sum(mapped.values()):,} bytes from {len(mapped)} mapped "
            f"file{'s' if len(mapped) > 1 else ''}: the kernel reads those by page faults, which are not "
            "calls"
        )
        lines += [f"  {printable(file)}: {amount:,} bytes" for file, amount in list(mapped.items())[:20]]
        lines += [f"  and {len(mapped) - 20} more"] if len(mapped) > 20 else []
    for direction in ("read", "written", "stream"):
        own = [each for each in unchecked if each.direction == direction]
        if not own:
            continue
        if direction == "stream":
            what = "what fprintf and fscanf moved, which DFTracer does not record, of files used by streams"
        else:
            amount = sum(each.bytes for each in own)
            files = "files that the run does not count, which are in the trace"
            what = f"{amount:,} bytes {direction} of {files}"
        names = sorted({_UNFINISHED.sub(r"\1", os.path.basename(each.file)) for each in own})
        shown = ", ".join(printable(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        lines.append(f"not compared: {what}: {shown}")
    return lines


def _format_sums(rows: list[CheckedFile]) -> list[str]:
    """A line per rank and direction, and one for all ranks if there are several."""
    lines = []
    for rank, direction in sorted({(row.rank, row.direction) for row in rows}):
        own = [row for row in rows if (row.rank, row.direction) == (rank, direction)]
        lines.append(_format_line(str(rank), direction, own))
    for direction in ("read", "written"):
        own = [row for row in rows if row.direction == direction]
        if own and len({row.rank for row in rows}) > 1:
            lines.append(_format_line("all", direction, own))
    return lines


def format_total(rows: list[CheckedFile]) -> str:
    counted = sum(row.counted for row in rows)
    return format_share(CheckedFile(0, "", "", counted, counted - sum(row.missed for row in rows)))


def format_share(row: CheckedFile) -> str:
    """Percent, and 100.0% only when it is: 99.96 is no 100.0."""
    if not row.counted and not row.traced:
        return "-"
    shown = f"{row.coverage:.1f}%"
    return shown if shown != "100.0%" or row.counted == row.traced else f"{row.coverage:.6f}%"


def _format_line(rank: str, direction: str, rows: list[CheckedFile]) -> str:
    """A line of the table. rank: its number, or "all"."""
    # spans of rows do not count headers, so bytes that calls read beyond them are not a fault of the trace
    beyond = direction == "read"
    traced = sum(min(row.counted, row.traced) if row.by_spans and beyond else row.traced for row in rows)
    whole = CheckedFile(0, direction, "", sum(row.counted for row in rows), traced)
    counted = f"{len(rows):>5}  {whole.counted:>16,}  {whole.traced:>16,}"
    return f"{rank:>4}  {direction:7}  {counted}  {format_share(whole):>8}"
