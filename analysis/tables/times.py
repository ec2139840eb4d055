"""Where one rank's time went: phases of the run, kinds of the main thread's time, steps; exact, in us.

Only unions of stretches are ever built. The length of a union before given times gives the rest:
what is in A but not in B is |A or B| - |B|, what is in both is |A| + |B| - |A or B|.
"""

import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.tables.intervals import Stretches, merge_stretches, subtract_stretches, unite_stretches
from analysis.tables.read import RankEvents, choose_steps
from analysis.trace.classify import (
    DATA_OPS,
    EPOCH,
    EVALUATION,
    KERNEL_COUNTERS,
    KINDS,
    PROGRAM_FILE,
    SETUP,
    STEP,
    SYSTEM_FILE,
    TRAINING,
)

MEASURES = (
    "wall_us", *(f"{kind}_us" for kind in KINDS), "other_us",
    "io_all_us", "io_behind_compute_us", "io_behind_communication_us", "io_not_hidden_us",
)  # fmt: skip
BINS = 600  # stretches of the timeline, at most, of one rank
MAX_EPOCHS = 1000  # that are kept apart
MAX_COLLECTIVES = 200_000  # of a rank that are kept
KEPT_CATS = ("startup", "checkpoint", "prep")  # whose spans are kept one by one, and those of evaluations


@dataclass
class Windows:
    """The run of one rank cut into phases: pieces without overlap, in order, that cover all of it."""

    phase: list[str]
    epoch: list[int | None]
    starts: np.ndarray
    ends: np.ndarray

    @property
    def bin_us(self) -> int:
        """How long a bin of the timeline is: a power of two, so that coarser ranks' bins hold finer ones."""
        span = max(1, int(self.ends[-1] - self.starts[0]))
        return 1 << max(0, math.ceil(math.log2(span / BINS)))

    def find_pieces(self, ts: np.ndarray) -> np.ndarray:
        """The number of the piece that each time is in."""
        return np.clip(np.searchsorted(self.starts, ts, side="right") - 1, 0, len(self.starts) - 1)


RankMeasures = tuple[dict[str, pl.DataFrame], Windows]  # tables of a rank, and its phases


def find_stretches(events: pl.DataFrame, *where: pl.Expr) -> Stretches:
    """The time that the chosen events cover."""
    found = events.lazy().filter(*where).select("ts", (pl.col("ts") + pl.col("dur")).alias("end")).collect()
    return merge_stretches(found["ts"].to_numpy(), found["end"].to_numpy())


def measure_covered_time(of: Stretches, times: np.ndarray) -> np.ndarray:
    """The length of a union before each time."""
    starts, ends = of
    if not len(starts):
        return np.zeros(len(times), np.int64)
    sums = np.concatenate([[0], np.cumsum(ends - starts)])
    number = np.searchsorted(starts, times, side="right")
    overhang = np.maximum(0, ends[np.maximum(number - 1, 0)] - times)
    return sums[number] - np.where(number > 0, overhang, 0)


def find_bounds(events: RankEvents) -> tuple[int, int]:
    """When the first event of the rank begins, and when the last one ends."""
    both = [frame for frame in (events.calls, events.spans) if len(frame)]
    return (
        min(int(f["ts"].to_numpy().min()) for f in both),
        max(int((f["ts"] + f["dur"]).to_numpy().max()) for f in both),
    )


def cut_into_phases(events: RankEvents, main: pl.DataFrame) -> Windows:
    """Phases of one rank. Where several would have a time, checkpoints have it, then evaluation, training by
    epochs, start-up, and the rest of the run.

    main: the main thread's spans.
    """
    first, last = find_bounds(events)
    phases = main.filter((pl.col("part") != SETUP).fill_null(True))
    of = {cat: phases.filter(pl.col("cat") == cat) for cat in ("checkpoint", "prep", "startup")}
    evaluation = main.filter(pl.col("part") == EVALUATION)
    pieces: list[tuple[str, int | None, Stretches]] = []
    taken = find_stretches(of["checkpoint"])
    pieces.append(("checkpoint", None, taken))

    def add(phase: str, epoch: int | None, found: Stretches) -> None:
        nonlocal taken
        pieces.append((phase, epoch, subtract_stretches(found, taken)))
        taken = unite_stretches(taken, found)

    add("evaluate", None, find_stretches(evaluation))
    work = main.filter(pl.col("part").is_in([EPOCH, STEP]))
    if not len(work):
        work = main.filter(pl.col("part") == TRAINING)
    if work["epoch"].n_unique() > MAX_EPOCHS:
        work = work.with_columns(pl.lit(None, pl.Int64).alias("epoch"))
    for (epoch,), spans in sorted(work.group_by("epoch"), key=lambda item: item[0][0] or 0):
        # a killed run has steps of an epoch but no span of the epoch itself
        ends = (spans["ts"] + spans["dur"]).to_numpy()
        add("train", epoch, (spans["ts"].to_numpy().min(keepdims=True), ends.max(keepdims=True)))
    begun = [int(f["ts"].to_numpy().min()) for f in (evaluation, work) if len(f)]
    if begun or len(of["startup"]):
        until = min(begun) if begun else last
        add("startup", None, (np.array([first]), np.array([until])))
    whole = np.array([first]), np.array([last])
    known = any(len(found[0]) for phase, _, found in pieces if phase != "checkpoint")
    add("preprocess" if len(of["prep"]) else "other" if known else "run", None, whole)
    return _in_order(pieces, first, last)


