"""A training in the numbers that other benchmarks ask for: ranks, steps, batches, records, times.

In: RUN. Out: a `MeasuredTraining`, from the same tables as the report. Of a run that was resumed, the longest
launch is taken.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.run_folder import records, run_settings
from analysis.run_folder.outputs import find_output_folder
from analysis.tables.answers import list_dataset_files
from analysis.tables.gather import JoinedTables, gather_tables
from analysis.workload.steps import Workload, join_workload, measure_rank_workload
from common.errors import UserError, printable

LEAST_ROWS = 0.005  # of a step: what other file calls take, from which on it is said
BUSY = ("compute_us", "transfer_us", "rows_us", "io_us")  # of a step, for benchmarks that know reading alone


@dataclass(frozen=True)
class Spread:
    """Seconds: how long something took, and how much that varied."""

    mean: float
    stdev: float

    @property
    def gamma(self) -> tuple[float, float]:
        """Shape and scale of the gamma distribution with this mean and deviation; for stdev > 0."""
        return (self.mean / self.stdev) ** 2, self.stdev**2 / self.mean


@dataclass(frozen=True)
class MeasuredTraining:
    name: str
    config: dict[str, Any]
    ranks: int
    epochs: int
    steps: int  # of each rank in an epoch: of the longest one
    record_bytes: int  # that a rank reads for a batch, on average
    batch_rows: int  # of a rank; 0: unknown
    dataset_files: int
    prefetch: int  # batches prepared ahead; 0: unknown
    compute: (
        Spread  # of a step: computing and exchanging, not waiting; the deviation is between ranks of a step
    )
    load: Spread  # of a batch: what loading takes besides file calls
    step: Spread  # from one step to the next, without evaluations and checkpoints
    utilisation: float  # compute / step
    eval_steps: int  # of each rank in an evaluation: of the longest one; 0: none
    eval_record_bytes: int
    eval_compute: Spread
    evaluations: int
    checkpoint_steps: int  # steps between two checkpoints; 0: none
    checkpoint_bytes: int  # of a rank
    checkpoints: int
    checkpoint_pause: float  # seconds that training stands still for one, on average
    requests: pl.DataFrame  # file calls that read for training: dur_us, bytes
    calls_per_batch: float
    starts_s: float  # from the first event to the first step
    rows_s: float  # of a step, in `compute`: file calls of the main thread, and waiting for rows of tables

    @property
    def has_other_calls(self) -> bool:
        """Whether `rows_s` is worth a sentence."""
        return self.rows_s >= LEAST_ROWS * self.compute.mean


def measure_training(run: str | Path) -> MeasuredTraining:
    """UserError where the trace has no steps, or does not say what was read for a batch."""
    joined = gather_tables(run, more=measure_rank_workload)
    work = _choose_launch(run, join_workload(joined.tables, joined.launches))
    config = records.read_config(find_output_folder(run) / "config.json", [])
    train = work.steps.filter(pl.col("phase") == "train")
    batches = work.batches.filter(pl.col("phase") == "train")
    evals = work.steps.filter(pl.col("phase") == "eval")
    eval_batches = work.batches.filter(pl.col("phase") == "eval")
    saves = work.pauses.filter(pl.col("name") == "checkpoint/save")
    ranks = train["rank"].n_unique()
    timed = train.filter(pl.col("step") > train["step"].min()) if train["step"].n_unique() > 1 else train
    busy = timed.select((pl.col("compute_us") + pl.col("transfer_us")) / 1e6).to_series()
    rows = timed.select((pl.col("rows_us") + pl.col("io_us")) / 1e6).to_series()
    step = timed.select((pl.col("period_us") - pl.col("pause_us")) / 1e6).to_series()
    saved = saves["step"].drop_nulls().unique().sort()
    first = joined["time"]["ts"].min()
    return MeasuredTraining(
        name=printable(Path(run).resolve().name),
        config=config,
        ranks=ranks,
        epochs=max(1, train["epoch"].n_unique()),
        steps=_count_longest(train, "epoch"),
        record_bytes=round(batches["bytes"].sum() / len(batches)),
        batch_rows=int(run_settings.to_number(run_settings.find_setting(config, "batch_size"))),
        dataset_files=_count_dataset_files(joined, config),
        prefetch=int(run_settings.to_number(run_settings.find_setting(config, "data.prefetch_batches"))),
        compute=Spread(float((busy + rows).mean() or 0), _find_own_deviation(timed)),  # type: ignore[arg-type]
        rows_s=float(rows.mean() or 0),  # type: ignore[arg-type]
        load=_spread(batches.select((pl.col("load_us") - pl.col("call_us")) / 1e6).to_series()),
        step=_spread(step),
        utilisation=min(1.0, float(busy.sum()) / max(1e-9, float(step.sum()))),
        eval_steps=_count_longest(evals, "evaluation") if len(evals) else 0,
        eval_record_bytes=round(eval_batches["bytes"].sum() / max(1, len(eval_batches))),
        eval_compute=_spread(evals.select(pl.sum_horizontal(BUSY) / 1e6).to_series()),
        evaluations=evals["evaluation"].n_unique(),
        checkpoint_steps=int(saved.diff().median() or saved[0]) if len(saved) else 0,  # type: ignore[arg-type]
        checkpoint_bytes=round((saves["bytes"].sum() or 0) / max(1, len(saves))),
        checkpoints=len(saved),
        checkpoint_pause=float(saves["dur_us"].mean() or 0) / 1e6,  # type: ignore[arg-type]
        requests=work.requests.filter(pl.col("phase") == "train"),
        calls_per_batch=float(batches["requests"].sum()) / len(batches),
        starts_s=(int(train["start"].min()) - int(first)) / 1e6,  # type: ignore[arg-type]
    )


def _count_dataset_files(joined: JoinedTables, config: dict[str, Any]) -> int:
    """Without meta.json, which says what is in the others."""
    files = list_dataset_files(joined, run_settings.list_dataset_paths(config))
    return len(files.filter(~files.str.ends_with(".json")))


def _choose_launch(run: str | Path, work: Workload) -> Workload:
    """The longest launch alone; UserError as `measure_training` says."""
    is_train = pl.col("phase") == "train"
    if not len(work.steps.filter(is_train)):
        raise UserError(
            f"{printable(run)}: the trace has no training steps (category train, name step); give the run "
            "folder of a traced training"
        )
    longest = work.steps.group_by("launch").agg(pl.col("period_us").sum()).sort("period_us", "launch")
    here = pl.col("launch") == longest["launch"][-1]
    frames = [frame.filter(here) for frame in (work.steps, work.batches, work.pauses, work.requests)]
    chosen = Workload(*frames)
    if not chosen.batches.filter(is_train)["bytes"].sum():
        raise UserError(
            f"{printable(run)}: the trace does not say what was read for a batch (spans data/read with "
            "bytes, or calls inside them): a benchmark of storage needs it"
        )
    return chosen


def _find_own_deviation(steps: pl.DataFrame) -> float:
    """How much a rank's computing differs from that of the others in the same step, in seconds; of one rank:
    from its own in other steps. What slows all ranks at once is left out: a benchmark that draws for each
    rank alone and then waits for the last one would count it twice.
    """
    busy = (pl.sum_horizontal(BUSY) / 1e6).alias("busy")
    if steps["rank"].n_unique() < 2:
        return float(steps.select(busy.std(ddof=0)).item() or 0)
    inside = steps.group_by("epoch", "step").agg(busy.var())
    return math.sqrt(float(inside["busy"].mean() or 0))  # type: ignore[arg-type]


def _count_longest(steps: pl.DataFrame, key: str) -> int:
    """Steps of each rank in the epoch or evaluation that has most of them."""
    counts = steps.group_by("rank", key).agg(pl.len()).group_by(key).agg(pl.col("len").min())
    return int(counts["len"].max())  # type: ignore[arg-type]


def _spread(seconds: pl.Series) -> Spread:
    values = seconds.to_numpy()
    return Spread(float(values.mean()), float(np.std(values))) if len(values) else Spread(0.0, 0.0)
