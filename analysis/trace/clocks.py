"""One clock for a run: which traces are of one job, and what brings a host's times to the first host's.

At its start and at its end a job marks how its hosts' clocks compare, each time with an error. The first rank
of a host records how far its clock is ahead, by round trips: some tens of us are uncertain. Older traces have
only the barriers that all ranks leave at one time, or some ms apart. Both marks together show how much faster
a clock goes; where that is no more than the errors, nothing is known about it and nothing is corrected.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.trace.process import TracedProcess, is_forked

# us: ranks leave a barrier so far apart, or are noticed to have left it, on busy machines
BARRIER_ERROR = 5_000
# us per us: clocks that are set by NTP are at most so fast. A larger difference at two barriers means that
# ranks left one of them late.
LARGEST_DRIFT = 5e-4
MOST_HOSTS = 8  # that get a sentence of their own


@dataclass(frozen=True)
class Clock:
    """How a host's times are corrected; the order of times does not change."""

    shift: int = 0  # us to add at the mark at the start
    start: int = 0  # when that was on this host's clock
    rate: float = 0.0  # us to add per us since then
    drift: int = 0  # what that comes to at the mark at the end
    error: int = 0  # us by which corrected times may be wrong at the mark at the start
    measured_rate: float | None = None  # as `rate`, whether or not it is used; None: there is one mark only
    rate_error: float = 0.0  # by how much that may be wrong
    by: str = ""  # "round trips", "barriers"; "": nothing had to be, or could be, corrected

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

    def correct_ns(self, ns: np.ndarray) -> np.ndarray:
        """The same of times in ns."""
        if not self.rate:
            return ns + self.shift * 1000
        return ns + self.shift * 1000 + np.rint((ns - self.start * 1000) * self.rate).astype(np.int64)

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

    Each rank is in a job once, and all of a job have the same world size. A forked process, or one that is
    no rank, belongs to the latest job that began before it.
    """
    found, made = list(found), []
    ours = any(p.world_size > 0 for p in found)

    def is_beside(process: TracedProcess) -> bool:
        """A worker; or, where ranks are named, a process of no rank, such as dftracer_service."""
        return is_forked(process) or (ours and process.world_size < 1)

    parents = [p for p in found if not is_beside(p)]
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
        if is_beside(process):
            before = [number for number, at in enumerate(begun) if at <= process.first]
            made[max(before, default=0)].append(process)
    return [job for job in made if job]


def make_clocks(found: Iterable[TracedProcess]) -> dict[Path, Clock]:
    """How each trace's times come to the clock of the job's first rank's host.

    Ranks of one host share its clock, so they share the correction.
    """
    return {path: clock for job in group_launches(found) for path, clock in _make_job_clocks(job).items()}


@dataclass(frozen=True)
class _Mark:
    """A host's clock compared with the first host's at one moment."""

    at: float  # us on this host's clock
    ahead: float  # us by which it is ahead
    error: float  # us
    by: str


def _make_job_clocks(job: list[TracedProcess]) -> dict[Path, Clock]:
    """One clock per host of a job, by the path of each trace."""
    hosts = dict.fromkeys(p.host for p in job)
    if len(hosts) < 2:
        return {p.path: Clock() for p in job}
    first = min(job, key=lambda p: p.rank).host
    marks = {when: _list_marks(job, hosts, first, when) for when in ("start", "end")}
    made = {host: _make_clock(marks["start"].get(host), marks["end"].get(host)) for host in hosts}
    return {p.path: made[p.host] for p in job}


def _list_marks(job: list[TracedProcess], hosts: Iterable[str], first: str, when: str) -> dict[str, _Mark]:
    """Of each host that has one; of the first host only where another one is the reference."""
    barriers = {
        host: [p.barriers[when] for p in job if p.host == host and when in p.barriers] for host in hosts
    }
    reference = barriers[first]
    if not any("start" in p.barriers for p in job if p.host == first):  # its trace lacks the beginning
        others = [times for times in barriers.values() if times] if when == "start" else []
        reference = min(others, key=np.median, default=[])
    marks = {
        host: _compare_barriers(times, reference)
        for host, times in barriers.items()
        if times and reference and times is not reference
    }
    for process in job:
        if when in process.offsets and process.host != first:
            at, ahead, error = process.offsets[when]
            marks[process.host] = _Mark(at, ahead, error, "round trips")
    return marks


def _compare_barriers(times: list[int], reference: list[int]) -> _Mark:
    """When the ranks of a host left a barrier, and when the first host's did, each by its own clock."""
    at = float(np.median(times))
    spread = max(times) - min(times) + max(reference) - min(reference)
    return _Mark(at, at - float(np.median(reference)), BARRIER_ERROR + spread, "barriers")


