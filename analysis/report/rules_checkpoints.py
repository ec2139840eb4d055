"""Rules over checkpoints: how long the training pauses, how uneven they are, and how they are written."""

import numpy as np
import polars as pl

from analysis.report.facts import US, Facts, Finding, count_most_seconds, show_longest
from analysis.report.page import format_seconds, format_size
from analysis.tables import device, progress
from analysis.tables.calls import is_below

PAUSE = 0.02  # of the run
TAIL, LEAST_CHECKPOINTS, TAIL_PART = 2.0, 4, 0.01  # times the median; checkpoints; of the run, longer than it
PIECE = 1 << 20  # bytes of a write
PIECES, PIECES_TIME = 1000, 0.2  # writes below it; of the time of all writes of checkpoints


def find_checkpoint_cost(f: Facts) -> Finding | None:
    """Training pauses while checkpoints are written or loaded."""
    stall = f.find_longest_phase("checkpoint")
    if stall < PAUSE * f.average_seconds("wall_s"):
        return None
    written = progress.list_checkpoints(f.joined).filter(pl.col("name") == "write")
    moved, spent = int(written["bytes"].sum()), float(written["seconds"].sum())
    speed = (
        f": {format_size(moved)} written at {moved / spent / 1e6:.0f} MB/s per rank. {device.WRITE_RATES}"
        if moved and spent
        else "."
    )
    text = f"Training pauses for {format_seconds(stall)} while checkpoints are saved or loaded{speed}"
    remedy = "Save less often, or to faster storage; or write in the background."
    if f.is_own_run:  # it does write in the background: what is left is copying, and waiting for the last one
        remedy = "Save less often (--checkpoint_every_steps), or put --checkpoint_dir on faster storage."
    evidence: dict[str, object] = {"stall_s": stall, "bytes": moved}
    marks = f.joined["marks"].filter(pl.col("cat") == "checkpoint").filter(pl.col("name") != "write")
    return Finding("checkpoint", stall, text, remedy, evidence | _show_mark(marks))


def _show_mark(marks: pl.DataFrame) -> dict[str, object]:
    if not len(marks):
        return {}
    top = marks.sort("dur", "ts").row(-1, named=True)
    return {"ts": int(top["ts"]), "dur_us": int(top["dur"])}


def time_checkpoints(f: Facts) -> pl.DataFrame:
    """A row per checkpoint: how long it takes from its `save` to the end of its last write, on the slowest
    rank; and when the `save` began."""
    marks = f.joined["marks"].filter(pl.col("cat") == "checkpoint")
    keys = ["launch", "rank"]
    saves = marks.filter(pl.col("name") == "save").sort("ts").select(*keys, "ts", "dur")
    saves = saves.with_columns(
        pl.int_range(pl.len()).over(keys).alias("nth"), (pl.col("ts") + pl.col("dur")).alias("saved")
    )
    writes = marks.filter(pl.col("name") == "write").sort("ts")
    writes = writes.select(*keys, "ts", (pl.col("ts") + pl.col("dur")).alias("written"))
    of_save = writes.join_asof(saves.select(*keys, "ts", "nth"), on="ts", by=keys, check_sortedness=False)
    last = of_save.drop_nulls("nth").group_by(*keys, "nth").agg(pl.col("written").max())
    took = pl.max_horizontal("saved", "written") - pl.col("ts")
    found = saves.join(last, on=[*keys, "nth"], how="left").with_columns(took.alias("us"))
    found = found.group_by("launch", "nth").agg(pl.col("us").max(), pl.col("ts").sort_by("us").last())
    return found.sort("launch", "nth")


def find_checkpoint_tail(f: Facts) -> Finding | None:
    """One checkpoint takes much longer than they usually do: it may not be done when the job must end."""
    table = time_checkpoints(f)
    if table.height < LEAST_CHECKPOINTS:
        return None
    top = table.sort("us", "ts").row(-1, named=True)
    usual = float(np.median(table["us"].to_numpy())) / 1e6
    longest = top["us"] / 1e6
    if longest < TAIL * usual or longest - usual < TAIL_PART * f.find_wall_seconds():
        return None
    late = float((table["us"] / 1e6 - usual).clip(0).sum())
    gain = min(late, f.find_longest_phase("checkpoint"))
    text = (
        f"The slowest of {table.height} checkpoints takes {format_seconds(longest)} from its copy to its "
        f"last byte, half of them {format_seconds(usual)} or less: one that is saved when the job's time "
        "runs out may not be done in time."
    )
    remedy = f"Leave more than {format_seconds(longest)} for it at the end of the job, or save elsewhere."
    if f.is_own_run:
        remedy = (
            f"Give --stop_before_walltime more than {max(1, round(longest))} seconds, or put "
            "--checkpoint_dir on storage that is not shared."
        )
    evidence = {"checkpoints": table.height, "longest_s": longest, "median_s": usual}
    evidence |= {"ts": int(top["ts"]), "dur_us": int(top["us"])}
    return Finding("checkpoint_tail", gain, text, remedy, evidence)


def find_checkpoint_fragments(f: Facts) -> Finding | None:
    """Checkpoints are written in small pieces."""
    every = f.joined["ops"].filter((pl.col("op") == "write") & (pl.col("layer") == "calls"))
    every = every.filter(pl.col("file").is_in(f.checkpoint_files.implode()))
    own = every.filter(is_below(PIECE))
    number, moved, spent = int(own["count"].sum()), int(own["bytes"].sum()), float(own["us"].sum()) / 1e6
    if number < PIECES or spent < PIECES_TIME * float(every["us"].sum()) / 1e6:
        return None
    large = max(1, round(moved / (8 << 20)))
    saved = count_most_seconds(own, US * (1 - large / number))
    gain = min(saved, f.find_longest_phase("checkpoint"))
    files = own["file"].n_unique()
    text = (
        f"Checkpoints are written in {number:,} pieces of less than {format_size(PIECE)}, "
        f"{format_size(moved / number)} on average, to {files:,} file{'s' if files > 1 else ''}; they take "
        f"{format_seconds(spent)}, added up over the ranks."
    )
    remedy = "Put the tensors of a rank into one file, and write it in pieces of some MB."
    if f.is_own_run:
        remedy = (
            "Save less often (--checkpoint_every_steps), or to storage for small writes (--checkpoint_dir)."
        )
    evidence = {"writes": number, "bytes": moved, "files": files, "seconds_all_ranks": spent}
    return Finding("checkpoint_fragments", gain, text, remedy, evidence | show_longest(own))
