"""Rules over communication: waiting for the slowest rank, and what is left, the transfer.

What of a collective is waiting and what is transfer: analysis/tables/collectives.py.
"""

from dataclasses import dataclass

import polars as pl

from analysis.report.facts import TRAIN, Facts, Finding
from analysis.report.page import format_seconds
from analysis.report.rules_time import find_busy_cores, find_slow_rank
from analysis.tables.collectives import estimate_clock_error, join_collectives

COMMUNICATION = 0.05  # of the training, that is waiting for a rank, or transfer
ALWAYS_LAST = 0.75  # of the waiting, for one rank
CORES_FIRST = "Ranks wait for cores meanwhile: see to that first."


@dataclass(frozen=True)
class Split:
    """Seconds per rank, on average."""

    waiting: float
    transfer: float
    unclear: float  # waits shorter than the clocks' error
    error_us: int
    last: dict[int, float]  # rank -> its share in the waiting of the others
    name: str  # of the collective with most of the waiting
    longest: dict[str, int]  # the slice with the longest wait
    longest_transfer: dict[str, int]


def split_communication(f: Facts) -> Split | None:
    """None where the ranks' spans cannot be joined: one rank, or no steps."""
    table = f.joined["collectives"]
    if table["rank"].n_unique() < 2:
        return None
    joined = join_collectives(table, f.joined.launches)
    if not len(joined):
        return None
    error = estimate_clock_error(f.joined.launches)
    joined = joined.with_columns(
        pl.when("sure").then("wait").otherwise(0).alias("sure"),
        pl.when("sure").then(0).otherwise("wait").alias("unclear"),
        (pl.col("dur") - pl.col("wait")).alias("transfer"),
    )
    number = f.breakdown.height
    sure = int(joined["sure"].sum())
    shares = joined.group_by("last_rank").agg(pl.col("sure").sum()).sort("sure", descending=True)
    names = joined.group_by("name").agg(pl.col("sure").sum()).sort("sure", "name", descending=[True, False])
    return Split(
        sure / 1e6 / number,
        int(joined["transfer"].sum()) / 1e6 / number,
        int(joined["unclear"].sum()) / 1e6 / number,
        error,
        {rank: us / max(1, sure) for rank, us in shares.iter_rows()},
        str(names["name"][0]),
        _show_last(joined.sort("sure", "ts")),
        _show_last(joined.sort("transfer", "ts")),
    )


def _show_last(joined: pl.DataFrame) -> dict[str, int]:
    """The last row, as evidence."""
    top = joined.row(-1, named=True)
    return {"ts": int(top["ts"]), "dur_us": int(top["dur"])}


def find_waiting_for_ranks(f: Facts) -> Finding | None:
    """The ranks wait in collectives for the one that comes last."""
    split, wall = split_communication(f), f.average_seconds("wall_s", *TRAIN)
    if split is None or wall <= 0 or split.waiting < COMMUNICATION * wall:
        return None
    rank, share = next(iter(split.last.items()))
    cpu = f.is_option("launch.device", "cpu")
    if share >= ALWAYS_LAST:
        who = f"for {share:.0%} of it rank {rank} is the last to come"
        remedy = "Find out what that rank does longer: the table of ranks says of which kind."
        slow = find_slow_rank(f)
        if slow and slow.evidence["rank"] == rank and slow.evidence["mostly"] in ("wait", "io"):
            remedy = "That rank waits for its data meanwhile: make those come in faster."
        elif f.is_own_run:
            remedy += " A plan of your own (--sharding_file) can take tables from it."
    else:
        who = f"no rank is always the last (most often rank {rank}, for {share:.0%} of that time)"
        remedy = "The ranks disturb each other or their work varies: give each rank cores of its own."
        if f.is_own_run and cpu:
            remedy = (
                "The ranks disturb each other or their work varies: start fewer ranks on a node (NPROC), or "
                "try DLRM_THREADS=1."
            )
    if find_busy_cores(f):
        remedy = CORES_FIRST
    text = (
        f"{split.waiting / wall:.0%} of the training, {format_seconds(split.waiting)} per rank, the ranks "
        f"wait in communication for the slowest of them, most of all in {split.name}; {who}. The transfer "
        f"takes {format_seconds(split.transfer)}{_say_unclear(split)}."
    )
    evidence = {"waiting_s": split.waiting, "transfer_s": split.transfer, "unclear_s": split.unclear,
                "clock_error_us": split.error_us, "rank": rank, "share": share}  # fmt: skip
    return Finding("waiting_for_ranks", split.waiting, text, remedy, evidence | split.longest)


def find_transfer(f: Facts) -> Finding | None:
    """Exchanging data takes long, once all ranks are there."""
    split, wall = split_communication(f), f.average_seconds("wall_s", *TRAIN)
    if split is None or wall <= 0 or split.transfer < COMMUNICATION * wall:
        return None
    busy = find_busy_cores(f)
    what = "data go from rank to rank" + (", or a rank waits for a core" if busy else "")
    text = (
        f"{split.transfer / wall:.0%} of the training, {format_seconds(split.transfer)} per rank, is "
        f"communication after the last rank has come: {what}{_say_unclear(split)}."
    )
    remedy = "Send less, or less often: larger batches, smaller types; or overlap it with compute."
    if f.is_own_run:
        batch = "--batch_size" if f.is_own_dlrm else "--train_batch_size"
        remedy = f"A larger {batch} makes fewer exchanges."
        if f.is_option("launch.device", "cpu") and f.is_option("run.cpu_fast_path", False):
            remedy = "Leave out --no-cpu_fast_path: ranks of one host then exchange through shared memory."
    if busy:
        remedy = CORES_FIRST
    compute = f.average_seconds("compute_s", *TRAIN)
    evidence = {"transfer_s": split.transfer, "waiting_s": split.waiting, "unclear_s": split.unclear,
                "clock_error_us": split.error_us}  # fmt: skip
    gain = min(split.transfer, compute)  # at most so much can happen behind compute
    return Finding("transfer", gain, text, remedy, evidence | split.longest_transfer)


def _say_unclear(split: Split) -> str:
    if not split.error_us or split.unclear < 0.001:
        return ""
    return (
        f" (the hosts' clocks may be wrong by {format_seconds(split.error_us / 1e6)}, so "
        f"{format_seconds(split.unclear)} more may be either)"
    )
