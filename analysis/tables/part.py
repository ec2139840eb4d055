"""A part of one rank's events: what went on during some steps, an epoch or a stretch of time.

What reaches beyond the part is cut off at its ends; the bytes of such a call stay whole.
"""

from dataclasses import replace

import polars as pl

from analysis.tables.read import RankEvents, tell_steps
from analysis.trace.selection import Selection

_END = pl.col("ts") + pl.col("dur")


def cut_events(events: RankEvents, selection: Selection) -> RankEvents:
    """selection: its steps and epoch are looked for on this rank; its seconds are `windows` already."""
    first, last = selection.windows[0] if selection.windows else (0, 1 << 62)
    chosen, is_step = pl.lit(True), tell_steps(events.spans)
    if selection.steps is not None:
        chosen &= pl.col("step").is_between(*selection.steps)
    if selection.epoch is not None:
        chosen &= pl.col("epoch") == selection.epoch
    if selection.steps is not None or selection.epoch is not None:
        steps = events.spans.filter(is_step & chosen).select(pl.col("ts").min(), _END.max().alias("end"))
        begin, end = steps.row(0)
        if begin is None:
            return replace(events, calls=events.calls.clear(), spans=events.spans.clear())
        first, last = max(first, begin), min(last, end)
    whole_steps = ~is_step | (chosen.fill_null(False) & (pl.col("ts") >= first) & (last >= _END))
    long = (pl.col("dur") >= selection.min_us) | (pl.col("cat") == "counter")
    return replace(
        events,
        calls=_cut(events.calls.filter(long), first, last),
        spans=_cut(events.spans.filter(long & whole_steps), first, last),
    )


def _cut(events: pl.DataFrame, first: int, last: int) -> pl.DataFrame:
    """What begins or goes on between these times (us), and no more of it."""
    inside = events.filter((pl.col("ts") < last) & ((pl.col("ts") >= first) | (first < _END)))
    begin, end = pl.col("ts").clip(first), _END.clip(upper_bound=last)
    return inside.with_columns(begin.alias("ts"), (end - begin).alias("dur"))
