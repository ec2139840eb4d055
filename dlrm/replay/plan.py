"""What each traced thread did, as nodes for a player: calls, spans, and what waits for what.

In: the trace files of a rank. Out: its `RankPlan`. About two kilobytes of memory a call. A node has a time to
think before it, in us: from the end of what the thread did before to its own beginning.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from analysis.tables.read import RankEvents, read_rank
from analysis.trace.classify import is_kernel_file, is_program_file
from analysis.trace.launches import Launch
from analysis.workload.steps import measure_steps
from common.errors import UserError
from dlrm.replay.order import BARRIER, BEGIN, CALL, Node, Thread, order_threads, take_out_waits

_CALLS = (
    "pid", "tid", "ts", "dur", "name", "op", "path", "other", "position", "count", "size", "failed", "flags",
    "whence", "iovcnt", "item", "args", "file",
)  # fmt: skip
_SPANS = (
    "pid", "tid", "ts", "dur", "cat", "name", "file", "bytes", "offset", "epoch", "step", "batch", "split",
    "mapped",
)  # fmt: skip
_NOT_REPLAYED = ("counter", "clock", "dftracer")  # categories of events that are not work
_Made = dict[Thread, list[tuple[int, int, Any]]]  # begin, duration (us), TracedCall or TracedSpan


class TracedCall(NamedTuple):
    """A call as it was made. Places and sizes are bytes; None: the trace does not say."""

    name: str
    op: str
    path: str  # whole name in the trace
    other: str | None  # the second file of a rename or link
    position: int | None  # where it began
    count: int | None  # asked for; of fread and fwrite: items
    moved: int  # by reads and writes; of a seek: where it ended
    failed: bool
    flags: int | None
    whence: int | None
    iovcnt: int | None
    item: int | None  # bytes of an item of fread and fwrite
    args: str | None  # JSON
    text: str  # the name as it was given
    unused: bool  # an open after which the process does nothing with the file: perhaps it failed
    opens: int  # how often the process had opened the file before

    def list_other_arguments(self) -> dict[str, Any]:
        """The other arguments."""
        try:
            found = json.loads(self.args or "{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def argument(self, key: str, otherwise: int) -> int:
        """A whole number among the other arguments."""
        value = self.list_other_arguments().get(key)
        return value if isinstance(value, int) and 0 <= value < 1 << 62 else otherwise


class TracedSpan(NamedTuple):
    """A span of the application, which is recorded again around the same calls."""

    cat: str
    name: str
    path: str | None  # a file that it names: whole, or its last part alone
    mapped: bool  # it copies from a mapped file, which no call shows
    args: dict[str, Any]


@dataclass
class ThreadPlan:
    """The nodes of one thread, in order."""

    thread: Thread
    name: str
    nodes: list[Node] = field(default_factory=list)


@dataclass
class RankPlan:
    """All that a rank does. `threads[0]` is its main thread; the others begin with a START of it."""

    rank: int
    begin: int = 0  # us on the run's clock, of its first event
    end: int = 0
    threads: list[ThreadPlan] = field(default_factory=list)
    calls: list[tuple[int, Thread, TracedCall]] = field(default_factory=list)  # in the order of time (us)
    left_out: Counter[str] = field(default_factory=Counter)  # why -> calls that are not replayed
    lost: list[str] = field(default_factory=list)  # what its traces lack

    def count_calls(self, op: str) -> tuple[int, int]:
        """(calls, bytes moved) of an operation."""
        moved = [call.moved for _, _, call in self.calls if call.op == op]
        return len(moved), sum(moved)

    def list_barriers(self) -> list[tuple[Any, ...]]:
        return [node.payload for plan in self.threads for node in plan.nodes if node.kind == BARRIER]


Waits = dict[int, dict[tuple[Any, ...], int]]  # rank -> what names a barrier -> us


def measure_waits(run: Path, launch: int) -> Waits:
    """What each rank of a launch waited for others in its steps and evaluations; none of a trace without
    steps.
    """
    try:
        steps = measure_steps(run).steps.filter(pl.col("launch") == launch)
    except UserError:
        return {}
    waits: Waits = defaultdict(lambda: defaultdict(int))
    for rank, phase, epoch, step, batch, split, waited in steps.select(
        "rank", "phase", "epoch", "step", "batch", "split", "peers_us"
    ).iter_rows():
        key = ("step", epoch, step, batch) if phase == "train" else ("evaluate", epoch, step, split)
        waits[rank][key] += waited
    return {rank: dict(found) for rank, found in waits.items()}


def plan_rank(job: Launch, known: set[str], data_only: bool, waits: Waits) -> RankPlan:
    """Read the trace of a rank. known: the names of calls that the player can make.

    data_only: leave out files of programs and of the system, such as modules that are imported.
    """
    events = read_rank(job.rank, job.files, job.clock, details=True)
    plan = RankPlan(job.rank, lost=[process.lost for process in events.processes if process.lost])
    calls, spans = _read_calls(events, known, data_only, plan), _read_spans(events)
    if not calls and not spans:
        return plan
    items = {
        thread: sorted(
            [(ts, -dur, CALL, call) for ts, dur, call in calls.get(thread, ())]
            + [(ts, -dur, BEGIN, span) for ts, dur, span in spans.get(thread, ())],
            key=lambda item: item[:3],
        )
        for thread in {*calls, *spans}
    }
    plan.begin = min(each[0][0] for each in items.values())
    plan.end = max(ts - negative for each in items.values() for ts, negative, _, _ in each)
    names = {(p.pid, tid): name for p in events.processes for tid, name in p.threads.items()}
    main = _find_main(items, events)
    for thread, nodes in order_threads(items, main, spans).items():
        if thread == main:
            nodes = take_out_waits(nodes, waits.get(job.rank, {}))
        plan.threads.append(ThreadPlan(thread, names.get(thread, f"thread {thread[1]}"), nodes))
    return plan


def _find_main(items: dict[Thread, Any], events: RankEvents) -> Thread:
    """The first process's first thread; where that did nothing, the thread that began first."""
    for process in events.processes:
        if (process.pid, process.pid) in items:
            return process.pid, process.pid
    return min(items, key=lambda thread: items[thread][0][0])


