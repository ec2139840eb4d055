"""A Perfetto trace of a run that is too large for the Perfetto UI: all ranks in outline, some of it in full.

In outline, of every rank: the phases of the run, a slice for each step with the seconds of its parts as
arguments, and the bandwidth of its file calls. In full: the start-up, the slowest steps, the slowest rank and
an ordinary stretch, each of a few ranks.

In: the traces, read once for the outline, a few of them again for the details. Out: the same kind of file as
`convert` writes, in memory that grows by some tens of kilobytes a rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from analysis.perfetto.tracks import FileTracks, SharedTracks, TrackLabels, write_bandwidth
from analysis.tables.cores import Map
from analysis.tables.read import RankEvents, read_rank
from analysis.tables.times import MEASURES, RankMeasures, measure_rank
from analysis.trace.arguments import READ, WRITE
from analysis.trace.clocks import Clock
from analysis.trace.launches import Launch
from analysis.trace.process import TracedProcess, is_forked
from analysis.trace.scan import EVENT, INT, EventBlock
from analysis.trace.selection import Selection, Window
from analysis.trace.source import EventBlockReader, FileSource, Progress, TraceSource
from analysis.trace.strings import ID, StringTable

MAX_RANKS, MAX_EVENTS = 64, 6_000_000  # that the UI's WebAssembly opens, as measured
EVENT_BYTES = 18  # of a compressed trace: DFTracer's events take 15 to 25
OUTLINE_TID = (1 << 31) - 1  # the thread number of the outline: no kernel gives it out
OUTLINE = "outline"
SLOW_STEPS, ORDINARY_STEPS = 3, 5
DETAIL_RANKS = 4  # that a slow step is shown of: the slowest ones
STARTUP_SECONDS = 10.0  # of a trace without steps


@dataclass
class Detail:
    """A stretch of some ranks that is shown in full, and the words for it."""

    what: str
    ranks: list[int]
    window: Window
    steps: Window | None = None

    def describe(self) -> str:
        """With the command that shows the same of more ranks."""
        shown = ", ".join(map(str, self.ranks))
        where = f"--steps {self.steps[0]}-{self.steps[1]}" if self.steps else ""
        return f"{self.what} of rank {shown}" + (f" (for more ranks: {where} --ranks A-B)" if where else "")


@dataclass
class RankOutline:
    """What is kept of one rank in one launch."""

    job: Launch
    processes: list[TracedProcess]  # as read: with the names of threads, and what could not be read
    phases: pl.DataFrame  # phase, epoch, ts, dur: without overlap
    steps: pl.DataFrame  # those of `measure_rank`
    moved: pl.DataFrame  # ts, dur, kind, size of calls that moved bytes


@dataclass
class Outline:
    """What the first reading leaves: the tracks of each file, and the steps of all ranks."""

    tracks: dict[Path, FileTracks] = field(default_factory=dict)
    steps: list[pl.DataFrame] = field(default_factory=list)  # launch, rank, step, ts, wall_us, own_us
    # launch, rank -> us, of its first event and its last
    bounds: dict[tuple[int, int], Window] = field(default_factory=dict)

    @property
    def begins(self) -> dict[int, int]:
        """Of each rank the first event of its first launch."""
        return {rank: begin for (_, rank), (begin, _) in sorted(self.bounds.items(), reverse=True)}


def is_too_large(processes: Iterable[TracedProcess]) -> bool:
    """By the number of ranks, and by what the files' sizes say about the number of events."""
    processes = list(processes)
    size = sum(
        process.path.stat().st_size * (1 if process.path.suffix == ".gz" else 0.1) for process in processes
    )
    ranks = {process.rank for process in processes if not is_forked(process)}
    return len(ranks) > MAX_RANKS or size / EVENT_BYTES > MAX_EVENTS


