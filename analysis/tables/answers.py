"""The joined tables of a run -> the tables of the report: seconds, bytes, a row per phase, rank, file, ....

Time as a whole and I/O; progress.py has what goes step by step.
"""

import os
from collections.abc import Sequence

import polars as pl

from analysis.tables.calls import MAPPED, PROGRAMS, add_latency_us
from analysis.tables.gather import JoinedTables
from analysis.tables.times import MEASURES
from analysis.trace.classify import DATA_OPS, DATASET_CATS, KINDS, PROGRAM_FILE, is_understood

S = 1e6
WHOLE_PHASES = ("startup", "evaluate", "checkpoint", "preprocess", "other")
PARTS = ("startup", *reversed(KINDS), "rest", "evaluate", "checkpoint", "preprocess", "other")


def to_seconds(*names: str) -> list[pl.Expr]:
    """Columns in us -> columns in seconds, named _s instead of _us."""
    return [(pl.col(name) / S).alias(name.removesuffix("_us") + "_s") for name in names]


def count_by(*names: str) -> list[pl.Expr]:
    """The sums of these columns, as whole numbers."""
    return [pl.col(name).sum().cast(pl.Int64) for name in names]


SECONDS = pl.col("us").sum().truediv(S).alias("seconds")


def sum_phases(j: JoinedTables, *by: str) -> pl.DataFrame:
    """Per rank and phase: seconds of wall clock, by kind, and of I/O, hidden and not hidden."""
    keys = (*by, "rank", "phase")
    sums = j["time"].group_by(keys).agg(pl.col("ts").min(), pl.col(*MEASURES).sum())
    return sums.sort(*keys[:-1], "ts").select(*keys, *to_seconds(*MEASURES))


def sum_epochs(j: JoinedTables) -> pl.DataFrame:
    """The same for each epoch of the training, of a rank on average."""
    train = j["time"].filter(pl.col("phase") == "train")
    return (
        train.group_by("epoch")
        .agg(pl.col(*MEASURES).sum() / pl.col("rank").n_unique())
        .sort("epoch")
        .select("epoch", *to_seconds(*MEASURES))
    )


def sum_breakdown(j: JoinedTables) -> pl.DataFrame:
    """Where each rank's wall time went: the phases that are not training whole, the training by kind."""
    table = sum_phases(j)
    kinds = [pl.col(f"{kind}_s").sum().alias(kind) for kind in KINDS] + [
        pl.col("other_s").sum().alias("rest")
    ]
    work = table.filter(pl.col("phase").is_in(["train", "run"])).group_by("rank").agg(kinds)
    whole = [pl.col("wall_s").filter(pl.col("phase") == phase).sum().alias(phase) for phase in WHOLE_PHASES]
    found = table.group_by("rank").agg(pl.col("wall_s").sum().alias("wall"), *whole)
    found = found.join(work, on="rank", how="left").sort("rank")
    return found.select("rank", "wall", *(pl.col(name).fill_null(0.0) for name in PARTS))


def sum_volume(j: JoinedTables, *by: str) -> pl.DataFrame:
    """Operations, bytes and seconds of reads and writes, and how fast one operation moves its bytes."""
    return _sum_volume(j, j["ops"], by)


def sum_files(j: JoinedTables) -> pl.DataFrame:
    """The same by file, start-up left out: that reads thousands of modules."""
    return _sum_volume(
        j, j["ops"].filter((pl.col("phase") != "startup") & pl.col("file").is_not_null()), ("file",)
    )


def _sum_volume(j: JoinedTables, ops: pl.DataFrame, by: tuple[str, ...]) -> pl.DataFrame:
    """What `sum_volume` gives, of these rows of the table ops; `host` may be one of the columns in `by`."""
    data = ops.filter(pl.col("op").is_in(DATA_OPS))
    if "host" in by:
        names = {p.rank: p.host or "?" for p in j.processes}
        host = pl.col("rank").replace_strict(names, default="?", return_dtype=pl.String)
        data = data.with_columns(host.alias("host"))
    found = data.group_by(*by, "op").agg(
        *count_by("count", "bytes"), SECONDS, *count_by("sequential", "strided", "random", "failed")
    )
    rate = pl.when(pl.col("seconds") > 0).then(pl.col("bytes") / pl.col("seconds") / 1e6).alias("MB_per_s")
    mean = (pl.col("bytes") / pl.col("count")).alias("mean_bytes")
    return found.with_columns(rate, mean).sort(
        "bytes", *by, "op", descending=[True] + [False] * (len(by) + 1)
    )


