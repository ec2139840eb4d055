"""Rules over files: shared by ranks, read or written again and again, mapped; and calls that move no byte."""

from typing import Any

import polars as pl

from analysis.report.facts import TRAIN, US, Facts, Finding, advise_mapped_files, show_longest
from analysis.report.page import format_seconds, format_size
from analysis.tables import answers, device
from analysis.tables.calls import BLOCK, SMALL_REQUEST, TABLE_FILE, is_below
from common.words import format_number

SHARED_COUNT = 1000  # small or misaligned requests
SHARED_PART = 0.1  # of the requests of a shared file
STRAGGLES = 0.15  # of the slowest rank's time, or of the largest rank's bytes
UNEVEN = 0.3  # of the largest rank's bytes
AGAIN = 1.5  # times the size of a file
AGAIN_BYTES, AGAIN_PART = 16 << 20, 0.1  # at least, and of all bytes read, or written
METADATA_PART = 0.3  # of the time in file calls
METADATA_RANK_S = 30.0
HINTS_PART = 0.1
SYNC_PART = 0.02  # of the run
MAPPED_PART, MAPPED_RATE = 0.02, 2e9  # of the training; bytes per s: faster ones come from memory
AMPLIFIED = 1.2  # times the bytes asked for
METADATA_OPS = ("open", "close", "stat", "seek", "other")


def find_shared_requests(f: Facts) -> Finding | None:
    """Small or misaligned requests on a file that ranks share and write: they take locks from each other."""
    written = f.shared.filter(pl.col("op") == "write")["file"].unique()
    rows = f.shared.filter(
        pl.col("file").is_in(written.implode()) & ~pl.col("file").str.ends_with(TABLE_FILE)
    )
    is_small = is_below(SMALL_REQUEST)
    small = pl.col("count").filter(is_small).sum().alias("small")
    files = rows.group_by("file").agg(
        pl.col("count", "misaligned", "us").sum(), small, pl.col("ranks").first()
    )
    many = [
        (pl.col(name) >= SHARED_COUNT) & (pl.col(name) > SHARED_PART * pl.col("count"))
        for name in ("small", "misaligned")
    ]
    files = files.filter(many[0] | many[1]).sort("us", "file", descending=[True, False])
    if not len(files):
        return None
    own = rows.filter(pl.col("file") == files["file"][0]).filter(is_small | (pl.col("misaligned") > 0))
    costly = pl.when(is_small).then("us").otherwise("misaligned_us")
    spent = float(own.select(costly.sum()).item()) / 1e6
    gain = f.limit_gain(own, costly)
    if not f.matters(gain, own, costly):
        return None
    top = files.row(0, named=True)
    kinds = [
        f"{top[name]:,} are {what}"
        for name, what in (
            ("small", f"smaller than {format_size(SMALL_REQUEST)}"),
            ("misaligned", f"not at a multiple of {BLOCK:,} bytes"),
        )
        if top[name] > SHARED_PART * top["count"]
    ]
    text = (
        f"{top['ranks']} ranks share {top['file']} and write it: of {top['count']:,} requests "
        f"{' and '.join(kinds)}. They take {format_seconds(spent)}, added up over the ranks; file systems "
        "let ranks that write one file wait for each other's locks."
    )
    remedy = "Give each rank a file, or a stretch that begins at a block; or let one rank write for its node."
    evidence = {name: int(top[name]) for name in ("ranks", "count", "small", "misaligned")}
    evidence |= {"file": top["file"], "seconds_all_ranks": spent}
    return Finding("shared_requests", gain, text, remedy, evidence | show_longest(own))


