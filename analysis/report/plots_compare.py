"""Figures of several runs together, always on one axis: bars, overlaid curves, scaling. As in plots.py."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis.report.comparison import ComparedRun, Comparison, ScalingPoint
from analysis.report.facts import TRAIN
from analysis.report.page import Spec, format_size
from analysis.report.plots import COLORS, CYCLE, find_round_edges
from analysis.tables import answers, progress
from analysis.tables.answers import PARTS

RUN_COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#999933", "#882255", "#888888",
)  # fmt: skip
HIDDEN = {"behind compute": "#8fd3b6", "behind communication": "#9ecae1", "not hidden": COLORS["io"]}
MOST_BARS = 24  # beyond them one bar is a run, the mean of its ranks
BINS = 30
Labelled = list[tuple[str, ComparedRun]]


def label_runs(comparison: Comparison) -> Labelled:
    """A, B, ...; of a setting with several runs A1, A2, ..."""
    return [
        (f"{setting.letter}{number}" if len(setting.runs) > 1 else setting.letter, run)
        for setting in comparison.settings
        for number, run in enumerate(setting.runs, 1)
    ]


def plot_times(runs: Labelled) -> Spec | None:
    """Where the time went: a bar per rank of each run."""
    ranks = sum(run.facts.breakdown.height for _, run in runs)
    rows = []
    for label, run in runs:
        table = run.facts.breakdown
        if ranks > MOST_BARS:
            means = {name: float(table[name].cast(pl.Float64).sum()) / table.height for name in PARTS}
            rows.append((f"{label}, mean of {table.height}", means))
        else:
            rows += [(f"{label} rank {row['rank']}", row) for row in table.iter_rows(named=True)]
    return _make_bars([(label, [(name, row[name]) for name in PARTS]) for label, row in rows], COLORS)


def plot_hidden_io(runs: Labelled) -> Spec | None:
    """I/O of a rank while it trains: behind compute, behind communication, not hidden."""
    columns = ("io_behind_compute_s", "io_behind_communication_s", "io_not_hidden_s")
    rows = [
        (
            label,
            [(n, run.facts.average_seconds(c, *TRAIN)) for n, c in zip(HIDDEN, columns, strict=True)],
        )
        for label, run in runs
    ]
    return _make_bars(rows, HIDDEN)


def _make_bars(rows: list[tuple[str, list[tuple[str, float]]]], colors: dict[str, str]) -> Spec | None:
    """Rows of one figure share its axis."""
    made, used = [], set[str]()
    for label, amounts in rows:
        at, parts = 0.0, []
        for name, seconds in amounts:
            if seconds > 0:
                parts.append([name, at, seconds])
                at += seconds
                used.add(name)
        made.append({"label": label, "parts": parts})
    kept = {name: color for name, color in colors.items() if name in used}
    return {"type": "rows", "rows": made, "colors": kept, "unit": "s", "left": 150} if used else None


def plot_startup(runs: Labelled) -> Spec | None:
    """The start-up of each run's first rank."""
    rows, names = [], dict[str, None]()
    for label, run in runs:
        table = progress.list_startup(run.run.joined).drop_nulls("at_s")
        if len(table):
            launch, rank = table.select("launch", "rank").row(0)
            own = table.filter((pl.col("launch") == launch) & (pl.col("rank") == rank))
            parts = [list(part) for part in own.select("part", "at_s", "seconds").iter_rows()]
            names.update(dict.fromkeys(name for name, _, _ in parts))
            rows.append({"label": f"{label} rank {rank}", "parts": parts})
    colors = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    if not rows:
        return None
    return {"type": "rows", "rows": rows, "colors": colors, "unit": "s", "left": 150, "gantt": True}


def plot_curves(runs: Labelled, over: str) -> Spec | None:
    """Loss, samples per second and scores of all runs in one panel each, over `step` or `time`."""
    column = "at_s" if over == "time" else "step"
    curves = [
        (label, progress.make_curves(run.run.joined, run.run.metrics).drop_nulls([column, "value"]))
        for label, run in runs
    ]
    # the test is one point, of the last step
    curves = [(label, table.filter(pl.col("split").fill_null("") != "test")) for label, table in curves]
    panels = []
    for name in ("loss", "samples_per_second", "auroc"):
        lines = [
            (label, table.filter((pl.col("name") == name) & pl.col("value").is_finite()).sort(column))
            for label, table in curves
        ]
        series = _make_series((label, table[column], table["value"]) for label, table in lines)
        if series:
            title = "AUROC" if name == "auroc" else name.replace("_", " ")
            unit = "samples/s" if name == "samples_per_second" else ""
            panels.append(_make_panel(title, unit, series, zero=name == "samples_per_second"))
    return {"type": "time", "panels": panels, "unit": "s" if over == "time" else "step"} if panels else None


