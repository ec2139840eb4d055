"""Figures as views of tables: each function turns a frame of tables/answers.py into a specification that
page.js draws. Nothing is computed here but positions and labels. None when there is nothing to show."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import polars as pl

from analysis.report.answer import LABELS, Answer
from analysis.report.many_ranks import ChosenRanks
from analysis.report.page import Spec, format_size
from analysis.tables.answers import PARTS
from analysis.tables.progress import RANKINGS
from analysis.trace.classify import KINDS

# Okabe and Ito's colours, which colour-blind readers can distinguish too
COLORS = {
    "compute": "#009e73", "communication": "#0072b2", "copy": "#56b4e9", "wait": "#e8601c", "io": "#882255",
    "rest": "#bbbbbb", "other": "#dddddd", "startup": "#f0c14b", "evaluate": "#9970ab",
    "checkpoint": "#8c510a", "preprocess": "#5aae61",
}  # fmt: skip
READ, WRITE, THIRD = "#332288", "#999933", "#44aa99"  # of lines and columns: none is a kind of time above
VAL, TEST, ALONE = "#aa4499", "#111111", "#555555"  # alone: a line that has its panel for itself
STEP, LATE = "#0072b2", "#cc3311"
CYCLE = ("#f0c14b", "#56b4e9", "#009e73", "#e6a0c4", "#d55e00", "#0072b2", "#999999", "#b3de69", "#9970ab")
MAX_ROWS, MAX_NODES = 64, 24
Gaps = Sequence[tuple[float, float]]  # from when to when nothing ran


def plot_answer(answer: Answer) -> Spec | None:
    """A rank's time in one bar, and below it what storage could save of it at most."""
    at, parts = 0.0, []
    for name, seconds in answer.parts_s.items():
        if seconds > 0:
            parts.append([LABELS[name], at, seconds])
            at += seconds
    if not parts:
        return None
    kinds = {"waiting": "wait", "evaluation": "evaluate", "checkpoints": "checkpoint"}
    colors = {label: COLORS[kinds.get(name, name)] for name, label in LABELS.items()}
    rows = [{"label": "a rank's time", "parts": parts}]
    if answer.storage_seconds > 0:
        rows.append({"label": "storage, at most", "parts": [["storage", 0.0, answer.storage_seconds]]})
    return _make_rows(rows, colors | {"storage": COLORS["io"]}, left=130)


def plot_whatif(table: pl.DataFrame) -> Spec | None:
    """Speed of the training over the speed of storage. `table`: rows of `whatif.predict_table`."""
    known = table["samples_per_second"].null_count() == 0
    values = table["samples_per_second"] if known else 1e6 / table["step_us"]
    unit = "samples/s" if known else "steps/s"
    series = [{"name": f"predicted {unit}", "color": READ, "y": values.to_list()}]
    return {
        "type": "columns", "labels": table["storage"].to_list(), "series": series, "yunit": unit,
        "xunit": "speed of storage, against the run's", "log": False,
    }  # fmt: skip


def plot_time_by_rank(breakdown: pl.DataFrame, chosen: ChosenRanks) -> Spec | None:
    """A bar per rank: seconds by phase and kind; and the mean of all where they are too many."""
    shown = chosen.show(breakdown)
    rows = [
        {"label": chosen.name_rank(row["rank"]), "parts": _put_in_line(row)}
        for row in shown.iter_rows(named=True)
    ]
    if len(shown) < len(breakdown):
        means = breakdown.select(pl.col(PARTS).mean()).row(0, named=True)
        rows.append({"label": f"mean of {len(breakdown):,}", "parts": _put_in_line(means)})
    return _make_rows(rows, COLORS)


def plot_nodes(nodes: pl.DataFrame) -> Spec | None:
    """A bar per node, the mean of its ranks; of many nodes those with the slowest ranks. nodes: of
    `many_ranks.sum_nodes`.
    """
    rows = [
        {"label": row["host"] or "?", "parts": _put_in_line({part: row[f"{part}_s"] for part in PARTS})}
        for row in nodes.head(MAX_NODES).iter_rows(named=True)
    ]
    return _make_rows(rows, COLORS, left=150)


def _put_in_line(seconds: Mapping[str, float]) -> list[list]:
    """One part behind the other: name, begin, length."""
    at, parts = 0.0, []
    for name in PARTS:
        if seconds[name] > 0:
            parts.append([name, at, seconds[name]])
            at += seconds[name]
    return parts