def _sum_of(column: str, op: str) -> pl.Expr:
    return pl.col(column).filter(pl.col("op") == op).sum().cast(pl.Int64)


def sum_interfaces(j: JoinedTables) -> pl.DataFrame:
    """A row for each interface that calls went through, POSIX or STDIO, as Darshan counts its modules."""
    calls = j["ops"].filter(pl.col("layer") == "calls")
    named = pl.concat([calls.filter(pl.col("file") != PROGRAMS).select("cat", "file"), j["programs"]])
    files = named.group_by("cat").agg(pl.col("file").n_unique().alias("files"))
    return calls.join(files, on="cat").group_by(pl.col("cat").alias("interface")).agg(
        pl.col("files").first(),
        *(_sum_of("count", op).alias(f"{op}s") for op in ("open", "read", "write", "seek", "stat", "sync")),
        _sum_of("bytes", "read").alias("bytes_read"), _sum_of("bytes", "write").alias("bytes_written"),
        SECONDS,
    ).sort("interface")  # fmt: skip


def sum_file_use(j: JoinedTables) -> pl.DataFrame:
    """Files by who used them and for what, start-up left out: of one rank or shared, read only or written."""
    moved = j["ops"].filter(
        pl.col("op").is_in(DATA_OPS) & pl.col("file").is_not_null() & (pl.col("phase") != "startup")
    )
    files = moved.group_by("file").agg(
        pl.col("rank").n_unique().alias("ranks"), *count_by("count", "misaligned"),
        _sum_of("bytes", "read").alias("bytes_read"), _sum_of("bytes", "write").alias("bytes_written"),
        (pl.col("op") == "read").any().alias("is_read"), (pl.col("op") == "write").any().alias("is_written"),
    )  # fmt: skip
    access = pl.when("is_read").then(
        pl.when("is_written").then(pl.lit("read and write")).otherwise(pl.lit("read only"))
    ).otherwise(pl.lit("write only"))  # fmt: skip
    used = pl.when(pl.col("ranks") > 1).then(pl.lit("several ranks")).otherwise(pl.lit("one rank"))
    found = files.group_by(used.alias("used_by"), access.alias("access")).agg(
        pl.len().alias("files"), *count_by("count", "misaligned", "bytes_read", "bytes_written")
    )
    return found.rename({"count": "requests"}).sort("used_by", "access")


def list_dataset_files(j: JoinedTables, folders: Sequence[str] = ()) -> pl.Series:
    """Files of the dataset: those that a span of reading data names, and all that is read in `folders`.

    DFTracer writes a relative path as it was opened, behind the current directory: /here/../data/day_0.
    """
    named = pl.col("cat").str.to_lowercase().is_in(DATASET_CATS) & (pl.col("op") == "read")
    declared = j["claims"].filter(named & pl.col("file").is_not_null())["file"]
    read = j["ops"].filter((pl.col("op") == "read") & pl.col("file").is_not_null())["file"].unique()
    inside = pl.Series(
        [any(os.path.normpath(file).startswith(folder + "/") for folder in folders) for file in read],
        dtype=pl.Boolean,
    )
    return pl.concat([declared, read.filter(inside)]).unique().sort()


def sum_operations(j: JoinedTables) -> pl.DataFrame:
    """Every operation: how often, how long in all, at the median and the 99th percentile."""
    total = j["ops"].group_by("layer", "op").agg(
        *count_by("count", "bytes", "failed"), SECONDS, pl.col("max_us").max()
    )  # fmt: skip
    found = total.join(find_percentiles(j["latencies"], "layer", "op"), on=["layer", "op"], how="left")
    return found.sort("seconds", "layer", "op", descending=[True, False, False])


