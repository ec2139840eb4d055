"""The trace files of one rank -> two lean tables: intercepted calls, and everything else.

For those who make the calls again (replay, exports) the table of calls can also have what was asked for.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from analysis.trace.arguments import count_moved_bytes, read_argument
from analysis.trace.classify import CALLS, OWN_STEPS, STEP, classify
from analysis.trace.clocks import Clock
from analysis.trace.columns import make_event_frame
from analysis.trace.events import TraceReader
from analysis.trace.positions import FilePositions
from analysis.trace.process import TracedProcess
from analysis.trace.scan import MAX_BYTES, EventBlock
from analysis.trace.source import EventBlockReader, TraceSource
from analysis.trace.strings import ID, StringTable

_COLUMNS = (
    "pid", "tid", "cat", "name", "ts", "dur", "file", "offset", "ret", "bytes",
    "epoch", "step", "batch", "value", "split",
)  # fmt: skip
CALL = ("pid", "tid", "cat", "name", "op", "ts", "dur", "file", "offset", "size", "failed")
# What a call was asked for: where it began (`offset` as the call says it, else followed from open, seek and
# read; null: unknown), its arguments count, flags, whence, iovcnt and (of an item) size, its return
# value, the other file of a rename or link, all arguments that have no column above, as JSON, and `path`: the
# whole name of the file, null where the trace has none (`other` is a whole name, too).
DETAILS = ("position", "count", "ret", "flags", "whence", "iovcnt", "item", "other", "args", "path")
_INTEGERS = {"flags": "flags", "whence": "whence", "iovcnt": "iovcnt", "item": "size"}
_NOT_THERE = -(1 << 62)  # beyond what an argument can be
_BARE_HASH = re.compile("[0-9a-f]{16}")
_OTHER_FILE = r'"(?:newpath|path2|new)_hash":"([^"]*)"'
SPAN = (
    "pid", "tid", "cat", "name", "kind", "part", "op", "ts", "dur", "file", "bytes",
    "epoch", "step", "batch", "value", "split", "mapped",
)  # fmt: skip


@dataclass
class RankEvents:
    """All events of one rank, times on the run's common clock."""

    rank: int
    processes: list[TracedProcess]
    calls: pl.DataFrame
    spans: pl.DataFrame
    paths: dict[str, str] = field(default_factory=dict)  # file hash -> path, for the ranks that lack it

    @property
    def count(self) -> int:
        return len(self.calls) + len(self.spans)

    @cached_property
    def main_thread(self) -> tuple[int, int]:
        """pid, tid of the thread that trains: the one with the steps, else the busiest first thread."""
        spans = self.spans
        for chosen in (
            choose_steps(spans),
            spans.filter((pl.col("dur") > 0) & (pl.col("pid") == pl.col("tid"))),
            spans.filter(pl.col("dur") > 0),
            self.calls,
        ):
            if len(chosen):
                sums = chosen.group_by("pid", "tid").agg(pl.col("dur").sum())
                top = sums.sort("dur", "tid", descending=True)
                return int(top["pid"][0]), int(top["tid"][0])
        return self.processes[0].pid, self.processes[0].pid


def tell_steps(spans: pl.DataFrame) -> pl.Expr:
    """Whether a span is a step of the training: where there are this project's spans, only those."""
    is_step = (pl.col("part") == STEP).fill_null(False)
    is_own = is_step & (pl.col("cat") == OWN_STEPS)
    return is_own if len(spans.filter(is_own).head(1)) else is_step


def choose_steps(spans: pl.DataFrame) -> pl.DataFrame:
    return spans.filter(tell_steps(spans))


def read_rank(
    rank: int, files: Iterable[Path], clock: Clock | None = None, source: TraceSource | None = None,
    details: bool = False, through: Callable[[EventBlockReader], Iterable[EventBlock]] = iter,
) -> RankEvents:  # fmt: skip
    """Calls and spans of one rank, from all its trace files.

    clock: what corrects its times. source: a reading that several analyses share, else these files.
    details: whether calls also have the columns DETAILS, and spans the column offset. through: gives the
    blocks of a reader, after it has taken from them what else is wanted.
    """
    calls, spans, found = [], [], []
    strings, paths, clock = StringTable(), {}, clock or Clock()
    for path in files:
        positions = FilePositions() if details else None
        reader = source.open_reader(path, strings, paths) if source else TraceReader(path, strings, paths)
        strings, paths = reader.strings, reader.paths
        found.append(reader.process)
        pids: set[int] = set()
        for block in through(reader):
            pids |= _list_pids(block)
            one, other = _split_block(block, reader, clock, positions)
            calls.append(one)
            spans.append(other)
        reader.process.pids = max(1, len(pids))
    known = {strings.text(given): strings.text(path) for given, path in paths.items()}
    columns = (*CALL, *DETAILS[:-1]) if details else CALL
    joined = _resolve_files(pl.concat(calls, rechunk=False) if calls else _make_empty(columns), known)
    return RankEvents(
        rank,
        found,
        _name_in_full(joined, found, known) if details else joined,
        _resolve_files(
            pl.concat(spans) if spans else _make_empty((*SPAN, "offset") if details else SPAN), known
        ),
        known,
    )


