"""A part of a run: some ranks, some hosts, a stretch of steps or of time, only long events.

In: what the user asked for. Out: which processes are read, and which events of a block are kept. Steps and
epochs become stretches of time, on the run's common clock, so that what other threads did meanwhile is there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from analysis.trace.arguments import read_argument
from analysis.trace.classify import OWN_STEPS, STEP, find_part
from analysis.trace.clocks import Clock
from analysis.trace.events import TraceReader
from analysis.trace.process import TracedProcess
from analysis.trace.scan import EventBlock
from analysis.trace.strings import ID, StringTable
from common.errors import UserError

MOST = 1 << 31  # of a rank's or a step's number
_RANGE = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")
Window = tuple[int, int]  # us, both ends belong to it


@dataclass(frozen=True)
class Selection:
    """What is kept; the fields that are not given keep everything."""

    ranks: tuple[Window, ...] = ()  # first and last of each range
    hosts: tuple[str, ...] = ()
    every: int = 1  # N: the first, the N-th after it, and so on, of the ranks that are left
    steps: Window | None = None
    epoch: int | None = None
    from_seconds: float | None = None  # since the run began
    to_seconds: float | None = None
    min_us: int = 0  # shorter events are left out
    windows: tuple[Window, ...] = field(default=())  # of time; found by `find_windows`

    @property
    def is_whole(self) -> bool:
        return self == Selection()

    @property
    def has_times(self) -> bool:
        return any(
            given is not None for given in (self.steps, self.epoch, self.from_seconds, self.to_seconds)
        )

    def choose_processes(self, processes: Iterable[TracedProcess]) -> list[TracedProcess]:
        """Those of the chosen ranks and hosts; UserError where there are none."""
        kept = [
            process for process in processes
            if (not self.ranks or any(low <= process.rank <= high for low, high in self.ranks))
            and (not self.hosts or process.host in self.hosts)
        ]  # fmt: skip
        chosen = set(sorted({process.rank for process in kept})[:: self.every])
        kept = [process for process in kept if process.rank in chosen]
        if not kept:
            raise UserError(f"{self.describe()}: the run has no such rank; `summary` lists ranks and hosts")
        return kept

    def is_inside(self, ts: np.ndarray, dur: np.ndarray) -> np.ndarray:
        """Which events (bool) overlap a window; ts, dur: us on the common clock."""
        if not self.windows:
            return np.ones(len(ts), np.bool_)
        inside, ends = np.zeros(len(ts), np.bool_), ts + dur
        for first, last in self.windows:
            inside |= (ts <= last) & (ends >= first)
        return inside

    def is_long(self, block: EventBlock) -> np.ndarray:
        """Which rows (bool) are as long as asked for; values of counters have no length."""
        return (block.dur >= self.min_us) | (block.cat == ID["counter"])

    def describe(self) -> str:
        """As options; also the end of a file's name, with other signs between."""
        parts = []
        if self.ranks:
            shown = [f"{low}" if low == high else f"{low}-{high}" for low, high in self.ranks]
            parts.append("--ranks " + ",".join(shown))
        if self.hosts:
            parts.append("--hosts " + ",".join(self.hosts))
        if self.every > 1:
            parts.append(f"--every {self.every}")
        if self.steps:
            parts.append(f"--steps {self.steps[0]}-{self.steps[1]}")
        if self.epoch is not None:
            parts.append(f"--epoch {self.epoch}")
        if self.from_seconds is not None:
            parts.append(f"--from {self.from_seconds:g}")
        if self.to_seconds is not None:
            parts.append(f"--to {self.to_seconds:g}")
        if self.min_us:
            parts.append(f"--min-us {self.min_us}")
        return " ".join(parts)

    def name_part(self) -> str:
        """The end of a file's name: -ranks0-7,64-steps100-120."""
        return re.sub(r"[^\w.,-]", "", self.describe().replace(" --", "-").replace("--", "-"))[:120]


WHOLE = Selection()


def parse_ranges(text: str) -> tuple[Window, ...]:
    """0-7,64 -> ((0, 7), (64, 64)); ValueError for anything else."""
    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found:
            raise ValueError(f"{text!r}: give numbers and ranges, e.g. 0-7,64")
        low, high = int(found[1]), int(found[2] or found[1])
        if high < low or high >= MOST:
            raise ValueError(f"{text!r}: the range {part.strip()} is empty or too large")
        ranges.append((low, high))
    return tuple(ranges)


def find_windows(
    selection: Selection, jobs: list[list[TracedProcess]], clocks: Mapping[Path, Clock], begin: int
) -> tuple[Window, ...]:
    """The stretches of time that the selection's steps, epoch and seconds stand for; UserError where there
    are none.

    jobs: the processes of each launch; each has a stretch of its own. clocks: by trace file. begin: us, when
    the run began.
    """
    if not selection.has_times:
        return ()
    first, last = 0, 1 << 62
    if selection.from_seconds is not None:
        first = begin + round(selection.from_seconds * 1e6)
    if selection.to_seconds is not None:
        last = begin + round(selection.to_seconds * 1e6)
    if first > last:
        raise UserError(f"{selection.describe()}: ends before it begins")
    if selection.steps is None and selection.epoch is None:
        return ((first, last),)
    windows = []
    for job in jobs:
        spans = [_find_steps(selection, process, clocks[process.path]) for process in job]
        begins, ends = [span[0] for span in spans if span], [span[1] for span in spans if span]
        if begins and max(first, min(begins)) <= min(last, max(ends)):
            windows.append((max(first, min(begins)), min(last, max(ends))))
    if not windows:
        raise UserError(f"{selection.describe()}: the traces have no such step; `report` lists the steps")
    return tuple(windows)


def _find_step_rows(block: EventBlock, strings: StringTable) -> tuple[np.ndarray, np.ndarray]:
    """Which events are steps (bool [n]), by any dialect, and which of them are this project's."""
    pairs, of_row = np.unique(block.cat.astype(np.int64) << 32 | block.name, return_inverse=True)
    named = [(strings.text(int(pair) >> 32), strings.text(int(pair) & 0xFFFFFFFF)) for pair in pairs]
    is_step = np.array([find_part(cat, name) == STEP for cat, name in named], bool)
    is_own = np.array([cat == OWN_STEPS for cat, _ in named], bool)
    steps = block.is_event() & is_step[of_row]
    return steps, steps & is_own[of_row]


def _find_steps(selection: Selection, process: TracedProcess, clock: Clock) -> Window | None:
    """From the beginning of the first chosen step of a process to the end of its last one."""
    low, high = selection.steps or (0, MOST)
    found, has_own = {False: (1 << 62, -1), True: (1 << 62, -1)}, False  # of all steps, of this project's
    reader = TraceReader(process.path, StringTable(), {})
    for block in reader:
        steps, own = _find_step_rows(block, reader.strings)
        if not steps.any():
            continue
        has_own |= bool(own.any())
        step = read_argument(block, ID["step"], -1)
        chosen = (step >= low) & (step <= high)
        if selection.epoch is not None:
            chosen &= read_argument(block, ID["epoch"], -1) == selection.epoch
        for which, rows in ((False, steps & chosen), (True, own & chosen)):
            if rows.any():
                ts, dur = clock.correct_spans(block.ts[rows], block.dur[rows])
                begin, end = found[which]
                found[which] = min(begin, int(ts.min())), max(end, int((ts + dur).max()))
    begin, end = found[has_own]
    return (begin, end) if end >= 0 else None