def find_stragglers(f: Facts) -> Finding | None:
    """One rank takes longer than another for its part of a shared file."""
    files = compare_shared(f).filter(
        (pl.col("by_bytes") <= UNEVEN) & (pl.max_horizontal("by_time", "by_bytes") > STRAGGLES)
    )
    found = _find_worst(f, files, "late_us", "slowest")
    if found is None:
        return None
    top, gain = found
    apart = f"differ by {top['by_bytes']:.0%} at most" if top["by_bytes"] >= 0.01 else "are the same"
    text = (
        f"Rank {top['slowest']} spends {format_seconds(top['most_us'] / 1e6)} in {top['file']}, which "
        f"{top['ranks']} ranks share, and the quickest of them {format_seconds(top['least_us'] / 1e6)}; "
        f"their bytes {apart}"
    )
    remedy = "Look at that rank's host: its path to the storage, and who else uses it."
    if f.on_one_host:
        remedy = "All ranks have one host's path to the storage: look at what that rank does meanwhile."
    if top["most_us"] - top["longest_us"] <= (1 + STRAGGLES) * top["others_us"]:
        text += f". One call makes the difference, of {format_seconds(top['longest_us'] / 1e6)}"
        remedy = "Look at what happened during that call; the link shows it."
    evidence = {
        "file": top["file"], "rank": top["slowest"], "by_time": top["by_time"], "by_bytes": top["by_bytes"],
        "ts": top["slowest_ts"], "dur_us": top["longest_us"],
    }  # fmt: skip
    return Finding("stragglers", gain, f"{text}.", remedy, evidence)


def find_file_imbalance(f: Facts) -> Finding | None:
    """One rank moves much more of a shared file than another."""
    files = compare_shared(f).filter(pl.col("by_bytes") > UNEVEN)
    found = _find_worst(f, files, "more_us", "largest")
    if found is None:
        return None
    top, gain = found
    text = (
        f"Rank {top['largest']} moves {format_size(top['most_bytes'])} of {top['file']}, which "
        f"{top['ranks']} ranks share, and the rank with the least {format_size(top['least_bytes'])}."
    )
    remedy = "Cut the file into equal parts for the ranks, or let all of them read and write."
    evidence = {
        "file": top["file"], "rank": top["largest"], "by_bytes": top["by_bytes"],
        "ts": top["largest_ts"], "dur_us": top["dur_us"],
    }  # fmt: skip
    return Finding("file_imbalance", gain, text, remedy, evidence)


def _find_worst(f: Facts, files: pl.DataFrame, lost: str, rank: str) -> tuple[dict[str, Any], float] | None:
    """(the shared file that costs most, seconds to be won); None where that does not matter.

    lost: the column with the microseconds that it costs. rank: the column that says whose they are.
    """
    if not len(files):
        return None
    top = files.sort(lost, "file", descending=[True, False]).row(0, named=True)
    gain = min(top[lost] / 1e6, _sum_exposed(f, top[rank]))
    return (top, gain) if f.matters(gain) else None


def compare_shared(f: Facts) -> pl.DataFrame:
    """Per shared file and operation how much its ranks' times and bytes differ: 0 not at all, 1 entirely.

    late_us: how much longer the slowest rank takes than the mean one; more_us: the same of the rank that
    moves most bytes.
    """
    ranks = f.shared.group_by("op", "file", "rank").agg(
        pl.col("us", "bytes").sum(), pl.col("ts").sort_by("max_us", "ts").last(), pl.col("max_us").max()
    )
    found = ranks.group_by("op", "file").agg(
        pl.len().alias("ranks"),
        pl.col("us").min().alias("least_us"), pl.col("us").max().alias("most_us"),
        pl.col("bytes").min().alias("least_bytes"), pl.col("bytes").max().alias("most_bytes"),
        (pl.col("us").max() - pl.col("us").mean()).alias("late_us"),
        (pl.col("us").sort_by("bytes", "rank").last() - pl.col("us").mean()).alias("more_us"),
        ((pl.col("us").sum() - pl.col("us").max()) / (pl.len() - 1)).alias("others_us"),
        pl.col("rank").sort_by("us", "rank").last().alias("slowest"),
        pl.col("rank").sort_by("bytes", "rank").last().alias("largest"),
        pl.col("ts").sort_by("us", "rank").last().alias("slowest_ts"),
        pl.col("max_us").sort_by("us", "rank").last().alias("longest_us"),
        pl.col("ts").sort_by("bytes", "rank").last().alias("largest_ts"),
        pl.col("max_us").sort_by("bytes", "rank").last().alias("dur_us"),
    )  # fmt: skip
    return found.filter(pl.col("ranks") > 1).with_columns(
        (1 - pl.col("least_us") / pl.col("most_us").clip(1)).alias("by_time"),
        (1 - pl.col("least_bytes") / pl.col("most_bytes").clip(1)).alias("by_bytes"),
    )


