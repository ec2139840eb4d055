"""What a training would do with other storage: a small model of loading thread, queue, step and barrier.

In: a `Workload` and a `Scenario`. Out: a `Prediction`. On every rank a thread loads one batch after the other
and puts it into a queue that holds `prefetch` of them; the main thread takes a batch, or waits for it,
computes, and waits for the other ranks. The durations are the trace's own, step by step and batch by batch;
only what the scenario changes is scaled. A step's end is that of its last rank plus the exchange.

A read of n bytes costs `latency + n / bandwidth`, both fitted to the run's calls. What a batch's calls took
beyond that stays, or shrinks with it. Where tables are in files, a second thread's calls bring their rows
while the step before is computed (`analysis/workload/table_rows.py`); what is missing then is waited for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import polars as pl

from analysis.trace.strings import compiled
from analysis.workload.steps import Workload
from common.errors import UserError

RANGE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of storage speeds that the table has
DEPTH = 4  # batches that the queue holds where no configuration says it
LONGEST_REQUEST = 1 << 40  # bytes; a trace can claim anything
SELDOM = 0.01  # of the time in reads: sizes with less do not count as different
MAX_CELLS = 20_000_000  # ranks times steps of a pass


@dataclass(frozen=True)
class Scenario:
    """What is changed. Factors: storage 2 is twice the bandwidth, compute 0.1 a tenth of the time."""

    storage: float = 1.0  # bandwidth; infinite: reads take no time
    latency: float = 1.0  # of each request
    compute: float = 1.0
    prefetch: int | None = None  # batches that the queue holds
    read_chunk_mb: float | None = None  # largest read of the loading thread, 2^20 bytes
    ranks: int | None = None


@dataclass(frozen=True)
class RequestCost:
    """latency + bytes / bandwidth, in microseconds."""

    latency_us: float
    us_per_byte: float
    separable: bool  # whether the requests' sizes differ enough to tell the two apart

    def of(self, requests: np.ndarray, moved: np.ndarray, scenario: Scenario) -> np.ndarray:
        """What this many requests of this many bytes in all cost: us."""
        if math.isinf(scenario.storage):
            return np.zeros(np.shape(moved))
        return requests * self.latency_us * scenario.latency + moved * self.us_per_byte / scenario.storage


@dataclass(frozen=True)
class TableRows:
    """Of each step what rows of tables in files take; float64 [ranks, steps], us."""

    wait: np.ndarray  # of the step, for them
    calls: np.ndarray  # of another thread that brings them
    ahead: np.ndarray  # how long before they were needed it began
    spare: np.ndarray  # how long before that it was done

    def find_waits(self, scenario: Scenario) -> np.ndarray:
        """How long each step waits for its rows."""
        longer = self.calls / scenario.storage - self.calls - self.ahead * (scenario.compute - 1)
        return np.maximum(0.0, self.wait - self.spare + longer)


@dataclass(frozen=True)
class Pass:
    """One epoch, or one evaluation: arrays of float64 [ranks, steps], us, a batch for each step."""

    phase: str
    compute: np.ndarray
    io: np.ndarray  # the main thread's file calls
    pause: np.ndarray
    call: np.ndarray  # of loading the batch: file calls
    work: np.ndarray  # of loading the batch: all else
    moved: np.ndarray  # bytes read for the batch
    requests: np.ndarray
    exchange_us: float  # of a step, after the last rank has come; does not depend on compute
    jitter_us: float  # of a step: what several barriers in a step cost beyond one at its end
    ahead: int  # batches that are taken before the first step is computed
    measured_us: np.ndarray  # of each step: how long the ranks took for it, without pauses
    rows: TableRows | None = None  # where tables are in files


@dataclass(frozen=True)
class Prediction:
    """Seconds and shares of the launch that is simulated; of its training unless they say so."""

    steps: int
    train_seconds: float  # without pauses and without the first step, as results.json counts
    step_ms: float
    samples_per_second: float | None  # None where the rows of a step are unknown
    waiting_share: float  # of those seconds: the ranks' mean waiting for batches, and for rows of tables
    utilisation: float  # of the accelerator, as DLIO defines it: computing and exchanging / all of it
    seconds: float  # epochs and evaluations, with the first step and pauses


@dataclass(frozen=True)
class Model:
    """A run as the model takes it."""

    passes: list[Pass]
    cost: RequestCost
    depth: int  # batches that the run's own queue held
    chunk_mb: float | None  # largest read of a rank that reads ahead of its batch; None: where ranks do not
    by_turns: bool  # several ranks take turns in the files, so that none of them reads ahead
    rows_per_step: float | None  # of all ranks

    @property
    def ranks(self) -> int:
        return len(self.passes[0].compute)

    def find_chunk(self, ranks: int, read_chunk_mb: float | None) -> float:
        """MB of a read that goes beyond its batch; 0 where each batch has reads of its own."""
        if self.chunk_mb is None or (self.by_turns and ranks > 1):
            return 0.0
        return self.chunk_mb if read_chunk_mb is None else read_chunk_mb


def fit_request_cost(requests: pl.DataFrame) -> RequestCost:
    """Latency and bandwidth of reads that took `dur_us` and moved `bytes`: from the median of each size.

    Of the lines through two sizes (and those with no latency, or with latency only) the one that is nearest
    to all, by the ratio of what it says to what was measured; a size counts as much as the time spent in it,
    so that a few reads which memory answered decide nothing. Where all have about one size nothing tells the
    two apart: then all of it counts as bandwidth.
    """
    found = (
        requests.filter(pl.col("bytes").is_between(1, LONGEST_REQUEST))
        .group_by((pl.col("bytes").cast(pl.Float64).log(2) * 4).floor().alias("bucket"))
        .agg(pl.col("bytes").mean(), pl.col("dur_us").median(), pl.len().alias("n"))
        .sort("bytes")
    )
    if not len(found):
        return RequestCost(0.0, 0.0, False)
    size, took, n = (found[name].to_numpy().astype(np.float64) for name in ("bytes", "dur_us", "n"))
    took = np.maximum(took, 0.5)  # a trace has whole us
    weight = n * took
    common = size[weight >= SELDOM * weight.sum()]
    separable = bool(len(common)) and common.max() >= 4 * common.min()
    if not separable:
        return RequestCost(0.0, float((weight * took / size).sum() / weight.sum()), False)
    one, two = np.triu_indices(len(size), 1)
    slopes = (took[two] - took[one]) / (size[two] - size[one])
    latencies = took[one] - slopes * size[one]
    latency = np.concatenate([latencies, np.zeros(len(size)), took])
    slope = np.concatenate([slopes, took / size, np.zeros(len(size))])
    valid = (latency >= 0) & (slope >= 0)
    latency, slope = latency[valid], slope[valid]
    says = latency[:, None] + slope[:, None] * size
    best = int(np.argmin(np.abs(np.log(says / took)) @ weight))
    return RequestCost(float(latency[best]), float(slope[best]), True)


def make_model(
    workload: Workload,
    depth: int = DEPTH,
    rows_per_step: float | None = None,
    chunk_mb: float | None = None,
    by_turns: bool = False,
) -> Model:
    """The longest launch of a run as the model takes it; the fields of `Model` say what the arguments are."""
    if not len(workload.batches):
        raise UserError(
            "the trace does not say what was loaded for a batch (spans data/read or data/preprocess): "
            "what other storage would do cannot be computed"
        )
    steps = workload.steps
    launch = steps.group_by("launch").agg(pl.col("period_us").sum()).sort("period_us", "launch")["launch"][-1]
    steps = steps.filter(pl.col("launch") == launch)
    batches = workload.batches.filter(pl.col("launch") == launch)
    passes = []
    for phase, key in (("train", "epoch"), ("eval", "evaluation")):
        own, loads = steps.filter(pl.col("phase") == phase), batches.filter(pl.col("phase") == phase)
        joined = own.join(
            loads.group_by("rank", "evaluation", "batch").agg(
                pl.col("load_us", "call_us", "bytes", "requests").sum()
            ),
            on=["rank", "evaluation", "batch"], how="left", nulls_equal=True,
        )  # fmt: skip
        for (_,), rows in sorted(
            joined.group_by(key), key=lambda item: -1 if item[0][0] is None else item[0][0]
        ):
            passes.append(_make_pass(phase, rows))
    return Model(
        passes, fit_request_cost(workload.requests), max(1, depth), chunk_mb, by_turns, rows_per_step
    )


def _make_pass(phase: str, rows: pl.DataFrame) -> Pass:
    """rows: steps with their batches' loads, of one epoch or evaluation."""
    lengths = rows.group_by("rank").len()["len"].to_list()
    count = min(lengths)  # a killed rank has fewer
    rows = rows.sort("rank", "start").filter(pl.int_range(pl.len()).over("rank") < count)

    def take(name: str) -> np.ndarray:
        """float64 [ranks, steps]"""
        return rows[name].fill_null(0).cast(pl.Float64).to_numpy().reshape(len(lengths), count)

    wait, compute, io, pause = take("wait_us"), take("compute_us"), take("io_us"), take("pause_us")
    transfer, period = take("transfer_us"), take("period_us")
    tables = TableRows(take("rows_us"), *(take(f"rows_{name}_us") for name in ("calls", "ahead", "spare")))
    last = (wait + tables.wait + compute + io + pause).max(axis=0).mean()
    beyond = max(0.0, float(period.mean() - last))
    exchange = min(beyond, float(transfer.mean()))
    first = take("waits")[:, 0]
    call = take("call_us")
    return Pass(
        phase, compute, io, pause, call, np.maximum(0, take("load_us") - call), take("bytes"),
        take("requests"), exchange, beyond - exchange, max(0, int(first.max()) - 1),
        (period - pause).mean(axis=0), tables if tables.wait.any() or tables.calls.any() else None,
    )  # fmt: skip


