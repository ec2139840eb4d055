"""Figures of reads and writes: rates by rank, sizes of requests, times of operations. As in plots.py."""

import polars as pl

from analysis.report.many_ranks import Heat
from analysis.report.page import Spec, format_seconds, format_size
from analysis.report.plots import READ, THIRD, WRITE
from analysis.tables.calls import add_latency_us


def plot_heat(heat: Heat | None, begin_us: int, unit: str) -> Spec | None:
    """Ranks, or groups of them, over time. begin_us: of the run."""
    if heat is None or sum(len(row.ranks) for row in heat.rows) < 2:
        return None
    labels = [row.label for row in heat.rows]
    values = [[_shorten(value) for value in row] for row in heat.values.tolist()]
    return {
        "type": "heat", "rows": labels, "values": values,
        "unit": unit, "from": (heat.begin_us - begin_us) / 1e6, "width": heat.width_us / 1e6,
        "left": min(250, max(74, 20 + 7 * max(map(len, labels)))),
    }  # fmt: skip


def _shorten(value: float) -> float:
    """Three digits: there are thousands of such numbers on a page."""
    return float(f"{value:.3g}") if value else 0


def plot_device(device: pl.DataFrame) -> Spec | None:
    """What was read in each phase: from a device, and from memory. `device`: a row per phase."""
    rows = []
    for row in device.iter_rows(named=True):
        parts = [["from a device", 0.0, row["device_read_bytes"] / 1e6]]
        parts.append(["from memory", parts[0][2], row["cache_read_bytes"] / 1e6])
        if parts := [part for part in parts if part[2] > 0]:
            rows.append({"label": row["phase"], "parts": parts})
    colors = {"from a device": "#332288", "from memory": "#9ecae1"}
    used = [name for name in colors if any(part[0] == name for row in rows for part in row["parts"])]
    return {
        "type": "rows", "rows": rows, "colors": {name: colors[name] for name in used}, "unit": "MB",
        "dark": ["from a device"], "left": 110, "gantt": False,
    } if rows else None  # fmt: skip


def plot_request_sizes(sizes: pl.DataFrame) -> Spec | None:
    return _make_histogram(sizes, "count", "requests", True)


def plot_request_bytes(sizes: pl.DataFrame) -> Spec | None:
    return _make_histogram(sizes.with_columns(pl.col("bytes") / 1e6), "bytes", "MB", False)


def _make_histogram(sizes: pl.DataFrame, column: str, unit: str, log: bool) -> Spec | None:
    """Columns by size of request. sizes: rows with op, bucket (log2 of bytes, -1 for none) and `column`,
    which is added up. log: a logarithmic axis.
    """
    table = sizes.group_by("op", "bucket").agg(pl.col(column).sum())
    if not len(table):
        return None
    buckets = list(range(table["bucket"].to_numpy().min(), table["bucket"].to_numpy().max() + 1))
    series = []
    for op, color in (("read", READ), ("write", WRITE)):
        found = dict(table.filter(pl.col("op") == op).select("bucket", column).iter_rows())
        if found:
            series.append({"name": op, "color": color, "y": [found.get(b, 0) for b in buckets]})
    labels = ["0" if b < 0 else format_size(2**b) for b in buckets]
    return {
        "type": "columns",
        "labels": labels,
        "series": series,
        "yunit": unit,
        "xunit": "size of a request, from this up to twice it",
        "log": log,
    }


def plot_latency(latencies: pl.DataFrame) -> Spec | None:
    """How long operations took: read, write, and all the others, by powers of two of microseconds."""
    if not len(latencies):
        return None
    op, us = pl.col("op"), pl.col("us")
    octave = pl.when(us < 1).then(-1).otherwise(us.clip(1).log(2).floor()).cast(pl.Int64)
    table = add_latency_us(latencies).with_columns(
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
    labels = ["<1 us" if o < 0 else format_seconds(2.0**o / 1e6) for o in octaves]
    return {
        "type": "columns",
        "labels": labels,
        "series": series,
        "yunit": "operations",
        "xunit": "time of one operation, from this up to twice it",
        "log": True,
    }
