"""All analyses at the end of a job, from one reading of the traces.

Both Perfetto traces, the check of bytes, and the report. One that fails does not keep the others from their
results. A small run is read block by block in this process, for all analyses at the same time. A large one,
of which the Perfetto traces are overviews, is read rank by rank, on all cores or on a cluster.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from analysis.perfetto import convert, overview
from analysis.report import report
from analysis.report.run import choose_measures
from analysis.tables import check
from analysis.tables.cores import Map, map_on_threads
from analysis.tables.gather import More, RankTables, make_rank_tables
from analysis.tables.read import read_rank
from analysis.tables.times import measure_rank
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.source import FileSource, Progress, SharedReading, Sharer, Sharing, TraceSource


@dataclass(frozen=True)
class Analysis:
    """One of the commands that `finish` runs."""

    command: str  # what does the same alone
    run: Callable[[str, TraceSource, Map], Any]
    of_rank: Callable[["RankReading"], Any]  # what it takes of a rank that was read elsewhere


ANALYSES = (
    Analysis(
        "perfetto",
        lambda run_dir, source, over: convert.convert_to_pftrace(run_dir, source=source, over=over),
        lambda rank: rank.outline,
    ),
    Analysis(
        "perfetto --posix",
        lambda run_dir, source, over: convert.convert_to_pftrace(
            run_dir, posix=True, source=source, over=over
        ),
        lambda rank: rank.outline,
    ),
    Analysis("check", check.check_run, lambda rank: rank.sums),
    Analysis(
        "report",
        lambda run_dir, source, over: report.write_report(run_dir, source=source, over=over),
        lambda rank: rank.tables,
    ),
)


@dataclass
class AnalysisOutcome:
    """What one analysis gave, or why it gave nothing."""

    command: str
    result: Any = None
    error: BaseException | None = None


def run_analyses(
    run_dir: str, progress: Progress | None = None, over: Map = map_on_threads
) -> list[AnalysisOutcome]:
    """over: where the ranks of a large run are read."""
    reading = SharedReading(run_dir)
    if overview.is_too_large(reading.order):
        reading.close()
        return _analyse_by_rank(run_dir, FileSource(run_dir, reading.copy_heads()), progress, over)
    sharers = [
        reading.add(each.command, lambda source, each=each: each.run(run_dir, source, over))
        for each in ANALYSES
    ]
    reading.run(progress)
    return _list_outcomes(sharers)


def _list_outcomes(sharers: Iterable[Sharer]) -> list[AnalysisOutcome]:
    return [AnalysisOutcome(sharer.name, sharer.result, sharer.error) for sharer in sharers]


def _analyse_by_rank(
    run_dir: str, source: FileSource, progress: Progress | None, over: Map
) -> list[AnalysisOutcome]:
    jobs, sharing = plan_launches(source), Sharing()
    sharers = [
        sharing.add(
            each.command,
            lambda ranks, each=each: each.run(run_dir, source, _take_from(ranks, each.of_rank)),
        )
        for each in ANALYSES
    ]
    of_rank = partial(
        read_for_all, more=choose_measures(Path(run_dir)), unlikely=check.find_unlikely_files(run_dir)
    )
    ranks = over(of_rank, jobs)
    sharing.run(_tell_progress(ranks, progress))
    return _list_outcomes(sharers)


def _tell_progress(ranks: Iterable["RankReading"], progress: Progress | None) -> Iterator["RankReading"]:
    for rank in ranks:
        if progress:
            progress(rank.outline.job.files[0], rank.tables.events)
        yield rank


def _take_from(ranks: Iterable["RankReading"], of_rank: Callable[["RankReading"], Any]) -> Map:
    """A `Map` that reads nothing: what its function would give is a part of what was read for all."""
    return lambda function, work: (of_rank(rank) for rank in ranks)


@dataclass
class RankReading:
    """What the analyses keep of one rank in one launch, from one reading of its files."""

    outline: overview.RankOutline
    sums: check.RankSums
    tables: RankTables


def read_for_all(job: Launch, more: More, unlikely: frozenset[str]) -> RankReading:
    """more: measures of the rank besides those that all reports have. unlikely: files that `check` needs."""
    counts = check.RankCounts(job)
    events = read_rank(job.rank, job.files, job.clock, through=counts.count_blocks)
    measured = measure_rank(events)
    outline = overview.make_outline(job, events, measured)
    return RankReading(outline, counts.sum_files(unlikely), make_rank_tables(job, events, more, measured))
