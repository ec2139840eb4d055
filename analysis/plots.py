"""Figures as views of tables: each function turns a frame of tables/answers.py into a specification that
page.js draws. Nothing is computed here but positions and labels. None when there is nothing to show."""

import math
from itertools import pairwise

import numpy as np
import polars as pl

from analysis.page import Spec, seconds, size
from analysis.stages import KINDS
from analysis.tables.answers import PARTS
from analysis.tables.calls import with_us

# Okabe and Ito's colours, told apart by colour-blind eyes too
COLORS = {
    "compute": "#009e73", "communication": "#0072b2", "copy": "#56b4e9", "wait": "#e8601c", "io": "#882255",
    "rest": "#bbbbbb", "other": "#dddddd", "startup": "#f0c14b", "evaluate": "#9970ab",
    "checkpoint": "#8c510a", "preprocess": "#5aae61",
}  # fmt: skip
DARK = ("communication", "io", "wait", "checkpoint", "evaluate", "compute", "bare")
READ, WRITE, THIRD = "#0072b2", "#d55e00", "#009e73"
CYCLE = ("#f0c14b", "#56b4e9", "#009e73", "#e6a0c4", "#d55e00", "#0072b2", "#999999", "#b3de69", "#9970ab")
MAX_ROWS = 64


def where(breakdown: pl.DataFrame) -> Spec | None:
    rows = []
    for row in breakdown.head(MAX_ROWS).iter_rows(named=True):
        at, parts = 0.0, []
        for name in PARTS:
            if row[name] > 0:
                parts.append([name, at, row[name]])
                at += row[name]
        rows.append({"label": f"rank {row['rank']}", "parts": parts})
    return _rows(rows, COLORS)


def _rows(rows: list[dict], colors: dict, left: int = 110, gantt: bool = False) -> Spec | None:
    used = {part[0] for row in rows for part in row["parts"]}
    if not used:
        return None
    kept = {name: color for name, color in colors.items() if name in used}
    return {
        "type": "rows",
        "rows": rows,
        "colors": kept,
        "unit": "s",
        "dark": list(DARK),
        "left": left,
        "gantt": gantt,
    }


def hidden(phases: pl.DataFrame) -> Spec | None:
    """I/O of each rank and phase: behind compute, behind communication, bare."""
    colors = {"behind compute": "#8fd3b6", "behind communication": "#9ecae1", "bare": "#882255"}
    rows = []
    for row in phases.filter(pl.col("io_all_s") > 0).head(MAX_ROWS).iter_rows(named=True):
        at, parts = 0.0, []
        for name, column in zip(colors, ("compute", "communication", None), strict=True):
            value = row[f"io_behind_{column}_s"] if column else row["io_bare_s"]
            if value > 0:
                parts.append([name, at, value])
                at += value
        rows.append({"label": f"rank {row['rank']}, {row['phase']}", "parts": parts})
    return _rows(rows, colors, left=150)


def over_time(timeline: pl.DataFrame, curves: pl.DataFrame) -> Spec | None:
    if not len(timeline):
        return None
    at, width = timeline["at_s"].to_list(), timeline["width_s"][0]
    panels = [
        {"label": "share of the ranks' time", "unit": "", "kind": "stack", "height": 110, "series": [
            {"name": kind, "color": COLORS[kind], "x": at, "y": timeline[kind].to_list(), "width": width}
            for kind in (*reversed(KINDS), "other")]},
        {"label": "MB/s, all ranks", "unit": "MB/s", "kind": "line", "series": [
            {"name": op, "color": color, "x": at, "y": timeline[f"{op}_MB_per_s"].to_list(), "width": width}
            for op, color in (("read", READ), ("write", WRITE))]},
    ]  # fmt: skip
    for name, unit, color in (("loss", "", "#333333"), ("samples_per_second", "samples/s", THIRD)):
        found = curves.filter((pl.col("name") == name) & pl.col("value").is_finite())
        if len(found):
            series = {
                "name": name.replace("_", " "),
                "color": color,
                "x": found["at_s"].to_list(),
                "y": found["value"].to_list(),
            }
            panels.append(
                {
                    "label": name.replace("_", " "),
                    "unit": unit,
                    "kind": "line",
                    "series": [series],
                    "zero": name != "loss",
                }
            )
    panels += _auroc(curves)
    return {"type": "time", "panels": panels, "unit": "s"}