def predict(model: Model, scenario: Scenario = Scenario()) -> Prediction:  # noqa: B008  # frozen
    """What the run would do. `Scenario()` is the run as it was, by the model."""
    seconds = train = waited = worked = first = 0.0
    steps = 0
    for each in model.passes:
        own = _change_ranks(each, scenario.ranks) if scenario.ranks else each
        load = _find_load_times(own, model, scenario)
        busy = own.compute * scenario.compute
        io = own.io / scenario.storage
        rows = own.rows.find_waits(scenario) if own.rows else np.zeros_like(load)
        waits, ends = np.zeros_like(load), np.zeros(load.shape[1])
        common = own.exchange_us + own.jitter_us * scenario.compute
        depth = scenario.prefetch or model.depth
        _simulate_pass(load, busy + io + rows + own.pause, common, depth, own.ahead, waits, ends)
        seconds += ends[-1] / 1e6
        if each.phase == "train":
            skip = 1 if not steps and load.shape[1] > 1 else 0  # the first step of the run is not timed
            paused = own.pause[:, skip:].max(axis=0).sum()
            first = ends[0] if skip else 0.0
            train += (ends[-1] - first - paused) / 1e6
            waited += (waits + rows)[:, skip:].mean(axis=0).sum() / 1e6
            timed = load.shape[1] - skip
            worked += (busy[:, skip:].mean(axis=0).sum() + timed * own.exchange_us) / 1e6
            steps += timed
    if not steps or train <= 0:
        raise UserError("the trace has no training step that took any time: nothing can be predicted")
    rows = model.rows_per_step
    if rows is not None and scenario.ranks:
        rows *= scenario.ranks / model.ranks
    return Prediction(
        steps, float(train), 1e3 * float(train) / steps, rows * steps / float(train) if rows else None,
        min(1.0, float(waited / train)), min(1.0, float(worked / train)), float(seconds),
    )  # fmt: skip


