"""The workload of a run: planted times come out to the microsecond, and a real traced run adds up."""

from pathlib import Path

import polars as pl
import pytest
from support import traced
from support.made_traces import BEGIN, Made

from analysis.workload.steps import Workload, measure_steps
from common.errors import UserError

PARTS = ("wait_us", "rows_us", "peers_us", "transfer_us", "pause_us", "io_us", "compute_us")
STEP = {"epoch": 0, "step": 1, "batch": 0}


def assert_adds_up(found: Workload) -> None:
    sums = found.steps.select(pl.sum_horizontal(PARTS)).to_series()
    assert found.steps["period_us"].to_list() == sums.to_list()
    assert found.steps.select(pl.min_horizontal(PARTS).min()).item() >= 0
    assert (found.batches["load_us"] >= found.batches["read_us"] + found.batches["assemble_us"]).all()
    assert (found.batches["call_us"] <= found.batches["read_us"]).all()


def two_steps(rank: int, world: int, late: int) -> Made:
    """Two steps of 1,000 and 500 us; in the first the rank comes to a collective `late` us after 1,000."""
    made = Made(rank, world)
    made.span("startup", "imports", 0, 900)
    made.span("train", "epoch", 1_000, 1_500, epoch=0)
    made.span("dataloader", "fetch.iter", 1_000, 100, **STEP)
    made.posix("write", 1_120, 30, "/run/log.txt", ret=10)
    made.span("torchrec", "all2all", 1_000 + late, 600 - late, **STEP)
    made.span("torchrec", "output_dist_wait]", 1_000 + late + 10, 20, **STEP)  # inside: counts once
    made.span("train", "step", 1_000, 700, **STEP)
    made.span("checkpoint", "save", 1_750, 100, **STEP)
    made.span("checkpoint", "copy", 1_760, 80, **STEP)
    made.span("train", "step", 2_000, 500, epoch=0, step=2, batch=1)
    return made


def test_planted_steps(tmp_path: Path) -> None:
    two_steps(0, 2, 200).write(tmp_path)
    two_steps(1, 2, 450).write(tmp_path)
    found = measure_steps(tmp_path)
    assert_adds_up(found)
    assert found.ranks == 2
    first = found.steps.filter(pl.col("step") == 1).sort("rank")
    assert first["start"].to_list() == [BEGIN + 1_000] * 2
    assert first["period_us"].to_list() == [1_000] * 2
    assert first["peers_us"].to_list() == [250, 0]  # rank 0 waits until rank 1 has come
    assert first["transfer_us"].to_list() == [150, 150]
    assert first["wait_us"].to_list() == [100] * 2
    assert first["io_us"].to_list() == [30] * 2
    assert first["pause_us"].to_list() == [100] * 2  # the copy is inside the save
    assert first["compute_us"].to_list() == [370, 620]
    last = found.steps.filter(pl.col("step") == 2)
    assert last.select("period_us", "compute_us").rows() == [(500, 500)] * 2
    assert found.pauses.select("name", "dur_us").rows() == [("checkpoint/save", 100)] * 2


def test_planted_rows_of_tables_in_files(tmp_path: Path) -> None:
    """A second thread reads during one step what the next one needs: that waits, or has time to spare."""
    made = Made()
    for step, (wait, dur) in enumerate(((0, 150), (0, 250), (130, 600))):
        ts = 1_000 + step * 1_000
        made.span("train", "step", ts, 900, epoch=0, step=step + 1, batch=step)
        made.span("ssd", "fetch", ts + 500, 50 + wait)
        if wait:
            made.span("ssd", "wait", ts + 510, wait)
        made.posix("pread64", ts + 520 + wait, 20, "/store/t_0.rows", ret=64, offset=0)  # by itself
        made.posix("pwrite64", ts + 700, 40, "/store/t_0.rows", 9, ret=64, offset=0)
        made.posix("pread64", ts + 800, dur, "/store/t_0.rows", 9, ret=64, offset=0)
    made.posix("pwrite64", 2_200, 50, "/store/t_0.rows", 9, ret=64, offset=0)  # that nobody needs in step 2
    made.posix("pread64", 3_600, 20, "/data/x", 9, ret=64, offset=0)  # no table
    made.write(tmp_path)
    found = measure_steps(tmp_path)
    assert_adds_up(found)
    columns = ("rows_us", "io_us", "rows_calls_us", "rows_ahead_us", "rows_spare_us")
    assert found.steps.select(columns).rows() == [
        (0, 20, 0, 0, 0),  # nothing before it
        (0, 20, 40 + 150, 800, 1_500 - 950),  # from 700 to 950 of the step before, needed at 500 of this one
        (130, 20, 40 + 250, 810, 0),
    ]  # fmt: skip