def _sum_exposed(f: Facts, rank: int) -> float:
    """Seconds of a rank's I/O and waiting that nothing hides: what less I/O on it can save."""
    return float(f.sum_rank_exposed().filter(pl.col("rank") == rank)["seconds"].sum())


def find_redundant_reads(f: Facts) -> Finding | None:
    """More bytes are read of a file, in one epoch or outside of the training, than there are in it."""
    amplified = _list_amplified(f)["file"]
    found = _find_again(f, "read")
    found = found.filter(~pl.col("file").is_in(amplified.implode()))
    if not len(found):
        return None
    extra, spent = int(found["extra"].sum()), float(found["extra_us"].sum()) / 1e6
    top, gain = found.row(0, named=True), _limit_again(f, "read", found)
    if not (found["of_rank"] > AGAIN).any() and not f.matters(gain):
        return None  # each rank reads it once; that costs nothing here
    when = " in one epoch" if top["epoch"] is not None else ""
    text = (
        f"{top['file']} is read {top['times']:.1f} times over{when}: {format_size(top['moved'])}, where once "
        f"would be {format_size(top['once'])}, by {format_number(top['ranks'], 'rank')}. In all "
        f"{_say_again(extra, spent, 'read')}"
    )
    remedy = "Keep what was read until it is used, and let each rank read its own part once."
    if f.is_own_dlrm and top["file"] in f.dataset_files:
        remedy = "If the dataset fits into memory, hold it there: --source memory reads it once."
    evidence = {"file": top["file"], "times": top["times"], "bytes_again": extra, "seconds_all_ranks": spent}
    return Finding("redundant_reads", gain, text, remedy, evidence | _show_request(f, "read", top["file"]))


def find_redundant_writes(f: Facts) -> Finding | None:
    """The same places of a file are written again while it is open."""
    found = _find_again(f, "write")
    if not len(found):
        return None
    extra, spent = int(found["extra"].sum()), float(found["extra_us"].sum()) / 1e6
    top, gain = found.row(0, named=True), _limit_again(f, "write", found)
    text = (
        f"{top['file']} is written {top['times']:.1f} times over: {format_size(top['moved'])}, where once "
        f"would be {format_size(top['once'])}. In all {_say_again(extra, spent, 'written')}"
    )
    remedy = "Change the data in memory and write each place once."
    evidence = {"file": top["file"], "times": top["times"], "bytes_again": extra, "seconds_all_ranks": spent}
    return Finding("redundant_writes", gain, text, remedy, evidence | _show_request(f, "write", top["file"]))