def _make_series(lines: Iterable[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    """Lines that have points, in the colour that their run has in all figures."""
    return [
        {"name": label, "color": RUN_COLORS[i % len(RUN_COLORS)], "x": list(x), "y": list(y)}
        for i, (label, x, y) in enumerate(lines)
        if len(x)
    ]


def _make_panel(label: str, unit: str, series: list[dict[str, Any]], zero: bool) -> dict[str, Any]:
    """A panel of lines. zero: its axis begins at 0."""
    return {"label": label, "unit": unit, "kind": "line", "height": 140, "series": series, "zero": zero}


def plot_step_times(runs: Labelled) -> Spec | None:
    """Which share of the steps took how long, in the same classes for all runs."""
    walls = {label: progress.list_steps(run.run.joined)["wall_us"].to_numpy() for label, run in runs}
    walls = {label: wall for label, wall in walls.items() if len(wall)}
    if not walls:
        return None
    low = min(float(wall.min()) for wall in walls.values())
    high = max(float(np.quantile(wall, 0.99)) for wall in walls.values())
    edges = find_round_edges(low, high, BINS)
    colors = {label: RUN_COLORS[i % len(RUN_COLORS)] for i, (label, _) in enumerate(runs)}
    series = []
    for label, wall in walls.items():
        counts, _ = np.histogram(np.clip(wall, edges[0], edges[-1]), edges)
        series.append({"name": label, "color": colors[label], "y": (100 * counts / len(wall)).tolist()})
    return {
        "type": "columns", "labels": [f"{edge / 1e3:.4g}" for edge in edges[:-1]], "series": series,
        "yunit": "% of the steps", "xunit": "ms per step; the last bar holds all longer ones",
    }  # fmt: skip


def plot_request_sizes(runs: Labelled) -> Spec | None:
    """Reads by size, start-up left out."""
    counts = {}
    for label, run in runs:
        table = answers.count_request_sizes(run.run.joined, "phase")
        table = table.filter((pl.col("phase") != "startup") & (pl.col("op") == "read"))
        counts[label] = dict(table.group_by("bucket").agg(pl.col("count").sum()).iter_rows())
    known = [bucket for found in counts.values() for bucket in found]
    if not known:
        return None
    buckets = range(min(known), max(known) + 1)
    series = [
        {"name": label, "color": RUN_COLORS[i % len(RUN_COLORS)], "y": [found.get(b, 0) for b in buckets]}
        for i, (label, found) in enumerate(counts.items())
    ]
    return {
        "type": "columns", "labels": ["0" if b < 0 else format_size(2**b) for b in buckets],
        "series": series, "yunit": "reads", "log": True,
        "xunit": "size of a read, from this up to twice it",
    }  # fmt: skip


def plot_scaling(points: Sequence[ScalingPoint], called: str) -> Spec | None:
    """Speed over the values of a setting; of a setting that is a number also what proportional would be."""
    speeds = [point.samples_per_second for point in points]
    if points[0].efficiency is None:
        return {
            "type": "columns", "labels": [str(point.value) for point in points], "xunit": called,
            "series": [{"name": "samples/s", "color": RUN_COLORS[0], "y": speeds}], "yunit": "samples/s",
        }  # fmt: skip
    x = [float(point.value) for point in points]
    ideal = [speeds[0] * value / x[0] for value in x]
    panels = [
        _make_panel(
            "samples/s",
            "samples/s",
            [
                {"name": "measured", "color": RUN_COLORS[0], "x": x, "y": speeds},
                {"name": "proportional to the first", "color": RUN_COLORS[-1], "x": x, "y": ideal},
            ],
            zero=True,
        )
    ]
    shares = [
        {"name": name, "color": COLORS[kind], "x": x, "y": [100 * (value or 0.0) for value in values]}
        for name, kind, values in (
            ("waiting for data", "wait", [point.wait_share for point in points]),
            ("communication", "communication", [point.communication_share for point in points]),
        )
        if any(value is not None for value in values)
    ]
    if shares:
        panels.append(_make_panel("% of training", "%", shares, zero=True))
    return {"type": "time", "panels": panels, "unit": called}
