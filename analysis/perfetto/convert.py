"""The traces of a run -> one native Perfetto trace: processes by rank, nested slices, counters, flows.

Streamed block by block, in constant memory; written under a temporary name and renamed when whole.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from analysis.perfetto import overview, proto
from analysis.perfetto.bandwidth import BandwidthCounter
from analysis.perfetto.links import number_run
from analysis.perfetto.nodes import write_nodes
from analysis.perfetto.profiles import Place, write_profiles
from analysis.perfetto.tracks import (
    ConversionSummary,
    FileTracks,
    SharedTracks,
    TraceOutput,
    TrackLabels,
    name_process_track,
    write_bandwidth,
    write_counter,
)
from analysis.run_folder import outputs, records, run_settings
from analysis.tables.cores import Map, map_on_threads
from analysis.trace.clocks import Clock, describe_moves, group_launches, make_clocks, measure_clock_skew
from analysis.trace.events import assign_ranks
from analysis.trace.kineto import read_profile
from analysis.trace.launches import plan_launches
from analysis.trace.nodes import find_node_files
from analysis.trace.process import TracedProcess, is_forked
from analysis.trace.selection import WHOLE, Selection, find_windows
from analysis.trace.source import FileSource, Progress, TraceSource
from common.errors import UserError, os_errors_as_user_errors, printable

LONGEST_NAME = 200  # bytes of a file's name, its ending not counted
EARLIER_US = 60_000_000  # what ended later than the file's first records may have begun before them
EVERYTHING, POSIX_ONLY = 1, 2  # the second half of a trace's number, after the run's
_NO_COUNTERS = ("step", "epoch", "time", "split", "samples")
# a track for each of their other numbers would bury the rest
_OF_EVALUATIONS = ("auroc", "log_loss", "Recall@10", "NDCG@10")


def convert_to_pftrace(
    run_dir: str | Path, path: str | Path | None = None, posix: bool = False,
    progress: Progress | None = None, source: TraceSource | None = None, selection: Selection = WHOLE,
    whole: bool = False, kineto: Sequence[Path] = (), node_counters: Sequence[Path] = (),
    over: Map = map_on_threads,
) -> ConversionSummary:  # fmt: skip
    """Write the Perfetto trace. posix: I/O calls only. progress: is given a file and its new events.

    selection: the part of the run that is shown; only without a source that several analyses share. whole:
    all of it, though the Perfetto UI cannot open so much; else a large run becomes an overview. kineto:
    profiles of torch.profiler to be shown with the run's own. node_counters: the same of folders that
    dftracer_service has written. over: where ranks are read, for an overview.
    """
    given = [read_profile(path) for path in kineto]
    nodes = find_node_files(run_dir, node_counters)
    source = source or FileSource(run_dir)
    processes = source.read_heads()
    summary = ConversionSummary(Path())
    known, jobs = make_clocks(processes), group_launches(processes)
    every_rank = {process.rank for process in processes}
    summary.clocks = describe_moves(processes, known)
    begin = min((known[p.path].correct_time(p.first) for p in processes if p.first), default=0)
    if not selection.is_whole:
        ranked = [process for job in jobs for process in assign_ranks(job)]
        kept = selection.choose_processes(ranked)
        jobs = group_launches(kept)
        selection = replace(selection, windows=find_windows(selection, jobs, known, begin))
    begin = max(0, begin - EARLIER_US)
    name = name_trace(run_dir, posix) + selection.name_part() + ".pftrace"
    with new_trace(run_dir, path, name, outputs.is_own_trace) as (summary.path, file):
        file.write(outputs.mark_packet())
        file.write(proto.encode_trace_uuid(number_run(processes), POSIX_ONLY if posix else EVERYTHING))
        bandwidth = BandwidthCounter(begin)
        shared = SharedTracks(TraceOutput(file), summary, posix, begin, bandwidth, selection)
        shown = [
            (process, name_process_track(process, number if len(jobs) > 1 else 0))
            for number, job in enumerate(jobs, 1)
            for process in assign_ranks(job)
        ]
        outlined = selection.is_whole and not whole and overview.is_too_large(p for p, _ in shown)
        track_labels = _label_processes(shared, jobs, shown, outlined)
        if outlined:
            labels = {process.path: about for (process, _), about in zip(shown, track_labels, strict=True)}
            heads = {process.path: process for process, _ in shown}
            jobs_of_ranks = plan_launches(source)
            summary.notes, tracks = overview.write_overview(
                shared, source, run_dir, jobs_of_ranks, labels, heads, progress, over
            )
            done = [process for process, _ in shown]
        else:
            done, tracks = _write_whole(shared, source, shown, track_labels, known, progress)
        if not posix:
            places = [
                Place(process, known[process.path], tracks[process.path], about.pid)
                for process, about in zip(done, track_labels, strict=True)
            ]
            summary.notes += write_profiles(shared, run_dir, given, places, every_rank)
            end = 0 if outlined else max(known[process.path].correct_time(process.last) for process in done)
            summary.notes += write_nodes(shared, nodes, [process for process, _ in shown], known, end)
            _write_metrics(shared, Path(run_dir) / "metrics.jsonl")
        shared.out.flush()
        if not summary.events:
            raise _explain_no_events(run_dir, posix, selection)
    summary.skew = measure_clock_skew(done)
    return summary


def _label_processes(
    shared: SharedTracks, jobs: list[list[TracedProcess]], shown: list[tuple[TracedProcess, str]],
    outlined: bool,
) -> list[TrackLabels]:  # fmt: skip
    """The labels of each process' tracks. Their names are written first, so that they come in this order."""
    # One rank of a launch shows the counters of the run (loss, samples per second): they are the same on all.
    # An overview has them from metrics.jsonl.
    with_run_counters = set()
    if not outlined:
        with_run_counters = {min(job, key=lambda p: (is_forked(p), p.rank)).path for job in jobs}
    track_labels = [
        TrackLabels(shared.reserve_number(process.pid), name, order, process.path in with_run_counters)
        for order, (process, name) in enumerate(shown)
    ]
    for about in track_labels:
        shared.out.write(proto.describe_process_early(about.pid, about.name))
    return track_labels


