"""All ranks of a run -> joined tables. One rank at a time is in memory (two, on two threads).

A run that was stopped and went on has several launches: each rank of each launch is read by itself.

`part` is the unit of work: it needs the files of one rank and nothing else, so a Dask cluster can do it.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from analysis.tables.calls import io, told
from analysis.tables.read import read_rank
from analysis.tables.times import times
from analysis.trace.clocks import Clock, clocks, launches
from analysis.trace.events import heads, ranked
from analysis.trace.process import Process
from common.errors import UserError

OF_A_LAUNCH = ("time", "steps", "marks")  # tables whose rows say their launch
Map = Callable[..., Iterable["Part"]]


@dataclass
class Job:
    """The traces of one rank in one launch, and what to do to their times."""

    rank: int
    files: list[Path]
    clock: Clock = Clock()
    launch: int = 1


@dataclass
class Part:
    """All that is kept of one rank in one launch."""

    processes: list[Process]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    events: int = 0
    calls: int = 0


@dataclass
class Joined:
    """The tables of all ranks, one below the other, and the processes that wrote the traces, by launch."""

    launches: list[list[Process]]
    tables: dict[str, pl.DataFrame]
    events: int
    calls: int

    @property
    def processes(self) -> list[Process]:
        return sorted((p for job in self.launches for p in job), key=lambda p: (p.rank, p.path.name))

    def __getitem__(self, name: str) -> pl.DataFrame:
        return self.tables[name]


def jobs(run_dir: str | Path) -> list[Job]:
    found = heads(run_dir)
    known, made = clocks(found), []
    for launch, job in enumerate(launches(found), 1):
        by_rank: dict[int, list[Path]] = {}
        for process in ranked(job):
            by_rank.setdefault(process.rank, []).append(process.path)
        made += [Job(rank, paths, known[paths[0]], launch) for rank, paths in by_rank.items()]
    return made


def part(job: Job) -> Part:
    events = read_rank(job.rank, job.files, job.clock)
    for process in events.processes:
        process.rank = job.rank
    rows = len(events.calls), len(events.spans)
    made = Part(events.processes, paths=events.paths, events=sum(rows), calls=rows[0])
    if made.events:
        made.tables, cuts = times(events)
        calls, spans = events.calls, told(events)
        del events  # most of the memory: the spans are not needed any more
        made.tables |= io(job.rank, calls, spans, cuts)
        made.tables = {name: _plain(table) for name, table in made.tables.items()}
        launch = pl.lit(job.launch, pl.Int32).alias("launch")
        made.tables |= {name: made.tables[name].with_columns(launch) for name in OF_A_LAUNCH}
    return made


def _plain(table: pl.DataFrame) -> pl.DataFrame:
    """Categories as text: they are few rows now, and text travels between machines."""
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String))


def on_threads(function: Callable[[Job], Part], work: list[Job]) -> Iterable[Part]:
    with ThreadPoolExecutor(max_workers=min(len(work), os.cpu_count() or 1)) as pool:
        yield from pool.map(function, work)


def gather(run_dir: str | Path, over: Map = on_threads) -> Joined:
    work = jobs(run_dir)
    parts = list(over(part, work))
    full = [p for p in parts if p.tables]
    if not full:
        raise UserError(f"{run_dir}: the traces hold no events; was the run killed before it flushed any?")
    paths = {given: path for p in parts for given, path in p.paths.items()}
    tables = {name: _join([p.tables[name] for p in full], paths) for name in full[0].tables}
    by_launch: dict[int, list[Process]] = {}
    for job, made in zip(work, parts, strict=True):
        by_launch.setdefault(job.launch, []).extend(made.processes)
    return Joined(list(by_launch.values()), tables, sum(p.events for p in parts), sum(p.calls for p in parts))


def _join(tables: list[pl.DataFrame], paths: dict[str, str]) -> pl.DataFrame:
    table = pl.concat(tables)
    if "file" in table.columns:  # a forked process does not write its parent's hashes again
        table = table.with_columns(pl.col("file").replace(paths))
    if "width_us" in table.columns and len(table):  # the coarsest rank's bins for all
        width = table["width_us"].max()
        coarse = pl.col("bin") * pl.col("width_us") // width
        keys = [c for c in ("rank", "layer", "op") if c in table.columns]
        sums = [c for c in table.columns if c not in (*keys, "bin", "width_us")]
        table = (
            table.with_columns(coarse.alias("bin"), pl.lit(width, pl.Int64).alias("width_us"))
            .group_by(*keys, "width_us", "bin").agg(pl.col(sums).sum()).sort(*keys, "bin")
        )  # fmt: skip
    return table
