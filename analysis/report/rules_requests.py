"""Rules over single requests: their size, their order, their alignment, and how long the slowest take.

What is said of small, jumping or slow requests is summed up from those requests alone: means over all of a
file's or a rank's hide them. Files of programs are left out, and each file is in one rule only: one that is
read at random is not reported for small reads too. The gain that they promise is never more than the I/O that
nothing hides.
"""

import polars as pl

from analysis.report.facts import (
    LARGE_JUMP,
    MATTERS,
    US,
    Facts,
    Finding,
    advise_tables_in_files,
    show_longest,
)
from analysis.report.page import format_seconds, format_size
from analysis.tables.calls import BLOCK, MAPPED, SMALL_REQUEST, TABLE_FILE, add_latency_us, is_below

LARGE_REQUEST = 8 << 20  # a request of this size is large enough for common file systems
SMALL_COUNT = 1000
SMALL_TIME = 0.2  # of the time of all requests of its kind
MISALIGNED = 0.1  # of the requests; and the blocks touched in vain, of those touched
MORE_CALLS = 0.1  # calls of one kind, over those of the other
STDIO_SHARE, STDIO_BYTES = 0.1, 1 << 20  # of the bytes; at least
SLOW_PART, SLOW_TIMES, SLOW_TIME = 0.01, 10, 0.3  # of the reads; the median of their size; of the time
SLOW_LEAST = 1000  # reads


def find_small_reads(f: Facts) -> Finding | None:
    """Many reads so small that they cost a call each rather than the time to move their bytes."""
    found = _find_small(f, "read")
    if found is None:
        return None
    small, gain = found
    calls, moved, spent = _sum_calls(small)
    file, tables, ranks = _name_top(small)
    shared = f", which {ranks} ranks share" if file and ranks > 1 else ""
    text = (
        f"{calls:,} reads are smaller than {format_size(SMALL_REQUEST)}: {format_size(moved / calls)} on "
        f"average{f', most of them of {file}{shared}' if file else ''}. They take {format_seconds(spent)}, "
        f"added up over the ranks; {max(1, round(moved / LARGE_REQUEST)):,} large reads would bring the same "
        f"bytes.{_say_hidden(gain)}"
    )
    remedy = advise_tables_in_files(f) if tables else "Read larger pieces and hand them out from memory."
    data = f.pick_data_reads()["file"].implode()
    if not tables and 2 * int(small.filter(pl.col("file").is_in(data))["count"].sum()) >= calls:
        remedy = f.advise_larger_reads(moved / calls)
    evidence = {"reads": calls, "bytes": moved, "seconds_all_ranks": spent, "file": file}
    return Finding("small_reads", gain, text, remedy, evidence | show_longest(small))