def measure(model: Model) -> tuple[float, float]:
    """Seconds of the training as traced, as `Prediction.train_seconds` counts them, and the same per step in
    ms: what `predict(model)` should give.
    """
    times = np.concatenate([p.measured_us for p in model.passes if p.phase == "train"])
    times = times[1:] if len(times) > 1 else times
    return float(times.sum()) / 1e6, float(times.mean()) / 1e3


def predict_range(
    model: Model, scenario: Scenario, factors: Sequence[float] = RANGE
) -> list[tuple[float, Prediction]]:
    """Predictions for storage that is these factors as fast as the scenario's, and for infinitely fast."""
    found = [(f, predict(model, replace(scenario, storage=f * scenario.storage))) for f in factors]
    return [*found, (math.inf, predict(model, replace(scenario, storage=math.inf)))]


def _find_load_times(own: Pass, model: Model, scenario: Scenario) -> np.ndarray:
    """How long each batch takes to load: [ranks, steps], us."""
    before = model.find_chunk(model.ranks, None)
    chunk = model.find_chunk(len(own.compute), scenario.read_chunk_mb)
    if chunk != before and own.requests.any():
        return _change_chunks(own, model, scenario, chunk * (1 << 20))
    was = model.cost.of(own.requests, own.moved, Scenario())
    now = model.cost.of(own.requests, own.moved, scenario)
    # What calls took beyond the fit is the machine's and the storage's ups and downs: slower storage does not
    # lengthen it, faster storage shortens it as all the rest.
    faster = np.minimum(1.0, np.divide(now, was, out=np.ones_like(was), where=was > 0))
    return np.maximum(0.0, now + faster * (own.call - was)) + own.work


