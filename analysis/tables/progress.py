"""The joined tables of a run, by step and over time: steps, ranks, start-up, timeline."""

import polars as pl

from analysis.tables.answers import S, to_seconds
from analysis.tables.gather import JoinedTables
from analysis.tables.times import MEASURES
from analysis.trace.classify import DATA_OPS, KINDS

KIND_US = [f"{kind}_us" for kind in (*KINDS, "other")]
OWN = (pl.col("wall_us") - pl.col("communication_us")).alias("own_us")  # a step without what waits for others


def list_steps(j: JoinedTables) -> pl.DataFrame:
    """One row per step: its time on the slowest rank and on average, by kind, and which rank was last."""
    found = j["steps"].with_columns(OWN).group_by("launch", "epoch", "step").agg(
        pl.col("ts").min(), pl.len().alias("ranks"),
        pl.col("wall_us").max(), pl.col("wall_us").mean().alias("mean_us"),
        pl.col("rank").sort_by("own_us", "rank").last().alias("slowest_rank"),
        pl.col("own_us").max(), pl.col("own_us").mean().alias("own_mean_us"),
        pl.col(*KIND_US, "io_all_us", "io_not_hidden_us").mean(),
    )  # fmt: skip
    return found.sort("ts", "launch", "epoch", "step")


