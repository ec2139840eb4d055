"""Rules over time: waiting, slow ranks, start-up, checkpoints, late steps."""

import polars as pl

from analysis.report.facts import TABLE_FILE, TRAIN, Facts, Finding
from analysis.report.page import format_seconds, format_size
from analysis.tables import progress


def find_waiting(f: Facts) -> Finding | None:
    """The main thread waits for data: in data/wait, or reading itself."""
    wall = f.mean_seconds("wall_s", *TRAIN)
    stall = f.mean_seconds("wait_s", *TRAIN) + f.mean_seconds("io_s", *TRAIN)
    if wall <= 0 or stall < 0.05 * wall:
        return None
    evidence: dict[str, object] = {"stall_s": stall, "wall_s": wall}
    name, size_text = "its data", ""
    remedy = "Let the loader prefetch further ahead, or put the data on faster storage."
    reads = f.data_reads(*TRAIN).sort("seconds", descending=True)
    if len(reads):
        name = str(reads["file"][0])
        mean = float(reads["bytes"].sum()) / max(1, int(reads["count"].sum()))
        size_text = f"; a read moves {format_size(mean)} on average"
        evidence |= {"file": name, "mean_read_bytes": mean}
        if name.endswith(TABLE_FILE):
            remedy = "These are tables in files: raise --cache_memory_budget_mb."
        elif mean < 1 << 20:
            remedy = f.advise_larger_reads(mean)
        elif f.is_own_run:
            remedy = "Raise --prefetch_batches, stage the data on the node, or hold it in memory."
    text = (
        f"{stall / wall:.0%} of the training's time is waiting for data, most of all for {name}{size_text}."
    )
    return Finding("waiting", stall, text, remedy, evidence)


def find_slow_rank(f: Facts) -> Finding | None:
    """One rank's own part of a step is longer than the others', who wait for it in communication."""
    if f.ranks.height < 2:
        return None
    late = f.ranks.sort("own_ms", descending=True).row(0, named=True)
    others = f.ranks.filter(pl.col("rank") != late["rank"])
    usual = {c: float(others[c].to_numpy().mean()) for c in ("compute_s", "wait_s", "io_s", "copy_s")}
    own = float(others["own_ms"].quantile(0.5) or 0.0)
    if own <= 0 or late["own_ms"] < 1.25 * own:
        return None
    steps = progress.list_steps(f.joined)
    lost = float((steps["own_us"] - steps["own_mean_us"]).sum()) / 1e6
    what = max(usual, key=lambda c: late[c] - usual[c]).removesuffix("_s")
    host = next((p.host for p in f.joined.processes if p.rank == late["rank"]), "")
    text = (
        f"Rank {late['rank']}{f' on {host}' if host else ''} needs {late['own_ms']:.3g} ms for its own "
        f"part of a step, the others {own:.3g} ms: mostly more {what}. The others wait for it in "
        "communication."
    )
    remedy = {
        "wait": "Look at that host's storage and at which files this rank reads.",
        "io": "Look at that host's storage and at which files this rank reads.",
    }.get(what, "Look at that host's processor and neighbours; balance the plan if it gives this rank more.")
    evidence = {"rank": late["rank"], "own_ms": late["own_ms"], "others_ms": own, "mostly": what}
    return Finding("slow_rank", lost, text, remedy, evidence)


def find_slow_startup(f: Facts) -> Finding | None:
    """The first step comes late."""
    table, wall = progress.list_startup(f.joined), f.mean_seconds("wall_s")
    if not len(table):
        return None
    jobs = f.launches.height
    first = _sum_slowest(table.group_by("launch", "rank").agg(pl.col("seconds").sum()))
    of_parts = table.filter(pl.col("part") != "first step").group_by("launch", "part")
    parts = of_parts.agg(pl.col("seconds").max()).group_by("part").agg(pl.col("seconds").sum())
    if first < 0.1 * wall or not len(parts):
        return None
    part, long = parts.sort("seconds", descending=True).row(0)
    calls = (
        f"; file calls are {format_seconds(f.mean_seconds('io_s', 'startup'))} per rank"
        if f.joined.calls
        else ""
    )
    text = (
        f"{'The first step ends' if jobs == 1 else f'The first steps of {jobs} launches end'} after "
        f"{format_seconds(first)}{'' if jobs == 1 else ' in all'}, {first / wall:.0%} of the run; "
        f"its longest part is {part}, {format_seconds(long)}{calls}."
    )
    remedy = "It is paid once per job: run longer jobs."
    if part == "imports" and f.mean_seconds("io_s", "startup") > 0.2 * long:  # else it is Python's own work
        remedy = "Put the environment on node-local storage; it is paid once per job, so run longer jobs."
    evidence = {"first_step_s": first, "part": part, "part_s": long}
    return Finding("startup", long, text, remedy, evidence)


def _sum_slowest(table: pl.DataFrame) -> float:
    """Of each launch the rank that took longest, added up."""
    return float(table.group_by("launch").agg(pl.col("seconds").max())["seconds"].sum())


def find_checkpoint_cost(f: Facts) -> Finding | None:
    """Training pauses while checkpoints are written or loaded."""
    stall = f.longest_phase_seconds("checkpoint")
    if stall < 0.02 * f.mean_seconds("wall_s"):
        return None
    written = progress.list_checkpoints(f.joined).filter(pl.col("name") == "write")
    moved, spent = int(written["bytes"].sum()), float(written["seconds"].sum())
    speed = (
        f": {format_size(moved)} written at {moved / spent / 1e6:.0f} MB/s per rank"
        if moved and spent
        else ""
    )
    text = f"Training pauses for {format_seconds(stall)} while checkpoints are saved or loaded{speed}."
    remedy = "Save less often, or to faster storage; or write in the background."
    return Finding("checkpoint", stall, text, remedy, {"stall_s": stall, "bytes": moved})


def find_late_steps(f: Facts) -> Finding | None:
    """Few steps that take much longer than the others."""
    table = f.joined["steps"]
    if len(table) < 20:
        return None
    late = progress.find_late_steps(f.joined, times=3.0, n=len(table))
    first = table.group_by("launch", "rank").agg(pl.col("ts").min())["ts"]
    late = late.filter(~pl.col("ts").is_in(first.to_list()))  # a first step warms up
    if not len(late):
        return None
    by_step = late.group_by("launch", "epoch", "step").agg(pl.col("excess_us").max(), pl.col("why").first())
    lost = float(by_step["excess_us"].sum()) / 1e6
    if lost < 0.02 * f.mean_seconds("wall_s", *TRAIN):
        return None
    why = by_step.group_by("why").agg(pl.col("excess_us").sum()).sort("excess_us", descending=True)["why"][0]
    worst = late.row(0, named=True)
    text = (
        f"{len(by_step)} steps take more than three times the median, {format_seconds(lost)} in all; "
        f"the extra time is mostly {why}. The longest is step {worst['step']} on rank {worst['rank']}, "
        f"{format_seconds(worst['wall_us'] / 1e6)}."
    )
    evidence = {"steps": len(by_step), "mostly": why, "longest": worst["step"], "rank": worst["rank"]}
    return Finding(
        "late_steps", lost, text, "The table of late steps has links that show them in Perfetto.", evidence
    )
