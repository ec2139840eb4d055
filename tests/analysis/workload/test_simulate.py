"""The model of what-if: its arithmetic against a clock that ticks, planted runs, and a real run made slow."""

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support import traced
from support.made_traces import Made, training

from analysis.workload import simulate
from analysis.workload.simulate import Model, Pass, RequestCost, Scenario, TableRows, make_model, predict
from analysis.workload.steps import measure_steps
from common.errors import UserError

NO_TIME = Scenario(storage=math.inf)
SLOW_READS = Path(__file__).parents[3] / "benchmarks" / "slow_reads.c"


def tick(
    load: np.ndarray, own: np.ndarray, common: int, depth: int, ahead: int
) -> tuple[np.ndarray, list[int]]:
    """The same, us by us: every rank's loading thread and main thread do what they can at each moment."""
    ranks, steps = load.shape
    waits, ends = np.zeros((ranks, steps), int), []
    queue, loaded = [0] * ranks, [0] * ranks  # batches in the queue, and put into it so far
    left = [int(load[rank, 0]) for rank in range(ranks)]  # of the batch being loaded
    taken, step, done = [0] * ranks, 0, [-1] * ranks  # done: when the step's own work ends, -1: not begun
    now, begin = 0, 0
    while step < steps:
        for _ in range(2 * depth + ahead + 3):  # until nothing more happens at this moment
            for rank in range(ranks):
                if loaded[rank] < steps and left[rank] == 0 and queue[rank] < depth:
                    queue[rank] += 1
                    loaded[rank] += 1
                    left[rank] = int(load[rank, loaded[rank]]) if loaded[rank] < steps else 0
                if begin <= now and done[rank] < 0:
                    if taken[rank] < min(steps, step + ahead + 1):
                        if queue[rank]:
                            queue[rank] -= 1
                            taken[rank] += 1
                    else:
                        done[rank] = now + int(own[rank, step])
            if begin <= now and all(0 <= end <= now for end in done):
                begin = now + common
                ends.append(begin)
                step, done = step + 1, [-1] * ranks
                if step == steps:
                    return waits, ends
        for rank in range(ranks):
            waits[rank, step] += begin <= now and done[rank] < 0
            left[rank] = max(0, left[rank] - 1)
        now += 1
    return waits, ends


@pytest.mark.parametrize("seed", range(12))
def test_against_a_ticking_clock(seed: int) -> None:
    random = np.random.default_rng(seed)
    ranks, steps = int(random.integers(1, 4)), int(random.integers(1, 12))
    depth, ahead, common = int(random.integers(1, 5)), int(random.integers(0, 3)), int(random.integers(0, 9))
    load = random.integers(0, 40, (ranks, steps)).astype(np.float64)
    own = random.integers(1, 40, (ranks, steps)).astype(np.float64)
    waits, ends = np.zeros_like(load), np.zeros(steps)
    simulate._simulate_pass(load, own, float(common), depth, ahead, waits, ends)
    slow_waits, slow_ends = tick(load, own, common, depth, ahead)
    assert ends.tolist() == slow_ends
    assert waits.tolist() == slow_waits.tolist()


def a_model(call: float, compute: float, *, ranks: int = 1, steps: int = 50, **more) -> Model:
    """Every batch is one read of 1,000 bytes that takes `call` us, half of it latency; times in us."""
    full = np.full((ranks, steps), 1.0)
    made = Pass(
        "train", compute * full, 0 * full, 0 * full, call * full, 0 * full, 1_000 * full, full,
        exchange_us=more.pop("exchange", 0.0), jitter_us=0.0, ahead=0, measured_us=full[0],
    )  # fmt: skip
    cost = RequestCost(call / 2, call / 2 / 1_000, True)
    return Model([made], cost, more.pop("depth", 2), more.pop("chunk", None), True, 100.0 * ranks)