def sum_step_ranges(j: JoinedTables, ranges: int = 20) -> pl.DataFrame:
    """The training in ranges of steps: the same measures as of an epoch, of a rank on average."""
    table = j["steps"].filter(pl.col("step").is_not_null())
    if not len(table):
        return table.select("step")
    low, high = (int(edge) for edge in (table["step"].to_numpy().min(), table["step"].to_numpy().max()))
    width = max(1, -(-(high - low + 1) // ranges))
    first = (low + (pl.col("step") - low) // width * width).alias("from_step")
    means = pl.col(*MEASURES).sum() / pl.col("rank").n_unique()
    found = table.group_by(first).agg(pl.col("step").n_unique().alias("steps"), means).sort("from_step")
    return found.select("from_step", "steps", *to_seconds(*MEASURES))


def find_late_steps(j: JoinedTables, times: float = 2.0, n: int = 40) -> pl.DataFrame:
    """Steps longer than `times` the median of their run, and what took the extra time."""
    usual = j["steps"].select(pl.col("wall_us", *KIND_US).median()).row(0, named=True)
    late = j["steps"].filter(pl.col("wall_us") > times * (usual["wall_us"] or 0))
    kind = pl.Series("kind", [name.removesuffix("_us") for name in KIND_US])
    extra = [late[name].to_numpy() - (usual[name] or 0) for name in KIND_US]
    most = pl.DataFrame(extra, schema=KIND_US).select(pl.concat_list(KIND_US).list.arg_max()).to_series()
    late = late.with_columns(
        kind.gather(most.cast(pl.UInt32)).alias("why"),
        (pl.col("wall_us") - usual["wall_us"]).cast(pl.Int64).alias("excess_us"),
    )
    return late.sort("wall_us", "ts", "rank", descending=[True, False, False]).head(n)


def compare_ranks(j: JoinedTables) -> pl.DataFrame:
    """Skew: each rank's own work in its steps (all but communication), against the others."""
    table = j["steps"].with_columns(OWN).group_by("rank").agg(
        pl.len().alias("steps"),
        *(pl.col(c).sum() for c in ("wall_us", *KIND_US)),
        pl.col("own_us").median(),
    )  # fmt: skip
    middle = table["own_us"].median()
    return table.sort("rank").select(
        "rank", "steps", *to_seconds("wall_us", *KIND_US), (pl.col("own_us") / 1e3).alias("own_ms"),
        (pl.col("own_us") / middle).alias("of_median"),
    )  # fmt: skip


def list_startup(j: JoinedTables) -> pl.DataFrame:
    """From a launch's first event to the end of its first step; `between` is what no span covers. No rows
    where the beginning was not read.
    """
    about = ["launch", "rank"]
    first = j["steps"].sort("ts").group_by(about, maintain_order=True).first()
    bounds = first.select(
        *about, pl.col("ts").alias("first_ts"), (pl.col("ts") + pl.col("wall_us")).alias("end")
    )
    bounds = bounds.join(j["time"].group_by(about).agg(pl.col("ts").min().alias("begin")), on=about)
    marks = j["marks"].filter(pl.col("cat") == "startup").join(bounds, on=about).sort("ts")
    marks = marks.filter(pl.col("ts") < pl.col("first_ts"))
    step = first.select(*about, pl.lit("first step").alias("part"), "ts", pl.col("wall_us").alias("dur"))
    parts = pl.concat([marks.select(*about, pl.col("name").alias("part"), "ts", "dur"), step])
    covered = bounds.join(parts.group_by(about).agg(pl.col("dur").sum()), on=about)
    between = (pl.col("end") - pl.col("begin") - pl.col("dur")).clip(0).alias("dur")
    gaps = covered.select(
        *about, pl.lit("between").alias("part"), pl.lit(None, pl.Int64).alias("ts"), between
    )
    rows = pl.concat([parts, gaps]).join(bounds, on=about)
    at = ((pl.col("ts") - pl.col("begin")) / S).alias("at_s")
    rows = rows.select(*about, "part", at, (pl.col("dur") / S).alias("seconds"))
    if not j.has_start:
        return rows.clear()
    return rows.sort("launch", "rank", "at_s", nulls_last=True, maintain_order=True)


def list_launches(j: JoinedTables) -> pl.DataFrame:
    """A row per launch: when it began and how long it ran; before it, for how long nothing did."""
    own = j["time"].group_by("launch", "rank").agg(pl.col("ts").min(), pl.col("wall_us").sum())
    table = own.group_by("launch").agg(
        pl.len().alias("ranks"), pl.col("ts").min(), (pl.col("ts") + pl.col("wall_us")).max().alias("end")
    )
    done = j["steps"].group_by("launch").agg(
        pl.col("step").n_unique().alias("steps"), pl.col("step").min().alias("first_step"),
        pl.col("step").max().alias("last_step"),
    )  # fmt: skip
    table = table.join(done, on="launch", how="left").sort("launch")
    pause = (pl.col("ts") - pl.col("end").shift(1)).clip(0).fill_null(0)
    at = (pl.col("ts") - pl.col("ts").min()) / S
    return table.select(
        "launch", "ranks", at.alias("at_s"), ((pl.col("end") - pl.col("ts")) / S).alias("wall_s"),
        (pause / S).alias("not_running_before_s"), pl.col("steps").fill_null(0), "first_step", "last_step",
    )  # fmt: skip


def find_gaps(j: JoinedTables) -> list[tuple[float, float]]:
    """From when to when, in seconds of the run, nothing ran: between two launches."""
    table = list_launches(j).filter(pl.col("not_running_before_s") > 0)
    return [(at - pause, at) for at, pause in table.select("at_s", "not_running_before_s").iter_rows()]


def list_checkpoints(j: JoinedTables) -> pl.DataFrame:
    """A row per checkpoint span: rank, what it did, when, for how long, bytes and MB/s.

    A save has no rate: a thread writes its bytes after the span.
    """
    at = ((pl.col("ts") - j["time"]["ts"].min()) / S).alias("at_s")
    rated = (pl.col("dur") > 0) & (pl.col("name") != "save")
    rate = pl.when(rated).then(pl.col("bytes") / pl.col("dur")).alias("MB_per_s")
    found = j["marks"].filter(pl.col("cat") == "checkpoint").sort("ts", "rank", "name")
    return found.select(
        "rank", "name", "step", at, (pl.col("dur") / S).alias("seconds"), "bytes", rate, "file"
    )


def sum_preprocessing(j: JoinedTables) -> pl.DataFrame:
    """A row per step of preprocessing: elapsed time, work of all workers, bytes and MB/s."""
    found = j["marks"].filter(pl.col("cat") == "prep").group_by("name").agg(
        pl.len().alias("count"), pl.col("ts").min(), pl.col("dur").sum(), pl.col("bytes").sum(),
        (pl.col("ts") + pl.col("dur")).max().alias("end"),
    )  # fmt: skip
    elapsed = pl.col("end") - pl.col("ts")
    return found.sort("ts", "name").select(
        "name", "count", (elapsed / S).alias("elapsed_s"), (pl.col("dur") / S).alias("work_s"), "bytes",
        pl.when(elapsed > 0).then(pl.col("bytes") / elapsed).alias("MB_per_s"),
    )  # fmt: skip


def make_timeline(j: JoinedTables) -> pl.DataFrame:
    """Per stretch of time: share of the ranks' time by kind, and MB/s read and written, all ranks.

    All stretches but the first are equally long: it begins with the run.
    """
    busy = j["busy"]
    width, first = int(busy["width_us"].to_numpy().max()), j["time"]["ts"].min()
    table = (
        busy.group_by("bin", maintain_order=True)
        .agg(pl.col("wall_us", *KIND_US).sum())
        .filter(pl.col("wall_us") > 0)
    )
    begin = pl.max_horizontal(pl.col("bin") * width, pl.lit(first))
    shares = [(pl.col(k) / pl.col("wall_us")).alias(k.removesuffix("_us")) for k in KIND_US]
    table = table.select("bin", begin.alias("ts"), ((pl.col("bin") + 1) * width - begin).alias("us"), *shares)
    for op in DATA_OPS:
        moved = j["rates"].filter(pl.col("op") == op).group_by("bin").agg(pl.col("bytes").sum().alias(op))
        rate = (pl.col(op) / pl.col("us")).alias(f"{op}_MB_per_s")  # B/us is MB/s
        table = table.join(moved, on="bin", how="left").with_columns(rate).drop(op)
    times = (((pl.col("ts") - first) / S).alias("at_s"), (pl.col("us") / S).alias("width_s"))
    return table.fill_null(0.0).sort("bin").select(*times, pl.exclude("bin", "ts", "us"))


CURVES = (
    "loss", "samples_per_second", "auroc", "lr", "cache_hit_rate", "cache_evictions", "store_bytes_read",
    "store_bytes_written",
)  # fmt: skip

RANKINGS = ("Recall@", "NDCG@")  # metrics of a recommender that ranks items, at some length of its list


def make_curves(j: JoinedTables, metrics: pl.DataFrame) -> pl.DataFrame:
    """What changes over a run, on its clock: metrics.jsonl, and of the trace's counters what it lacks."""
    begin = int(j["time"]["ts"].to_numpy().min())
    lacking = [
        pl.lit(None, dtype).alias(name)
        for name, dtype in {"step": pl.Int64, "split": pl.String, "time": pl.Float64}.items()
        if name not in metrics.columns
    ]
    logged = metrics.with_columns(lacking) if len(metrics) else pl.DataFrame()
    rows, have = [], []
    for name in (*CURVES, *(column for column in logged.columns if column.startswith(RANKINGS))):
        if name in logged.columns and logged["time"].dtype.is_numeric():
            found = logged.filter(pl.col(name).is_not_null() & pl.col("time").is_not_null())
            rows.append(
                found.select(
                    pl.lit(name).alias("name"), (pl.col("time") - begin / S).alias("at_s"),
                    pl.col("step").cast(pl.Int64, strict=False),
                    pl.col(name).cast(pl.Float64, strict=False).alias("value"),
                    pl.col("split").cast(pl.String),
                )
            )  # fmt: skip
            have.append(name)
    counted = j["curves"].filter(~pl.col("name").is_in(have) & (pl.col("rank") == pl.col("rank").min()))
    at = ((pl.col("ts") - begin) / S).alias("at_s")
    rows.append(counted.select("name", at, "step", "value", pl.lit(None, pl.String).alias("split")))
    return pl.concat(rows).sort("name", "at_s")
