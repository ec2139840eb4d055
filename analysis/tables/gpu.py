"""What each GPU did in the profiled steps, and what its rank's main thread did while it did nothing.

In: the rank's events, and the profiles of torch.profiler that are its own. Out: the table `gpu`, a row for
each device of a profile, in us: `kernels`, `collectives` (kernels of NCCL), `copies` and `idle` add up to
`profiled`, where several run at once the first of them has the time; the columns `idle_...` add up to `idle`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl

from analysis.tables.intervals import Stretches, merge_stretches, subtract_stretches, unite_stretches
from analysis.tables.read import RankEvents
from analysis.tables.times import find_bounds, find_stretches
from analysis.trace.classify import KINDS
from analysis.trace.kineto import COPY_CATS, STEP_NAME, Profile, find_process, read_profile
from analysis.trace.launches import Launch
from analysis.trace.process import TracedProcess
from common.errors import UserError

BUSY = ("kernels", "collectives", "copies")
IDLE = (*KINDS, "other")  # what the main thread did meanwhile
COLLECTIVE = "nccl"  # the beginning of the names of NCCL's kernels, and of RCCL's
TABLE = "gpu"
SCHEMA = {
    "rank": pl.Int32, "launch": pl.Int32, "device": pl.Int64, "steps": pl.Int64,
    **{f"{name}_us": pl.Float64 for name in ("profiled", *BUSY, "idle", *(f"idle_{kind}" for kind in IDLE))},
    "waiting_us": pl.Float64,  # the main thread, for data: for a batch, or in file calls of its own
    "busy_while_waiting_us": pl.Float64,
}  # fmt: skip


def measure_gpus(
    job: Launch, events: RankEvents, own: Sequence[Path], given: Sequence[Profile]
) -> pl.DataFrame:
    """The table `gpu` of one rank in one launch.

    own: the profiles in the run folder; one that is damaged is left out. given: from elsewhere.
    """
    profiles = [*_read_own(job, own), *given]
    rows = [
        row for profile in profiles if _has_gpus_of(profile, events) for row in _measure(job, events, profile)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _read_own(job: Launch, paths: Iterable[Path]) -> Iterator[Profile]:
    for path in paths:
        if path.name.startswith(f"rank{job.rank:05d}-"):
            with suppress(UserError):  # `perfetto` says so
                yield read_profile(path)


def _has_gpus_of(profile: Profile, events: RankEvents) -> bool:
    """Whether the profile has devices, and is of this rank in this launch."""
    if not len(profile) or profile.without_clock or not (profile.devices >= 0).any():
        return False
    return any(profile.is_of(each) and profile.is_at_the_time_of(each) for each in events.processes)


def explain_absence(profile: Profile, processes: Sequence[TracedProcess]) -> str:
    """Why a profile from elsewhere has no row in the table, or nothing. processes: of the run, as read."""
    found = find_process(profile, processes, {process.rank for process in processes})
    if isinstance(found, str):
        return found
    if found is not None and not profile.is_of(found):
        return f"it names no rank (distributedInfo), and its pid {profile.pid} is not the rank's"
    return "" if (profile.devices >= 0).any() else "it has nothing of a GPU; perfetto shows it"


def _measure(job: Launch, events: RankEvents, profile: Profile) -> list[list[float]]:
    """A row of SCHEMA for each device."""
    begin, end = (job.clock.correct_ns(times) for times in (profile.begin, profile.end))
    marks = np.array([name.startswith(STEP_NAME) for name in profile.names], np.bool_)[profile.name]
    marks &= profile.devices < 0  # a GPU has marks of its own, from its first kernel to its last one
    first, last = (time * 1000 for time in find_bounds(events))  # of a part of the run, where that was chosen
    window = begin.min(keepdims=True), end.max(keepdims=True)
    if marks.any():
        window = merge_stretches(begin[marks], end[marks])
    window = _intersect(window, (np.array([first]), np.array([last])))
    if not len(window[0]):
        return []
    middle = (begin + end) // 2
    steps = np.unique(profile.name[marks & (middle >= window[0][0]) & (middle < window[1][-1])])
    main = _split_main_thread(events, window)
    names = np.array([name.startswith(COLLECTIVE) for name in profile.names], np.bool_)[profile.name]
    kernels, copies = profile.has_cat("kernel"), profile.has_cat(*COPY_CATS)
    rows = []
    for device in sorted(set(profile.devices[profile.devices >= 0].tolist())):
        here = profile.devices == device
        parts, idle = split_in_order(
            window,
            [merge_stretches(begin[chosen & here], end[chosen & here]) for chosen in (
                kernels & ~names, kernels & names, copies,
            )],
        )  # fmt: skip
        idle_parts = [_intersect(idle, stretches) for stretches in main]
        waiting = unite_stretches(main[KINDS.index("io")], main[KINDS.index("wait")])
        rows.append([
            job.rank, job.launch, device, len(steps), _add_up(window),
            *map(_add_up, parts), _add_up(idle), *map(_add_up, idle_parts),
            _add_up(waiting), _add_up(subtract_stretches(waiting, idle)),
        ])  # fmt: skip
    return rows


def _split_main_thread(events: RankEvents, window: Stretches) -> list[Stretches]:
    """What the main thread did in the window: ns, for each of IDLE."""
    pid, tid = events.main_thread
    here = (pl.col("pid") == pid) & (pl.col("tid") == tid)
    kinds = [find_stretches(events.spans, here, pl.col("kind") == kind) for kind in KINDS]
    kinds[0] = unite_stretches(kinds[0], find_stretches(events.calls, here))
    parts, rest = split_in_order(window, [(starts * 1000, ends * 1000) for starts, ends in kinds])
    return [*parts, rest]


def split_in_order(window: Stretches, several: Iterable[Stretches]) -> tuple[list[Stretches], Stretches]:
    """Of a window what the first of several has, what of the rest the second has, ...; and what none has."""
    parts, rest = [], window
    for stretches in several:
        parts.append(_intersect(rest, stretches))
        rest = subtract_stretches(rest, stretches)
    return parts, rest


def _intersect(one: Stretches, two: Stretches) -> Stretches:
    return subtract_stretches(one, subtract_stretches(one, two))


def _add_up(stretches: Stretches) -> float:
    """In us."""
    return float((stretches[1] - stretches[0]).sum()) / 1000
