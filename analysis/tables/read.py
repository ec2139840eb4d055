"""The trace files of one rank -> two lean tables: intercepted calls, and everything else."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from analysis.trace.arguments import count_moved_bytes, read_argument
from analysis.trace.classify import CALLS, classify
from analysis.trace.clocks import Clock
from analysis.trace.columns import make_event_frame
from analysis.trace.events import TraceReader
from analysis.trace.process import TracedProcess
from analysis.trace.scan import MAX_BYTES, EventBlock
from analysis.trace.source import BlockReader, TraceSource
from analysis.trace.strings import ID, StringTable

_COLUMNS = (
    "pid", "tid", "cat", "name", "ts", "dur", "file", "offset", "ret", "bytes",
    "epoch", "step", "batch", "value", "split",
)  # fmt: skip
CALL = ("pid", "tid", "cat", "name", "op", "ts", "dur", "file", "offset", "size", "failed")
SPAN = (
    "pid", "tid", "cat", "name", "kind", "op", "ts", "dur", "file", "bytes",
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


def read_rank(
    rank: int, files: Iterable[Path], clock: Clock | None = None, source: TraceSource | None = None
) -> RankEvents:
    """Calls and spans of one rank, from all its trace files.

    clock: what corrects its times. source: a reading that several analyses share, else these files.
    """
    calls, spans, found = [], [], []
    strings, paths, clock = StringTable(), {}, clock or Clock()
    for path in files:
        reader = source.open_reader(path, strings, paths) if source else TraceReader(path, strings, paths)
        strings, paths = reader.strings, reader.paths
        found.append(reader.process)
        pids: set[int] = set()
        for block in reader:
            pids |= _list_pids(block)
            one, other = _split_block(block, reader, clock)
            calls.append(one)
            spans.append(other)
        reader.process.pids = max(1, len(pids))
    known = {strings.text(given): strings.text(path) for given, path in paths.items()}
    return RankEvents(
        rank,
        found,
        _resolve_files(pl.concat(calls, rechunk=False) if calls else _make_empty(CALL), known),
        _resolve_files(pl.concat(spans) if spans else _make_empty(SPAN), known),
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
    texts = events["file"].unique().cast(pl.String)
    if not any(text in known for text in texts):
        return events
    return events.with_columns(pl.col("file").cast(pl.String).replace(known).cast(pl.Categorical))


def _split_block(block: EventBlock, reader: BlockReader, clock: Clock) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The calls of a block (columns CALL) and its spans (columns SPAN), times corrected."""
    _, moved = count_moved_bytes(block, reader.strings)
    events = make_event_frame(block, reader.strings, reader.paths, 0, _COLUMNS)
    rows = block.is_event()
    mapped = read_argument(block, ID["mapped"]) > 0
    events = events.with_columns(pl.Series("moved", moved[rows]), pl.Series("mapped", mapped[rows]))
    meaning = classify(events).with_columns(pl.col("cat", "name").cast(pl.Categorical))
    events = events.join(
        meaning.with_columns(pl.col("kind", "op").cast(pl.Categorical)),
        on=["cat", "name"], how="left", maintain_order="left",
    )  # fmt: skip
    events = clock.correct_frame(events).with_columns(
        pl.col("tid", "pid").cast(pl.UInt32), pl.col("bytes").clip(-MAX_BYTES, MAX_BYTES)
    )
    is_call = pl.col("cat").cast(pl.String).is_in(CALLS)
    data = pl.col("op").cast(pl.String).is_in(["read", "write"])
    size = pl.when(data).then("moved")
    size = size.when(pl.col("op") == "seek").then(pl.col("ret"))
    calls = events.filter(is_call).with_columns(
        size.alias("size"), (pl.col("ret") < 0).fill_null(False).alias("failed")
    )
    return calls.select(CALL), events.filter(~is_call).select(SPAN)


def _make_empty(columns: Iterable[str]) -> pl.DataFrame:
    """A table without rows that can be joined to those of `_split_block`."""
    types = dict.fromkeys(("cat", "name", "op", "kind", "file", "split"), pl.Categorical)
    types |= dict.fromkeys(("pid", "tid"), pl.UInt32)
    types |= {"failed": pl.Boolean, "value": pl.Float64, "mapped": pl.Boolean}
    return pl.DataFrame(schema={name: types.get(name, pl.Int64) for name in columns})