def _auroc(curves: pl.DataFrame) -> list[dict]:
    found = curves.filter((pl.col("name") == "auroc") & pl.col("value").is_finite())
    series = [
        {"name": f"AUROC, {split}", "color": color, "x": rows["at_s"].to_list(), "y": rows["value"].to_list()}
        for split, color in (("val", "#9970ab"), ("test", "#8c510a"))
        if len(rows := found.filter(pl.col("split") == split))
    ]
    return [{"label": "AUROC", "unit": "", "kind": "line", "series": series, "zero": False}] if series else []


def rank_heat(rates: pl.DataFrame, begin_us: int) -> Spec | None:
    """Bytes moved per rank over time."""
    if not len(rates) or rates["rank"].n_unique() < 2:
        return None
    width = int(rates["width_us"][0])
    table = rates.group_by("rank", "bin").agg(pl.col("bytes").sum())
    first, last = int(table["bin"].to_numpy().min()), int(table["bin"].to_numpy().max())
    step = max(1, math.ceil((last - first + 1) / 150))
    ranks = table["rank"].unique().sort().to_list()[:MAX_ROWS]
    values = {rank: [0.0] * ((last - first) // step + 1) for rank in ranks}
    for rank, bin_, moved in table.filter(pl.col("rank").is_in(ranks)).iter_rows():
        values[rank][(bin_ - first) // step] += moved / (width * step)
    return {
        "type": "heat", "rows": [f"rank {r}" for r in ranks], "values": [values[r] for r in ranks],
        "unit": "MB/s", "from": (first * width - begin_us) / 1e6, "width": width * step / 1e6,
    }  # fmt: skip


def request_sizes(sizes: pl.DataFrame) -> Spec | None:
    return _histogram(sizes, "count", "requests", True)


def request_bytes(sizes: pl.DataFrame) -> Spec | None:
    return _histogram(sizes.with_columns(pl.col("bytes") / 1e6), "bytes", "MB", False)


def _histogram(sizes: pl.DataFrame, column: str, unit: str, log: bool) -> Spec | None:
    table = sizes.group_by("op", "bucket").agg(pl.col(column).sum())
    if not len(table):
        return None
    buckets = list(range(table["bucket"].to_numpy().min(), table["bucket"].to_numpy().max() + 1))
    series = []
    for op, color in (("read", READ), ("write", WRITE)):
        found = dict(table.filter(pl.col("op") == op).select("bucket", column).iter_rows())
        if found:
            series.append({"name": op, "color": color, "y": [found.get(b, 0) for b in buckets]})
    labels = ["0" if b < 0 else binary(b) for b in buckets]
    return {
        "type": "columns",
        "labels": labels,
        "series": series,
        "yunit": unit,
        "xunit": "bytes per request, from this power of two up to the next",
        "log": log,
    }


def binary(power: int) -> str:
    return f"{2 ** (power % 10)}{('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi')[power // 10]}"


def latency(latencies: pl.DataFrame) -> Spec | None:
    """How long operations took: read, write, and all the others, by powers of two of microseconds."""
    if not len(latencies):
        return None
    op, us = pl.col("op"), pl.col("us")
    octave = pl.when(us < 1).then(-1).otherwise(us.clip(1).log(2).floor()).cast(pl.Int64)
    table = with_us(latencies).with_columns(
        pl.when(op.is_in(["read", "write"])).then(op).otherwise(pl.lit("metadata")).alias("group"),
        octave.alias("octave"),
    )
    table = table.group_by("group", "octave").agg(pl.col("count").sum())
    octaves = list(range(table["octave"].to_numpy().min(), table["octave"].to_numpy().max() + 1))
    series = []
    for group, color in (("read", READ), ("write", WRITE), ("metadata", THIRD)):
        found = dict(table.filter(pl.col("group") == group).select("octave", "count").iter_rows())
        if found:
            series.append({"name": group, "color": color, "y": [found.get(o, 0) for o in octaves]})
    labels = ["<1 us" if o < 0 else seconds(2.0**o / 1e6) for o in octaves]
    return {
        "type": "columns",
        "labels": labels,
        "series": series,
        "yunit": "operations",
        "xunit": "time of one operation, from this up to twice it",
        "log": True,
    }


def step_times(steps: pl.DataFrame, begin_us: int) -> Spec | None:
    if not len(steps):
        return None
    table = steps.gather_every(math.ceil(len(steps) / 4000))
    late = 2 * float(np.median(steps["wall_us"].to_numpy()))
    series = []
    for name, color, rows in (
        ("step", READ, table.filter(pl.col("wall_us") <= late)),
        (
            "more than twice the median",
            "#cc3311",
            steps.filter(pl.col("wall_us") > late).top_k(500, by="wall_us").sort("ts"),
        ),
    ):
        if len(rows):
            series.append({
                "name": name, "color": color, "r": 2.5,
                "x": ((rows["ts"] - begin_us) / 1e6).to_list(), "y": (rows["wall_us"] / 1e3).to_list(),
                "tips": [_step_tip(row) for row in rows.iter_rows(named=True)],
            })  # fmt: skip
    return {
        "type": "time",
        "unit": "s",
        "panels": [
            {
                "label": "ms per step, slowest rank",
                "unit": "ms",
                "kind": "dots",
                "series": series,
                "height": 170,
            }
        ],
    }


def _step_tip(row: dict) -> str:
    parts = ", ".join(
        f"{kind} {row[f'{kind}_us'] / 1e3:.3g}" for kind in (*KINDS, "other") if row[f"{kind}_us"] >= 1
    )
    return (
        f"epoch {row['epoch']}, step {row['step']}: {row['wall_us'] / 1e3:.4g} ms, "
        f"rank {row['slowest_rank']} was last\n"
        f"mean over ranks, ms: {parts}\nts {row['ts']} us in the trace"
    )


def step_histogram(steps: pl.DataFrame, bars: int = 40) -> Spec | None:
    if len(steps) < 2:
        return None
    low, high = np.quantile(steps["wall_us"].to_numpy(), [0.0, 0.995]).tolist()
    if high - low < 2:
        return None
    bars = min(bars, round(high - low))
    width = (high - low) / bars
    edges = [low + i * width for i in range(bars + 1)]
    values = steps["wall_us"].to_numpy()
    counts = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
    counts[-1] += int((values >= edges[-1]).sum())
    return {
        "type": "columns", "labels": [f"{edge / 1e3:.4g}" for edge in edges[:-1]], "yunit": "steps",
        "xunit": "ms per step; the last bar holds all longer ones",
        "series": [{"name": "steps", "color": READ, "y": counts}],
    }  # fmt: skip


def startup(table: pl.DataFrame) -> Spec | None:
    names = [n for n in table["part"].unique(maintain_order=True) if n != "between"]
    colors = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    rows = []
    for (rank,), group in table.drop_nulls("at_s").group_by("rank", maintain_order=True):
        rows.append(
            {"label": f"rank {rank}", "parts": list(group.select("part", "at_s", "seconds").iter_rows())}
        )
    return _rows(rows[:MAX_ROWS], colors, gantt=True)


def files(volume: pl.DataFrame, n: int = 20) -> Spec | None:
    """The files with the most time in them."""
    top = volume.filter(pl.col("file").is_not_null()).top_k(n, by="seconds").sort("seconds", descending=True)
    rows = [
        {
            "label": f"{row['op']} {row['file']} ({size(row['bytes'])})",
            "parts": [[row["op"], 0.0, row["seconds"]]],
        }
        for row in top.iter_rows(named=True)
        if row["seconds"] > 0
    ]
    return _rows(rows, {"read": "#7fb8d9", "write": "#eaa069"}, left=420)


def work(ranks: pl.DataFrame) -> Spec | None:
    """Each rank's own work in its steps beside what it waited for the others."""
    if len(ranks) < 2:
        return None
    labels = [f"rank {r}" for r in ranks["rank"]]
    series = [
        {"name": "own work", "color": THIRD, "y": (ranks["wall_s"] - ranks["communication_s"]).to_list()},
        {"name": "communication", "color": COLORS["communication"], "y": ranks["communication_s"].to_list()},
    ]
    return {
        "type": "columns",
        "labels": labels,
        "series": series,
        "yunit": "seconds in all steps",
        "xunit": "",
    }


def preprocessing(table: pl.DataFrame) -> Spec | None:
    rows = [
        {"label": r["name"], "parts": [["work", 0.0, r["elapsed_s"]]]} for r in table.iter_rows(named=True)
    ]
    return _rows(rows, {"work": COLORS["preprocess"]}, left=200)