def _in_order(pieces: list[tuple[str, int | None, Stretches]], first: int, last: int) -> Windows:
    """Stretches of all phases in the order of time. pieces: (phase, epoch, its stretches); where there is
    none, the whole from `first` to `last` is the phase "run".
    """
    rows = [(int(a), int(b), phase, epoch) for phase, epoch, (starts, ends) in pieces
            for a, b in zip(starts, ends, strict=True)] or [(first, last, "run", None)]  # fmt: skip
    rows.sort()
    starts, ends, phases, epochs = zip(*rows, strict=True)
    return Windows(list(phases), list(epochs), np.array(starts), np.array(ends))


def measure_times(
    events: RankEvents, main: pl.DataFrame, times: np.ndarray, has_startup: bool = True
) -> dict[str, np.ndarray]:
    """For each measure, its amount before each time (int64, us): two of them differ by what is between.

    I/O is what calls take. A span of a read or write counts where no call shows it: around its calls it also
    holds waiting for the interpreter's lock or for a core, which are no I/O.
    Where nothing tells the start-up from the rest, the main thread's imports are not I/O that it waits for.
    """
    pid, tid = events.main_thread
    here = (pl.col("pid") == pid) & (pl.col("tid") == tid)
    if not has_startup:
        files = events.calls["file"].unique().drop_nulls()  # far fewer than calls
        own = files.filter(files.cast(pl.String).str.contains(f"{PROGRAM_FILE}|{SYSTEM_FILE}")).to_physical()
        here &= ~pl.col("file").to_physical().is_in(own.implode()).fill_null(False)
    spans = find_spans_without_calls(events.spans.filter(pl.col("kind") == "io"), events.calls)
    io_all = unite_stretches(find_stretches(events.calls), find_stretches(spans))
    all_io = measure_covered_time(io_all, times)
    sums: dict[str, np.ndarray] = {"wall_us": times - times.min()}
    none = np.zeros(0, np.int64)
    level, before, both = (none, none), np.zeros(len(times), np.int64), {}
    for kind in KINDS:
        if kind == "io":
            of_kind = unite_stretches(
                find_stretches(spans, pl.col("pid") == pid, pl.col("tid") == tid),
                find_stretches(events.calls, here),
            )
        else:
            of_kind = find_stretches(main, pl.col("kind") == kind)
        level = unite_stretches(level, of_kind)
        now = measure_covered_time(level, times)
        sums[f"{kind}_us"] = now - before
        before = now
        if kind in ("wait", "copy", "compute"):
            both[kind] = all_io + now - measure_covered_time(unite_stretches(io_all, level), times)
    sums["other_us"] = sums["wall_us"] - before
    sums["io_all_us"] = all_io
    sums["io_behind_compute_us"] = both["compute"] - both["copy"]
    sums["io_behind_communication_us"] = both["copy"] - both["wait"]
    sums["io_not_hidden_us"] = all_io - both["compute"] + both["wait"]
    return sums


def find_spans_without_calls(spans: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """The spans in which their thread begins no call that reads or writes."""
    moving = calls.lazy().filter(pl.col("op").is_in(DATA_OPS)).select("pid", "tid", "ts").collect()
    kept = [spans.clear()]
    for (pid, tid), own in spans.group_by("pid", "tid"):
        begun = moving.filter((pl.col("pid") == pid) & (pl.col("tid") == tid))["ts"].sort().to_numpy()
        first = np.searchsorted(begun, own["ts"].to_numpy(), side="left")
        last = np.searchsorted(begun, (own["ts"] + own["dur"]).to_numpy(), side="right")
        kept.append(own.filter(pl.Series(first == last)))
    return pl.concat(kept)


def list_collectives(
    main: pl.DataFrame, steps: pl.DataFrame, most: int | None = MAX_COLLECTIVES
) -> pl.DataFrame:
    """The communication of each step, as the main thread waits in it; spans inside another one are left out.

    `nth`: the how many-th of its name in the step, so that the ranks' spans of one collective can be joined.
    main: the main thread's spans. steps: epoch, step, ts, dur. most: that are kept, None for all.
    """
    begin = steps["ts"].to_numpy()
    end = begin + steps["dur"].to_numpy()
    found = main.filter(pl.col("kind") == "communication").sort("ts", "dur", descending=[False, True])
    place = np.searchsorted(begin, found["ts"].to_numpy(), side="right") - 1
    inside = (place >= 0) & (found["ts"].to_numpy() < end[place] if len(end) else False)
    open_until = pl.max_horizontal((pl.col("ts") + pl.col("dur")).cum_max().shift(1).fill_null(0), 0)
    found = found.select(
        pl.Series("nth_step", place, pl.Int64), pl.col("name").cast(pl.String), "ts", "dur",
        outer=pl.col("ts") >= open_until,
    ).filter(pl.col("outer") & pl.Series(inside, dtype=pl.Boolean))  # fmt: skip
    numbers = steps.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("nth_step"), "epoch",
        pl.col("step").fill_null(pl.int_range(pl.len(), dtype=pl.Int64)),
    )  # fmt: skip
    kept = found if most is None else found.head(most)
    found = kept.join(numbers, on="nth_step", how="left", maintain_order="left")
    nth = pl.int_range(pl.len(), dtype=pl.Int64).over("nth_step", "name").alias("nth")
    return found.select("epoch", "step", "name", nth, "ts", "dur")


