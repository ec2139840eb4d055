"""What each step took and each batch asked for: the workload of a run, without the machine it ran on.

In: the traces of a run, read rank by rank as the report reads them; no scanner of its own. Out: `Workload`,
four polars frames. All times are in microseconds (int64): `start` on the run's common clock, counted from
1970, all others durations. Every frame has `launch` (int32, from 1; a resumed run has several) and `rank`.

`steps`, a row per rank and step, in order of time. The columns from `wait_us` to `compute_us` (without counts
and bytes) add up to `period_us`; where several things are open at once the first of pause, waits, I/O and
communication has the time.

  phase           "train" or "eval"
  split           of an evaluation: "val" or "test"; null in training, and where the trace names none
  epoch, step     as the trace numbers them (step from 1, over all epochs); of an evaluation the last one
  evaluation      number of the evaluation on this rank, from 0; null in training
  batch           training: number of the batch trained, over all epochs; evaluation: from 0 in each
  start
  period_us       until the next step of the epoch or evaluation begins; of the last one: its own duration
  wait_us         in dataloader/fetch.iter: for the loading thread, whichever batch it is that is waited for
  waits           how many of these spans there are: batches taken
  rows_us         in ssd/wait: until another thread has read rows of tables in files
  peers_us        in collectives, until the slowest rank has come (one rank: 0)
  transfer_us     the rest of the collectives
  exchange_bytes  that the collectives' spans declare; null where they declare none
  pause_us        evaluations and checkpoint spans of the main thread
  io_us           file calls of the main thread: tables in files, logs
  compute_us      what is left
  rows_calls_us, rows_ahead_us, rows_spare_us    no part of the period: `analysis/workload/table_rows.py`

`batches`, a row per rank and batch that a loading thread prepared:

  phase, split, epoch, evaluation, batch    as above
  start           of its first read, or of its assembling where it needed none
  load_us         until it is assembled: at least read_us + assemble_us
  read_us         in data/read spans
  call_us         file calls that read, inside those spans
  assemble_us     in data/preprocess spans
  bytes           that the data/read spans declare; where they declare none, that the calls moved
  requests        file calls that read; copies from mapped files, which no call shows, count as one each

`pauses`, a row per rank and span of the main thread that interrupts training, whether inside a step's period
or between two epochs: `name` ("pipeline/evaluate", "eval/metrics", "checkpoint/collect", "checkpoint/save",
"checkpoint/wait", "checkpoint/load"), split, epoch, step, start, dur_us, bytes (that the span declares, else
null). eval/metrics is inside pipeline/evaluate. (For names of spans of earlier traces see
analysis/trace/classify.py.)

`requests`, file calls that read for batches (every n-th, where a rank made more than MAX_REQUESTS): phase,
dur_us, bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from analysis.tables.collectives import join_collectives
from analysis.tables.gather import RankTables
from analysis.tables.intervals import Stretches, unite_stretches
from analysis.tables.read import RankEvents, read_rank
from analysis.tables.times import find_stretches, list_collectives, measure_covered_time
from analysis.trace.classify import EVALUATION, PREPROCESS
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.process import TracedProcess
from analysis.trace.source import FileSource, TraceSource
from analysis.workload.table_rows import measure_row_loading
from common.errors import UserError, printable

MAX_REQUESTS = 100_000  # of a rank that are kept
PREFIX = "workload_"  # of the tables' names among those of the report
READER = "prefetch "  # the beginning of the name of a thread that loads batches; then its split follows
PAUSES = {"checkpoint": ("collect", "save", "wait", "load"), "eval": ("metrics",)}  # and evaluations
_IS_EVALUATION = (pl.col("part") == EVALUATION).fill_null(False) & (pl.col("name") == "evaluate")


@dataclass(frozen=True)
class Workload:
    """The frames that the module describes, of all ranks."""

    steps: pl.DataFrame
    batches: pl.DataFrame
    pauses: pl.DataFrame
    requests: pl.DataFrame

    @property
    def ranks(self) -> int:
        """Ranks of the launch that had most of them."""
        return int(self.steps.group_by("launch").agg(pl.col("rank").n_unique())["rank"].max() or 0)  # type: ignore[arg-type]


def measure_steps(run_dir: str | Path, source: TraceSource | None = None) -> Workload:
    """The workload of a run folder, or of any folder of DFTracer traces that has steps.

    source: a reading of the traces that is shared with other analyses. UserError where there are no steps.
    """
    shared = source or FileSource(run_dir)
    parts: list[RankTables] = []
    launches: dict[int, list[TracedProcess]] = {}
    for job in plan_launches(shared):
        events = read_rank(job.rank, job.files, job.clock, source)
        parts.append(RankTables(events.processes, measure_rank_workload(job, events)))
        for process in events.processes:
            process.rank = job.rank
        launches.setdefault(job.launch, []).extend(events.processes)
    tables = {name: pl.concat([part.tables[name] for part in parts]) for name in parts[0].tables}
    found = join_workload(tables, list(launches.values()))
    if not len(found.steps):
        raise UserError(
            f"{printable(run_dir)}: the trace has no steps (category train, name step): it is unknown what "
            "one takes; give the run folder of a traced training"
        )
    return found


def measure_rank_workload(job: Launch, events: RankEvents) -> dict[str, pl.DataFrame]:
    """The tables of one rank in one launch, by names that begin with PREFIX: input of `join_workload`."""
    pid, tid = events.main_thread
    columns = ("cat", "name", "kind", "part", "ts", "dur", "bytes", "epoch", "step", "batch", "split")
    main = (
        events.spans.lazy().filter((pl.col("pid") == pid) & (pl.col("tid") == tid)).select(columns)
        .with_columns(pl.col("cat", "name", "kind", "part", "split").cast(pl.String)).sort("ts").collect()
    )  # fmt: skip
    evaluations = main.filter(_IS_EVALUATION)
    calls = find_stretches(events.calls, pl.col("pid") == pid, pl.col("tid") == tid)
    checkpoints = find_stretches(main, pl.col("cat") == "checkpoint")
    pauses = unite_stretches(checkpoints, find_stretches(main, pl.col("part") == EVALUATION))
    steps, collectives = [], []
    for phase, found, pause in (
        ("train", _list_train_steps(main), pauses),
        ("eval", _list_eval_steps(main, evaluations), checkpoints),
    ):
        divided = _divide_periods(found, main, calls, pause)
        steps.append(divided.with_columns(measure_row_loading(events, main, divided).get_columns()))
        # list_collectives joins by epoch and step: of an evaluation by its number and the batch
        keys = ("epoch", "step") if phase == "train" else ("evaluation", "batch")
        windows = found.select(
            pl.col(keys[0]).alias("epoch"),
            pl.col(keys[1]).alias("step"),
            "ts",
            pl.col("period_us").alias("dur"),
        )
        own = list_collectives(
            main.filter(pl.Series(_is_outside(pause, main["ts"].to_numpy()))), windows, None
        )
        collectives.append(own.select(pl.lit(phase).alias("phase"), pl.all()))
    batches, requests = _measure_batches(events, pid, evaluations)
    number = pl.lit(job.launch, pl.Int32).alias("launch"), pl.lit(job.rank, pl.Int32).alias("rank")
    tables = {
        "steps": pl.concat(steps),
        "collectives": pl.concat(collectives),
        "batches": batches,
        "pauses": _list_pauses(main),
        "requests": requests,
    }
    return {PREFIX + name: table.select(*number, pl.all()) for name, table in tables.items()}


def join_workload(tables: dict[str, pl.DataFrame], launches: list[list[TracedProcess]]) -> Workload:
    """The tables of all ranks, one below the other, joined: who waited for whom needs them all.

    launches: the processes of each launch.
    """
    collectives = join_collectives(tables[PREFIX + "collectives"], launches, "phase")
    peers = collectives.group_by("launch", "rank", "phase", "epoch", "step").agg(
        pl.col("wait").filter(pl.col("sure")).sum().alias("peers_us")
    )
    is_train = pl.col("phase") == "train"
    steps = tables[PREFIX + "steps"].with_columns(
        pl.when(is_train).then("epoch").otherwise("evaluation").alias("outer"),
        pl.when(is_train).then("step").otherwise("batch").alias("inner"),
    )
    steps = steps.join(
        peers, left_on=["launch", "rank", "phase", "outer", "inner"],
        right_on=["launch", "rank", "phase", "epoch", "step"], how="left", nulls_equal=True,
    )  # fmt: skip
    waited = pl.min_horizontal(pl.col("peers_us").fill_null(0), "communication_us")
    steps = steps.with_columns(
        waited.alias("peers_us"), (pl.col("communication_us") - waited).alias("transfer_us")
    )
    return Workload(
        steps.sort("launch", "rank", "start").select(
            "launch", "rank", "phase", "split", "epoch", "step", "evaluation", "batch", "start", "period_us",
            "wait_us", "waits", "rows_us", "peers_us", "transfer_us", "exchange_bytes", "pause_us", "io_us",
            "compute_us", "rows_calls_us", "rows_ahead_us", "rows_spare_us",
        ),
        tables[PREFIX + "batches"].sort("launch", "rank", "start"),
        tables[PREFIX + "pauses"].sort("launch", "rank", "start"),
        tables[PREFIX + "requests"],
    )  # fmt: skip


def _list_train_steps(main: pl.DataFrame) -> pl.DataFrame:
    """The training steps of the main thread: columns phase to batch of `steps`, ts and period_us."""
    found = main.filter((pl.col("cat") == "train") & (pl.col("name") == "step"))
    number = pl.int_range(pl.len(), dtype=pl.Int64)
    return found.select(
        pl.lit("train").alias("phase"), pl.lit(None, pl.String).alias("split"), "epoch",
        pl.col("step").fill_null(number), pl.lit(None, pl.Int64).alias("evaluation"),
        pl.col("batch").fill_null(number), "ts", _make_period("epoch"),
    )  # fmt: skip


def _list_eval_steps(main: pl.DataFrame, evaluations: pl.DataFrame) -> pl.DataFrame:
    """The same of evaluations."""
    found = main.filter((pl.col("cat") == "eval") & (pl.col("name") == "eval_step"))
    place = _find_span(evaluations, found["ts"].to_numpy())
    found = found.with_columns(pl.Series("evaluation", place, pl.Int64)).filter(pl.col("evaluation") >= 0)
    splits = evaluations["split"].gather(found["evaluation"])
    return found.select(
        pl.lit("eval").alias("phase"), splits.alias("split"), "epoch", "step", "evaluation",
        pl.int_range(pl.len(), dtype=pl.Int64).over("evaluation").alias("batch"), "ts",
        _make_period("evaluation"),
    )  # fmt: skip


def _is_outside(stretches: Stretches, ts: np.ndarray) -> np.ndarray:
    """Which of these times are in none of the stretches (bool [times])."""
    return measure_covered_time(stretches, ts + 1) == measure_covered_time(stretches, ts)


def _make_period(within: str) -> pl.Expr:
    return (pl.col("ts").shift(-1).over(within) - pl.col("ts")).fill_null(pl.col("dur")).alias("period_us")


def _find_span(spans: pl.DataFrame, ts: np.ndarray) -> np.ndarray:
    """The number of the span (sorted, without overlap) that each time is in, -1 for none."""
    if not len(spans):
        return np.full(len(ts), -1)
    starts = spans["ts"].to_numpy()
    place = np.searchsorted(starts, ts, side="right") - 1
    inside = ts < starts[place] + spans["dur"].to_numpy()[place]
    return np.where((place >= 0) & inside, place, -1)


def _divide_periods(
    steps: pl.DataFrame, main: pl.DataFrame, calls: Stretches, pause: Stretches
) -> pl.DataFrame:
    """The steps with what their periods were spent on.

    main: the main thread's spans. calls, pause: when it was in file calls, and when it did not train.
    """
    begin = steps["ts"].to_numpy()
    end = begin + steps["period_us"].to_numpy()
    for_rows = (pl.col("kind") == "wait") & (pl.col("cat") == "ssd")
    for_data = (pl.col("kind") == "wait") & (pl.col("cat") != "ssd")
    taken, covered, amounts = pause, np.zeros(len(begin), np.int64), []
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    for more in (
        empty,
        find_stretches(main, for_data),
        find_stretches(main, for_rows),
        calls,
        find_stretches(main, pl.col("kind") == "communication"),
    ):
        taken = unite_stretches(taken, more)
        now = measure_covered_time(taken, end) - measure_covered_time(taken, begin)
        amounts.append(pl.Series(now - covered, dtype=pl.Int64))
        covered = now
    waiting = main.filter(for_data & pl.Series(_is_outside(pause, main["ts"].to_numpy())))
    at = np.searchsorted(begin, waiting["ts"].to_numpy(), side="right") - 1
    at = at[(at >= 0) & (waiting["ts"].to_numpy() < end[at])] if len(end) else at[:0]
    waits = pl.Series(np.bincount(at, minlength=len(begin)), dtype=pl.Int64)
    talking = main.filter((pl.col("kind") == "communication") & pl.col("bytes").is_not_null())
    place = np.searchsorted(begin, talking["ts"].to_numpy(), side="right") - 1
    sums = (
        talking.select(pl.Series("place", place, pl.Int64), "bytes")
        .group_by("place")
        .agg(pl.col("bytes").sum())
    )
    numbered = steps.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("place"))
    numbered = numbered.join(sums, on="place", how="left", maintain_order="left")
    return steps.select(
        "phase", "split", "epoch", "step", "evaluation", "batch", pl.col("ts").alias("start"), "period_us",
        amounts[0].alias("pause_us"), amounts[1].alias("wait_us"), waits.alias("waits"),
        amounts[2].alias("rows_us"), amounts[3].alias("io_us"),
        amounts[4].alias("communication_us"), numbered["bytes"].alias("exchange_bytes"),
        (pl.col("period_us") - pl.Series(covered, dtype=pl.Int64)).alias("compute_us"),
    )  # fmt: skip


def _list_pauses(main: pl.DataFrame) -> pl.DataFrame:
    chosen = pl.any_horizontal(
        _IS_EVALUATION,
        *((pl.col("cat") == cat) & pl.col("name").is_in(names) for cat, names in PAUSES.items()),
    )
    return main.filter(chosen).select(
        pl.concat_str("cat", "name", separator="/").alias("name"), "split", "epoch", "step",
        pl.col("ts").alias("start"), pl.col("dur").alias("dur_us"), "bytes",
    )  # fmt: skip


def _measure_batches(
    events: RankEvents, pid: int, evaluations: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Frames batches and requests of one rank, without launch and rank.

    What a thread reads before it assembles a batch is of that batch; where nothing is assembled, reads in a
    row with the same batch number are of that one.
    """
    spans = (
        events.spans.lazy()
        .filter((pl.col("cat") == "data") & pl.col("name").is_in(["read", *PREPROCESS]))
        .filter(pl.col("pid") == pid)
        .select("tid", (pl.col("name") != "read").alias("made"), "ts", "dur", "bytes", "epoch", "batch",
                "mapped")
        .sort("tid", "ts").collect()
    )  # fmt: skip
    spans = spans.with_columns(pl.Series("group", _number_batches(spans), pl.Int64))
    calls = _list_read_calls(events, pid, spans.filter(~pl.col("made")))
    moved = calls.group_by("group").agg(
        pl.col("dur").sum().alias("call_us"), pl.col("size").sum().alias("moved"), pl.len().alias("calls")
    )
    made = _sum_by_batch(spans).join(moved, on="group", how="left").sort("start")
    splits = _name_splits(events, pid, made, evaluations)
    place = pl.Series("evaluation", _find_span(evaluations, made["start"].to_numpy()), pl.Int64)
    made = made.with_columns(splits, place).with_columns(
        pl.when(pl.col("split").is_not_null() & (pl.col("evaluation") >= 0)).then("evaluation"),
        pl.when(pl.col("split").is_null()).then(pl.lit("train")).otherwise(pl.lit("eval")).alias("phase"),
    )
    in_turn = pl.int_range(pl.len(), dtype=pl.Int64).over("phase", "evaluation")
    declared = pl.when(pl.col("declared") > 0).then("declared").otherwise(pl.col("moved").fill_null(0))
    batches = made.select(
        "phase", "split", "epoch", "evaluation",
        pl.when(pl.col("phase") == "train").then(pl.col("batch").fill_null(in_turn)).otherwise(in_turn)
        .alias("batch"),
        "start", (pl.col("end") - pl.col("start")).alias("load_us"), "read_us",
        pl.min_horizontal(pl.col("call_us").fill_null(0), "read_us").alias("call_us"), "assemble_us",
        declared.alias("bytes"),
        (pl.col("calls").fill_null(0) + pl.col("mapped")).cast(pl.Int64).alias("requests"),
    )  # fmt: skip
    calls = calls.gather_every(max(1, -(-len(calls) // MAX_REQUESTS)))
    requests = calls.join(made.select("group", "phase"), on="group", how="left", maintain_order="left")
    return batches, requests.select("phase", pl.col("dur").alias("dur_us"), pl.col("size").alias("bytes"))


def _number_batches(spans: pl.DataFrame) -> np.ndarray:
    """For each span (sorted by thread and time) the number of the batch that it is of: int64 [spans].

    A thread that assembles begins the next batch after that, another one when the batch's number changes.
    """
    tid, made = spans["tid"].to_numpy(), spans["made"].to_numpy()
    batch = spans["batch"].fill_null(-1).to_numpy()
    first = np.concatenate([[True], tid[1:] != tid[:-1]])[: len(tid)]
    assembling = np.isin(tid, np.unique(tid[made]))
    after = np.concatenate([[False], made[:-1]])[: len(tid)]
    changed = np.concatenate([[False], batch[1:] != batch[:-1]])[: len(tid)]
    return np.cumsum(first | np.where(assembling, after, changed))


def _sum_by_batch(spans: pl.DataFrame) -> pl.DataFrame:
    """A row per group of the spans, which are sorted by it: their sums."""
    group = spans["group"].to_numpy()
    begins = np.flatnonzero(np.diff(group, prepend=-1)) if len(group) else np.zeros(0, np.int64)
    made, ts, dur = (spans[name].to_numpy() for name in ("made", "ts", "dur"))
    ends = np.append(begins[1:], len(group))[: len(begins)] - 1

    def add(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, begins) if len(begins) else values[:0]

    numbered = ~made & spans["batch"].is_not_null().to_numpy()
    return pl.DataFrame({
        "group": group[begins], "tid": spans["tid"].gather(begins), "start": ts[begins],
        "end": np.maximum.reduceat(ts + dur, begins) if len(begins) else ts[:0],
        "read_us": add(np.where(made, 0, dur)), "assemble_us": add(np.where(made, dur, 0)),
        "declared": add(np.where(made, 0, spans["bytes"].fill_null(0).to_numpy())),
        "mapped": add(spans["mapped"].fill_null(False).to_numpy().astype(np.int64)),
        "epoch": spans["epoch"].gather(ends), "batch": spans["batch"].gather(ends),
        "numbered": add(numbered.astype(np.int64)) > 0,
    })  # fmt: skip


def _list_read_calls(events: RankEvents, pid: int, reads: pl.DataFrame) -> pl.DataFrame:
    """The calls that read inside these data/read spans: group of the span, dur and size."""
    threads = reads["tid"].unique()
    calls = events.calls.lazy().filter(
        (pl.col("op") == "read") & (pl.col("pid") == pid) & pl.col("tid").is_in(threads.implode())
        & (pl.col("size") > 0)
    ).select("tid", "ts", "dur", "size").sort("ts").collect()  # fmt: skip
    until = reads.select("tid", "ts", "group", (pl.col("ts") + pl.col("dur")).alias("until")).sort("ts")
    found = calls.join_asof(until, on="ts", by="tid", strategy="backward", check_sortedness=False)
    return found.filter(pl.col("ts") <= pl.col("until")).select("group", "dur", "size")


def _name_splits(events: RankEvents, pid: int, made: pl.DataFrame, evaluations: pl.DataFrame) -> pl.Series:
    """The split that each batch was loaded for, null for training: as the thread's name says; without a name,
    batches that are loaded during an evaluation and whose reads have no number of a training batch are of it.
    """
    named: dict[int, str | None] = {}
    for process in events.processes:
        if process.pid == pid:
            for tid, name in process.threads.items():
                if name.startswith(READER):
                    split = name.removeprefix(READER).strip()
                    named[tid] = None if split == "train" else split
    place = _find_span(evaluations, made["start"].to_numpy())
    splits = evaluations["split"].to_list()
    found = [
        named[tid] if tid in named else splits[at] or "val" if at >= 0 and not numbered else None
        for tid, at, numbered in zip(made["tid"], place.tolist(), made["numbered"], strict=True)
    ]
    return pl.Series("split", found, pl.String)
