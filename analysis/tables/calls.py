"""What one rank asked of the storage: operations by size, latencies, order of access, rates over time.

In tables ops and latencies `bucket` is the size of the reads and writes of a row (`find_size_bucket`), null
for other calls: what a rule says of small, large or slow requests it takes from their own rows.

Rows come in three layers: "calls" are intercepted calls; "mapped" are copies from mapped files, which spans
declare and no call shows; "spans" are other reads and writes that the application declares and no call shows.
No byte is in two of them, so the layers can be added up.
"""

import numpy as np
import polars as pl

from analysis.tables.read import RankEvents
from analysis.tables.times import Windows
from analysis.trace.classify import DATA_OPS, PROGRAM_FILE
from analysis.trace.strings import compiled
from analysis.trace.windows import spread_bytes

SLOWEST = 40
PROGRAMS = "(modules and libraries)"  # stands in table ops for the files of `fold_program_files`
MAPPED = "mapped"  # the layer of copies from mapped files
_NONE, _SEQUENTIAL, _RANDOM, _STRIDED = 0, 1, 2, 3
_OPEN, _SEEK, _DATA, _ELSE = 0, 1, 2, 3
TABLE_FILE = ".rows"  # the end of the name of an embedding table's file
SMALL_REQUEST = 64 << 10  # a request below this is small
BLOCK = 4096  # of a file system and of the page cache; a skip into the middle of one is misaligned
FINE = 256  # latencies below this many us are counted one by one, above in 128 parts of each octave


def find_latency_bucket(dur: np.ndarray) -> np.ndarray:
    """Exact below FINE us, then buckets less than 1% wide: percentiles of many ranks can be added up."""
    bits = np.frexp(np.maximum(dur, 1).astype(np.float64))[1].astype(np.int64)  # bit length
    shift = np.maximum(bits - 8, 0)
    return np.where(dur < FINE, dur, shift * 128 + (dur >> shift))


