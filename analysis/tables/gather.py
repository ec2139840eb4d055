"""All ranks of a run -> joined tables. As many ranks are in memory as are read at one time.

`read_rank_tables` is the unit of work: it needs only the files of one rank, so another process, or a Dask
cluster, can run it.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import polars as pl

from analysis.tables.calls import fold_program_files, make_io_tables, select_declared_io
from analysis.tables.cores import Map, map_on_threads
from analysis.tables.kernel_counters import measure_device
from analysis.tables.part import cut_events
from analysis.tables.read import RankEvents, read_rank
from analysis.tables.times import RankMeasures, measure_rank
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.process import TracedProcess
from analysis.trace.selection import WHOLE, Selection
from analysis.trace.source import FileSource, TraceSource
from common.errors import UserError

PACKED_TABLES, PACKED_BYTES = 64, 1 << 20  # that wait uncompressed
OF_A_LAUNCH = ("time", "steps", "collectives", "marks")  # tables whose rows hold their launch
More = Callable[[Launch, RankEvents], dict[str, pl.DataFrame]]  # further tables of one rank in one launch


@dataclass
class RankTables:
    """All that is kept of one rank in one launch."""

    processes: list[TracedProcess]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    events: int = 0
    calls: int = 0


@dataclass
class JoinedTables:
    """The tables of all ranks, one below the other, and the processes that wrote the traces, by launch."""

    launches: list[list[TracedProcess]]
    tables: dict[str, pl.DataFrame]
    events: int
    calls: int
    has_start: bool = True  # not of a part of the run, whose first step is any step

    @property
    def processes(self) -> list[TracedProcess]:
        return sorted((p for job in self.launches for p in job), key=lambda p: (p.rank, p.path.name))

    def __getitem__(self, name: str) -> pl.DataFrame:
        return self.tables[name]


def list_losses(processes: Iterable[TracedProcess]) -> list[str]:
    """What the traces of one launch lack, a sentence each."""
    known = list(processes)
    missing = describe_missing_ranks(known, "the run")
    return shorten_losses([process.lost for process in known if process.lost]) + [missing] * bool(missing)


def shorten_losses(losses: list[str], most: int = 8) -> list[str]:
    """The first ones, and how many more there are."""
    more = len(losses) - most
    return losses[:most] + ([f"{more} more traces are incomplete"] if more > 0 else [])


def describe_missing_ranks(processes: Iterable[TracedProcess], name: str) -> str:
    """Which ranks of a launch, called `name`, have no trace; empty where all have, or it is unknown."""
    known = list(processes)
    world, there = max((p.world_size for p in known), default=-1), {p.rank for p in known}
    lacking = list(islice((rank for rank in range(world) if rank not in there), 11))
    if not lacking:
        return ""
    names = ", ".join(map(str, lacking[:10])) + ("..." if len(lacking) > 10 else "")
    return f"{name} had {world} ranks; there is no trace of rank {names}"


def read_rank_tables(job: Launch, more: More | None = None, details: bool = False) -> RankTables:
    events = read_rank(job.rank, job.files, job.clock, details=details)
    if not job.part.is_whole:
        events = cut_events(events, job.part)
    return make_rank_tables(job, events, more)


def make_rank_tables(
    job: Launch, events: RankEvents, more: More | None = None, measured: RankMeasures | None = None
) -> RankTables:
    """The tables of one rank in one launch. `events` may be freed on the way: they are most of the memory.

    measured: what `measure_rank` says of them, if it was called before.
    """
    for process in events.processes:
        process.rank = job.rank
    rows = len(events.calls), len(events.spans)
    made = RankTables(events.processes, paths=events.paths, events=sum(rows), calls=rows[0])
    measured = measured or measure_rank(events)
    if measured:
        made.tables, cuts = measured
        made.tables["device"] = measure_device(events, cuts)
        further = more(job, events) if more else {}
        calls, spans = events.calls, select_declared_io(events)
        del events  # most of the memory: the spans are not needed any more
        made.tables |= make_io_tables(job.rank, calls, spans, cuts)
        made.tables = {name: _cast_categories(table) for name, table in made.tables.items()}
        made.tables |= fold_program_files(made.tables["ops"], made.tables["extents"])
        launch = pl.lit(job.launch, pl.Int32).alias("launch")
        made.tables |= {name: made.tables[name].with_columns(launch) for name in OF_A_LAUNCH} | further
    return made


def _cast_categories(table: pl.DataFrame) -> pl.DataFrame:
    """Categories as text: they are few rows now, and text travels between machines."""
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String))


def read_shared(source: TraceSource, work: list[Launch], more: More | None = None) -> Iterator[RankTables]:
    """One rank after the other is read; while the next one is, the tables of the last one are made."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        made: Future[RankTables] | None = None
        for job in work:
            events = read_rank(job.rank, job.files, job.clock, source)
            if made:
                yield made.result()  # no more than two ranks are in memory
            made = pool.submit(make_rank_tables, job, events, more)
            del events
        if made:
            yield made.result()


