"""Rules over reads, writes and calls. The gain they promise is never more than the I/O that nothing hides."""

import polars as pl

from analysis.report.facts import TABLE_FILE, TRAIN, Facts, Finding
from analysis.report.page import format_seconds, format_size
from analysis.tables import answers
from analysis.tables.calls import add_latency_us

SMALL = 64 << 10  # a request below this is small
LARGE_REQUEST = 8 << 20  # a request of this size is large enough for common file systems


def find_small_reads(f: Facts) -> Finding | None:
    """Many reads so small that they cost a call each rather than the time to move their bytes."""
    reads = f.after_startup("sizes").filter((pl.col("op") == "read") & (pl.col("bucket") >= 0))
    small = reads.filter(pl.col("bucket") < SMALL.bit_length() - 1)
    calls, moved, spent = (int(small[c].sum()) for c in ("count", "bytes", "us"))
    if calls < 1000 or spent < 0.2 * int(reads["us"].sum()):
        return None
    large = max(1, round(moved / LARGE_REQUEST))
    gain = f.limit_gain(spent / 1e6 * (1 - large / calls))  # a call this small is mostly the cost of a call
    is_small = pl.col("mean_bytes") < SMALL
    files = f.reads.filter(is_small).sort("count", descending=True)
    name = files["file"][0] if len(files) and 2 * files["count"][0] > calls else None
    text = (
        f"{calls:,} reads are smaller than {format_size(SMALL)}: {format_size(moved / calls)} on average"
        f"{f', most of them of {name}' if name else ''}. They take {format_seconds(spent / 1e6)}, "
        f"added up over the ranks; {large:,} large reads would bring the same bytes."
    )
    evidence = {"reads": calls, "bytes": moved, "seconds_all_ranks": spent / 1e6, "file": name}
    remedy = "Most of them are not of the data: programs are read from there, or files of other kinds."
    if 2 * int(f.data_reads().filter(is_small)["count"].sum()) >= calls:
        remedy = f.advise_larger_reads(moved / calls)
    return Finding("small_reads", gain, text, remedy, evidence)


def find_mapped_files(f: Facts) -> Finding | None:
    """Files that the application reads and no call touches: page faults, seen only as slow spans."""
    reads = f.after_startup("ops").filter((pl.col("layer") == "spans") & (pl.col("op") == "read"))
    if not len(reads):
        return _mapped_by_option(f)
    if f.joined.calls == 0:
        return None
    moved, spent = int(reads["bytes"].sum()), float(reads["us"].sum()) / 1e6
    rate, gain = moved / max(spent, 1e-9) / 1e6, f.limit_gain(spent)
    if rate > 2000 or gain < 0.02 * f.mean_seconds("wall_s", "train", "run", "preprocess"):
        return None
    slow = reads.group_by("file").agg(pl.col("us").sum()).sort("us", descending=True)["file"][0]
    text = (
        f"{format_size(moved)} are read without any call, at {rate:.0f} MB/s, most of the time in {slow}: "
        "a mapped file that is not in memory comes in by page faults, a few pages at a time."
    )
    remedy = "Read the files instead of mapping them, or advise the kernel to read ahead."
    if f.is_own_run:
        remedy = "Leave out --mmap_mode (a streamed source reads ahead), or read the files once beforehand."
    return Finding("mapped", gain, text, remedy, {"bytes": moved, "MB_per_s": rate, "file": slow})


def _mapped_by_option(f: Facts) -> Finding | None:
    """The trainer's mapped source has no spans of its reads: its batches take long to assemble."""
    data = f.config.get("data", {})
    assembled = f.joined["spans"].filter((pl.col("cat") == "data") & (pl.col("name") == "assemble"))
    stall, wall = f.mean_seconds("wait_s", *TRAIN), f.mean_seconds("wall_s", *TRAIN)
    if (
        not (data.get("mmap_mode") or data.get("source") == "mmap")
        or not len(assembled)
        or stall < 0.02 * wall
    ):
        return None
    usual, late = (float(assembled[c].to_numpy().max()) / 1e6 for c in ("p50_us", "p99_us"))
    text = (
        "The dataset is mapped, so its bytes come in by page faults, which no trace shows: half of the "
        f"batches are assembled in {format_seconds(usual)}, one in a hundred takes more than "
        f"{format_seconds(late)}, and the training waits {format_seconds(stall)} for them."
    )
    remedy = "Leave out --mmap_mode (a streamed source reads ahead), or read the files once beforehand."
    return Finding("mapped", stall, text, remedy, {"p50_s": usual, "p99_s": late, "stall_s": stall})


