"""What is to be read of a run, rank by rank: the unit of work of all analyses that read ranks apart.

In: the beginnings of its trace files. Out: a `Launch` for each rank of each launch; a run that was stopped
and resumed has several.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from analysis.trace.clocks import Clock, group_launches, make_clocks
from analysis.trace.events import assign_ranks
from analysis.trace.selection import WHOLE, Selection, find_windows
from analysis.trace.source import TraceSource


@dataclass
class Launch:
    """The traces of one rank in one launch, and what to do to their times."""

    rank: int
    files: list[Path]
    clock: Clock = Clock()
    launch: int = 1
    part: Selection = WHOLE  # of its events


def plan_launches(source: TraceSource, selection: Selection = WHOLE) -> list[Launch]:
    """What is to be read: the files of each rank in each launch, with the clock that corrects their times."""
    found = source.read_heads()
    known, made = make_clocks(found), []
    jobs = group_launches(found)
    begin = min((known[p.path].correct_time(p.first) for p in found if p.first), default=0)
    part = replace(selection, ranks=(), hosts=(), every=1)
    part = replace(part, windows=find_windows(replace(part, steps=None, epoch=None), jobs, known, begin))
    if not selection.is_whole:
        jobs = group_launches(selection.choose_processes(p for job in jobs for p in assign_ranks(job)))
    for launch, job in enumerate(jobs, 1):
        by_rank: dict[int, list[Path]] = {}
        for process in assign_ranks(job):
            by_rank.setdefault(process.rank, []).append(process.path)
        made += [Launch(rank, paths, known[paths[0]], launch, part) for rank, paths in by_rank.items()]
    return made
