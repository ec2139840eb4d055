"""What the run would do with other storage, another queue, other processors or more ranks, in words.

In: a run as read, and what is changed. Out: a table over the speed of storage, text for the terminal, JSON.
The model itself is analysis/workload/simulate.py; docs/whatif.md says what it leaves out.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.report.page import format_seconds
from analysis.report.run import TracedRun, open_run
from analysis.run_folder import run_settings
from analysis.tables import device
from analysis.tables.cores import Map, map_on_threads
from analysis.workload import simulate
from analysis.workload.simulate import Model, Prediction, Scenario
from common.errors import UserError, printable
from common.words import format_number

FROM_MEMORY = 0.5  # share of the bytes read that a device gave, below which it is said
APART = 0.05  # difference between the model and the run, from which on it is said
NEEDS_CHUNKS = "--read_chunk_mb changes nothing here: "


def make_run_model(run: TracedRun) -> Model:
    """The run as the model takes it; UserError where its trace has no steps, or says nothing of batches."""
    if not len(run.workload.steps):
        raise UserError(
            f"{printable(run.path)}: the trace has no steps (category train, name step): what other storage "
            "would do to them cannot be computed; give the run folder of a traced training"
        )
    config = run.config
    depth = int(run_settings.to_number(run_settings.find_setting(config, "data.prefetch_batches")))
    rows = run_settings.to_number(run_settings.find_setting(config, "batch_size"))
    chunk = run_settings.to_number(run_settings.find_setting(config, "data.read_chunk_mb"))
    streamed = run_settings.find_setting(config, "data.source") in ("auto", "stream")
    mixed = any(
        run_settings.find_setting(config, f"data.{name}")
        for name in ("shuffle_training_set", "shuffle_batch_order", "mmap_mode")
    )
    reads_ahead = chunk > 0 and streamed and not mixed
    model = simulate.make_model(
        run.workload, depth or simulate.DEPTH, None, chunk if reads_ahead else None, by_turns=True
    )
    return replace(model, rows_per_step=rows * model.ranks or None)


def predict_table(model: Model, scenario: Scenario = Scenario()) -> pl.DataFrame:  # noqa: B008  # frozen
    """A row per speed of storage, from RANGE and infinitely fast, and what the run would do; all else as in
    the scenario. `saved_s`: seconds of the whole run, against the run as it was.
    """
    now = simulate.predict(model).seconds
    rows = [
        {
            "storage": name_factor(factor), "samples_per_second": each.samples_per_second,
            "step_us": 1e3 * each.step_ms, "waiting_share": each.waiting_share,
            "utilisation_share": each.utilisation, "saved_s": now - each.seconds,
        }
        for factor, each in simulate.predict_range(model, replace(scenario, storage=1.0))
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"samples_per_second": pl.Float64})


def name_factor(factor: float) -> str:
    return "no time" if math.isinf(factor) else f"x{factor:g}"


def list_notes(run: TracedRun, model: Model, scenario: Scenario) -> list[str]:
    """What must be known to believe the numbers, as sentences."""
    notes = []
    source = device.find_read_source(run.joined, "train", "run")
    if source is not None and source.share is not None and source.share < FROM_MEMORY:
        notes.append(
            f"{1 - source.share:.0%} of the bytes that were read while training came from memory, not from a "
            "device: the factors scale the speed of memory. Trace a run whose data are not in the page cache."
        )
    elif source is None:
        notes.append("It is not known whether reads came from a device or from memory.")
    notes += _describe_tables(model, scenario)
    if not model.cost.separable and scenario.latency != 1:
        notes.append(
            "All reads have about one size, so latency and bandwidth cannot be told apart: all counts as "
            "bandwidth, and --latency changes nothing."
        )
    if scenario.read_chunk_mb is not None:
        if model.chunk_mb is None:
            notes.append(NEEDS_CHUNKS + "the run did not stream its data in file order, or does not say so.")
        elif model.find_chunk(scenario.ranks or model.ranks, 1.0) == 0:
            notes.append(NEEDS_CHUNKS + "ranks that take turns in a file read one batch at a time.")
    measured, modelled = simulate.measure(model)[1], simulate.predict(model).step_ms
    if abs(modelled / measured - 1) > APART:
        notes.append(
            f"The model gives {modelled:.3g} ms a step for the run as it was, which took {measured:.3g} ms: "
            "trust ratios more than times."
        )
    if scenario.ranks is not None and scenario.ranks != model.ranks:
        notes.append(
            f"--ranks: every rank is taken to have the storage and the exchange of one of the {model.ranks} "
            "measured ones; that all of them share the storage is --storage."
        )
    return notes


def _describe_tables(model: Model, scenario: Scenario) -> list[str]:
    """Of a run with tables in files what its steps waited for rows, and what of that storage can change."""
    found = [each.rows for each in model.passes if each.phase == "train" and each.rows]
    if not found:
        return []
    wait, calls = (
        np.concatenate([getattr(rows, name).mean(axis=0) for rows in found])[1:].sum() / 1e6
        for name in ("wait", "calls")
    )
    text = (
        f"Rows of tables in files: after the first step a rank waits {format_seconds(wait)} for them, and a "
        f"thread's calls for them take {format_seconds(calls)}. The factor of storage scales these calls as "
        "a whole; what the thread does besides stays."
    )
    return [text + (" --latency does not change them." if scenario.latency != 1 else "")]


def describe_whatif(run: TracedRun, scenario: Scenario) -> tuple[str, dict[str, Any]]:
    """The predictions for a scenario and for a range around it: text, and the same for programs."""
    model = make_run_model(run)
    now, then = simulate.predict(model), simulate.predict(model, scenario)
    seconds, step_ms = simulate.measure(model)
    table, notes = predict_table(model, scenario), list_notes(run, model, scenario)
    changes = _list_changes(scenario)
    lines = [f"{run.name}: {format_number(model.ranks, 'rank')}, {format_number(now.steps, 'step')} "
             f"after the first, prefetching {model.depth}"]  # fmt: skip
    lines += ["", _format_row("", ("step", "samples/s", "waiting", "AU", "saved"))]
    lines.append(_format_row("traced", (f"{step_ms:.4g} ms", _format_speed(model.rows_per_step and
                                        1e3 * model.rows_per_step / step_ms), "", "", "")))  # fmt: skip
    lines.append(_format_prediction("model, as it was", now, now))
    if changes:
        lines.append(_format_prediction(", ".join(changes), then, now))
    lines += ["", f"Over the speed of storage{' (with the other changes)' if changes else ''}:"]
    lines += [
        _format_prediction(name_factor(factor), each, now)
        for factor, each in simulate.predict_range(model, replace(scenario, storage=1.0))
    ]
    cost = model.cost
    rate = f"{1 / cost.us_per_byte:.4g} MB/s" if cost.us_per_byte > 0 else "no time for bytes"
    fitted = f"A read costs {format_seconds(cost.latency_us / 1e6)} and {rate}, fitted to the run's calls."
    if not cost.latency_us and not cost.us_per_byte:
        fitted = "The run read nothing while it trained."
    lines += ["", fitted]
    lines += [f"Note: {note}" for note in notes]
    lines.append(
        "AU: accelerator utilisation as DLIO counts it, computing and exchanging / the training's time."
    )
    found = {
        "run": run.name,
        "scenario": asdict(scenario),
        "traced": {"train_seconds": seconds, "step_ms": step_ms},
        "model": asdict(now),
        "predicted": asdict(then) | {"saved_seconds": now.seconds - then.seconds},
        "range": table.rows(named=True),
        "request_cost": asdict(cost),
        "notes": notes,
    }
    return "\n".join(lines), found


def _list_changes(scenario: Scenario) -> list[str]:
    given = {name: value for name, value in asdict(scenario).items() if value != getattr(Scenario(), name)}
    factors = ("storage", "latency", "compute")
    return [f"{name} {name_factor(value) if name in factors else value}" for name, value in given.items()]


def _format_speed(speed: float | None) -> str:
    return f"{speed:,.0f}" if speed else "-"


def _format_prediction(name: str, each: Prediction, now: Prediction) -> str:
    saved = "" if each is now else format_seconds(now.seconds - each.seconds)
    return _format_row(
        name,
        (f"{each.step_ms:.4g} ms", _format_speed(each.samples_per_second), f"{each.waiting_share:.1%}",
         f"{each.utilisation:.1%}", saved),
    )  # fmt: skip


def _format_row(name: str, cells: tuple[str, ...]) -> str:
    return (f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells)).rstrip()


def predict_run(
    path: str | Path, scenario: Scenario, over: Map = map_on_threads
) -> tuple[str, dict[str, Any]]:
    """What `python -m analysis whatif` prints, as text and as JSON values."""
    return describe_whatif(open_run(path, over), scenario)
