"""The traces of a run -> one native Perfetto trace: processes by rank, nested slices, counters, flows.

Streamed block by block, in constant memory; written under a temporary name and renamed when whole.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from analysis import settings, wire
from analysis.clocks import clocks, launches, moves, skew
from analysis.derive import Bandwidth
from analysis.events import Reader, heads, ranked
from analysis.tracks import (
    About,
    FileTracks,
    Output,
    Shared,
    Summary,
    process_name,
    write_bandwidth,
    write_counter,
)
from common.errors import UserError

EARLIER_US = 60_000_000  # what ended later than the file's first records may have begun before them
_NO_COUNTERS = ("step", "epoch", "time", "split", "samples")
# a track for each of their other numbers would bury the rest
_OF_EVALUATIONS = ("auroc", "log_loss", "Recall@10", "NDCG@10")


def convert(
    run_dir: str | Path, path: str | Path | None = None, posix: bool = False,
    progress: Callable[[Path, int], None] | None = None,
) -> Summary:  # fmt: skip
    """Write the Perfetto trace. posix: I/O calls only. progress: is given a file and its new events."""
    processes = heads(run_dir)
    path = Path(path) if path else beside(run_dir) / (trace_name(run_dir, posix) + ".pftrace")
    summary = Summary(path)
    known, jobs = clocks(processes), launches(processes)
    summary.clocks = moves(processes, known)
    begin = min((known[p.path].time(p.first) for p in processes if p.first), default=0)
    begin = max(0, begin - EARLIER_US)
    with published(path) as file:
        shared = Shared(Output(file), summary, posix, begin, Bandwidth(begin))
        done = []
        shown = [
            (process, process_name(process, number if len(jobs) > 1 else 0))
            for number, job in enumerate(jobs, 1)
            for process in ranked(job)
        ]
        abouts = [
            About(shared.unique(process.pid), name, order) for order, (process, name) in enumerate(shown)
        ]
        for about in abouts:
            shared.out.write(wire.early_process(about.pid, about.name))
        for (process, _), about in zip(shown, abouts, strict=True):
            reader = Reader(process.path, shared.strings, shared.paths)
            tracks = FileTracks(shared, process, reader, known[process.path], about)
            for block in reader:
                tracks.add(block)
                if progress:
                    progress(process.path, len(block))
            tracks.finish()
            done.append(reader.process)
        write_bandwidth(shared, 0, shared.total)
        if not posix:
            _metrics(shared, Path(run_dir) / "metrics.jsonl")
        shared.out.flush()
    summary.skew = skew(done)
    if not summary.events:
        path.unlink()
        raise UserError(f"{run_dir}: the traces hold no events" + (" of POSIX calls" if posix else ""))
    return summary


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            file = temporary.open("wb")
        except OSError as error:
            raise UserError(
                f"{path}: cannot write there ({error.strerror}); choose another place with -o"
            ) from error
        with file:
            yield file
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what was wrong before is what counts
            temporary.unlink()


def beside(run_dir: str | Path) -> Path:
    """Where its files go: the run's folder, or the one that a single trace is in."""
    return Path(run_dir) if Path(run_dir).is_dir() else Path(run_dir).parent


def trace_name(run_dir: str | Path, posix: bool) -> str:
    """What the training was, as a file name; the folder's name where there is no config.json."""
    run = Path(run_dir)
    suffix = "-posix" if posix else ""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    name = settings.file_name(config) if isinstance(config, dict) else ""
    folder = run.resolve().name if run.is_dir() else run.name.split(".")[0]
    return (name or folder or "trace") + suffix


def _metrics(shared: Shared, path: Path) -> None:
    """What metrics.jsonl has and the traces' own counters do not."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows(path):
        prefix = f"{row['split']} " if "split" in row else ""
        for key, value in row.items():
            if "split" in row and key not in _OF_EVALUATIONS:
                continue
            if key not in _NO_COUNTERS and isinstance(value, int | float) and key not in shared.counted:
                series.setdefault(prefix + key, []).append((row["time"], float(value)))
    for name, points in series.items():
        uuid = shared.new_uuid()
        shared.out.write(wire.counter_track(uuid, 0, name, ""))
        times, values = np.array(sorted(points)).T
        write_counter(shared, uuid, (times * 1e6).astype(np.int64), values)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that have a time; a killed run may have half a line at its end."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("time"), int | float):
                yield row