def _make_clock(start: _Mark | None, end: _Mark | None) -> Clock:
    """What corrects a host's times, by its marks."""
    if start is None:
        return Clock()
    begun, shift = round(start.at), -start.ahead
    span = end.at - start.at if end is not None else 0
    if end is None or span <= 0:  # a killed rank has no mark at the end: an offset is all there is
        return Clock(round(shift), begun, error=round(start.error), by=start.by)
    drift, uncertain = start.ahead - end.ahead, start.error + end.error
    by = "barriers" if "barriers" in (start.by, end.by) else start.by
    measured = {"measured_rate": drift / span, "rate_error": uncertain / span, "by": by}
    if abs(drift) > uncertain:
        if by == "barriers" and abs(drift) > LARGEST_DRIFT * span:
            return Clock(round(shift), begun, error=round(start.error), **measured)
        return Clock(round(shift), begun, drift / span, round(drift), round(start.error), **measured)
    # no drift is seen: both marks say the same, and what is true is where they overlap
    low = max(shift - start.error, -end.ahead - end.error)
    high = min(shift + start.error, -end.ahead + end.error)
    return Clock(round((low + high) / 2), begun, error=round((high - low) / 2), **measured)


def list_clocks(found: Iterable[TracedProcess], known: dict[Path, Clock]) -> list[dict[str, Any]]:
    """A row per launch and host whose clock was compared with the first host's: us, and us per s."""
    rows = []
    for number, job in enumerate(group_launches(found), 1):
        for host, clock in {p.host: known[p.path] for p in job if known[p.path].by}.items():
            rows.append({
                "launch": number, "host": host, "by": clock.by,
                "moved_us": clock.shift, "error_us": clock.error,
                "drift_us_per_s": None if clock.measured_rate is None else 0.0 - 1e6 * clock.measured_rate,
                "drift_error_us_per_s": None if clock.measured_rate is None else 1e6 * clock.rate_error,
                "drift_corrected": bool(clock.rate),
            })  # fmt: skip
    return rows


def describe_moves(found: Iterable[TracedProcess], known: dict[Path, Clock]) -> list[str]:
    """How the hosts' times were moved, and how certain that is: a sentence each, of the first hosts."""
    rows = list_clocks(found, known)
    several = any(row["launch"] > 1 for row in rows)
    sentences = []
    for row in rows[:MOST_HOSTS]:
        launch = f" in launch {row['launch']}" if several else ""
        sentences.append(
            f"clock of {row['host']}{launch}: moved by {row['moved_us']} us, "
            f"right within {row['error_us']} us (by {row['by']}); {_describe_drift(row)}"
        )
    if rest := rows[MOST_HOSTS:]:
        sentences.append(
            f"clocks of {len(rest)} more hosts: moved by at most {max(abs(r['moved_us']) for r in rest)} us, "
            f"right within {max(r['error_us'] for r in rest)} us; drift corrected on "
            f"{sum(r['drift_corrected'] for r in rest)} of them"
        )
    return sentences


def _describe_drift(row: dict[str, Any]) -> str:
    if row["drift_us_per_s"] is None:
        return "its drift is not known: no mark at the end"
    drift = f"it gains {row['drift_us_per_s']:.3g} us per s, give or take {row['drift_error_us_per_s']:.2g}"
    unusual = abs(row["drift_us_per_s"]) > 1e6 * LARGEST_DRIFT
    if row["drift_corrected"]:
        return f"{drift}: corrected" + (", though a clock is seldom that wrong" if unusual else "")
    if unusual and abs(row["drift_us_per_s"]) > row["drift_error_us_per_s"]:
        return f"{drift}: NOT corrected: clocks do not drift so much, ranks may have left a barrier late"
    return f"{drift}: not corrected, since that may be nothing"


def measure_clock_skew(found: Iterable[TracedProcess]) -> dict[str, int]:
    """How far the clocks were apart at each barrier, in us: over all ranks of a job, as recorded."""
    apart: dict[str, int] = {}
    for job in group_launches(found):
        for when in ("start", "end"):
            at = [p.barriers[when] for p in job if when in p.barriers]
            if len(at) > 1:
                apart[when] = max(apart.get(when, 0), max(at) - min(at))
    return apart