def _explain_no_events(run_dir: str | Path, posix: bool, selection: Selection) -> UserError:
    if not selection.is_whole:
        return UserError(f"{selection.describe()}: nothing is in this part of the run")
    which = " of POSIX calls" if posix else ""
    return UserError(f"{printable(run_dir)}: the traces hold no events{which}")


def _write_whole(
    shared: SharedTracks, source: TraceSource, shown: list[tuple[TracedProcess, str]],
    track_labels: list[TrackLabels], clocks: Mapping[Path, Clock], progress: Progress | None,
) -> tuple[list[TracedProcess], dict[Path, int]]:  # fmt: skip
    """All events of these processes (and the names of their tracks). Returns the processes as read, and the
    number of each one's track.
    """
    done, written = [], {}
    for (process, _), about in zip(shown, track_labels, strict=True):
        reader = source.open_reader(process.path, shared.strings, shared.paths)
        shared.use_tables(reader.strings, reader.paths)
        tracks = FileTracks(shared, process, reader, clocks[process.path], about)
        for block in reader:
            tracks.add_block(block)
            if progress:
                progress(process.path, len(block))
        tracks.finish_file()
        reader.process.rank = process.rank
        done.append(reader.process)
        written[process.path] = tracks.uuid
    write_bandwidth(shared, 0, shared.total)
    return done, written


@contextmanager
def new_trace(
    run_dir: str | Path, path: str | Path | None, name: str, is_own: outputs.IsOwn
) -> Iterator[tuple[Path, BinaryIO]]:
    """A file that appears under its name only when it is whole: `path`, else `name` in the run's folder."""
    if path is not None:
        with outputs.named_file(Path(path), is_own) as partial, _open_partial(partial, Path(path)) as file:
            yield Path(path), file
        return
    folder = outputs.find_output_folder(run_dir)
    outputs.check_folder(folder, {name: is_own}, "name another file with -o")
    with (
        outputs.results_in(folder) as results,
        _open_partial(results.file(name, is_own), folder / name) as file,
    ):
        yield folder / name, file


@contextmanager
def _open_partial(partial: Path, path: Path) -> Iterator[BinaryIO]:
    """Errors name this file only if they are its own: traces are read in the meantime."""
    with os_errors_as_user_errors(path):
        file = _Named(partial, path)
    try:
        yield file  # pyright: ignore[reportReturnType]
    finally:
        with os_errors_as_user_errors(path):
            file.close()


class _Named(io.FileIO):
    """A file whose errors carry the name that it will have."""

    def __init__(self, partial: Path, path: Path) -> None:
        super().__init__(partial, "w")
        self._path = path

    def write(self, data: Any, /) -> int:
        view: Any = memoryview(data).cast("B")
        whole = len(view)
        with os_errors_as_user_errors(self._path):
            while view:
                view = view[super().write(view) :]
        return whole


def name_trace(run_dir: str | Path, posix: bool) -> str:
    """What the training was, as a file name; the folder's name where there is no config.json."""
    run = Path(run_dir)
    suffix = "-posix" if posix else ""
    name = run_settings.trace_file_name(records.read_config(run / "config.json", []))
    folder = run.resolve().name if run.is_dir() else run.name.split(".")[0]
    name = name or folder or "trace"
    while len(os.fsencode(name)) > LONGEST_NAME:
        name = name[:-1]
    return name + suffix


def _write_metrics(shared: SharedTracks, path: Path) -> None:
    """What metrics.jsonl has and the traces' own counters do not."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in records.read_metrics_lines(path, []):
        if "time" not in row:
            continue
        prefix = f"{row['split']} " if "split" in row else ""
        for key, value in row.items():
            if "split" in row and key not in _OF_EVALUATIONS:
                continue
            if key not in _NO_COUNTERS and isinstance(value, int | float) and key not in shared.counted:
                series.setdefault(prefix + key, []).append((row["time"], float(value)))
    for name, points in series.items():
        uuid = shared.describe_run_counter(name)
        times, values = np.array(sorted(points)).T
        ts = (times * 1e6).astype(np.int64)
        inside = shared.selection.is_inside(ts, np.zeros_like(ts))
        write_counter(shared, uuid, ts[inside], values[inside])
