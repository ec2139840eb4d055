"""A run folder as read: the joined traces, the JSON files beside them, and notes on what is missing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import polars as pl

from analysis.perfetto.links import LinkedRun, name_run
from analysis.report.page import format_number, format_seconds, format_size
from analysis.run_folder import records
from analysis.run_folder.outputs import find_output_folder
from analysis.tables import gpu, utilisation
from analysis.tables.answers import list_unknown_spans, sum_spans
from analysis.tables.calls import MAPPED
from analysis.tables.cores import Map, map_on_threads
from analysis.tables.device import explain_missing_counters
from analysis.tables.gather import (
    JoinedTables,
    More,
    describe_missing_ranks,
    gather_tables,
    shorten_losses,
)
from analysis.tables.read import RankEvents
from analysis.trace.classify import is_earlier_name, is_gpu_record
from analysis.trace.clocks import describe_moves, make_clocks, measure_clock_skew
from analysis.trace.kineto import Profile, find_profiles, read_profile
from analysis.trace.launches import Launch
from analysis.trace.nodes import list_losses
from analysis.trace.selection import WHOLE, Selection
from analysis.trace.source import TraceSource
from analysis.workload.fidelity import measure_requests
from analysis.workload.steps import Workload, join_workload, measure_rank_workload
from common.errors import printable

OF_WHOLE_RUN = ("samples_per_second", "test_auroc", "evaluations")  # in results.json


@dataclass
class TracedRun:
    path: Path
    joined: JoinedTables
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: pl.DataFrame = field(default_factory=pl.DataFrame)
    dlio_utilisation: float | None = None  # of the accelerators, as DLIO's own summary.json says
    notes: list[str] = field(default_factory=list)

    @cached_property
    def workload(self) -> Workload:
        """What steps took and batches asked for; frames without rows where the trace has no steps."""
        return join_workload(self.joined.tables, self.joined.launches)

    @property
    def folder(self) -> Path:
        """The run folder; of a single trace file the one that it is in."""
        return find_output_folder(self.path)

    @property
    def name(self) -> str:
        return printable(self.path.resolve().name)

    @property
    def linked(self) -> LinkedRun:
        return name_run(self.joined.processes, self.name)

    @property
    def begin_us(self) -> int:
        return int(self.joined["time"]["ts"].min())  # type: ignore[arg-type]


def open_run(
    path: str | Path,
    over: Map = map_on_threads,
    source: TraceSource | None = None,
    with_requests: bool = False,
    selection: Selection = WHOLE,
    kineto: Sequence[Path] = (),
) -> TracedRun:
    """Reads a run: its traces (`over` says where) and the JSON files beside them.

    with_requests: also each single read and write, for `fidelity.compare_tables`. selection: the part of the
    run that is read. kineto: profiles of torch.profiler besides the run's own.
    """
    folder = Path(path)
    given = [read_profile(each) for each in kineto]
    more = choose_measures(folder, given, with_requests)
    run = TracedRun(folder, gather_tables(folder, over, source, more, with_requests, selection))
    run.config = records.read_config(run.folder / "config.json", run.notes)
    run.plan = records.read_plan(run.folder / "plan.json", run.notes)
    run.results = records.read_results(run.folder / "results.json", run.notes)
    run.metrics = records.read_metrics(run.folder / "metrics.jsonl", run.notes)
    if len(run.joined[utilisation.TABLE]):
        run.dlio_utilisation = records.read_dlio_utilisation(run.folder / "summary.json", run.notes)
    if not selection.is_whole:
        run.notes.append(
            f"Only a part of the run was read: {selection.describe()}. Sums and means are of that."
        )
        if selection.has_times:
            run.metrics = _cut_metrics(run.metrics, run.joined["time"])
            run.results = {name: value for name, value in run.results.items() if name not in OF_WHOLE_RUN}
    run.notes += _list_notes(run.joined, bool(run.config), selection.is_whole)
    if selection.is_whole:
        absent = [(profile, gpu.explain_absence(profile, run.joined.processes)) for profile in given]
        run.notes += [
            f"{printable(profile.path)} is not in this report: {why}." for profile, why in absent if why
        ]
    run.notes += [
        f"Counters of a node: {loss}."
        for loss in list_losses(folder, {process.host for process in run.joined.processes})
    ]
    return run


def choose_measures(folder: Path, given: Sequence[Profile] = (), with_requests: bool = False) -> More:
    """What is measured of each rank besides the tables of all runs. See `open_run`."""
    requests_or_steps = measure_requests if with_requests else measure_rank_workload
    return partial(_measure_more, more=requests_or_steps, own=find_profiles(folder), given=given)


def _cut_metrics(metrics: pl.DataFrame, time: pl.DataFrame) -> pl.DataFrame:
    """The rows that were written during the time that the traces were read of."""
    if "time" not in metrics.columns or not metrics["time"].dtype.is_numeric():
        return metrics
    first, last = time["ts"].min(), (time["ts"] + time["wall_us"]).max()
    return metrics.filter((pl.col("time") * 1e6).is_between(pl.lit(first), pl.lit(last)))


def _measure_more(
    job: Launch, events: RankEvents, more: More, own: Sequence[Path], given: Sequence[Profile]
) -> dict[str, pl.DataFrame]:
    """What a report has beyond the tables of all commands."""
    return more(job, events) | {
        gpu.TABLE: gpu.measure_gpus(job, events, own, given),
        utilisation.TABLE: utilisation.measure_utilisation(events),
    }


def _describe_unknown_spans(joined: JoinedTables) -> list[str]:
    """A sentence where there are spans that `analysis/trace/classify.py` knows nothing about, else none."""
    unknown = list_unknown_spans(joined)
    if not len(unknown):
        return []
    names = [
        printable(f"{cat}/{name}")[:80] for cat, name in unknown.head(5).select("cat", "name").iter_rows()
    ]
    more = f" and {len(unknown) - 5} more names" if len(unknown) > 5 else ""
    spans = format_number(int(unknown["count"].sum()), "span")
    seconds = format_seconds(int(unknown["us"].sum()) / 1e6)
    return [
        f"Nothing is known about the names of {spans}, {seconds} in sum; "
        f"that time counts as what is inside them, or as other: {', '.join(names)}{more}."
    ]


def _describe_gpu_records(joined: JoinedTables) -> list[str]:
    """A sentence where there are records that DFTracer made of GPUs, else none."""
    sums = sum_spans(joined).group_by(pl.col("cat").cast(pl.String)).agg(pl.col("count").sum())
    found = [(cat, count) for cat, count in sums.sort("cat").iter_rows() if is_gpu_record(cat)]
    if not found:
        return []
    records = format_number(sum(count for _, count in found), "record")
    named = ", ".join(f"{cat} {count:,}" for cat, count in found[:12])
    more = f" and {len(found) - 12} more kinds" if len(found) > 12 else ""
    return [
        f"DFTracer made {records} of GPUs ({named}{more}). Perfetto and the table of spans show them; no "
        "other number of this report counts their time."
    ]


def _describe_earlier_names(joined: JoinedTables) -> list[str]:
    """A sentence where spans have names that this project gave them earlier, else none."""
    found = [
        f"{cat}/{name}"
        for cat, name in sum_spans(joined).select(pl.col("cat", "name").cast(pl.String)).iter_rows()
        if is_earlier_name(cat, name)
    ]
    if not found:
        return []
    return [
        f"The trace was made before December 2026: {', '.join(found)} have other names now and mean the same."
    ]


def _list_notes(joined: JoinedTables, ours: bool, whole: bool) -> list[str]:
    """Sentences on what is missing in the traces or must be known to read the report.

    ours: config.json is there. whole: all ranks were read.
    """
    shown = [f"{text}." for text in shorten_losses([p.lost for p in joined.processes if p.lost])]
    shown += _describe_launches(joined, whole)
    empty = [p.path.name for p in joined.processes if p.events == 0]
    if empty:
        shown.append(
            f"{len(empty)} traces hold no events: {', '.join(empty[:3])}{'...' if len(empty) > 3 else ''}."
        )
    merged = [p for p in joined.processes if p.pids > 1]
    shown += [
        f"{printable(p.path.name)} holds the events of {p.pids:,} processes, which count as one rank: times, "
        "phases and steps are those of one of them, the one with the longest training or the most work; "
        "calls and bytes are of all."
        for p in merged[:8]
    ]
    shown += _describe_unknown_spans(joined)
    shown += _describe_gpu_records(joined)
    if ours:
        shown += _describe_earlier_names(joined)
    if reason := explain_missing_counters(joined):
        shown.append(reason)
    if joined.calls == 0:
        shown.append(
            "No file calls were recorded: bytes and times of I/O are those that the application declares."
        )
    shown += _describe_mapped_reads(joined)
    if not len(joined["steps"]) and "preprocess" not in joined["time"]["phase"]:
        shown.append("No training steps (category train, name step): everything about steps is left out.")
    if not ours and max((p.world_size for job in joined.launches[-1:] for p in job), default=-1) < 0:
        shown.append("These traces do not name their ranks: each process counts as one rank.")
    return shown + _describe_clocks(joined)


def _describe_launches(joined: JoinedTables, whole: bool) -> Iterator[str]:
    """That the run was launched several times; and the ranks of which a trace is missing."""
    several = len(joined.launches) > 1
    if several:
        yield (
            f"The run was launched {len(joined.launches)} times. Each launch has its own clock and start-up; "
            "times are added up over them, and the time between them counts as nothing."
        )
    for number, job in enumerate(joined.launches, 1):
        missing = describe_missing_ranks(job, f"Launch {number}" if several else "The run")
        if missing and whole:
            yield f"{missing}. Sums and means are over the others."


def _describe_mapped_reads(joined: JoinedTables) -> Iterator[str]:
    copied = joined["ops"].filter(pl.col("layer") == MAPPED)
    if len(copied):
        yield (
            f"{format_size(int(copied['bytes'].sum()))} of the bytes read, in "
            f"{format_number(int(copied['count'].sum()), 'read')}, were copied from mapped files, as the "
            "application's spans declare them: page faults brought them in, which are not calls."
        )


def _describe_clocks(joined: JoinedTables) -> list[str]:
    """How far the clocks of several hosts were apart, and what was corrected."""
    apart = measure_clock_skew(joined.processes)
    if not apart or len({p.host for p in joined.processes}) < 2:
        return []
    differences = ", ".join(f"{us / 1e3:.3g} ms at the {when}" for when, us in apart.items())
    moves = describe_moves(joined.processes, make_clocks(joined.processes))
    return [
        f"The ranks' clocks were apart by {differences}, as seen when they left a barrier; times are "
        f"on the clock of the first rank's host: {'; '.join(moves) or 'nothing to correct'}."
    ]