def _find_again(f: Facts, op: str) -> pl.DataFrame:
    """Files that are read or written more than AGAIN times over, those with most bytes first.

    A file that is opened anew to be written is a new file; tables in files have rules of their own.
    """
    ops = f.after_startup("ops").filter(pl.col("file").is_not_null() & (pl.col("layer") == "calls"))
    own = ops.filter((pl.col("op") == op) & ~pl.col("file").str.ends_with(TABLE_FILE))
    found = own.group_by("file", "phase", "epoch", "rank").agg(pl.col("bytes", "us").sum().cast(pl.Int64))
    found = found.group_by("file", "phase", "epoch").agg(
        pl.col("bytes").sum().alias("moved"), pl.col("bytes").max().alias("most"), pl.col("us").sum(),
        pl.len().alias("ranks"),
    )  # fmt: skip
    reach = f.joined["extents"].group_by("file").agg(pl.col("reach").max())
    found = found.join(reach, on="file")
    if op == "write":
        opened = f.joined["ops"].filter(pl.col("op") == "open").group_by("file").agg(pl.col("count").sum())
        found = found.join(opened, on="file", how="left")
        found = found.with_columns(pl.col("reach") * pl.col("count").fill_null(1).clip(1))
    evaluations = f.joined["marks"].filter(pl.col("name") == "evaluate")
    passes = pl.when(pl.col("phase") == "evaluate").then(_count_most(evaluations)).otherwise(1)
    found = found.with_columns((pl.col("reach") * passes * f.launches.height).alias("once"))
    least = max(AGAIN_BYTES, int(AGAIN_PART * int(ops.filter(pl.col("op") == op)["bytes"].sum())))
    found = found.with_columns(
        (pl.col("moved") / pl.col("once")).alias("times"),
        (pl.col("most") / pl.col("once")).alias("of_rank"),
        (pl.col("moved") - pl.col("once")).alias("extra"),
    ).filter((pl.col("times") > AGAIN) & (pl.col("extra") >= least))
    return found.with_columns(
        (pl.col("us") * pl.col("extra") / pl.col("moved")).alias("extra_us")
    ).sort("extra", "file", descending=[True, False])  # fmt: skip


def _say_again(extra: int, spent: float, done: str) -> str:
    """Sums do not say which of the bytes came first: their time is that of the mean byte."""
    return (
        f"{format_size(extra)} are {done} again: {format_seconds(spent)} at the mean rate of these files, "
        "added up over the ranks."
    )


def _limit_again(f: Facts, op: str, found: pl.DataFrame) -> float:
    """Seconds to be won by moving the bytes of `_find_again` once."""
    keys = ["file", "phase", "epoch"]
    again = found.select(*keys, (pl.col("extra") / pl.col("moved")).alias("again"))
    ops = f.after_startup("ops").filter((pl.col("op") == op) & (pl.col("layer") == "calls"))
    return f.limit_gain(ops.join(again, on=keys, nulls_equal=True), US * pl.col("again"))


def _count_most(marks: pl.DataFrame) -> int:
    """Of the rank that has most of these."""
    return max([1, *marks.group_by("rank").len()["len"].to_list()])


def _show_request(f: Facts, op: str, file: str) -> dict[str, int]:
    """The longest read or write (`op`) of a file, as evidence."""
    return show_longest(f.requests.filter((pl.col("op") == op) & (pl.col("file") == file)))


def _list_amplified(f: Facts) -> pl.DataFrame:
    return answers.compare_declared(f.joined).filter(
        (pl.col("op") == "read")
        & (pl.col("times") > AMPLIFIED)
        & (pl.col("moved") - pl.col("asked") > 1 << 20)
    )


def find_amplified_reads(f: Facts) -> Finding | None:
    """More bytes moved than asked for."""
    table = _list_amplified(f)
    if not len(table):
        return None
    extra = int((table["moved"] - table["asked"]).sum())
    top = table.row(0, named=True)
    text = (
        f"{format_size(extra)} more are read than the loader asked for; {top['file']} is read "
        f"{top['times']:.1f} times over."
    )
    remedy = "Keep what was read until it is used: whole batches per read, or fewer passes."
    evidence = {"bytes": extra, "file": top["file"]} | _show_request(f, "read", top["file"])
    ops = f.after_startup("ops").filter((pl.col("op") == "read") & (pl.col("layer") == "calls"))
    gain = f.limit_gain(ops.join(table.select("file", "times"), on="file"), US * (1 - 1 / pl.col("times")))
    return Finding("amplified", gain, text, remedy, evidence)


