"""All ranks of a run -> joined tables. One rank at a time is in memory (two, on two threads).

`part` is the unit of work: it needs the files of one rank and nothing else, so a Dask cluster can do it.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from analysis.errors import AnalysisError
from analysis.events import Process, files, offsets
from analysis.tables.calls import io, told
from analysis.tables.read import head, read_rank
from analysis.tables.times import times

Map = Callable[..., Iterable["Part"]]


@dataclass
class Job:
    """The traces of one rank and what to add to their times."""

    rank: int
    files: list[Path]
    shift: int = 0


@dataclass
class Part:
    """All that is kept of one rank."""

    processes: list[Process]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    events: int = 0
    calls: int = 0


@dataclass
class Joined:
    """The tables of all ranks, one below the other, and the processes that wrote the traces."""

    processes: list[Process]
    tables: dict[str, pl.DataFrame]
    events: int
    calls: int

    def __getitem__(self, name: str) -> pl.DataFrame:
        return self.tables[name]


def jobs(run_dir: str | Path) -> list[Job]:
    found = [head(path) for path in files(run_dir)]
    shifts = offsets(found)
    by_rank: dict[int, list[Process]] = {}
    named = max((p.rank for p in found), default=-1)
    for process in sorted(found, key=lambda p: (p.rank < 0, p.rank, p.path.name)):
        if process.rank < 0:  # not traced by us: each process is a rank of its own
            named += 1
            process.rank = named
        by_rank.setdefault(process.rank, []).append(process)
    return [
        Job(rank, [p.path for p in group], shifts[group[0].path]) for rank, group in sorted(by_rank.items())
    ]


def part(job: Job) -> Part:
    events = read_rank(job.rank, job.files, job.shift)
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
    return made


def _plain(table: pl.DataFrame) -> pl.DataFrame:
    """Categories as text: they are few rows now, and text travels between machines."""
    return table.with_columns(pl.col(pl.Categorical).cast(pl.String))


def on_threads(function: Callable[[Job], Part], work: list[Job]) -> Iterable[Part]:
    with ThreadPoolExecutor(max_workers=min(len(work), os.cpu_count() or 1)) as pool:
        yield from pool.map(function, work)


def gather(run_dir: str | Path, over: Map = on_threads) -> Joined:
    parts = list(over(part, jobs(run_dir)))
    full = [p for p in parts if p.tables]
    if not full:
        raise AnalysisError(
            f"{run_dir}: the traces hold no events; was the run killed before it flushed any?"
        )
    paths = {given: path for p in parts for given, path in p.paths.items()}
    tables = {name: _join([p.tables[name] for p in full], paths) for name in full[0].tables}
    return Joined(
        sorted((process for p in parts for process in p.processes), key=lambda p: (p.rank, p.path.name)),
        tables,
        sum(p.events for p in parts),
        sum(p.calls for p in parts),
    )


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