def find_percentiles(latencies: pl.DataFrame, *by: str) -> pl.DataFrame:
    """p50, p90, p99 of latencies in us, from counts per bucket: exact below 256 us, else within 1%."""
    counts = latencies.group_by(*by, "us_bucket").agg(count_by("count")).sort(*by, "us_bucket")
    counts = add_latency_us(counts).with_columns(
        pl.col("count").cum_sum().over(by).alias("upto"), pl.col("count").sum().over(by).alias("all")
    )
    return counts.group_by(*by).agg(
        pl.col("us").filter(pl.col("upto") >= pl.col("all") * q).min().alias(f"p{int(q * 100)}_us")
        for q in (0.5, 0.9, 0.99)
    )


def count_request_sizes(j: JoinedTables, *by: str) -> pl.DataFrame:
    """Requests by size: `bytes_from` is the power of two that a size begins with; 0 for nothing moved.

    Copies from mapped files are none: the kernel fetches their pages as it likes.
    """
    low = pl.when(pl.col("bucket") < 0).then(0).otherwise(2 ** pl.col("bucket").cast(pl.Int64).clip(0))
    requests = j["ops"].filter(pl.col("bucket").is_not_null() & (pl.col("layer") != MAPPED))
    found = requests.group_by(*by, "op", "bucket").agg(*count_by("count", "bytes"), SECONDS)
    return found.with_columns(low.alias("bytes_from")).sort(*by, "op", "bucket")


def list_slowest(j: JoinedTables, startup: bool = False, n: int = 40) -> pl.DataFrame:
    """The n operations that took longest, of all ranks: of the start-up and of programs' own files, or of all
    others. `size` is what a read or write moved.
    """
    of_startup = (pl.col("phase") == "startup") | pl.col("file").str.contains(PROGRAM_FILE).fill_null(False)
    at = ((pl.col("ts") - j["time"]["ts"].min()) / S).alias("at_s")
    size = pl.when(pl.col("op").is_in(DATA_OPS)).then("size").alias("size")
    found = j["slowest"].filter(of_startup if startup else ~of_startup)
    found = found.sort("dur", "ts", "rank", "tid", "name", descending=[True] + [False] * 4).head(n)
    return found.select("rank", "phase", "name", "file", size, "dur", at, "tid", "ts")


def compare_declared(j: JoinedTables) -> pl.DataFrame:
    """Bytes that the application declares per file, and bytes that the calls moved after start-up; without
    mapped files, whose bytes no call moves."""
    calls = j["ops"].filter(
        (pl.col("layer") == "calls") & pl.col("op").is_in(DATA_OPS) & (pl.col("phase") != "startup")
    )
    moved = calls.group_by("op", "file").agg(pl.col("bytes").sum().alias("moved"), pl.col("us").sum())
    asked = (
        j["claims"].filter(~pl.col("mapped")).group_by("op", "file").agg(pl.col("bytes").sum().alias("asked"))
    )
    both = moved.join(asked.filter(pl.col("asked") > 0), on=["op", "file"])
    times = (pl.col("moved") / pl.col("asked")).alias("times")
    return both.with_columns(times).sort("moved", "op", "file", descending=[True, False, False])


def sum_spans(j: JoinedTables) -> pl.DataFrame:
    """Every span by name: sums over all ranks, the middle rank's median, the worst rank's 99th percentile."""
    found = j["spans"].group_by("cat", "name", "kind").agg(
        *count_by("count", "us", "bytes"), pl.col("p50_us").median(), pl.col("p99_us", "max_us").max()
    )  # fmt: skip
    return found.sort("us", "cat", "name", descending=[True, False, False])


def list_unknown_spans(j: JoinedTables) -> pl.DataFrame:
    """The spans that no dialect has, by name: columns cat, name, count, us, the longest in sum first."""
    sums = sum_spans(j).filter(pl.col("kind").is_null()).select("cat", "name", "count", "us")
    known = [
        is_understood(cat, name)
        for cat, name in sums.select(pl.col("cat", "name").cast(pl.String)).iter_rows()
    ]
    return sums.filter(~pl.Series(known, dtype=pl.Boolean))