def find_metadata_load(f: Facts) -> Finding | None:
    """Opens, seeks, stats and closes that cost as much as the reading."""
    calls = f.after_startup("ops").filter(pl.col("layer") == "calls")
    other = calls.filter(~pl.col("op").is_in(["read", "write"]))
    spent, whole = float(other["us"].sum()) / 1e6, float(calls["us"].sum()) / 1e6
    gain = f.limit_gain(spent)
    if not len(other) or spent < 0.3 * whole or gain < 0.01 * f.mean_seconds("wall_s"):
        return None
    sums = other.group_by("op").agg(pl.col("us").sum(), pl.col("count").sum())
    top = sums.sort("us", descending=True).row(0, named=True)
    number = int(other["count"].sum())
    text = (
        f"{spent / whole:.0%} of the time in file calls moves no byte: {number:,} opens, seeks, stats and "
        f"closes; {top['op']} alone is {top['count']:,} calls and {format_seconds(top['us'] / 1e6)}."
    )
    remedy = "Keep files open, and put many small files into few large ones."
    return Finding(
        "metadata", gain, text, remedy, {"seconds_all_ranks": spent, "calls": number, "top": top["op"]}
    )


def find_random_access(f: Facts) -> Finding | None:
    """Reads that jump about. A fixed skip forward is none: ranks that take turns, each with its rows."""
    sequential, strided, jumps = (int(f.reads[c].sum()) for c in ("sequential", "strided", "random"))
    if jumps < 1000 or jumps < sequential + strided:
        return None
    top = f.reads.sort("random", descending=True).row(0, named=True)
    if top["mean_bytes"] >= LARGE_REQUEST / 8:
        return None
    part = jumps / (jumps + strided + sequential)
    text = (
        f"{part:.0%} of the reads jump to another offset of their file, most of them in {top['file']}, "
        f"{format_size(top['mean_bytes'])} at a time: no file system reads ahead for that."
    )
    remedy = "Shuffle batches, not rows; or read long stretches and shuffle inside them."
    if f.is_own_run and str(top["file"]).endswith(TABLE_FILE):
        remedy = "Raise --cache_memory_budget_mb: more of the tables' rows stay in memory."
    elif f.is_own_run:
        remedy = "Shuffle in memory: --shuffle_batches, or --shuffle_training_set (reads long stretches)."
    evidence = {"random": jumps, "strided": strided, "sequential": sequential, "file": top["file"]}
    return Finding(
        "random_access", f.limit_gain(float(f.reads["seconds"].sum()) * part), text, remedy, evidence
    )


def find_slow_tail(f: Facts) -> Finding | None:
    """A few reads that take most of the time: the storage was busy, or cold."""
    reads = add_latency_us(f.after_startup("latencies").filter(pl.col("op") == "read"))
    if int(reads["count"].sum()) < 1000:
        return None
    middle, last = answers.find_percentiles(reads, "op").select("p50_us", "p99_us").row(0)
    total = pl.col("us") * pl.col("count")
    spent = float(reads.select(total.sum()).item())
    slow = reads.filter(pl.col("us") > last)
    tail, number = float(slow.select(total.sum()).item()), max(1, int(slow["count"].sum()))
    gain = f.limit_gain(tail / 1e6)
    if tail < 0.3 * spent or tail / number < 10 * middle or gain < 0.005 * f.mean_seconds("wall_s"):
        return None
    text = (
        f"The slowest {number:,} reads take {tail / spent:.0%} of the reading time: half of all are done in "
        f"{format_seconds(middle / 1e6)}, these need {format_seconds(tail / number / 1e6)} each."
    )
    remedy = "The storage is shared or cold: stripe the files wider, or stage them on the node."
    return Finding(
        "slow_tail", gain, text, remedy, {"share": tail / spent, "reads": number, "p50_us": middle}
    )


def find_amplified_reads(f: Facts) -> Finding | None:
    """More bytes moved than asked for."""
    table = answers.compare_declared(f.joined).filter(
        (pl.col("op") == "read") & (pl.col("times") > 1.2) & (pl.col("moved") - pl.col("asked") > 1 << 20)
    )
    if not len(table):
        return None
    extra = int((table["moved"] - table["asked"]).sum())
    spent = float((table["us"] * (1 - 1 / table["times"])).sum()) / 1e6
    top = table.row(0, named=True)
    text = (
        f"{format_size(extra)} more are read than the loader asked for; {top['file']} is read "
        f"{top['times']:.1f} times over."
    )
    remedy = "Keep what was read until it is used: whole batches per read, or fewer passes."
    return Finding("amplified", f.limit_gain(spent), text, remedy, {"bytes": extra, "file": top["file"]})


def find_failed_calls(f: Facts) -> Finding | None:
    """Reads or writes that returned an error."""
    bad = f.joined["ops"].filter((pl.col("failed") > 0) & pl.col("op").is_in(["read", "write"]))
    if not len(bad):
        return None
    top = bad.sort("failed", descending=True).row(0, named=True)
    number = int(bad["failed"].sum())
    text = f"{number:,} reads or writes failed, most of them {top['name']} of {top['file']}."
    return Finding("failed", 0.0, text, "Look at that file.", {"calls": number, "file": top["file"]})
