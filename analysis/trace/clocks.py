"""One clock for a run: which traces are of one job, and what brings a host's times to the first host's.

A job's barriers at its start and at its end happen at one time on all ranks. The first shows how far a
host's clock is off, both together how much faster it goes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from analysis.trace.process import TracedProcess, is_forked

LARGEST_DRIFT = 5e-4  # of real clocks; a larger difference means that ranks left a barrier at different times


@dataclass(frozen=True)
class Clock:
    """How a host's times are corrected; the order of times does not change."""

    shift: int = 0  # us to add at the barrier at the start
    start: int = 0  # when that was on this host's clock
    rate: float = 0.0  # us to add per us since then
    drift: int = 0  # what that comes to at the barrier at the end

    @property
    def moves(self) -> bool:
        """Whether times are changed at all."""
        return bool(self.shift or self.rate)

    def correct_time(self, ts: int) -> int:
        return int(self.correct_times(np.array([ts]))[0])

    def correct_times(self, ts: np.ndarray) -> np.ndarray:
        if not self.rate:
            return ts + self.shift
        return ts + self.shift + np.rint((ts - self.start) * self.rate).astype(np.int64)

    def correct_spans(self, ts: np.ndarray, dur: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin and duration: both ends are moved, so that what was inside another span stays inside."""
        begin = self.correct_times(ts)
        return begin, self.correct_times(ts + dur) - begin if self.rate else dur

    def correct_frame(self, events: pl.DataFrame) -> pl.DataFrame:
        """Correct the columns ts and, where there is one, dur."""
        if not self.moves:
            return events
        ts = events["ts"].to_numpy()
        if "dur" not in events.columns:
            return events.with_columns(pl.Series("ts", self.correct_times(ts)))
        begin, dur = self.correct_spans(ts, events["dur"].to_numpy())
        return events.with_columns(pl.Series("ts", begin), pl.Series("dur", dur))


def group_launches(found: Iterable[TracedProcess]) -> list[list[TracedProcess]]:
    """The traces by the job that wrote them, in the order of time: a run that was stopped has several.

    Each rank is in a job once, and all of a job have the same world size. A forked process belongs to the
    latest job that began before it.
    """
    found, made = list(found), []
    parents = [p for p in found if not is_forked(p)]
    in_time = sorted(parents, key=lambda p: (p.barriers.get("start", p.first), p.rank))
    of_rank: dict[int, list[TracedProcess]] = {}
    for process in in_time:
        of_rank.setdefault(process.rank, []).append(process)
    by_rank = [of_rank[rank] for rank in sorted(of_rank)]
    whole = {p.world_size for p in parents} == {len(by_rank)} and len({len(each) for each in by_rank}) == 1
    if whole:  # the n-th of each rank belong together, however far apart the hosts' clocks are
        made = [list(job) for job in zip(*by_rank, strict=True)]
    ranks: set[int] = set()  # of the latest job
    for process in [] if whole else in_time:
        if not made or process.rank in ranks or process.world_size != made[-1][0].world_size:
            made.append([])
            ranks = set()
        made[-1].append(process)
        ranks.add(process.rank)
    begun = [min(p.first for p in job) for job in made]
    made = made or [[]]
    for process in found:
        if is_forked(process):
            before = [number for number, at in enumerate(begun) if at <= process.first]
            made[max(before, default=0)].append(process)
    return [job for job in made if job]


def make_clocks(found: Iterable[TracedProcess]) -> dict[Path, Clock]:
    """How each trace's times come to the clock of the job's first rank's host.

    Ranks of one host share its clock, so they share the correction: the median over their barriers.
    """
    return {path: clock for job in group_launches(found) for path, clock in _make_job_clocks(job).items()}


def _make_job_clocks(job: list[TracedProcess]) -> dict[Path, Clock]:
    """One clock per host of a job, by the path of each trace."""
    hosts = dict.fromkeys(p.host for p in job)
    barriers = {when: {host: _median_barrier(job, host, when) for host in hosts} for when in ("start", "end")}
    known = [at for at in barriers["start"].values() if at is not None]
    if len(hosts) < 2 or not known:
        return {p.path: Clock() for p in job}
    first = min(job, key=lambda p: p.rank).host
    reference = barriers["start"][first]
    made = {
        host: _make_clock(
            at,
            barriers["end"][host],
            min(known) if reference is None else reference,
            None if reference is None else barriers["end"][first],
        )  # fmt: skip
        for host, at in barriers["start"].items()
    }
    return {p.path: made[p.host] for p in job}


def _median_barrier(job: list[TracedProcess], host: str, when: str) -> float | None:
    """When the ranks of a host left the barrier, by their own clock; None where no trace says it."""
    times = [p.barriers[when] for p in job if p.host == host and when in p.barriers]
    return float(np.median(times)) if times else None


def _make_clock(start: float | None, end: float | None, first_start: float, first_end: float | None) -> Clock:
    """What corrects a host's times.

    start, end: the median time of its ranks at the two barriers; first_start, first_end: the same of the
    first rank's host. None where no trace of the host has that barrier.
    """
    if start is None:
        return Clock()
    shift, begun = round(first_start - start), round(start)
    if end is None or first_end is None or end <= start or first_end <= first_start:
        return Clock(shift, begun)  # a killed rank has no barrier at the end: an offset is all there is
    drift = (first_end - first_start) - (end - start)
    if abs(drift) > LARGEST_DRIFT * (end - start):
        return Clock(shift, begun)
    return Clock(shift, begun, drift / (end - start), round(drift))


def describe_moves(found: Iterable[TracedProcess], known: dict[Path, Clock]) -> list[str]:
    """How the hosts' times were moved, a sentence each."""
    jobs = group_launches(found)
    sentences = []
    for number, job in enumerate(jobs, 1):
        for host, clock in {p.host: known[p.path] for p in job if known[p.path].moves}.items():
            launch = f" in launch {number}" if len(jobs) > 1 else ""
            text = f"clock of {host}{launch}: moved by {clock.shift} us to meet the barrier at the start"
            if clock.drift:
                text += f", by {clock.drift} us more towards the end ({1e6 * clock.rate:+.3g} us per s)"
            sentences.append(text)
    return sentences


def measure_clock_skew(found: Iterable[TracedProcess]) -> dict[str, int]:
    """How far the clocks were apart at each barrier, in us: over all ranks of a job, as recorded."""
    apart: dict[str, int] = {}
    for job in group_launches(found):
        for when in ("start", "end"):
            at = [p.barriers[when] for p in job if when in p.barriers]
            if len(at) > 1:
                apart[when] = max(apart.get(when, 0), max(at) - min(at))
    return apart