def plot_gpus(table: pl.DataFrame) -> Spec | None:
    """A bar per GPU: what it did, and while it was idle what the main thread did. table: of tables/gpu.py."""
    colors = {"kernels": COLORS["compute"], "collectives": COLORS["communication"], "copies": COLORS["copy"]}
    idle = {"wait": "waiting for data", "io": "I/O"}
    colors |= {
        f"idle: {idle.get(kind, kind)}": color
        for kind, color in (
            ("wait", COLORS["wait"]), ("io", COLORS["io"]), ("communication", "#9ecae1"), ("copy", "#deebf7"),
            ("compute", "#8fd3b6"), ("other", COLORS["other"]),
        )
    }  # fmt: skip
    names = ("kernels", "collectives", "copies", "idle_wait", "idle_io", "idle_communication", "idle_copy",
             "idle_compute", "idle_other")  # fmt: skip
    rows = []
    for row in table.head(MAX_ROWS).iter_rows(named=True):
        at, parts = 0.0, []
        for label, name in zip(colors, names, strict=True):
            if row[f"{name}_us"] > 0:
                parts.append([label, at, row[f"{name}_us"] / 1e6])
                at += row[f"{name}_us"] / 1e6
        rows.append({"label": f"rank {row['rank']}, GPU {row['device']}", "parts": parts})
    return _make_rows(rows, colors, left=130)


def _make_rows(rows: list[dict], colors: dict, left: int = 110, gantt: bool = False) -> Spec | None:
    """Bars, each cut into parts.

    rows: {"label": text, "parts": [[name, begin, length], ...]}; colors: name -> colour, in the order of the
    legend; left: pixels for the labels.
    """
    used = {part[0] for row in rows for part in row["parts"]}
    if not used:
        return None
    kept = {name: color for name, color in colors.items() if name in used}
    return {
        "type": "rows",
        "rows": rows,
        "colors": kept,
        "unit": "s",
        "left": left,
        "gantt": gantt,
    }


def plot_hidden_io(phases: pl.DataFrame, chosen: ChosenRanks) -> Spec | None:
    """I/O of each rank and phase: behind compute, behind communication, not hidden."""
    colors = {"behind compute": "#8fd3b6", "behind communication": "#9ecae1", "not hidden": "#882255"}
    rows = []
    shown = chosen.show(phases.filter(pl.col("io_all_s") > 0))
    for row in shown.head(MAX_ROWS).iter_rows(named=True):
        at, parts = 0.0, []
        for name, column in zip(colors, ("compute", "communication", None), strict=True):
            value = row[f"io_behind_{column}_s"] if column else row["io_not_hidden_s"]
            if value > 0:
                parts.append([name, at, value])
                at += value
        rows.append({"label": f"rank {row['rank']}, {row['phase']}", "parts": parts})
    return _make_rows(rows, colors, left=150)