def test_what_is_faster_decides() -> None:
    slow = a_model(1_000, 300)
    assert predict(slow).step_ms == pytest.approx(1.0)  # loading takes longer than computing
    assert predict(slow).waiting_share == pytest.approx(0.7)
    assert predict(slow).utilisation == pytest.approx(0.3)
    assert predict(slow).samples_per_second == pytest.approx(100 / 0.001)
    assert predict(slow, Scenario(storage=2)).step_ms == pytest.approx(0.75)  # half of it is latency
    assert predict(slow, Scenario(latency=0)).step_ms == pytest.approx(0.5)
    assert predict(slow, Scenario(storage=100, latency=0.1)).step_ms == pytest.approx(0.3, rel=0.01)
    assert predict(slow, Scenario(storage=math.inf)).waiting_share == 0
    assert predict(slow, Scenario(compute=10)).step_ms == pytest.approx(3.0)
    assert predict(slow, Scenario(compute=10)).utilisation == pytest.approx(1.0)


def test_ups_and_downs_are_not_lengthened() -> None:
    """Calls took three times what the fit says: slower storage adds to that, faster storage shortens all."""
    model = a_model(1_000, 1)
    model = replace(model, cost=RequestCost(0.0, 1 / 3, True))
    assert predict(model, Scenario(storage=0.5)).step_ms == pytest.approx(1.333, rel=0.01)
    assert predict(model, Scenario(storage=2)).step_ms == pytest.approx(0.5, rel=0.01)


