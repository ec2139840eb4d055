"""Rules over single requests: their size, their order, their alignment, and how long the slowest take.

Files of programs are left out, and each file is in one rule only: one that is read at random is not reported
for small reads too. The gain that they promise is never more than the I/O that nothing hides.
"""

from collections.abc import Sequence

import polars as pl

from analysis.report.facts import (
    MATTERS,
    TABLE_FILE,
    Facts,
    Finding,
    advise_tables_in_files,
    show_longest,
    sum_by_file,
)
from analysis.report.page import format_seconds, format_size
from analysis.tables import answers
from analysis.tables.calls import BLOCK, MAPPED, SMALL_REQUEST, add_latency_us

LARGE_REQUEST = 8 << 20  # a request of this size is large enough for common file systems
SMALL_COUNT = 1000
SMALL_TIME = 0.2  # of the time of all requests of its kind
MISALIGNED = 0.1  # of the requests; and the blocks touched in vain, of the bytes
MORE_CALLS = 0.1  # calls of one kind, over those of the other
STDIO_SHARE, STDIO_BYTES = 0.1, 1 << 20  # of the bytes; at least


def find_small_reads(f: Facts) -> Finding | None:
    """Many reads so small that they cost a call each rather than the time to move their bytes."""
    found = _find_small(f, "read")
    if found is None:
        return None
    small, calls, moved, spent, gain = found
    file, tables, ranks = _name_top(small, "small")
    shared = f", which {ranks} ranks share" if file and ranks > 1 else ""
    text = (
        f"{calls:,} reads are smaller than {format_size(SMALL_REQUEST)}: {format_size(moved / calls)} on "
        f"average{f', most of them of {file}{shared}' if file else ''}. They take {format_seconds(spent)}, "
        f"added up over the ranks; {max(1, round(moved / LARGE_REQUEST)):,} large reads would bring the same "
        f"bytes.{_say_hidden(gain)}"
    )
    remedy = advise_tables_in_files(f) if tables else "Read larger pieces and hand them out from memory."
    data = f.data_reads()["file"].implode()
    if not tables and 2 * int(small.filter(pl.col("file").is_in(data))["small"].sum()) >= calls:
        remedy = f.advise_larger_reads(moved / calls)
    evidence = {"reads": calls, "bytes": moved, "seconds_all_ranks": spent, "file": file}
    return Finding("small_reads", gain, text, remedy, evidence | show_longest(small))