def _read_calls(events: RankEvents, known: set[str], data_only: bool, plan: RankPlan) -> _Made:
    """The calls of each thread. Fills `plan.calls` and `plan.left_out`."""
    rows = events.calls.select(_CALLS).sort("ts", maintain_order=True)
    rows = rows.with_columns(pl.col(pl.Categorical).cast(pl.String))
    # whether the process uses the file again before it opens it another time
    next_op = rows.select(pl.col("op").shift(-1).over("pid", "path"))["op"].to_list()
    opened = (pl.col("op") == "open").cum_sum().over("pid", "path").fill_null(0)
    opens = rows.select(opened.cast(pl.Int64))["op"].to_list()
    threads: _Made = defaultdict(list)
    texts: dict[str | None, str | None] = {}  # each once, whatever the number of calls
    for values, after, before in zip(rows.iter_rows(), next_op, opens, strict=True):
        row: list[Any] = [texts.setdefault(v, v) if isinstance(v, str) else v for v in values]
        pid, tid, ts, dur, name, op, path, other, position, count, size, failed, flags, *rest = row
        reason = _find_reason(name, path, known, data_only)
        if reason:
            plan.left_out[reason] += 1
            continue
        unused = op == "open" and after in (None, "open")
        moved = size if op in ("read", "write", "seek") and size else 0
        whence, iovcnt, item, args, text = rest
        call = TracedCall(
            name, op, path, other, position, count, moved, bool(failed), flags, whence, iovcnt, item, args,
            text, unused, before - (op == "open"),
        )  # fmt: skip
        threads[pid, tid].append((ts, dur, call))
        plan.calls.append((ts, (pid, tid), call))
    return threads


def _find_reason(name: str, path: str | None, known: set[str], data_only: bool) -> str:
    """Why a call is not replayed; nothing if it is."""
    if path is None:
        return f"{name} (the trace names no file)"
    if is_kernel_file(path):
        return "calls on files of /proc, /sys and /dev"
    if data_only and is_program_file(path):
        return "calls on files of programs and of the system (--data_only)"
    if name not in known and name.startswith("posix_fadvise"):
        return f"{name} (the trace does not say which advice: --fadvise)"
    return "" if name in known else f"{name} (not known to the replay)"


def _read_spans(events: RankEvents) -> _Made:
    rows = events.spans.select(_SPANS).with_columns(pl.col(pl.Categorical).cast(pl.String))
    rows = rows.filter(~pl.col("cat").is_in(_NOT_REPLAYED))
    folders = {process.pid: process.folder for process in reversed(events.processes)}
    threads: _Made = defaultdict(list)
    for pid, tid, ts, dur, cat, name, file, *values, mapped in rows.iter_rows():
        if file and "/" in file:
            file = os.path.normpath(os.path.join("/", folders.get(pid, ""), file))
        args = {key: value for key, value in zip(_SPANS[7:-1], values, strict=True) if value is not None}
        threads[pid, tid].append((ts, dur, TracedSpan(cat, name, file, mapped, args)))
    return threads