def measure_rank(events: RankEvents) -> RankMeasures | None:
    """Tables time (per phase and epoch), steps, collectives, busy (timeline), spans, marks, curves; None of a
    rank without events.
    """
    if not events.count:
        return None
    pid, tid = events.main_thread
    main = (
        events.spans.lazy().filter((pl.col("pid") == pid) & (pl.col("tid") == tid))
        .select("cat", "name", "kind", "part", "ts", "dur", "epoch", "step", "batch").collect()
    )  # fmt: skip
    cuts = cut_into_phases(events, main)
    steps = choose_steps(main).sort("ts")
    begin = steps["ts"].to_numpy()
    end = begin + steps["dur"].to_numpy()
    width = cuts.bin_us
    bins = np.arange(cuts.starts[0] // width, cuts.ends[-1] // width + 2)
    edges = np.clip(bins * width, cuts.starts[0], cuts.ends[-1])
    times = np.concatenate([cuts.starts, cuts.ends, begin, end, edges])
    sums = measure_times(events, main, times, "startup" in cuts.phase)
    n, m = len(cuts.starts), len(begin)
    by_piece = {k: v[n : 2 * n] - v[:n] for k, v in sums.items()}
    by_step = {k: v[2 * n + m : 2 * n + 2 * m] - v[2 * n : 2 * n + m] for k, v in sums.items()}
    by_bin = {k: np.diff(v[2 * (n + m) :]) for k, v in sums.items()}
    rank = pl.lit(events.rank, pl.Int32).alias("rank")
    # a merged file has the start-up and the checkpoints of several processes: only one can be the rank's
    merged = any(process.pids > 1 for process in events.processes)
    of_rank = (pl.col("pid") == pid) | pl.lit(not merged)
    time = (
        pl.DataFrame({"phase": cuts.phase, "epoch": cuts.epoch, "ts": cuts.starts, **by_piece},
                     schema_overrides={"epoch": pl.Int64})
        .group_by("phase", "epoch", maintain_order=True)
        .agg(pl.col("ts").min(), pl.col(*MEASURES).sum())
    )  # fmt: skip
    tables = {
        "time": time.select(rank, pl.all()),
        "steps": steps.select(rank, "epoch", "step", "batch", "ts").with_columns(
            **{k: pl.Series(v) for k, v in by_step.items()}
        ),
        "collectives": list_collectives(main, steps).select(rank, pl.all()),
        "busy": pl.DataFrame({"bin": bins[:-1], **by_bin}).select(
            rank, pl.lit(width, pl.Int64).alias("width_us"), pl.all()
        ),
        "spans": sum_by_name(events.spans).select(rank, pl.all()),
        "marks": events.spans.filter(
            (pl.col("cat").is_in(KEPT_CATS) | (pl.col("part") == EVALUATION).fill_null(False))
            & (pl.col("part") != SETUP).fill_null(True)
            & of_rank
        ).head(20_000)
        .select(rank, "pid", "tid", "cat", "name", "ts", "dur", "file", "bytes", "epoch", "step", "split"),
        "curves": events.spans.filter(
            (pl.col("cat") == "counter") & ~pl.col("name").cast(pl.String).str.starts_with(KERNEL_COUNTERS)
        ).head(50_000)
        .select(rank, "name", "ts", "step", "value"),
    }  # fmt: skip
    return tables, cuts


def sum_by_name(spans: pl.DataFrame) -> pl.DataFrame:
    """Every kind of span: how often, how long in sum, at the median, at the 99th percentile."""
    return (
        spans.filter(~pl.col("cat").is_in(["counter", "clock"]))
        .group_by("cat", "name", "kind")
        .agg(
            pl.len().alias("count"),
            pl.col("dur").sum().alias("us"),
            pl.col("dur").quantile(0.5, "nearest").cast(pl.Int64).alias("p50_us"),
            pl.col("dur").quantile(0.99, "nearest").cast(pl.Int64).alias("p99_us"),
            pl.col("dur").max().alias("max_us"),
            pl.col("bytes").sum(),
        )
        .sort("us", descending=True)
    )