def find_bucket_middle(bucket: np.ndarray) -> np.ndarray:
    """The middle of a bucket of `find_latency_bucket`, in us."""
    shift = np.maximum(bucket // 128 - 1, 0)
    low = np.where(bucket < FINE, bucket, (bucket - shift * 128) << shift)
    return low + np.where(bucket < FINE, 0, ((1 << shift) - 1) / 2)


def add_latency_us(latencies: pl.DataFrame) -> pl.DataFrame:
    """Adds the column `us`, the time that a latency bucket stands for."""
    return latencies.with_columns(
        pl.Series("us", find_bucket_middle(latencies["us_bucket"].to_numpy()), pl.Float64)
    )


def find_size_bucket(size: np.ndarray) -> np.ndarray:
    """n for sizes from 2^n to 2^(n+1) - 1; -1 for nothing."""
    return np.frexp(size.astype(np.float64))[1].astype(np.int64) - 1


def is_below(size: int) -> pl.Expr:
    """The rows (with `bucket`) of reads and writes of less than `size` bytes, a power of two, but of some."""
    return pl.col("bucket").is_between(0, size.bit_length() - 2)


_NEEDED = (
    "pid", "tid", "cat", "name", "op", "ts", "dur", "file", "offset", "size", "failed", "order", "touched",
)  # fmt: skip
# Of the calls of a row: random_... of those that jump, misaligned_... of those that skip into the middle of a
# block. They touch `touched` blocks, `needless` more than as many bytes from a block's begin on; needless_us
# is their time by the share of needless blocks, call by call.
SUMS = (
    "count", "bytes", "us", "failed", "sequential", "strided", "random", "random_bytes", "random_us",
    "misaligned", "misaligned_bytes", "misaligned_us", "touched", "needless", "needless_us",
)  # fmt: skip


def select_declared_io(events: RankEvents) -> pl.DataFrame:
    """Spans of the application that declare how many bytes they read or wrote."""
    return events.spans.filter(pl.col("op").is_not_null() & pl.col("bytes").is_not_null())


def make_io_tables(
    rank: int, calls: pl.DataFrame, declared: pl.DataFrame, cuts: Windows
) -> dict[str, pl.DataFrame]:
    """Tables ops, extents, claims, latencies, rates, slowest."""
    order, touched, extents = follow_calls(calls)
    calls = calls.with_columns(pl.Series("order", order, pl.UInt8), pl.Series("touched", touched))
    unseen = find_unseen(declared, calls).select(
        "mapped", "pid", "tid", "cat", "name", "op", "ts", "dur", "file",
        pl.lit(None, pl.Int64).alias("offset"),
        pl.col("bytes").alias("size"), pl.lit(False).alias("failed"), pl.lit(0, pl.UInt8).alias("order"),
        pl.lit(0, pl.Int64).alias("touched"),
    )  # fmt: skip
    made = [_sum_layer(calls.select(_NEEDED), "calls", cuts)]
    for layer, rows in (("spans", ~pl.col("mapped")), (MAPPED, pl.col("mapped"))):
        if len(own := unseen.filter(rows)):
            made.append(_sum_layer(own.select(_NEEDED), layer, cuts))
    number = pl.lit(rank, pl.Int32).alias("rank")
    tables = {name: pl.concat([t[name] for t in made]).select(number, pl.all()) for name in made[0]}
    tables["claims"] = sum_declared(declared).select(number, pl.all())
    tables["extents"] = extents.select(number, pl.all())
    return tables


def fold_program_files(ops: pl.DataFrame, extents: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Tables ops and extents with one row for all modules and libraries that only the start-up reads: those
    are thousands of files, the same ones on each rank. Table programs keeps their names, for counting.
    """
    early = (pl.col("phase") == "startup") & (pl.col("op") != "write") & (pl.col("failed") == 0)
    files = ops.group_by("file").agg((early & (pl.col("layer") == "calls")).all().alias("early"))
    files = files.filter(pl.col("early") & pl.col("file").str.contains(PROGRAM_FILE))["file"]
    is_folded = pl.col("file").is_in(files.implode()).fill_null(False)
    folded, kept = ops.filter(is_folded), ops.filter(~is_folded)
    sums = folded.group_by("rank", "layer", "phase", "epoch", "cat", "name", "op", "bucket").agg(
        pl.lit(PROGRAMS).alias("file"), pl.col(SUMS).sum(), pl.col("ts").sort_by("max_us").last(),
        pl.col("max_us").max(),
    )  # fmt: skip
    return {
        "ops": pl.concat([kept, sums.select(kept.columns)]),
        "extents": extents.join(kept.select("file").unique(), on="file", how="semi"),
        "programs": folded.select("cat", "file").unique(),
    }


def find_unseen(declared: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Declared reads and writes that no call shows: mapped files, calls that are not intercepted.

    What is copied from a mapped file is never seen: the calls on it read its header, or another mapping's.
    A span that names a file is seen when any call moved bytes of it (a bare name: of any file so called);
    one that names none, when calls of its process moved at least half of its bytes while it was open.
    """
    kept = [declared.filter("mapped")]
    declared = declared.filter(~pl.col("mapped"))
    moving = calls.select("pid", "op", "file", "ts", "size").filter(pl.col("size") > 0)
    paths = moving.select("op", pl.col("file")).unique().with_columns(pl.col("file").cast(pl.String))
    bare = paths.with_columns(pl.col("file").str.split("/").list.last())
    named = declared.filter(pl.col("file").is_not_null())
    seen = pl.concat([paths, bare]).unique()
    lost = named.select("op", "file").unique().with_columns(pl.col("file").cast(pl.String).alias("path"))
    lost = lost.join(seen, left_on=["op", "path"], right_on=["op", "file"], how="anti")
    named = named.join(lost, on=["op", "file"], how="semi") if len(lost) else named.clear()
    nameless = declared.filter(pl.col("file").is_null())
    kept.append(named)
    for (pid, op), spans in nameless.group_by("pid", "op"):
        own = moving.filter((pl.col("pid") == pid) & (pl.col("op") == op)).sort("ts")
        sums = np.concatenate([[0], np.cumsum(own["size"].to_numpy())])
        edges = (spans["ts"].to_numpy(), (spans["ts"] + spans["dur"]).to_numpy())
        low = np.searchsorted(own["ts"].to_numpy(), edges[0], side="left")
        high = np.searchsorted(own["ts"].to_numpy(), edges[1], side="right")
        kept.append(spans.filter(pl.Series(2 * (sums[high] - sums[low]) < spans["bytes"].to_numpy())))
    return pl.concat(kept)


def sum_declared(declared: pl.DataFrame) -> pl.DataFrame:
    """Bytes per category and file as the application declares them, to compare with the calls."""
    return declared.group_by("cat", "op", "file", "mapped").agg(
        pl.len().alias("count"), pl.col("bytes").sum(), pl.col("dur").sum()
    )


def _sum_layer(frame: pl.DataFrame, layer: str, cuts: Windows) -> dict[str, pl.DataFrame]:
    """Tables ops, latencies, rates and slowest of one layer.

    frame: a row per operation (columns _NEEDED). cuts: the rank's phases.
    """
    frame = frame.with_columns(pl.Series("piece", cuts.find_pieces(frame["ts"].to_numpy()), pl.Int32))
    pieces = pl.DataFrame(
        {"piece": range(len(cuts.phase)), "phase": cuts.phase, "epoch": cuts.epoch},
        schema={"piece": pl.Int32, "phase": pl.String, "epoch": pl.Int64},
    )
    name = pl.lit(layer).alias("layer")
    is_data = pl.col("op").is_in(DATA_OPS)
    size = pl.Series("bucket", find_size_bucket(frame["size"].fill_null(0).to_numpy()), pl.Int32)
    frame = frame.with_columns(size).with_columns(pl.when(is_data).then("bucket").alias("bucket"))
    ops = (
        _sum_operations(frame)
        .join(pieces, on="piece", how="left")
        .group_by("phase", "epoch", "cat", "name", "op", "bucket", "file")
        .agg(pl.col(SUMS).sum(), pl.col("ts").sort_by("max_us").last(), pl.col("max_us").max())
    )
    data = frame.filter(is_data).select("op", "ts", "dur", "size")
    us = pl.Series("us_bucket", find_latency_bucket(frame["dur"].to_numpy()), pl.Int64)
    latencies = (
        frame.select("piece", "op", "bucket", us)
        .group_by("piece", "op", "bucket", "us_bucket").agg(pl.len().alias("count"))
        .join(pieces, on="piece", how="left")
        .group_by("phase", "op", "bucket", "us_bucket").agg(pl.col("count").sum())
    )  # fmt: skip
    # the start-up reads thousands of modules: it has a list of its own
    first = pl.col("piece").is_in(pieces.filter(pl.col("phase") == "startup")["piece"].implode())
    top = [frame.filter(rows).top_k(SLOWEST, by="dur") for rows in (first, ~first)]
    slowest = pl.concat(top).join(pieces, on="piece", how="left")
    return {
        "ops": ops.select(name, pl.all()),
        "latencies": latencies.select(name, pl.all()),
        "rates": make_rates(data, cuts).select(name, pl.all()),
        "slowest": slowest.select(
            name, "phase", "pid", "tid", "cat", "name", "op", "ts", "dur", "file", "offset", "size"
        ),
    }


def _sum_operations(frame: pl.DataFrame) -> pl.DataFrame:
    """Per piece, operation, size and file: sums, how long the longest one took, and when it began."""
    # time and row in one number: its maximum is the longest one's, without a sort
    longest = (pl.col("dur").clip(0, (1 << 31) - 1) * (1 << 32) + pl.int_range(pl.len())).alias("longest")
    needless = pl.col("touched") - (pl.col("size") + BLOCK - 1) // BLOCK
    found = (
        frame.lazy()
        .select(
            "piece", "cat", "name", "op", "bucket", "file", "size", "dur", "failed", "order", "touched",
            longest, needless.alias("needless"), (pl.col("order") == _RANDOM).alias("random"),
            (pl.col("touched") > 0).alias("misaligned"),
        )
        .group_by("piece", "cat", "name", "op", "bucket", "file")
        .agg(
            pl.len().alias("count"),
            pl.col("size").filter(pl.col("bucket").is_not_null()).sum().alias("bytes"),
            pl.col("dur").sum().alias("us"),
            pl.col("dur").max().alias("max_us"),
            pl.col("failed").sum(),
            (pl.col("order") == _SEQUENTIAL).sum().alias("sequential"),
            (pl.col("order") == _STRIDED).sum().alias("strided"),
            pl.col("random").sum(),
            pl.col("size").filter("random").sum().alias("random_bytes"),
            pl.col("dur").filter("random").sum().alias("random_us"),
            pl.col("misaligned").sum(),
            pl.col("size").filter("misaligned").sum().alias("misaligned_bytes"),
            pl.col("dur").filter("misaligned").sum().alias("misaligned_us"),
            pl.col("touched").sum(),
            pl.col("needless").filter("misaligned").sum(),
            (pl.col("dur") * pl.col("needless") / pl.col("touched")).filter("misaligned").sum()
            .round().cast(pl.Int64).alias("needless_us"),
            pl.col("longest").max(),
        )
        .collect()
    )  # fmt: skip
    return found.with_columns(frame["ts"].gather(found["longest"] & 0xFFFFFFFF)).drop("longest")


def make_rates(data: pl.DataFrame, cuts: Windows) -> pl.DataFrame:
    """Bytes and operations per stretch of time; a long operation's bytes are spread over its time."""
    width = cuts.bin_us
    first = int(cuts.starts[0] // width)
    n = int(cuts.ends[-1] // width) - first + 1
    found = []
    for op in DATA_OPS:
        rows = data.filter(pl.col("op") == op)
        starts, moved = rows["ts"].to_numpy() - first * width, np.zeros(n)
        spread_bytes(starts, starts + rows["dur"].to_numpy(), rows["size"].to_numpy(), width, moved)
        count = np.bincount(np.clip(starts // width, 0, n - 1), minlength=n)
        found.append(pl.DataFrame({"bin": np.arange(first, first + n), "bytes": moved, "count": count})
                     .select(pl.lit(op).alias("op"), pl.lit(width, pl.Int64).alias("width_us"), pl.all())
                     .filter((pl.col("bytes") > 0) | (pl.col("count") > 0)))  # fmt: skip
    return pl.concat(found)


def follow_calls(calls: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, pl.DataFrame]:
    """For each call how it follows on the last one of its thread on the file: it begins where that ended, or
    skips forward by as much as the time before or after, or jumps. Of calls that skip or jump into the middle
    of a BLOCK how many blocks they touch, 0 of all others. And how far into each file the calls reached,
    which is all that a trace shows of a file's size."""
    group, kind, groups = _group_calls(calls)
    order, reach = np.zeros(len(calls), np.uint8), np.zeros(groups, np.int64)
    touched = np.zeros(len(calls), np.int64)
    offset, size = (calls[name].fill_null(-1).to_numpy() for name in ("offset", "size"))
    # of each group: position, end of the last call, how far the last skip went, and which call skipped
    position, end, skip, skipped = (np.full(groups, -1) for _ in range(4))
    _follow_calls(group, kind, offset, size, position, end, skip, skipped, reach, order, touched)
    far = calls.select("file", pl.Series("reach", reach[group], pl.Int64))
    far = far.filter(pl.col("file").is_not_null() & (pl.col("reach") > 0))
    return order, touched, far.group_by("file").agg(pl.col("reach").max())


def _group_calls(calls: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
    """A number per (thread, file), and what the call means for the position in the file."""
    threads = calls["tid"].unique().sort().to_numpy()
    files = calls["file"].to_physical().fill_null(0).to_numpy().astype(np.int64)
    group = files * max(1, len(threads)) + np.searchsorted(threads, calls["tid"].to_numpy())
    named = calls["file"].is_not_null().to_numpy()
    meaning = {"open": _OPEN, "seek": _SEEK, "read": _DATA, "write": _DATA}
    kind = calls["op"].replace_strict(meaning, default=_ELSE, return_dtype=pl.UInt8).to_numpy()
    return group, np.where(named, kind, _ELSE), int(group.max()) + 1 if len(group) else 0


@compiled
def _follow_calls(group, kind, offset, size, position, end, skip, skipped, reach, order, touched):
    """Fills `order` (uint8 [calls]), `touched` (int64 [calls]) and `reach` (int64 [groups]); `follow_calls`
    says what they mean.

    group, kind, offset, size: [calls]; offset and size are -1 where a call has none.
    """
    for i in range(len(group)):
        g = group[i]
        if kind[i] == _OPEN:
            position[g] = 0
        elif kind[i] == _SEEK:
            position[g] = size[i]
        elif kind[i] == _DATA and size[i] > 0:
            start = offset[i] if offset[i] >= 0 else position[g]
            if start >= 0:
                order[i] = _SEQUENTIAL if end[g] < 0 or start == end[g] else _RANDOM
                if order[i] == _RANDOM:
                    if start % BLOCK != 0:
                        touched[i] = (start + size[i] - 1) // BLOCK - start // BLOCK + 1
                    if start > end[g] and start - end[g] == skip[g]:
                        order[i] = order[skipped[g]] = _STRIDED
                    skip[g], skipped[g] = start - end[g], i
                end[g] = start + size[i]
                reach[g] = max(reach[g], end[g])
                if offset[i] < 0:
                    position[g] = end[g]