def find_small_writes(f: Facts) -> Finding | None:
    """The same for writes; those of checkpoints and of shared files have rules of their own."""
    found = _find_small(f, "write")
    if found is None:
        return None
    small, calls, moved, spent, gain = found
    file, tables, _ = _name_top(small, "small")
    text = (
        f"{calls:,} writes are smaller than {format_size(SMALL_REQUEST)}: {format_size(moved / calls)} on "
        f"average{f', most of them to {file}' if file else ''}. They take {format_seconds(spent)}, added up "
        f"over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Collect them in a buffer of some MB and write that."
    remedy = advise_tables_in_files(f) if tables else remedy
    evidence = {"writes": calls, "bytes": moved, "seconds_all_ranks": spent, "file": file}
    return Finding("small_writes", gain, text, remedy, evidence | show_longest(small))


def _find_small(f: Facts, op: str) -> tuple[pl.DataFrame, int, int, float, float] | None:
    """(files with small requests, how many, bytes, seconds of all ranks, seconds to be won), or None."""
    every = f.requests.filter(pl.col("op") == op)
    left_out = [f.jumping.filter(pl.col("op") == op)["file"]]
    if op == "write":
        written = f.shared.filter(pl.col("op") == "write")["file"].unique()
        left_out += [f.checkpoint_files, written]
    small = sum_by_file(every.filter(~pl.col("file").is_in(pl.concat(left_out).implode())))
    small = small.filter(pl.col("small") > 0)
    calls, moved, us = (int(small[c].sum()) for c in ("small", "small_bytes", "small_us"))
    if calls < SMALL_COUNT or us < SMALL_TIME * int(every["us"].sum()):
        return None
    large = max(1, round(moved / LARGE_REQUEST))
    gain = f.limit_gain(us / 1e6 * (1 - large / calls))  # a call this small is mostly the cost of a call
    return (small, calls, moved, us / 1e6, gain) if f.matters(gain, us / 1e6) else None


def _name_top(files: pl.DataFrame, by: str) -> tuple[str | None, bool, int]:
    """The file with more than half of them, or None; whether most are of tables in files; its ranks."""
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
    jumping, share, spent, gain = found
    text = (
        f"{share:.0%} of the reads of {_name_jumping(jumping)}: no file system reads ahead for that. They "
        f"take {format_seconds(spent)}, added up over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Shuffle batches, not rows; or read long stretches and shuffle inside them."
    if f.is_own_dlrm:
        remedy = "Shuffle in memory: --shuffle_batches, or --shuffle_training_set (reads long stretches)."
    columns = ("random", "strided", "sequential")
    return Finding("random_access", gain, text, *_advise_on_jumps(f, jumping, spent, remedy, columns))


def find_random_writes(f: Facts) -> Finding | None:
    """Writes that jump about."""
    found = _find_random(f, "write")
    if found is None:
        return None
    jumping, share, spent, gain = found
    text = (
        f"{share:.0%} of the writes to {_name_jumping(jumping)}: {int(jumping['random'].sum()):,} of them, "
        f"{format_size(int(jumping['bytes'].sum()))} in all. They take {format_seconds(spent)}, added up "
        f"over the ranks.{_say_hidden(gain)}"
    )
    remedy = "Sort the pieces by offset and write neighbours together, or append and put them in order later."
    columns = ("random", "strided", "sequential", "bytes")
    return Finding("random_writes", gain, text, *_advise_on_jumps(f, jumping, spent, remedy, columns))


def _name_jumping(files: pl.DataFrame) -> str:
    named = f"{files['file'][0]}{_count_others(files)}"
    return f"{named} jump to another offset, {format_size(_mean_bytes(files))} at a time"


def _advise_on_jumps(
    f: Facts, files: pl.DataFrame, spent: float, remedy: str, columns: Sequence[str]
) -> tuple[str, dict[str, object]]:
    """(the remedy, which is another one for tables in files; the evidence, with the sums of `columns`)."""
    file = files["file"][0]
    evidence: dict[str, object] = {column: int(files[column].sum()) for column in columns}
    evidence |= {"file": file, "seconds_all_ranks": spent}
    remedy = advise_tables_in_files(f) if str(file).endswith(TABLE_FILE) else remedy
    return remedy, evidence | show_longest(files)


def _mean_bytes(files: pl.DataFrame) -> float:
    return int(files["bytes"].sum()) / max(1, int(files["count"].sum()))


def _find_random(f: Facts, op: str) -> tuple[pl.DataFrame, float, float, float] | None:
    """(files that are accessed at random, their share of jumps, seconds of all ranks, seconds to be won)."""
    found = f.jumping.filter((pl.col("op") == op) & (pl.col("bytes") < LARGE_REQUEST / 8 * pl.col("count")))
    if not len(found):
        return None
    share = pl.col("random") / (pl.col("sequential") + pl.col("strided") + pl.col("random"))
    sums = found.select(pl.col("random", "sequential", "strided").sum())
    spent = float(found.select((pl.col("us") * share).sum()).item()) / 1e6
    gain = f.limit_gain(spent)
    if not f.matters(gain, spent):
        return None
    return found, float(sums.select(share).item()), spent, gain


def _count_others(files: pl.DataFrame) -> str:
    others = len(files) - 1
    return f" and {others} more file{'s' if others > 1 else ''}" if others else ""


def find_misaligned(f: Facts) -> Finding | None:
    """Requests that skip into the middle of a block, so that blocks are read and written for nothing."""
    files = sum_by_file(f.requests.filter(~pl.col("file").str.ends_with(TABLE_FILE)))
    jumping = f.jumping.select("op", "file")
    files = files.join(jumping, on=["op", "file"], how="anti").filter(pl.col("misaligned") > 0)
    number, moved, us = (int(files[c].sum()) for c in ("misaligned", "misaligned_bytes", "misaligned_us"))
    calls = int(f.requests["count"].sum())
    in_vain = number * BLOCK / max(1, number * BLOCK + moved)  # one block more than an aligned one touches
    if number < SMALL_COUNT or number < MISALIGNED * calls or in_vain < MISALIGNED:
        return None
    gain = f.limit_gain(us / 1e6 * in_vain)
    if not f.matters(gain):
        return None
    file, _, _ = _name_top(files, "misaligned")
    text = (
        f"{number / calls:.0%} of the requests skip into the middle of a block of {BLOCK:,} "
        f"bytes{f', most of them in {file}' if file else ''}: {format_size(moved / number)} on average, so "
        f"about {in_vain:.0%} of the bytes that the storage moves for them is for nothing."
    )
    remedy = (
        f"Begin requests at multiples of {BLOCK:,} bytes: pad records, or read whole blocks and cut them."
    )
    if f.is_own_dlrm:
        remedy = "A larger --batch_size or --shuffle_training_set makes fewer and longer requests of them."
    evidence = {"requests": number, "of": calls, "bytes": moved, "file": file}
    return Finding("misaligned", gain, text, remedy, evidence | show_longest(files))


def find_operation_imbalance(f: Facts) -> Finding | None:
    """Most calls are of the kind, reads or writes, that moves few of the bytes."""
    sums = {
        op: (int(own["count"].sum()), int(own["bytes"].sum()), int(own["us"].sum()))
        for op in ("read", "write")
        for own in [f.requests.filter(pl.col("op") == op)]
    }
    many, few = sorted(sums, key=lambda op: -sums[op][0])
    (calls, moved, us), (other_calls, other_moved, _) = sums[many], sums[few]
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
    wanted = max(1, round(moved / max(1, other_moved / other_calls)))  # calls as large as the others
    gain = f.limit_gain(us / 1e6 * (1 - min(1.0, wanted / calls)))
    if not f.matters(gain):
        return None
    text = (
        f"{of_calls:.0%} of the requests are {many}s, which move {share:.0%} of the bytes: "
        f"{format_size(moved / calls)} each, where a {few} moves {format_size(other_moved / other_calls)}."
    )
    own = f.requests.filter(pl.col("op") == many)
    evidence = {f"{many}s": calls, f"{few}s": other_calls, "share_of_bytes": share}
    remedy = f"Make the {many}s as large as the {few}s."
    return Finding("operation_imbalance", gain, text, remedy, evidence | show_longest(own))


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
    rate = other / max(1, int(direct["us"].sum()))  # B/us
    gain = f.limit_gain(max(0.0, spent - moved / rate / 1e6)) if other >= 1 << 20 else 0.0
    top = own.sort("bytes", descending=True)["file"][0]
    direct_s = format_seconds(moved / rate / 1e6) if gain else ""
    faster = f"; at the rate of the direct calls it would be {direct_s}" if gain else ""
    text = (
        f"{moved / (moved + other):.0%} of the bytes, {format_size(moved)}, go through the buffered calls of "
        f"the C library (fread, fwrite), most of all {top}. They take {format_seconds(spent)}{faster}."
    )
    remedy = "Read and write with POSIX calls of some MB, or give the streams a larger buffer (setvbuf)."
    evidence = {"bytes": moved, "share": moved / (moved + other), "file": top}
    return Finding("stdio", gain, text, remedy, evidence | show_longest(own))


def find_slow_tail(f: Facts) -> Finding | None:
    """A few reads that take most of the time: the storage was busy, or cold."""
    is_call = (pl.col("op") == "read") & (pl.col("layer") != MAPPED)
    reads = add_latency_us(f.after_startup("latencies").filter(is_call))
    if int(reads["count"].sum()) < 1000:
        return None
    middle, last = answers.find_percentiles(reads, "op").select("p50_us", "p99_us").row(0)
    total = pl.col("us") * pl.col("count")
    spent = float(reads.select(total.sum()).item())
    slow = reads.filter(pl.col("us") > last)
    tail, number = float(slow.select(total.sum()).item()), max(1, int(slow["count"].sum()))
    gain = f.limit_gain(tail / 1e6)
    jumping = int(f.jumping.filter(pl.col("op") == "read")["us"].sum())
    if 2 * jumping > int(f.requests.filter(pl.col("op") == "read")["us"].sum()):
        return None  # what is cached is quick, what is not is slow: the rule on random reads says what to do
    if tail < 0.3 * spent or tail / number < 10 * middle or gain < MATTERS / 2 * f.wall_seconds():
        return None
    text = (
        f"The slowest {number:,} reads take {tail / spent:.0%} of the reading time: half of all are done in "
        f"{format_seconds(middle / 1e6)}, these need {format_seconds(tail / number / 1e6)} each."
    )
    remedy = "The storage is shared or cold: stripe the files wider, or stage them on the node."
    evidence: dict[str, object] = {"share": tail / spent, "reads": number, "p50_us": middle}
    reads = f.after_startup("ops").filter(is_call)
    return Finding("slow_tail", gain, text, remedy, evidence | show_longest(reads))