def find_small_writes(f: Facts) -> Finding | None:
    """The same for writes; those of checkpoints and of shared files have rules of their own."""
    found = _find_small(f, "write")
    if found is None:
        return None
    small, gain = found
    calls, moved, spent = _sum_calls(small)
    file, tables, _ = _name_top(small)
    text = (
        f"{calls:,} writes are smaller than {format_size(SMALL_REQUEST)}: {format_size(moved / calls)} on "
        f"average{f', most of them to {file}' if file else ''}. They take {format_seconds(spent)}, added up "
        f"over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Collect them in a buffer of some MB and write that."
    remedy = advise_tables_in_files(f) if tables else remedy
    evidence = {"writes": calls, "bytes": moved, "seconds_all_ranks": spent, "file": file}
    return Finding("small_writes", gain, text, remedy, evidence | show_longest(small))


def _find_small(f: Facts, op: str) -> tuple[pl.DataFrame, float] | None:
    """(the small requests, as rows of `Facts.requests`; seconds to be won), or None."""
    every = f.requests.filter(pl.col("op") == op)
    left_out = [f.jumping.filter(pl.col("op") == op)["file"]]
    if op == "write":
        written = f.shared.filter(pl.col("op") == "write")["file"].unique()
        left_out += [f.checkpoint_files, written]
    small = every.filter(
        is_below(SMALL_REQUEST) & ~pl.col("file").is_in(pl.concat(left_out).unique().implode())
    )
    calls, moved, _ = _sum_calls(small)
    if calls < SMALL_COUNT or int(small["us"].sum()) < SMALL_TIME * int(every["us"].sum()):
        return None
    large = max(1, round(moved / LARGE_REQUEST))
    gain = f.limit_gain(small, US * (1 - large / calls))  # a call this small is mostly the cost of a call
    return (small, gain) if f.matters(gain, small) else None


def _sum_calls(requests: pl.DataFrame) -> tuple[int, int, float]:
    """(calls, bytes, seconds of all ranks) of these rows."""
    calls, moved, us = (int(requests[name].sum()) for name in ("count", "bytes", "us"))
    return calls, moved, us / 1e6


def _name_top(requests: pl.DataFrame, by: str = "count") -> tuple[str | None, bool, int]:
    """The file with more than half of them, or None; whether most are of tables in files; its ranks."""
    files = requests.group_by("file").agg(pl.col(by).sum(), pl.col("rank").n_unique().alias("ranks"))
    top = files.sort(by, "file", descending=[True, False]).row(0, named=True)
    whole = int(files[by].sum())
    tables = int(files.filter(pl.col("file").str.ends_with(TABLE_FILE))[by].sum())
    return (top["file"] if 2 * top[by] > whole else None), 2 * tables > whole, int(top["ranks"])


def _say_hidden(gain: float) -> str:
    return "" if gain > 0 else " All of it is hidden behind other work now."


def find_random_access(f: Facts) -> Finding | None:
    """Reads that jump about. A fixed skip forward is none: ranks that take turns, each with its rows."""
    found = _find_random(f, "read")
    if found is None:
        return None
    jumps, share, gain = found
    text = (
        f"{share:.0%} of the reads of {_name_jumping(jumps)}: no file system reads ahead for that. They "
        f"take {_format_jumps(jumps)}, added up over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Shuffle batches, not rows; or read long stretches and shuffle inside them."
    if f.is_own_dlrm:
        remedy = "Shuffle in memory: --shuffle_batches, or --shuffle_training_set (reads long stretches)."
    return Finding("random_access", gain, text, *_advise_on_jumps(f, jumps, remedy))


def find_random_writes(f: Facts) -> Finding | None:
    """Writes that jump about."""
    found = _find_random(f, "write")
    if found is None:
        return None
    jumps, share, gain = found
    text = (
        f"{share:.0%} of the writes to {_name_jumping(jumps)}: {int(jumps['random'].sum()):,} of them, "
        f"{format_size(int(jumps['random_bytes'].sum()))} in all. They take {_format_jumps(jumps)}, added up "
        f"over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Sort the pieces by offset and write neighbours together, or append and put them in order later."
    return Finding("random_writes", gain, text, *_advise_on_jumps(f, jumps, remedy))


def _find_random(f: Facts, op: str) -> tuple[pl.DataFrame, float, float] | None:
    """(the rows of `Facts.requests` with the jumps, their share in the requests of their files, seconds to be
    won), or None."""
    files = f.jumping.filter(pl.col("op") == op)
    jumps = files.filter(is_below(LARGE_JUMP) & (pl.col("random") > 0))
    if not len(jumps):
        return None
    gain = f.limit_gain(jumps, pl.col("random_us"))
    if not f.matters(gain, jumps, pl.col("random_us")):
        return None
    placed = int(files.select(pl.col("sequential", "strided", "random").sum()).sum_horizontal().item())
    return jumps, int(jumps["random"].sum()) / placed, gain


def _name_jumping(jumps: pl.DataFrame) -> str:
    """Their file, and how many bytes one moves."""
    mean = int(jumps["random_bytes"].sum()) / max(1, int(jumps["random"].sum()))
    files = _list_jumping(jumps)
    others = len(files) - 1
    more = f" and {others} more file{'s' if others > 1 else ''}" if others else ""
    return f"{files[0]}{more} jump to another offset, {format_size(mean)} at a time on average"


def _list_jumping(jumps: pl.DataFrame) -> list[str]:
    files = jumps.group_by("file").agg(pl.col("random").sum())
    return files.sort("random", "file", descending=[True, False])["file"].to_list()


def _format_jumps(jumps: pl.DataFrame) -> str:
    return format_seconds(int(jumps["random_us"].sum()) / 1e6)


def _advise_on_jumps(f: Facts, jumps: pl.DataFrame, remedy: str) -> tuple[str, dict[str, object]]:
    """(the remedy, which is another one for tables in files; the evidence)."""
    file = _list_jumping(jumps)[0]
    evidence: dict[str, object] = {
        "random": int(jumps["random"].sum()), "bytes": int(jumps["random_bytes"].sum()), "file": file,
        "seconds_all_ranks": int(jumps["random_us"].sum()) / 1e6,
    }  # fmt: skip
    remedy = advise_tables_in_files(f) if file.endswith(TABLE_FILE) else remedy
    return remedy, evidence | show_longest(jumps)


def find_misaligned(f: Facts) -> Finding | None:
    """Requests that skip into the middle of a block, so that blocks are read and written for nothing."""
    own = f.requests.filter(~pl.col("file").str.ends_with(TABLE_FILE) & (pl.col("misaligned") > 0))
    own = own.join(f.jumping.select("op", "file").unique(), on=["op", "file"], how="anti")
    number, moved, touched, needless = (
        int(own[name].sum()) for name in ("misaligned", "misaligned_bytes", "touched", "needless")
    )
    calls = int(f.requests["count"].sum())
    in_vain = needless / max(1, touched)
    if number < SMALL_COUNT or number < MISALIGNED * calls or in_vain < MISALIGNED:
        return None
    gain = f.limit_gain(own, pl.col("needless_us"))
    if not f.matters(gain):
        return None
    file, _, _ = _name_top(own, "misaligned")
    text = (
        f"{number / calls:.0%} of the requests skip into the middle of a block of {BLOCK:,} "
        f"bytes{f', most of them in {file}' if file else ''}: {format_size(moved / number)} on average. They "
        f"touch {touched:,} blocks, {in_vain:.0%} of them only because they do not begin where a block does."
    )
    remedy = (
        f"Begin requests at multiples of {BLOCK:,} bytes: pad records, or read whole blocks and cut them."
    )
    if f.is_own_dlrm:
        remedy = "A larger --batch_size or --shuffle_training_set makes fewer and longer requests of them."
    evidence = {"requests": number, "of": calls, "bytes": moved, "blocks": touched, "needless": needless}
    return Finding("misaligned", gain, text, remedy, evidence | {"file": file} | show_longest(own))


def find_operation_imbalance(f: Facts) -> Finding | None:
    """Most calls are of the kind, reads or writes, that moves few of the bytes."""
    own = {op: f.requests.filter(pl.col("op") == op) for op in ("read", "write")}
    many, few = sorted(own, key=lambda op: -int(own[op]["count"].sum()))
    (calls, moved, _), (other_calls, other_moved, _) = _sum_calls(own[many]), _sum_calls(own[few])
    whole = calls + other_calls
    if calls < SMALL_COUNT or not other_calls or calls - other_calls < MORE_CALLS * whole:
        return None
    share, of_calls = moved / max(1, moved + other_moved), calls / whole
    covered = {
        "read": (find_small_reads, find_random_access),
        "write": (find_small_writes, find_random_writes),
    }
    if share > of_calls / 2 or any(rule(f) for rule in covered[many]):
        return None
    usual, other = _find_usual_size(own[many]), _find_usual_size(own[few])
    if usual >= other:
        return None  # a few large calls of the other kind move its bytes
    smaller = own[many].filter(pl.col("bucket") < other)
    wanted = max(1, round(int(smaller["bytes"].sum()) / 2**other))  # calls as large as the others
    gain = f.limit_gain(smaller, US * (1 - min(1.0, wanted / int(smaller["count"].sum()))))
    if not f.matters(gain):
        return None
    text = (
        f"{of_calls:.0%} of the requests are {many}s, which move {share:.0%} of the bytes: half of them move "
        f"less than {format_size(2 ** (usual + 1))}, half of the {few}s {format_size(2**other)} or more."
    )
    evidence = {f"{many}s": calls, f"{few}s": other_calls, "share_of_bytes": share}
    remedy = f"Make the {many}s as large as the {few}s."
    return Finding("operation_imbalance", gain, text, remedy, evidence | show_longest(smaller))


def _find_usual_size(requests: pl.DataFrame) -> int:
    """The size class (`bucket`) of the middle one of these requests."""
    sizes = requests.group_by("bucket").agg(pl.col("count").sum()).sort("bucket")
    middle = sizes.filter(2 * pl.col("count").cum_sum() >= pl.col("count").sum())
    return int(middle["bucket"][0])


def find_stdio(f: Facts) -> Finding | None:
    """Data that go through the buffers of the C library's streams."""
    calls = f.after_startup("ops").filter(
        pl.col("op").is_in(["read", "write"]) & (pl.col("layer") == "calls")
    )
    calls = calls.filter(~pl.col("file").fill_null("").str.contains(r"^/(proc|sys|dev|etc)/"))
    own, direct = (calls.filter((pl.col("cat") == "STDIO") == is_own) for is_own in (True, False))
    moved, other, spent = int(own["bytes"].sum()), int(direct["bytes"].sum()), float(own["us"].sum()) / 1e6
    if moved < STDIO_BYTES or moved <= STDIO_SHARE * (moved + other):
        return None
    # what direct calls of the same kind would take for the same bytes, where there are enough to tell
    rates = direct.group_by("op").agg(pl.col("bytes", "us").sum()).filter(pl.col("bytes") >= 1 << 20)
    rates = rates.select("op", (pl.col("us") / pl.col("bytes")).alias("us_per_byte"))
    compared = own.join(rates, on="op")
    slower = US - pl.col("bytes") * pl.col("us_per_byte")
    saved = float(compared.select(slower.sum()).item() or 0.0) / 1e6
    gain = f.limit_gain(compared, slower) if saved > 0 else 0.0
    top = (
        own.group_by("file")
        .agg(pl.col("bytes").sum())
        .sort("bytes", "file", descending=[True, False])["file"][0]
    )
    faster = (
        f"; at the rate of the direct calls it would be {format_seconds(spent - saved)}" if gain > 0 else ""
    )
    text = (
        f"{moved / (moved + other):.0%} of the bytes, {format_size(moved)}, go through the buffered calls of "
        f"the C library (fread, fwrite), most of all {top}. They take {format_seconds(spent)}{faster}."
    )
    remedy = "Read and write with POSIX calls of some MB, or give the streams a larger buffer (setvbuf)."
    evidence = {"bytes": moved, "share": moved / (moved + other), "file": top}
    return Finding("stdio", max(0.0, gain), text, remedy, evidence | show_longest(own))


def find_slow_tail(f: Facts) -> Finding | None:
    """A few reads take most of the time, though they are no larger than others: the storage was busy, or
    cold."""
    is_call = (pl.col("op") == "read") & (pl.col("layer") != MAPPED)
    reads = add_latency_us(f.after_startup("latencies").filter(is_call))
    number = int(reads["count"].sum())
    if number < SLOW_LEAST:
        return None
    classes = _find_slow_reads(reads, int(SLOW_PART * number))
    total, slow = US * pl.col("count"), reads.join(classes, on=["bucket", "us_bucket"])
    slow = slow.with_columns(pl.col("count") * pl.col("part"))
    spent, tail = (float(each.select(total.sum()).item()) for each in (reads, slow))
    if tail < SLOW_TIME * spent:
        return None
    jumping = f.jumping.filter((pl.col("op") == "read") & is_below(LARGE_JUMP))
    if 2 * int(jumping["random_us"].sum()) > spent:
        return None  # what is cached is quick, what is not is slow: the rule on random reads says what to do
    gain = f.limit_gain(slow, total - pl.col("usual_us") * pl.col("count"))
    if gain < MATTERS / 2 * f.find_wall_seconds():
        return None
    count = round(float(slow["count"].sum()))
    usual = float(slow.select((pl.col("usual_us") * pl.col("count")).sum()).item()) / count
    text = (
        f"{count:,} of {number:,} reads take {tail / spent:.0%} of the reading time: "
        f"{format_seconds(tail / count / 1e6)} each on average, where half of all reads of their size are "
        f"done in {format_seconds(usual / 1e6)}."
    )
    remedy = "The storage is shared or cold: stripe the files wider, or stage them on the node."
    evidence: dict[str, object] = {"share": tail / spent, "reads": count, "usual_us": usual}
    calls = f.after_startup("ops").filter(is_call)
    return Finding("slow_tail", gain, text, remedy, evidence | show_longest(calls))


def _find_slow_reads(reads: pl.DataFrame, most: int) -> pl.DataFrame:
    """The classes (bucket, us_bucket) of reads that take SLOW_TIMES the median of their size: usual_us, that
    median; part, which share of the class is among the `most` slowest, as measured by it.
    """
    found = reads.group_by("bucket", "us_bucket", "us").agg(pl.col("count").sum()).sort("bucket", "us_bucket")
    half = 2 * pl.col("count").cum_sum() >= pl.col("count").sum()
    found = found.with_columns(US.filter(half).first().over("bucket").alias("usual_us"))
    times = US / pl.col("usual_us").clip(1)
    slow = found.filter(times >= SLOW_TIMES).sort(times, "us", "bucket", descending=True)
    left = (most - pl.col("count").cum_sum() + pl.col("count")).clip(0)
    slow = slow.with_columns((pl.min_horizontal("count", left) / pl.col("count")).alias("part"))
    return slow.filter(pl.col("part") > 0).select("bucket", "us_bucket", "usual_us", "part")