def plot_over_time(timeline: pl.DataFrame, curves: pl.DataFrame, gaps: Gaps = ()) -> Spec | None:
    """Panels on one time axis: shares of time, MB/s, loss, samples per second, scores, caches."""
    if not len(timeline):
        return None
    at, width = timeline["at_s"].to_list(), timeline["width_s"].max()  # only the first is shorter
    panels = [
        {"label": "share of the ranks' time", "unit": "", "kind": "stack", "height": 110, "series": [
            {"name": kind, "color": COLORS[kind], "x": at, "y": timeline[kind].to_list(), "width": width}
            for kind in (*reversed(KINDS), "other")]},
        {"label": "MB/s read and written, all ranks", "unit": "MB/s", "kind": "line", "series": [
            {"name": op, "color": color, "x": at, "y": timeline[f"{op}_MB_per_s"].to_list(), "width": width}
            for op, color in (("read", READ), ("write", WRITE))]},
    ]  # fmt: skip
    for name, unit in (("loss", ""), ("samples_per_second", "samples/s")):
        found = curves.filter((pl.col("name") == name) & pl.col("value").is_finite())
        if len(found):
            series = {
                "name": name.replace("_", " "),
                "color": ALONE,
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
    panels += _make_score_panels(curves) + _make_cache_panels(curves)
    return {"type": "time", "panels": panels, "unit": "s", "gaps": list(gaps)}


def _make_score_panels(curves: pl.DataFrame) -> list[dict]:
    """AUROC; of a model that ranks items Recall and NDCG, of ten items or else the longest list."""
    named = curves["name"].unique().to_list()
    longest = [
        max((n for n in named if n.startswith(kind)), key=_list_length, default="") for kind in RANKINGS
    ]
    panels = []
    for name in filter(None, ("auroc", *longest)):
        found = curves.filter((pl.col("name") == name) & pl.col("value").is_finite())
        label = "AUROC" if name == "auroc" else name
        series = [
            {"name": split, "color": color,
             "x": rows["at_s"].to_list(), "y": rows["value"].to_list()}
            for split, color in (("val", VAL), ("test", TEST))
            if len(rows := found.filter(pl.col("split") == split))
        ]  # fmt: skip
        if series:
            panels.append({"label": label, "unit": "", "kind": "line", "series": series, "zero": False})
    return panels


def _list_length(name: str) -> int:
    """NDCG@100 -> 100; papers quote 10."""
    digits = name.partition("@")[2]
    return (1 << 30 if digits == "10" else int(digits)) if digits.isdecimal() else 0


CACHE = (
    ("cache hit rate", "", ("cache_hit_rate",)),
    ("evictions per step", "rows", ("cache_evictions",)),
    ("tables' files, per step", "MB", ("store_bytes_read", "store_bytes_written")),
)


def _make_cache_panels(curves: pl.DataFrame) -> list[dict]:
    """Of training; runs whose tables are all in memory have none of it."""
    panels = []
    for label, unit, names in CACHE:
        series = [
            {
                "name": name.replace("_", " "), "color": color if len(names) > 1 else ALONE,
                "x": found["at_s"].to_list(), "y": (found["value"] / (1e6 if unit == "MB" else 1)).to_list(),
            }
            for name, color in zip(names, (READ, WRITE), strict=False)
            if len(found := curves.filter((pl.col("name") == name) & pl.col("split").is_null()))
        ]  # fmt: skip
        if series:
            panels.append({"label": label, "unit": unit, "kind": "line", "series": series, "zero": True})
    return panels


def plot_step_times(steps: pl.DataFrame, begin_us: int, gaps: Gaps = ()) -> Spec | None:
    """A dot per step; steps over twice the median in a colour of their own."""
    if not len(steps):
        return None
    table = steps.gather_every(math.ceil(len(steps) / 4000))
    late = 2 * float(np.median(steps["wall_us"].to_numpy()))
    series = []
    for name, color, rows in (
        ("step", STEP, table.filter(pl.col("wall_us") <= late)),
        (
            "more than twice the median",
            LATE,
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
        "gaps": list(gaps),
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


def plot_step_histogram(steps: pl.DataFrame, bars: int = 40) -> Spec | None:
    """How many steps took how long."""
    if len(steps) < 2:
        return None
    low, high = np.quantile(steps["wall_us"].to_numpy(), [0.0, 0.995]).tolist()
    if high - low < 2:
        return None
    edges = find_round_edges(low, high, bars)
    values = steps["wall_us"].to_numpy()
    counts = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
    counts[-1] += int((values >= edges[-1]).sum())
    return {
        "type": "columns", "labels": [f"{edge / 1e3:.4g}" for edge in edges[:-1]], "yunit": "steps",
        "xunit": "ms per step; the last bar holds all longer ones",
        "series": [{"name": "steps", "color": STEP, "y": counts}],
    }  # fmt: skip


def find_round_edges(low: float, high: float, bars: int) -> list[int]:
    """Edges of about so many bars over low to high, in us: multiples of 1, 2, 5, 10, 20 and so on."""
    wanted = max(1.0, (high - low) / bars)
    power = 10 ** math.floor(math.log10(wanted))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)
    return [width * i for i in range(int(low // width), int(high // width) + 2)]


def plot_startup(table: pl.DataFrame, chosen: ChosenRanks) -> Spec | None:
    """A bar per rank: the parts of its start-up, each where it began."""
    names = [n for n in table["part"].unique(maintain_order=True) if n != "between"]
    colors = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    rows = []
    several = table["launch"].n_unique() > 1
    shown = chosen.show(table.drop_nulls("at_s"))
    for (launch, rank), group in shown.group_by("launch", "rank", maintain_order=True):
        label = f"rank {rank}, launch {launch}" if several else chosen.name_rank(rank)
        rows.append({"label": label, "parts": list(group.select("part", "at_s", "seconds").iter_rows())})
    return _make_rows(rows[:MAX_ROWS], colors, left=150 if several else 110, gantt=True)


def plot_files(volume: pl.DataFrame, n: int = 20) -> Spec | None:
    """The files with the most time in them."""
    top = volume.filter(pl.col("file").is_not_null()).top_k(n, by="seconds").sort("seconds", descending=True)
    rows = [
        {
            "label": f"{row['file']} ({format_size(row['bytes'])})",
            "parts": [[row["op"], 0.0, row["seconds"]]],
        }
        for row in top.iter_rows(named=True)
        if row["seconds"] > 0
    ]
    return _make_rows(rows, {"read": READ, "write": WRITE}, left=420)


def plot_work(ranks: pl.DataFrame, chosen: ChosenRanks) -> Spec | None:
    """Each rank's own work in its steps beside what it waited for the others."""
    if len(ranks) < 2:
        return None
    ranks = chosen.show(ranks)
    labels = [chosen.name_rank(rank) for rank in ranks["rank"]]
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


def plot_preprocessing(table: pl.DataFrame) -> Spec | None:
    rows = [
        {"label": r["name"], "parts": [["work", 0.0, r["elapsed_s"]]]} for r in table.iter_rows(named=True)
    ]
    return _make_rows(rows, {"work": COLORS["preprocess"]}, left=200)
