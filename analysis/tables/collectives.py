"""Who waited for whom: the ranks' spans of one collective, joined; the rank that comes last decides.

In: a row per rank and collective (as `list_collectives` of times.py makes them). Out: the same rows with how
long each waited. What a rank waits before the last one has come is waiting for it; what follows is transfer.
A wait that is shorter than the clocks' error is neither.
"""

import polars as pl

from analysis.trace.clocks import make_clocks
from analysis.trace.process import TracedProcess

UNKNOWN_ERROR_US = 1000  # of the clocks of two hosts, where nothing compares them


def join_collectives(
    table: pl.DataFrame, launches: list[list[TracedProcess]], *more_keys: str
) -> pl.DataFrame:
    """Adds `wait` (us), `sure` (whether it is longer than the clocks' error), `last_rank` and `latest`.

    Collectives that not all ranks of their launch have are left out, and all where there is one rank.
    launches: the processes of each launch. more_keys: columns that tell steps apart besides epoch and step.
    """
    keys = ["launch", *more_keys, "epoch", "step", "name", "nth"]
    ranks = pl.DataFrame(
        {"launch": range(1, len(launches) + 1), "ranks": [len({p.rank for p in job}) for job in launches]},
        schema={"launch": pl.Int32, "ranks": pl.UInt32},
    )
    last = table.group_by(keys).agg(
        pl.len().alias("there"), pl.col("ts").max().alias("latest"),
        pl.col("rank").sort_by("ts", "rank").last().alias("last_rank"),
    )  # fmt: skip
    last = last.join(ranks, on="launch").filter((pl.col("there") == pl.col("ranks")) & (pl.col("ranks") > 1))
    end = pl.col("ts") + pl.col("dur")
    joined = table.join(last, on=keys, nulls_equal=True).with_columns(
        (pl.min_horizontal("latest", end) - pl.col("ts")).clip(0).alias("wait")
    )
    return joined.with_columns((pl.col("wait") > estimate_clock_error(launches)).alias("sure"))


def estimate_clock_error(launches: list[list[TracedProcess]]) -> int:
    """How far the times of two ranks may be wrong against each other, in us: 0 on one host."""
    worst = 0
    for job in launches:
        first, known = min(job, key=lambda p: p.rank).host, make_clocks(job)
        clocks = {p.host: known[p.path] for p in job if p.host != first}
        errors = sorted(clock.error if clock.by else UNKNOWN_ERROR_US for clock in clocks.values())
        worst = max(worst, sum(errors[-2:]))  # between two hosts both errors add up
    return worst