def _list_pids(block: EventBlock) -> set[int]:
    """The processes whose events are in the block: usually one, which is found without sorting."""
    pids = block.pid[block.is_event()]
    if not len(pids) or (pids == pids[0]).all():
        return {int(pid) for pid in pids[:1]}
    return set(np.unique(pids).tolist())


def _resolve_files(events: pl.DataFrame, known: dict[str, str]) -> pl.DataFrame:
    """A forked process does not write its parent's hashes again, and its file may have been read first."""
    if "other" in events.columns:
        events = events.with_columns(pl.col("other").replace(known))
    texts = events["file"].unique().cast(pl.String)
    if not any(text in known for text in texts):
        return events
    return events.with_columns(pl.col("file").cast(pl.String).replace(known).cast(pl.Categorical))


def _name_in_full(
    calls: pl.DataFrame, processes: Iterable[TracedProcess], known: dict[str, str]
) -> pl.DataFrame:
    """Adds `path`, and makes `other` a whole name: relative names count from where the process began.

    known: file hash -> path. A hash that it lacks names no file.
    """
    folders = {process.pid: process.folder for process in reversed(list(processes))}
    named = set(known.values())

    def find_path(pid: int, name: str | None) -> str | None:
        if name is None or (name not in named and _BARE_HASH.fullmatch(name)):
            return None
        return os.path.normpath(os.path.join("/", folders.get(pid, ""), name))

    for column, made in (("file", "path"), ("other", "other")):
        calls = calls.with_columns(pl.col(column).cast(pl.String).alias("named"))
        pairs = calls.select("pid", "named").unique()
        found = [find_path(pid, name) for pid, name in pairs.iter_rows()]
        calls = calls.join(
            pairs.with_columns(pl.Series("in_full", found, pl.String)),
            on=["pid", "named"], how="left", maintain_order="left", nulls_equal=True,
        )  # fmt: skip
        calls = calls.with_columns(pl.col("in_full").alias(made)).drop("named", "in_full")
    return calls


def _split_block(
    block: EventBlock, reader: EventBlockReader, clock: Clock, positions: FilePositions | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The calls of a block (columns CALL) and its spans (columns SPAN), times corrected.

    positions: of this file up to here; then calls also have the columns DETAILS.
    """
    _, moved = count_moved_bytes(block, reader.strings)
    columns = _COLUMNS if positions is None else (*_COLUMNS, "count", "args")
    events = make_event_frame(block, reader.strings, reader.paths, 0, columns)
    rows = block.is_event()
    if positions is not None:
        events = _add_details(events, block, moved, reader.strings, positions)
    mapped = read_argument(block, ID["mapped"]) > 0
    events = events.with_columns(pl.Series("moved", moved[rows]), pl.Series("mapped", mapped[rows]))
    meaning = classify(events).with_columns(pl.col("cat", "name").cast(pl.Categorical))
    events = events.join(
        meaning.with_columns(pl.col("kind", "part", "op").cast(pl.Categorical)),
        on=["cat", "name"], how="left", maintain_order="left",
    )  # fmt: skip
    events = clock.correct_frame(events).with_columns(
        pl.col("tid", "pid").cast(pl.UInt32), pl.col("bytes").clip(-MAX_BYTES, MAX_BYTES)
    )
    is_call = pl.col("cat").is_in(CALLS)
    data = pl.col("op").is_in(["read", "write"])
    size = pl.when(data).then("moved")
    size = size.when(pl.col("op") == "seek").then(pl.col("ret"))
    calls = events.filter(is_call).with_columns(
        size.alias("size"), (pl.col("ret") < 0).fill_null(False).alias("failed")
    )
    chosen = CALL if positions is None else (*CALL, *DETAILS[:-1])
    also = () if positions is None else ("offset",)
    return calls.select(chosen), events.filter(~is_call).select(*SPAN, *also)


def _add_details(
    events: pl.DataFrame,
    block: EventBlock,
    moved: np.ndarray,
    strings: StringTable,
    positions: FilePositions,
) -> pl.DataFrame:
    """Adds those of DETAILS that are not columns of events yet.

    events: the rows of the block's events. moved: bytes, of every row.
    """
    rows = block.is_event()
    followed = pl.Series("followed", positions.find_offsets(block, strings, moved)[rows])
    found = [
        pl.Series(name, read_argument(block, strings.add(key), _NOT_THERE)[rows])
        for name, key in _INTEGERS.items()
    ]
    events = events.with_columns(followed, *found, pl.col("args").str.extract(_OTHER_FILE).alias("other"))
    return events.with_columns(
        *(pl.when(pl.col(name) != _NOT_THERE).then(name).alias(name) for name in _INTEGERS),
        pl.coalesce("offset", pl.when(pl.col("followed") >= 0).then("followed")).alias("position"),
    )


def _make_empty(columns: Iterable[str]) -> pl.DataFrame:
    """A table without rows that can be joined to those of `_split_block`."""
    types = dict.fromkeys(("cat", "name", "op", "kind", "part", "file", "split"), pl.Categorical)
    types |= dict.fromkeys(("pid", "tid"), pl.UInt32)
    types |= {"failed": pl.Boolean, "value": pl.Float64, "mapped": pl.Boolean}
    types |= dict.fromkeys(("args", "other"), pl.String)
    return pl.DataFrame(schema={name: types.get(name, pl.Int64) for name in columns})
