"""The kernel's counters of one rank (docs/traces.md), cut into the phases of its run."""

import numpy as np
import polars as pl

from analysis.tables.read import RankEvents
from analysis.tables.times import Windows
from analysis.trace.classify import KERNEL_COUNTERS

COUNTERS = {  # in the trace -> in the table
    "read_bytes": "device_read_bytes",
    "write_bytes": "device_write_bytes",
    "cancelled_write_bytes": "cancelled_write_bytes",
    "major_faults": "major_faults",
    "minor_faults": "minor_faults",
    "core_wait_us": "core_wait_us",
}


def measure_device(events: RankEvents, cuts: Windows) -> pl.DataFrame:
    """Table device: a row per phase with what the counters gained in it; null for one that was not recorded.

    What is gained between two samples is spread evenly over the time between them.
    """
    found = events.spans.filter(pl.col("cat") == "counter").select(
        "pid", "ts", "value", pl.col("name").cast(pl.String)
    )
    edges = np.append(cuts.starts, cuts.ends[-1])
    table = pl.DataFrame({"phase": cuts.phase}, schema={"phase": pl.String})
    for name, column in COUNTERS.items():
        own = found.filter((pl.col("name") == KERNEL_COUNTERS + name) & pl.col("value").is_finite())
        gained = np.zeros(len(cuts.phase))
        for _, samples in own.sort("ts").group_by("pid", maintain_order=True):
            values = np.maximum.accumulate(samples["value"].to_numpy())
            gained += np.diff(np.rint(np.interp(edges, samples["ts"].to_numpy(), values)))
        known = pl.Series(column, gained, pl.Float64).cast(pl.Int64, strict=False)
        table = table.with_columns(known if len(own) else pl.lit(None, pl.Int64).alias(column))
    rank = pl.lit(events.rank, pl.Int32).alias("rank")
    sums = [
        pl.when(pl.col(column).is_not_null().any()).then(pl.col(column).sum()).alias(column)
        for column in COUNTERS.values()
    ]
    return table.group_by("phase", maintain_order=True).agg(sums).select(rank, pl.all())