def write_overview(
    shared: SharedTracks, source: TraceSource, run_dir: str | Path, jobs: list[Launch],
    labels: dict[Path, TrackLabels], processes: dict[Path, TracedProcess], progress: Progress | None,
    over: Map,
) -> tuple[list[str], dict[Path, int]]:  # fmt: skip
    """Write all packets but the counters of the run. Returns sentences on what is shown, and the processes'
    tracks.

    jobs: in the order in which the source gives its files. labels, processes: by trace file. over: where
    ranks are read, if the source is not a reading that is shared with other analyses.
    """
    outline = Outline()
    measured = (read_outline(job, source) for job in jobs)
    if isinstance(source, FileSource):
        measured = over(read_outline, jobs)
    for rank in measured:
        for process in rank.processes:
            if progress:
                progress(process.path, process.events)
        _write_outline(shared, outline, rank, labels, processes)
    write_bandwidth(shared, 0, shared.total)
    details = choose_details(outline)
    again = FileSource(run_dir)
    for job in jobs:
        first, last = outline.bounds.get((job.launch, job.rank), (0, -1))
        windows = tuple(
            d.window for d in details if job.rank in d.ranks and d.window[0] <= last and d.window[1] >= first
        )
        if not windows:  # of this launch
            continue
        for path in job.files:
            reader = again.open_reader(path, shared.strings, shared.paths)
            _write_details(outline.tracks[path], reader, windows, job.clock)
    ranks = len({job.rank for job in jobs})
    notes = [
        f"an overview: {ranks:,} ranks, together too many events for the Perfetto UI (--whole converts all); "
        "phases and steps of all ranks, and in full:",
        *(f"  {detail.describe()}" for detail in details),
    ]
    return notes, {path: tracks.uuid for path, tracks in outline.tracks.items()}


def read_outline(job: Launch, source: TraceSource | None = None) -> RankOutline:
    events = read_rank(job.rank, job.files, job.clock, source)
    return make_outline(job, events, measure_rank(events))


def make_outline(job: Launch, events: RankEvents, measured: RankMeasures | None) -> RankOutline:
    """What is kept of a rank's events; measured: what `measure_rank` says of them."""
    if measured is None:
        return RankOutline(job, events.processes, pl.DataFrame(), pl.DataFrame(), pl.DataFrame())
    tables, cuts = measured
    phases = pl.DataFrame(
        {"phase": cuts.phase, "epoch": cuts.epoch, "ts": cuts.starts, "dur": cuts.ends - cuts.starts},
        schema_overrides={"epoch": pl.Int64},
    )
    own = (pl.col("wall_us") - pl.col("communication_us")).alias("own_us")
    steps = tables["steps"].with_columns(own, pl.lit(job.launch).alias("launch"))
    op = pl.col("op").cast(pl.String)
    moved = events.calls.filter(op.is_in(["read", "write"]) & (pl.col("size") > 0))
    kind = pl.when(op == "read").then(READ).otherwise(WRITE).alias("kind")
    return RankOutline(job, events.processes, phases, steps, moved.select("ts", "dur", kind, "size"))


def _write_outline(
    shared: SharedTracks, outline: Outline, rank: RankOutline, labels: dict[Path, TrackLabels],
    processes: dict[Path, TracedProcess],
) -> None:  # fmt: skip
    """Write one rank in outline, below the first of its processes, and keep what the details need."""
    job = rank.job
    for path, read in zip(job.files, rank.processes, strict=True):
        known = processes[path]
        known.threads = read.threads | {OUTLINE_TID: OUTLINE}
        known.last = read.last
        no_blocks = _NoBlocks(known, shared.strings, shared.paths)
        outline.tracks[path] = FileTracks(shared, known, no_blocks, Clock(), labels[path])
        if read.lost:
            shared.summary.lost.append(read.lost)
    if not len(rank.phases):
        return
    tracks = outline.tracks[job.files[0]]
    end = (rank.phases["ts"] + rank.phases["dur"]).max()
    outline.bounds[job.launch, job.rank] = int(rank.phases["ts"][0]), int(end)  # type: ignore[arg-type]
    outline.steps.append(rank.steps.select("launch", "rank", "step", "ts", "wall_us", "own_us"))
    ts, dur, kinds, sizes = (rank.moved[name].to_numpy() for name in ("ts", "dur", "kind", "size"))
    for sums in (tracks.bandwidth, shared.total):
        sums.add(ts, dur, kinds, sizes)
    tracks.add_block(make_outline_block(shared.strings, tracks.process.pid, rank.phases, rank.steps))
    write_bandwidth(shared, tracks.uuid, tracks.bandwidth)