def test_a_rank_alone_waits_for_nobody(tmp_path: Path) -> None:
    two_steps(0, 1, 200).write(tmp_path)
    first = measure_steps(tmp_path).steps.row(0, named=True)
    assert (first["peers_us"], first["transfer_us"], first["exchange_bytes"]) == (0, 400, None)


def test_planted_evaluation_inside_an_epoch(tmp_path: Path) -> None:
    """Its waits and collectives are its own, not those of the training step that it interrupts."""
    made = Made()
    made.span("train", "epoch", 1_000, 2_000, epoch=0)
    made.span("train", "step", 1_000, 100, **STEP)
    made.span("pipeline", "evaluate", 1_200, 600, epoch=0, step=1, split="val")
    for batch, ts in enumerate((1_200, 1_400)):
        made.span("eval", "eval_step", ts, 150, epoch=0, step=1, batch=batch)
        made.span("dataloader", "fetch.iter", ts, 40, epoch=0, step=1, batch=batch)
        made.span("torchrec", "all2all", ts + 50, 60, epoch=0, step=1)
        made.posix("read", ts - 60, 20, "/data/day_0.npy", 5, ret=4_000)
        made.span("data", "read", ts - 70 if batch else ts + 1, 35, 5, bytes=4_000, eval_batch=batch)
        made.span("data", "preprocess", ts + 45, 7, 5, batch=batch)
    made.span("eval", "metrics", 1_700, 90, epoch=0, step=1)
    made.span("train", "step", 2_000, 100, epoch=0, step=2, batch=1)
    made.write(tmp_path)
    found = measure_steps(tmp_path)
    assert_adds_up(found)
    train = found.steps.filter(pl.col("phase") == "train")
    assert train["period_us"].to_list() == [1_000, 100]
    assert train["pause_us"].to_list() == [600, 0]
    assert train["wait_us"].sum() == train["transfer_us"].sum() == 0
    evaluated = found.steps.filter(pl.col("phase") == "eval")
    shown = evaluated.select("split", "evaluation", "batch", "period_us", "wait_us", "transfer_us").rows()
    assert shown == [("val", 0, 0, 200, 40, 60), ("val", 0, 1, 150, 40, 60)]
    batches = found.batches.select("phase", "split", "batch", "read_us", "call_us", "bytes", "requests")
    assert batches.rows() == [("eval", "val", 0, 35, 0, 4_000, 0), ("eval", "val", 1, 35, 20, 4_000, 1)]
    assert found.pauses["name"].to_list() == ["pipeline/evaluate", "eval/metrics"]


def test_reads_belong_to_the_batch_that_is_assembled_next(tmp_path: Path) -> None:
    """A chunk that is read for batch 0 and serves batch 1, too: batch 1 asks for nothing."""
    made = Made()
    made.span("train", "step", 1_000, 900, **STEP)
    for at, size in ((100, 1_000), (200, 50)):
        made.span("data", "read", at, 60, 5, file="/d", bytes=size, batch=0)
        made.posix("pread64", at + 5, 20, "/d", 5, ret=size)
        made.posix("pread64", at + 30, 10, "/d", 5, ret=0)  # the end of the file: nothing is moved
    made.span("data", "preprocess", 300, 40, 5, batch=0)
    made.span("data", "preprocess", 400, 30, 5, batch=1)
    made.posix("pread64", 500, 20, "/other", 5, ret=9)  # outside any span
    made.write(tmp_path)
    batches = measure_steps(tmp_path).batches
    columns = ("batch", "start", "load_us", "read_us", "call_us", "assemble_us", "bytes", "requests")
    assert batches.select(columns).rows() == [
        (0, BEGIN + 100, 240, 120, 40, 40, 1_050, 2),
        (1, BEGIN + 400, 30, 0, 0, 30, 0, 0),
    ]


def test_real_ranks(tmp_path: Path) -> None:
    """Three steps on each of two real ranks, traced by DFTracer."""
    found = measure_steps(traced.run(tmp_path / "run", traced.TRAINING, world=2))
    assert_adds_up(found)
    assert found.steps.select("rank", "batch").rows() == [(r, b) for r in range(2) for b in range(3)]
    assert (found.steps["compute_us"] >= 3_000).all()  # it sleeps so long
    assert found.batches.sort("rank", "batch").select("rank", "batch", "bytes", "requests").rows() == [
        (r, b, 2_000, 2) for r in range(2) for b in range(3)
    ]
    assert found.requests["bytes"].to_list() == [1_000] * 12


def test_a_trace_without_steps(tmp_path: Path) -> None:
    made = Made(None)
    made.posix("read", 10, 5, "/x", ret=7)
    made.write(tmp_path)
    with pytest.raises(UserError, match="has no steps"):
        measure_steps(tmp_path)