def find_mapped_files(f: Facts) -> Finding | None:
    """Files that the application reads and no call touches: page faults, seen only as slow spans."""
    reads = f.after_startup("ops").filter((pl.col("layer") != "calls") & (pl.col("op") == "read"))
    if not len(reads) or f.joined.calls == 0:
        return None
    moved, spent = int(reads["bytes"].sum()), float(reads["us"].sum()) / 1e6
    rate = moved / max(spent, 1e-9) / 1e6
    from_memory = pl.col("bytes") * 1e6 / MAPPED_RATE  # us
    gain = f.limit_gain(reads, (US - from_memory).clip(0))
    wall = f.average_seconds("wall_s", *TRAIN, "preprocess")
    if rate > MAPPED_RATE / 1e6 or gain < MAPPED_PART * wall:
        return None
    slow = reads.group_by("file").agg(pl.col("us").sum()).sort("us", "file", descending=[True, False])
    text = (
        f"{format_size(moved)} are read without any call, at {rate:.0f} MB/s, most of the time in "
        f"{slow['file'][0]}: a mapped file comes in by page faults, a few pages at a time. "
        + device.describe_reads(f.joined, *reads["phase"].unique())
    )
    evidence = {"bytes": moved, "MB_per_s": rate, "file": slow["file"][0]} | show_longest(reads)
    return Finding("mapped", gain, text, advise_mapped_files(f), evidence)


def _list_metadata(f: Facts) -> pl.DataFrame:
    """Rows of the table ops: calls that move no byte and are not hints."""
    return f.after_startup("ops").filter((pl.col("layer") == "calls") & pl.col("op").is_in(METADATA_OPS))


def _sum_metadata(f: Facts) -> pl.DataFrame:
    """Calls that move no byte and are not hints, by kind; all but opens, closes, stats and seeks by name."""
    other = _list_metadata(f)
    kind = pl.when(pl.col("op") == "other").then(pl.col("name")).otherwise(pl.col("op")).alias("kind")
    longest = pl.col("ts").sort_by("max_us", "ts").last(), pl.col("max_us").max()
    sums = other.group_by(kind).agg(pl.col("us", "count").sum(), *longest)
    return sums.sort("us", "kind", descending=[True, False])


def _name_kinds(kinds: pl.DataFrame) -> str:
    """The three that take longest, e.g. "900 opens 270 ms, 900 closes 3 ms"."""
    names = {"open": "opens", "close": "closes", "stat": "stats", "seek": "seeks"}
    parts = [
        f"{row['count']:,} {names.get(row['kind'], row['kind'])} {format_seconds(row['us'] / 1e6)}"
        for row in kinds.head(3).iter_rows(named=True)
    ]
    return ", ".join(parts)


def find_metadata_load(f: Facts) -> Finding | None:
    """Opens, seeks, stats and closes that cost as much as the reading. Hints to the kernel are left out."""
    kinds = _sum_metadata(f)
    calls = f.after_startup("ops").filter((pl.col("layer") == "calls") & (pl.col("op") != "hint"))
    spent, whole = float(kinds["us"].sum()) / 1e6, float(calls["us"].sum()) / 1e6
    gain = f.limit_gain(_list_metadata(f))
    if not len(kinds) or spent < METADATA_PART * whole or not f.matters(gain):
        return None
    text = (
        f"{spent / whole:.0%} of the time in file calls, hints left out, goes into calls that move no byte: "
        f"{_name_kinds(kinds)}, added up over the ranks."
    )
    remedy = "Keep files open, and put many small files into few large ones."
    if kinds["kind"][0] == "seek":
        remedy = "Read with pread, which needs no seek."
    number, top = int(kinds["count"].sum()), kinds["kind"][0]
    evidence = {"seconds_all_ranks": spent, "calls": number, "top": top}
    return Finding("metadata", gain, text, remedy, evidence | show_longest(kinds))