def make_outline_block(
    strings: StringTable, pid: int, phases: pl.DataFrame, steps: pl.DataFrame
) -> EventBlock:
    """Phases and steps as if they had been read from a trace: whole numbers as arguments."""
    measures = [name for name in MEASURES if name != "wall_us"]
    keys = {strings.add(name): name for name in ("epoch", *measures, "step")}
    names = {phase: strings.add(phase) for phase in phases["phase"].unique(maintain_order=True)}
    rows = pl.concat(
        [
            phases.select(
                pl.col("phase").replace_strict(names),
                pl.lit(strings.add("phase")).alias("cat"), "ts", "dur", pl.col("epoch").cast(pl.Int64),
            ),
            steps.select(
                pl.lit(ID["step"]).alias("phase"), pl.lit(ID["train"]).alias("cat"), "ts",
                pl.col("wall_us").alias("dur"), pl.col(*measures, "step").cast(pl.Int64),
            ),
        ],
        how="diagonal_relaxed",
    )  # fmt: skip
    # a matrix of rows x keys: what is None in it is not an argument
    arguments = rows.select(*keys.values())
    given = arguments.select(pl.all().is_not_null()).to_numpy()
    values = arguments.fill_null(0).to_numpy()
    count, total = len(rows), int(given.sum())
    return EventBlock(
        np.zeros(1, np.uint8), np.full(count, EVENT, np.uint8), rows["phase"].cast(pl.Int32).to_numpy(),
        rows["cat"].cast(pl.Int32).to_numpy(), np.full(count, pid), np.full(count, OUTLINE_TID),
        rows["ts"].to_numpy(), rows["dur"].to_numpy(), np.concatenate([[0], np.cumsum(given.sum(axis=1))]),
        np.broadcast_to(np.array(list(keys), np.int32), given.shape)[given], np.full(total, INT, np.uint8),
        values[given], np.zeros(total, np.int64), [],
    )  # fmt: skip


def choose_details(outline: Outline) -> list[Detail]:
    """Start-up, the slowest steps, the slowest rank, an ordinary stretch."""
    steps = pl.concat(outline.steps) if outline.steps else pl.DataFrame()
    first = min(outline.begins, default=0)
    if not len(steps):
        begin = outline.begins.get(first, 0)
        return [Detail("the start", [first], (begin, begin + round(STARTUP_SECONDS * 1e6)))]
    steps = steps.filter(pl.col("step").is_not_null())
    of_rank = steps.group_by("rank").agg(pl.col("own_us").sum()).sort("own_us", "rank", descending=True)
    slowest = int(of_rank["rank"][0])
    ends = (pl.col("ts") + pl.col("wall_us")).alias("end")
    by_step = steps.group_by("launch", "step").agg(
        pl.col("ts").min(), ends.max(), pl.col("wall_us").max(),
        pl.col("rank").sort_by("own_us", "rank", descending=True).head(DETAIL_RANKS).alias("ranks"),
    ).sort("launch", "step")  # fmt: skip
    begun = by_step.row(0, named=True)
    details = [
        Detail(
            "start-up and first step", sorted({first, slowest}), (min(outline.begins.values()), begun["end"])
        )
    ]
    for row in by_step.slice(1).top_k(SLOW_STEPS, by="wall_us").sort("ts").iter_rows(named=True):
        what = f"step {row['step']}, one of the slowest ({row['wall_us'] / 1e3:,.1f} ms),"
        window, number = (row["ts"], row["end"]), (row["step"], row["step"])
        details.append(Detail(what, sorted(row["ranks"]), window, number))
    middle = max(0, len(by_step) // 2 - ORDINARY_STEPS // 2)
    part = by_step.slice(middle, ORDINARY_STEPS)
    low, high = int(part["step"][0]), int(part["step"][-1])
    window = int(part["ts"][0]), int(part["end"][-1])
    what = f"an ordinary stretch, steps {low} to {high},"
    details.append(Detail(what, [first], window, (low, high)))
    if slowest != first:
        details.append(Detail(f"the same, of the slowest rank: steps {low} to {high}", [slowest], window))
    return details


def _write_details(
    tracks: FileTracks, reader: EventBlockReader, windows: tuple[Window, ...], clock: Clock
) -> None:
    """Write what went on in these stretches, on the tracks of the rank that are there already."""
    tracks.reader, tracks.clock = reader, clock
    tracks.selection = Selection(windows=windows)
    for block in reader:
        tracks.add_block(block)


@dataclass
class _NoBlocks:
    """Stands for the reader of a file of which only the outline is written."""

    process: TracedProcess
    strings: StringTable
    paths: dict[int, int]

    def __iter__(self) -> Iterator[EventBlock]:
        return iter(())
