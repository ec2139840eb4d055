"""Is every byte in the trace? What the run says it moved, against the POSIX calls that the trace saw.

The run's word is results.json: bytes_read and bytes_written, by rank and file. The trace's word is what the
read and write calls returned, by the same rank (its forked workers included) and file.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.columns import resolve
from analysis.derive import READ, WRITE, moved
from analysis.errors import AnalysisError
from analysis.events import Process, Reader, files, launches, ranked
from analysis.strings import ID, Strings

DIRECTIONS = {"bytes_read": READ, "bytes_written": WRITE}
Moved = dict[tuple[int, str], int]  # (READ | WRITE, file) -> bytes


@dataclass(frozen=True)
class Row:
    rank: int
    direction: str  # "read", "written"
    file: str
    said: int
    traced: int

    @property
    def coverage(self) -> float:
        return 100.0 * self.traced / self.said if self.said else 100.0


def check(run_dir: str | Path) -> tuple[list[Row], list[Process]]:
    """One row per rank, direction and file that the run names; the processes say what was lost."""
    path = Path(run_dir) / "results.json"
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise AnalysisError(f"{path}: cannot read it ({error.strerror}); did the run end?") from error
    except ValueError as error:
        raise AnalysisError(f"{path}: not JSON ({error}); was the run killed while writing it?") from error
    traced, processes = by_rank(run_dir)
    rows = []
    for key, direction in DIRECTIONS.items():
        for rank, said in sorted(results.get(key, {}).items(), key=lambda item: int(item[0])):
            seen = traced.get(int(rank), {})
            rows += [
                Row(int(rank), key.removeprefix("bytes_"), file, int(said[file]), _of(seen, direction, file))
                for file in sorted(said)
            ]
    if not rows:
        raise AnalysisError(f"{path}: has no bytes_read and no bytes_written to compare with the trace")
    return rows, processes


def by_rank(run_dir: str | Path) -> tuple[dict[int, Moved], list[Process]]:
    """Bytes of every file by rank, as the trace of the run's last job has them."""
    strings, paths = Strings(), {}
    sums: dict[Path, dict[tuple[int, int], int]] = {}
    processes = []
    for path in files(run_dir):
        reader = Reader(path, strings, paths)
        processes.append(reader.process)
        mine = sums[path] = {}
        for block in reader:
            calls, amounts = moved(block, strings)
            owner = np.repeat(np.arange(len(block)), np.diff(block.arg_begin))
            where = np.flatnonzero((block.arg_key == ID["fhash"]) & (calls[owner] > 0))
            key = (block.arg_val[where] << 2) | calls[owner[where]]
            unique, group = np.unique(key, return_inverse=True)
            for number, total in zip(
                unique.tolist(), _sums(group, amounts[owner[where]], len(unique)), strict=True
            ):
                mine[number >> 2, number & 3] = mine.get((number >> 2, number & 3), 0) + total
    found: dict[int, Moved] = {}
    ranked(processes)
    latest = launches(processes)[-1] if processes else []  # results.json speaks of the job that ended
    for process in ranked(latest):
        seen = found.setdefault(process.rank, {})
        for (hashed, direction), total in sums[process.path].items():
            file = strings.text(int(resolve(np.array([hashed]), paths, strings)[0]))
            seen[direction, file] = seen.get((direction, file), 0) + total
    return found, processes


def _sums(group: np.ndarray, amounts: np.ndarray, size: int) -> list[int]:
    total = np.zeros(size, np.int64)
    np.add.at(total, group, amounts)
    return total.tolist()


def _of(seen: Moved, direction: int, file: str) -> int:
    """A file may have been opened through a link or by a path with dots in it."""
    names = {file, os.path.normpath(file), os.path.realpath(file)}
    return sum(seen.get((direction, name), 0) for name in names)


def text(rows: list[Row], processes: Iterable[Process]) -> str:
    """A line per rank and direction, then every file that is not covered to the byte."""
    lines = [f"{'rank':>4}  {'':7}  {'files':>5}  {'the run says':>16}  {'the trace says':>16}  coverage"]
    for rank, direction in sorted({(row.rank, row.direction) for row in rows}):
        mine = [row for row in rows if (row.rank, row.direction) == (rank, direction)]
        lines.append(_line(str(rank), direction, mine))
    for direction in ("read", "written"):
        mine = [row for row in rows if row.direction == direction]
        if mine and len({row.rank for row in rows}) > 1:
            lines.append(_line("all", direction, mine))
    wrong = [row for row in rows if row.said != row.traced]
    for row in wrong[:50]:
        lines.append(
            f"rank {row.rank}: {row.file}: {row.direction} {row.said:,} bytes, "
            f"traced {row.traced:,} ({share(row)})"
        )
    if len(wrong) > 50:
        lines.append(f"and {len(wrong) - 50} more files")
    lines += [f"lost: {process.lost}" for process in processes if process.lost]
    lines.append(
        f"coverage {total(rows)}: "
        + ("every byte is in the trace" if not wrong else "NOT every byte is in the trace")
    )
    return "\n".join(lines)


def total(rows: list[Row]) -> str:
    said = sum(row.said for row in rows)
    return share(Row(0, "", "", said, said - sum(abs(row.said - row.traced) for row in rows)))


def share(row: Row) -> str:
    """Percent, and 100.0% only when it is: 99.96 is no 100.0."""
    shown = f"{row.coverage:.1f}%"
    return shown if shown != "100.0%" or row.said == row.traced else f"{row.coverage:.6f}%"


def _line(rank: str, direction: str, rows: list[Row]) -> str:
    whole = Row(0, direction, "", sum(row.said for row in rows), sum(row.traced for row in rows))
    return (
        f"{rank:>4}  {direction:7}  {len(rows):>5}  {whole.said:>16,}  {whole.traced:>16,}  {share(whole):>8}"
    )