def gather_tables(
    run_dir: str | Path,
    over: Map = map_on_threads,
    source: TraceSource | None = None,
    more: More | None = None,
    details: bool = False,
    selection: Selection = WHOLE,
) -> JoinedTables:
    """over: where ranks are read. source: if it is a reading that is shared with other analyses, they are
    read there.

    more: makes further tables of each rank; a function of a module, which Dask can send. details: it gets
    calls with the columns DETAILS; not of a shared reading. selection: not of a shared reading, either.
    """
    source = source or FileSource(run_dir)
    work = plan_launches(source, selection)
    if isinstance(source, FileSource):
        parts = over(partial(read_rank_tables, more=more, details=details), work)
    else:
        parts = read_shared(source, work, more)
    tables: dict[str, _Packer] = {}
    programs: set[tuple[str, str]] = set()  # category and file: the same ones on each rank
    paths: dict[str, str] = {}
    by_launch: dict[int, list[TracedProcess]] = {}
    events = calls = 0
    for job, made in zip(work, parts, strict=True):
        by_launch.setdefault(job.launch, []).extend(made.processes)
        events, calls = events + made.events, calls + made.calls
        paths.update(made.paths)
        if made.tables:
            programs.update(made.tables.pop("programs").iter_rows())
        for name, table in made.tables.items():
            tables.setdefault(name, _Packer()).add(table)
    if not tables and not selection.is_whole:
        raise UserError(
            f"{selection.describe()}: nothing is in this part of the run; `report` lists the steps"
        )
    if not tables:
        raise UserError(f"{run_dir}: the traces hold no events; was the run killed before it flushed any?")
    joined = {name: _adapt_table(tables.pop(name).join(), paths) for name in list(tables)}
    launches, has_start = list(by_launch.values()), not selection.has_times
    names = {"cat": pl.String, "file": pl.String}
    joined["programs"] = pl.DataFrame(sorted(programs), names, orient="row")
    return JoinedTables(launches, joined, events, calls, has_start)


class _Packer:
    """The tables of one kind of all ranks, compressed as long as other ranks are read: a tenth of the memory.

    Many at a time, because each time costs a millisecond, however small the tables are.
    """

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._open: list[pl.DataFrame] = []
        self._open_bytes = 0

    def add(self, table: pl.DataFrame) -> None:
        self._open.append(table)
        self._open_bytes += table.estimated_size()
        if len(self._open) == PACKED_TABLES or self._open_bytes > PACKED_BYTES:
            packed = io.BytesIO()
            pl.concat(self._open).write_ipc(packed, compression="zstd")
            self._packed.append(packed.getvalue())
            self._open, self._open_bytes = [], 0

    def join(self) -> pl.DataFrame:
        """All of them, in the order in which they were added. Nothing is left here."""
        tables = [*(pl.read_ipc(io.BytesIO(each)) for each in self._packed), *self._open]
        self._packed, self._open = [], []
        return pl.concat(tables, rechunk=True)


def _adapt_table(table: pl.DataFrame, paths: dict[str, str]) -> pl.DataFrame:
    """A joined table with the names of all files. Timelines of different widths become bins of the widest.

    paths: file hash -> path, for rows whose rank did not have the path.
    """
    if "file" in table.columns:  # a forked process does not write its parent's hashes again
        table = table.with_columns(pl.col("file").replace(paths))
    if "width_us" in table.columns and len(table):  # the coarsest rank's bins for all
        width = table["width_us"].max()
        coarse = pl.col("bin") * pl.col("width_us") // width
        keys = [c for c in ("rank", "layer", "op") if c in table.columns]
        sums = [c for c in table.columns if c not in (*keys, "bin", "width_us")]
        table = (
            table.with_columns(coarse.alias("bin"), pl.lit(width, pl.Int64).alias("width_us"))
            .group_by(*keys, "width_us", "bin", maintain_order=True).agg(pl.col(sums).sum())
            .sort(*keys, "bin")
        )  # fmt: skip
    return table