def _change_chunks(own: Pass, model: Model, scenario: Scenario, chunk: float) -> np.ndarray:
    """The same bytes, read in chunks of another size: a batch that the buffer lacks reads the next chunk."""
    needed = own.moved.sum(axis=1, keepdims=True) / own.moved.shape[1]  # of each batch, of each rank
    files = own.requests.sum() / max(1, np.count_nonzero(own.requests))  # requests of a chunk
    moved = np.zeros_like(own.moved)
    for rank in range(len(moved)):
        have, left = 0.0, float(own.moved[rank].sum())
        for batch in range(moved.shape[1]):
            if have < needed[rank, 0] - 1 and left > 0:
                # up to a chunk from the batch's first row on, as the reader does
                got = min(left, max(chunk, float(needed[rank, 0])) - have)
                moved[rank, batch], have, left = got, have + got, left - got
            have -= needed[rank, 0]
    requests = np.where(moved > 0, files, 0.0)
    was = model.cost.of(own.requests, own.moved, Scenario()).sum()
    now = model.cost.of(requests, moved, scenario)
    call = now * (own.call.sum() / was if was > 0 else 1.0)
    # what reading costs besides calls goes with the bytes, the rest with the batches
    idle = own.requests == 0
    rest = float(np.median(own.work[idle])) if idle.any() else float(own.work.min())
    copying = max(0.0, float(own.work.sum() - rest * own.work.size)) / max(1.0, float(own.moved.sum()))
    return call + rest + copying * moved


def _change_ranks(own: Pass, ranks: int) -> Pass:
    """The same rows by another number of ranks, each with the batch size and the storage that a rank has now.

    A rank that is added is as one of the measured ones, at other steps; the first step stays the first.
    """
    measured, steps = own.compute.shape
    count = max(1, math.ceil(steps * measured / ranks))
    if ranks * count > MAX_CELLS:
        raise UserError(f"--ranks {ranks}: too many for {steps} steps; give less than {MAX_CELLS // count}")
    random = np.random.default_rng(0)
    later = max(1, steps - 1)
    picks = []
    for rank in range(ranks):
        order = np.arange(later) if rank < measured else random.permutation(later)
        places = np.concatenate([[0], 1 + order[np.arange(count - 1) % later]]) % steps
        picks.append((rank % measured, places))
    names = ("compute", "io", "pause", "call", "work", "moved", "requests")

    def pick(values: np.ndarray) -> np.ndarray:
        return np.stack([values[rank, where] for rank, where in picks])

    rows = own.rows and TableRows(*(pick(getattr(own.rows, each.name)) for each in fields(own.rows)))
    return replace(own, rows=rows, **{name: pick(getattr(own, name)) for name in names})


@compiled
def _simulate_pass(load, own, common, depth, ahead, waits, ends):
    """Fills `waits` [ranks, steps] and `ends` [steps], us from the beginning of the pass.

    load: of each batch [ranks, steps]. own: what each rank does in each step [ranks, steps]. common: what
    follows when all have come. depth: of the queue. ahead: batches taken before the first step is computed.
    """
    ranks, steps = load.shape
    ready = np.zeros(ranks)  # when the loading thread has put its last batch into the queue
    taken = np.zeros((ranks, steps))
    following = np.zeros(ranks, np.int64)  # the next batch that a rank takes
    now = np.zeros(ranks)
    for step in range(steps):
        latest = 0.0
        for rank in range(ranks):
            time = now[rank]
            until = min(steps, step + ahead + 1)
            while following[rank] < until:
                batch = following[rank]
                put = ready[rank] + load[rank, batch]
                if batch >= depth:  # the queue is full until that batch is taken
                    put = max(put, taken[rank, batch - depth])
                ready[rank] = put
                if put > time:
                    waits[rank, step] += put - time
                    time = put
                taken[rank, batch] = time
                following[rank] = batch + 1
            time += own[rank, step]
            latest = max(latest, time)
        ends[step] = latest + common
        for rank in range(ranks):
            now[rank] = ends[step]