def test_a_queue_hides_what_comes_in_bursts() -> None:
    """Every fifth batch takes 500 us to load, the others nothing; a step computes 100 us."""
    model = a_model(100, 100, steps=100)
    burst = np.where(np.arange(100) % 5 == 4, 5.0, 0.0)[None]
    model = Model(
        [replace(model.passes[0], call=100 * burst, moved=1_000 * burst, requests=burst)],
        model.cost, 1, None, True, None,
    )  # fmt: skip
    times = [predict(model, Scenario(prefetch=depth)).step_ms for depth in (1, 2, 5, 20)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0.13 and times[-1] == pytest.approx(0.1, rel=0.06)
    assert predict(model).samples_per_second is None


def test_ranks_meet_at_every_step() -> None:
    """Each is late in another step: all wait for it."""
    model = a_model(1, 100, ranks=2, exchange=20)
    late = np.full((2, 50), 100.0)
    late[0, ::2] = late[1, 1::2] = 200
    model = replace(model, passes=[simulate.replace(model.passes[0], compute=late)])
    found = predict(model)
    assert found.step_ms == pytest.approx(0.22)
    assert found.utilisation == pytest.approx(170 / 220)
    many = predict(model, Scenario(ranks=16))
    assert many.steps == math.ceil(50 * 2 / 16) - 1  # the same rows
    assert many.step_ms == pytest.approx(0.22) and many.samples_per_second == pytest.approx(1_600 / 220e-6)
    with pytest.raises(UserError, match="--ranks"):
        predict(a_model(1, 1, steps=40_000_000), Scenario(ranks=4000))


def test_larger_chunks_save_latency() -> None:
    model = a_model(1_000, 100, chunk=1_000 / (1 << 20))
    assert predict(model, Scenario(read_chunk_mb=10_000 / (1 << 20))).step_ms == pytest.approx(0.55, rel=0.05)
    assert predict(model, Scenario(read_chunk_mb=1_000 / (1 << 20))) == predict(model)
    alone = predict(model, Scenario(ranks=2)).step_ms  # they take turns: one batch at a time, as before
    assert predict(model, Scenario(ranks=2, read_chunk_mb=1.0)).step_ms == alone


def test_the_cost_of_a_read() -> None:
    size = np.repeat([4_096, 65_536, 1_048_576], 50)
    fitted = simulate.fit_request_cost(pl.DataFrame({"dur_us": 200 + size // 100, "bytes": size}))
    assert fitted.separable
    assert fitted.latency_us == pytest.approx(200, rel=0.02) and fitted.us_per_byte == pytest.approx(
        0.01, rel=0.01
    )
    few = pl.DataFrame({"dur_us": [9] * 5, "bytes": [256] * 5})  # answered by memory
    again = simulate.fit_request_cost(
        pl.concat([few, pl.DataFrame({"dur_us": 200 + size // 100, "bytes": size})])
    )
    assert (again.latency_us, again.us_per_byte) == pytest.approx((200, 0.01), rel=0.02)
    alike = simulate.fit_request_cost(pl.DataFrame({"dur_us": [100] * 9, "bytes": [1_000] * 9}))
    assert (alike.latency_us, alike.us_per_byte, alike.separable) == (0, pytest.approx(0.1), False)
    flat = simulate.fit_request_cost(pl.DataFrame({"dur_us": [90, 50], "bytes": [1_000, 100_000]}))
    assert flat.us_per_byte == 0 and flat.latency_us > 0
    none = simulate.fit_request_cost(pl.DataFrame(schema={"dur_us": pl.Int64, "bytes": pl.Int64}))
    assert none == RequestCost(0, 0, False)


def test_a_planted_run_is_reproduced(tmp_path: Path) -> None:
    """Reading hides behind computing, until storage is slower."""
    training(wait=10, compute=5_000, reads=4, read_us=1_000, steps=30).write(tmp_path)
    model = make_model(measure_steps(tmp_path), 4, 512.0)
    assert predict(model).step_ms == pytest.approx(simulate.measure(model)[1], rel=0.01)
    assert predict(model, Scenario(storage=8)).step_ms == pytest.approx(predict(model).step_ms, rel=0.01)
    assert predict(model, Scenario(storage=0.1)).step_ms == pytest.approx(40, rel=0.05)


def test_a_trace_that_says_nothing_of_batches(tmp_path: Path) -> None:
    made = Made()
    made.span("train", "step", 0, 100, epoch=0, step=1, batch=0)
    made.write(tmp_path)
    with pytest.raises(UserError, match="does not say what was loaded"):
        make_model(measure_steps(tmp_path))


# A thread reads a batch of three files, a queue of 2, a step that sleeps 10 ms.
QUEUED = """
import queue
for part, size in (("dense", 16), ("sparse", 48), ("labels", 2)):
    with open(f"{run}/{part}.bin", "wb") as out:
        out.write(bytes(40 * size * 1024))
trace.start_tracing(run, here, "train")
ready = queue.Queue(2)
def load():
    trace.name_thread("prefetch train")
    files = [(os.open(f"{run}/{part}.bin", os.O_RDONLY), size * 1024)
             for part, size in (("dense", 16), ("sparse", 48), ("labels", 2))]
    for batch in range(40):
        for file, size in files:
            with trace.span("data", "read", batch=batch, bytes=size):
                os.read(file, size)
        with trace.span("data", "assemble", batch=batch):
            time.sleep(0.0005)
        ready.put(batch)
threading.Thread(target=load).start()
with trace.span("train", "epoch"):
    for step in range(40):
        trace.set_context(epoch=0, step=step + 1)
        with trace.span("train", "step", batch=step):
            with trace.span("data", "wait", batch=step):
                ready.get()
            time.sleep(0.01)
trace.stop_tracing()
"""


# Another thread reads 3 rows of a table for the next step while one computes for 8 ms.
ROWS = """
from concurrent.futures import ThreadPoolExecutor
with open(f"{run}/t_0.rows", "wb") as out:
    out.write(bytes(1 << 20))
trace.start_tracing(run, here, "train")
rows = os.open(f"{run}/t_0.rows", os.O_RDWR)
def bring():
    for row in range(3):
        os.pread(rows, 256, row * 4096)
pool = ThreadPoolExecutor(1)
next_rows = pool.submit(bring)
with trace.span("train", "epoch"):
    for step in range(40):
        trace.set_context(epoch=0, step=step + 1)
        with trace.span("data", "assemble", batch=step):
            pass
        with trace.span("train", "step", batch=step):
            with trace.span("ssd", "fetch"):
                if not next_rows.done():
                    with trace.span("ssd", "wait"):
                        next_rows.result()
            next_rows = pool.submit(bring)
            time.sleep(0.008)
next_rows.result()
trace.stop_tracing()
"""


def test_rows_that_come_later_or_earlier() -> None:
    """Their calls take 500 us and begin 400 us before they are needed: 100 us are waited for them. Or they
    begin 550 us before: 50 are to spare."""
    model = a_model(1, 700)
    full = np.full((1, 50), 1.0)
    late = TableRows(100 * full, 500 * full, 400 * full, 0 * full)
    early = TableRows(0 * full, 500 * full, 550 * full, 50 * full)
    for rows, scenario, waited in (
        (late, Scenario(), 100), (late, Scenario(storage=2), 0), (late, Scenario(storage=0.5), 600),
        (late, Scenario(storage=1.1), 100 - 500 / 11), (late, Scenario(compute=1.1), 60), (late, NO_TIME, 0),
        (early, Scenario(), 0), (early, Scenario(storage=0.5), 450), (early, Scenario(compute=0.5), 225),
    ):  # fmt: skip
        found = predict(replace(model, passes=[replace(model.passes[0], rows=rows)]), scenario)
        step = 700 * scenario.compute + waited
        assert found.step_ms == pytest.approx(step / 1000)
        assert found.waiting_share == pytest.approx(waited / step, abs=0.002)
        assert found.utilisation == pytest.approx(700 * scenario.compute / step)


def use_slow_storage(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """For processes that are started later; SLOW_LATENCY_US and SLOW_BYTES_PER_US say how slow."""
    library = folder / "slow_reads.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SLOW_READS, "-ldl"], check=True)
    patch.setenv("LD_PRELOAD", str(library))
    patch.setenv("SLOW_FOLDER", str(folder.resolve()))


def model_undisturbed_run(folder: Path, program: str) -> simulate.Model:
    """Of a real run in which no step was held up by something else for longer than all steps differ."""
    for attempt in range(5):
        model = make_model(measure_steps(traced.run(folder / str(attempt), program)), 2)
        steps = np.concatenate([each.measured_us.ravel() for each in model.passes if each.phase == "train"])
        if steps[1:].mean() < 1.1 * np.median(steps[1:]):
            return model
    raise AssertionError("five runs in which some steps took far longer than the others")


def busy_ms(model: simulate.Model) -> float:
    """Of a step. On a busy machine one of two runs of the same program may be slower in all of its steps."""
    found = predict(model)
    return found.step_ms * (1 - found.waiting_share)


@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler makes reads slow")
def test_a_real_run_with_tables_on_other_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a run that waits 6 ms for its rows in each step to one that has time to spare, and back."""
    use_slow_storage(tmp_path, monkeypatch)
    monkeypatch.setenv("SLOW_BYTES_PER_US", "1e9")
    models = []
    for latency in ("4800", "1200"):
        monkeypatch.setenv("SLOW_LATENCY_US", latency)
        models.append(model_undisturbed_run(tmp_path / latency, ROWS))
    slow, fast = models
    assert predict(slow).waiting_share > 0.3 and predict(fast).waiting_share < 0.1
    assert predict(slow).utilisation < 0.7
    for model, scenario, other in ((slow, Scenario(storage=4), fast), (fast, Scenario(storage=0.25), slow)):
        assert predict(model).step_ms == pytest.approx(simulate.measure(model)[1], rel=0.1)
        known = replace(scenario, compute=busy_ms(other) / busy_ms(model))
        assert predict(model, known).step_ms == pytest.approx(simulate.measure(other)[1], rel=0.25)
    assert predict(slow, NO_TIME).waiting_share < 0.1


@pytest.mark.skipif(not shutil.which("cc"), reason="a C compiler makes reads slow")
def test_a_real_run_with_other_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a run that waits for slow reads to one whose storage is four times as fast, and back."""
    use_slow_storage(tmp_path, monkeypatch)
    monkeypatch.setenv("SLOW_LATENCY_US", "3000")
    models = []
    for rate in ("3", "12"):
        monkeypatch.setenv("SLOW_BYTES_PER_US", rate)
        models.append(model_undisturbed_run(tmp_path / rate, QUEUED))
    slow, fast = models
    assert slow.cost.latency_us == pytest.approx(3_200, rel=0.4)
    assert slow.cost.us_per_byte == pytest.approx(1 / 3, rel=0.3)
    for model, scenario, other in ((slow, Scenario(storage=4), fast), (fast, Scenario(storage=0.25), slow)):
        assert predict(model).step_ms == pytest.approx(simulate.measure(model)[1], rel=0.1)
        known = replace(scenario, compute=busy_ms(other) / busy_ms(model))
        assert predict(model, known).step_ms == pytest.approx(simulate.measure(other)[1], rel=0.3)
