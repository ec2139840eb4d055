"""Accelerator utilisation as DLIO and MLPerf Storage define it, of one rank by epoch.

What the steps of an epoch computed, without the first, over the time from the end of the first one's
computing to the end of the last one's; checkpoints count as no time, since they end what DLIO calls a block.

In: a rank's events. Out: a row per epoch: rank, epoch (counted from 1), steps, compute_us, time_us.
"""

import polars as pl

from analysis.tables.read import RankEvents
from analysis.tables.times import find_stretches, measure_covered_time
from analysis.trace.classify import EPOCH, EVALUATION

TABLE = "utilisation"
SCHEMA = {
    "rank": pl.Int32,
    "epoch": pl.Int64,
    "steps": pl.Int64,
    "compute_us": pl.Int64,
    "time_us": pl.Int64,
}
COMPUTING = ("ai_framework", "compute")  # categories: of DLIO until 2.0, and of its main branch


def measure_utilisation(events: RankEvents) -> pl.DataFrame:
    pid, tid = events.main_thread
    main = events.spans.filter((pl.col("pid") == pid) & (pl.col("tid") == tid))
    end = (pl.col("ts") + pl.col("dur")).alias("end")
    evaluations = find_stretches(main, pl.col("part") == EVALUATION)
    pauses = find_stretches(main, pl.col("cat") == "checkpoint")
    computes = (
        main.filter((pl.col("kind") == "compute") & pl.col("cat").is_in(COMPUTING))
        .sort("ts", "dur", descending=[False, True]).select("ts", "dur", end)
        # not what is inside another one
        .filter((pl.col("ts") >= pl.col("end").cum_max().shift(1)).fill_null(True))
    )  # fmt: skip
    rows = []
    epochs = main.filter(pl.col("part") == EPOCH).sort("ts").select("ts", end)
    for number, (begin, last) in enumerate(epochs.iter_rows(), 1):
        steps = computes.filter((pl.col("ts") >= begin) & (pl.col("end") <= last))
        inside = measure_covered_time(evaluations, steps["end"].to_numpy())
        before = measure_covered_time(evaluations, steps["ts"].to_numpy())
        steps = steps.filter(pl.Series(inside == before))
        if len(steps) < 2:
            continue
        ends = steps["end"].to_numpy()[[0, -1]]
        paused = int(measure_covered_time(pauses, ends)[1] - measure_covered_time(pauses, ends)[0])
        computed = int(steps["dur"][1:].sum())
        rows.append((events.rank, number, len(steps), computed, int(ends[1] - ends[0]) - paused))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def find_mean_utilisation(table: pl.DataFrame) -> float | None:
    """The mean over epochs and ranks, from 0 to 1; None where no epoch has two steps."""
    shares = table.filter(pl.col("time_us") > 0).select(pl.col("compute_us") / pl.col("time_us"))
    return float(shares.to_series().clip(0, 1).mean()) if len(shares) else None  # type: ignore[arg-type]
