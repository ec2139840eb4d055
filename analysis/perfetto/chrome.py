"""The traces of a run -> Chrome's JSON, for tools that know nothing newer. Slow and large; streamed."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from analysis.perfetto.convert import name_trace, new_trace
from analysis.perfetto.tracks import ConversionSummary, name_process_track
from analysis.run_folder import outputs
from analysis.trace.arguments import count_moved_bytes
from analysis.trace.clocks import describe_moves, group_launches, make_clocks, measure_clock_skew
from analysis.trace.columns import COLUMNS, make_event_frame
from analysis.trace.events import TraceReader, assign_ranks, read_heads
from analysis.trace.kineto import find_profiles
from analysis.trace.nodes import find_node_files
from analysis.trace.positions import FilePositions
from analysis.trace.process import TracedProcess
from analysis.trace.strings import StringTable
from common.words import format_number

_TOP = ("rank", "pid", "tid", "cat", "name", "ts", "dur", "args")


def convert_to_json(
    run_dir: str | Path, path: str | Path | None = None, posix: bool = False,
    progress: Callable[[Path, int], None] | None = None,
) -> ConversionSummary:  # fmt: skip
    """Write the JSON trace. posix: I/O calls only. progress: is given a file and its new events."""
    processes = read_heads(run_dir)
    summary = ConversionSummary(Path())
    known = make_clocks(processes)
    summary.clocks = describe_moves(processes, known)
    jobs = group_launches(processes)
    strings, paths, done = StringTable(), {}, []
    name = name_trace(run_dir, posix) + ".json"
    with new_trace(run_dir, path, name, outputs.is_own_json_trace) as (summary.path, raw):
        file = io.BufferedWriter(raw)  # pyright: ignore[reportArgumentType]
        mark = outputs.TRACE_MARK.decode()
        file.write(f'{{"displayTimeUnit":"ms","otherData":{{"mark":"{mark}"}},"traceEvents":['.encode())
        comma = b"\n"
        for pid, process in enumerate([process for job in jobs for process in assign_ranks(job)], 1):
            launch = 1 + next(n for n, job in enumerate(jobs) if process in job) if len(jobs) > 1 else 0
            reader = TraceReader(process.path, strings, paths)
            done.append(reader.process)
            positions = FilePositions()
            for block in reader:
                _, moved = count_moved_bytes(block, strings)
                offsets = positions.find_offsets(block, strings, moved)[block.is_event()]
                table = known[process.path].correct_frame(
                    make_event_frame(block, strings, paths, process.rank, COLUMNS)
                )
                followed = pl.when(pl.lit(pl.Series(offsets)) >= 0).then(pl.lit(pl.Series(offsets)))
                table = table.with_columns(pl.coalesce("offset", followed))
                for event in _make_events(table.iter_rows(named=True), pid, posix):
                    file.write(comma + json.dumps(event, separators=(",", ":")).encode())
                    comma = b",\n"
                    summary.events += 1
                if progress:
                    progress(process.path, len(block))
            for event in _make_metadata(process, reader.process, pid, launch):
                file.write(comma + json.dumps(event, separators=(",", ":")).encode())
                comma = b",\n"
            if reader.process.lost:
                summary.lost.append(reader.process.lost)
        file.write(b"\n]}\n")
        file.flush()
    summary.skew = measure_clock_skew(done)
    if not posix:
        summary.notes += _list_left_out(run_dir)
    return summary


def _list_left_out(run_dir: str | Path) -> list[str]:
    """What only the other format shows."""
    found = [(len(find_profiles(run_dir)), "torch.profiler profile")]
    found += [(len(find_node_files(run_dir)), "node counter file")]
    return [
        f"--format json leaves out {format_number(count, what)}: --format pftrace has them"
        for count, what in found
        if count
    ]


def _make_events(rows: Iterator[dict[str, Any]], pid: int, posix: bool) -> Iterator[dict[str, Any]]:
    """Chrome's events of these rows: slices X, counters C, instants i."""
    for row in rows:
        if posix and row["cat"] not in ("POSIX", "STDIO"):
            continue
        args = {key: value for key, value in row.items() if key not in _TOP and value is not None}
        if row["args"]:
            args.update(_parse_arguments(row["args"]))
        event = {
            "name": row["name"], "cat": row["cat"], "pid": pid, "tid": row["tid"],
            "ts": row["ts"], "args": args,
        }  # fmt: skip
        if row["cat"] == "counter":
            yield {**event, "ph": "C", "args": {row["name"]: row["value"]}}
        elif row["cat"] == "clock":
            yield {**event, "ph": "i", "s": "t"}
        else:
            yield {**event, "ph": "X", "dur": row["dur"]}


def _parse_arguments(text: str) -> dict[str, Any]:
    """Arguments without a column. The scanner does not parse values: one that is not JSON becomes text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"args": text}


def _make_metadata(
    process: TracedProcess, seen: TracedProcess, pid: int, launch: int
) -> Iterator[dict[str, Any]]:
    """Names of the process and its threads, and the place of the process in the list."""
    about = {"ph": "M", "pid": pid}
    yield {**about, "name": "process_name", "args": {"name": name_process_track(process, launch)}}
    yield {**about, "name": "process_sort_index", "args": {"sort_index": pid}}
    for tid, name in seen.threads.items():
        yield {**about, "tid": tid, "name": "thread_name", "args": {"name": name}}