def find_metadata_time(f: Facts) -> Finding | None:
    """One rank spends long in calls that move no byte, start-up included."""
    calls = f.joined["ops"].filter((pl.col("layer") == "calls") & pl.col("op").is_in(METADATA_OPS))
    ranks = calls.group_by("rank").agg(pl.col("us", "count").sum())
    ranks = ranks.sort("us", "rank", descending=[True, False])
    if not len(ranks) or ranks["us"][0] <= METADATA_RANK_S * 1e6:
        return None
    top = ranks.row(0, named=True)
    own = calls.filter(pl.col("rank") == top["rank"])
    early = float(own.filter(pl.col("phase") == "startup")["us"].sum()) / 1e6
    spent = top["us"] / 1e6
    not_hidden = early + float(f.sum_rank_exposed().filter(pl.col("rank") == top["rank"])["seconds"].sum())
    text = (
        f"Rank {top['rank']} spends {format_seconds(spent)} in {top['count']:,} opens, closes, stats, seeks "
        f"and other calls that move no byte, {format_seconds(early)} of them before its first step."
    )
    remedy = "Open fewer files: many small ones in few large ones."
    if early > spent / 2:
        remedy = "Most of it is Python looking for its modules: put the environment on node-local storage."
    evidence = {"rank": top["rank"], "calls": top["count"], "startup_s": early}
    return Finding("metadata_time", min(spent, not_hidden), text, remedy, evidence | show_longest(own))


def find_hint_cost(f: Facts) -> Finding | None:
    """Hints to the kernel (fadvise) that take long themselves."""
    calls = f.after_startup("ops").filter(pl.col("layer") == "calls")
    hints = calls.filter(pl.col("op") == "hint")
    spent, whole = float(hints["us"].sum()) / 1e6, float(calls["us"].sum()) / 1e6
    number, gain = int(hints["count"].sum()), f.limit_gain(hints)
    if not number or spent < HINTS_PART * whole or not f.matters(gain):
        return None
    name = hints.group_by("name").agg(pl.col("us").sum()).sort("us", descending=True)["name"][0]
    text = (
        f"{number:,} hints to the kernel ({name}) take {format_seconds(spent)}, added up over the ranks, "
        f"{spent / whole:.0%} of the time in file calls: they wait for the device's queue."
    )
    remedy = "Give fewer hints, each for a longer stretch."
    if f.is_own_dlrm:
        remedy = (
            "They come before reads of tables in files: raise --cache_memory_budget_mb to have fewer of them."
        )
    evidence = {"calls": number, "seconds_all_ranks": spent, "name": name}
    return Finding("hints", gain, text, remedy, evidence | show_longest(hints))


def find_sync_cost(f: Facts) -> Finding | None:
    """The main thread or a pause waits until written data are on the device."""
    calls = f.after_startup("ops").filter((pl.col("layer") == "calls") & (pl.col("op") == "sync"))
    spent, number = float(calls["us"].sum()) / 1e6, int(calls["count"].sum())
    gain = f.limit_gain(calls, also_s=f.find_longest_phase("checkpoint"))
    if not number or gain < SYNC_PART * f.find_wall_seconds():
        return None
    names = (
        calls.group_by("name").agg(pl.col("us", "count").sum()).sort("us", "name", descending=[True, False])
    )
    top = calls.sort("us", "max_us").row(-1, named=True)
    text = (
        f"{number:,} calls of {' and '.join(names['name'])} wait {format_seconds(spent)} until written data "
        "are on the device, added up over the ranks; the longest "
        f"{format_seconds(float(calls['max_us'].to_numpy().max()) / 1e6)}."
    )
    remedy = "Sync once, after the last write, or from a thread that the training does not wait for."
    evidence = {"calls": number, "seconds_all_ranks": spent, "file": top["file"]}
    return Finding("sync", gain, text, remedy, evidence | show_longest(calls))


def find_failed_calls(f: Facts) -> Finding | None:
    """Reads or writes that returned an error."""
    bad = f.joined["ops"].filter((pl.col("failed") > 0) & pl.col("op").is_in(["read", "write"]))
    if not len(bad):
        return None
    kinds = bad.group_by("name", "file").agg(pl.col("failed").sum())
    kinds = kinds.sort("failed", "name", "file", descending=[True, False, False])
    top, number = kinds.row(0, named=True), int(bad["failed"].sum())
    most = "most of all " if len(kinds) > 1 else ""
    many = f"{number:,} reads or writes" if number > 1 else "A read or write"
    text = f"{many} failed: {most}{top['name']} of {top['file'] or 'a file without a name'}."
    evidence = {"calls": number, "file": top["file"]} | show_longest(bad)
    return Finding("failed", 0.0, text, "Look at that file.", evidence, "high")
