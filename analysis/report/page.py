"""One HTML file that opens offline: text, tables and figure specifications; page.js draws the figures."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from analysis.perfetto.links import LinkedRun, make_link
from common.words import format_number

HERE = Path(__file__).parent
MANY_COLUMNS = 14  # of a table that a window of 1280 pixels would else cut
Spec = dict[str, Any]
# columns that hold bytes
SIZES = (
    "bytes", "size", "mean_bytes", "moved", "asked", "reach", "bytes_from", "bytes_read", "bytes_written",
)  # fmt: skip


@dataclass
class ReportEntry:
    """One thing in the report: what it answers, the table, and the figure that is a view of it."""

    section: str
    title: str
    table: pl.DataFrame | None
    plot: Spec | None
    caption: str
    name: str = ""  # of the CSV file; none is written without a name
    show: bool = False  # the table open on the page, not only the figure
    rows: int = 60
    jump: str = ""  # the column with the duration: each row is a slice to be shown in Perfetto
    fold: str = ""  # where the table is folded though there is no figure: what to click on
    run: LinkedRun | None = None  # whose slices those are
    shown: pl.DataFrame | None = None  # what the page shows of a table that has too many ranks for it

    @property
    def has_something(self) -> bool:
        return self.plot is not None or (self.table is not None and len(self.table) > 0)


def format_size(n: float | None) -> str:
    """Bytes in the largest unit of 1000 that leaves a number of at least 1."""
    if n is None:
        return ""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError


def to_prose(text: str) -> str:
    """Sentences as HTML: text between backticks is a name from the trace or a command."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def format_seconds(s: float | None) -> str:
    """Seconds in the unit that a reader would choose, from us to minutes."""
    if s is None:
        return ""
    if abs(s) >= 120:
        return f"{s / 60:.1f} min"
    if abs(s) >= 1:
        return f"{s:.2f} s"
    return f"{s * 1e3:.3g} ms" if abs(s) >= 1e-3 else f"{s * 1e6:.3g} us"


def format_cell(name: str, value: Any) -> str:
    """One value with its unit, which its column's name ends in."""
    if value is None:
        return ""
    if name in SIZES or name.endswith("_bytes"):
        return format_size(value)
    if name.endswith("_share"):
        return f"{value:.1%}"
    if name.endswith("_s") and not name.endswith("MB_per_s") or name == "seconds":
        return format_seconds(value)
    if name.endswith("_us") or name in ("us", "dur"):
        return format_seconds(value / 1e6)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, int) and name not in ("pid", "tid", "ts", "rank", "step", "epoch", "batch"):
        return f"{value:,}"
    return str(value)


def format_heading(name: str) -> str:
    """The cells carry their own units, so the heading needs none."""
    known = name.removesuffix("_us") if name.endswith("_us") else name
    known = name.removesuffix("_s") if name.endswith("_s") and not name.endswith("MB_per_s") else known
    return {"us": "time", "dur": "time"}.get(known, known).replace("_", " ")


def render_table(
    table: pl.DataFrame, rows: int = 60, jump: str = "", label: str = "", run: LinkedRun | None = None,
    of: int = 0,
) -> str:  # fmt: skip
    """The first `rows` rows as HTML.

    jump: the column with the duration of a slice; each row then has a link that shows it in Perfetto.
    label: what a screen reader calls the table. of: how many rows the file in tables/ has, if more than here.
    """
    numeric = [dtype.is_numeric() for dtype in table.dtypes]
    heads = "".join(
        f"<th scope=col{' class=n' if n else ''}><button>{escape(format_heading(name))}</button></th>"
        for name, n in zip(table.columns, numeric, strict=True)
    )
    heads += "<th scope=col>in Perfetto</th>" if jump else ""
    body = []
    for row in table.head(rows).iter_rows():
        cells = []
        for name, value, number in zip(table.columns, row, numeric, strict=True):
            text = escape(format_cell(name, value))
            if number:
                cells.append(f'<td class=n data-v="{"" if value is None else value}">{text}</td>')
            elif name == "file":  # the end of a path says more than its beginning
                cells.append(f'<td class=path title="{text}"><bdi>{text}</bdi></td>')
            else:
                cells.append(f"<td>{text}</td>")
        if jump:
            ts, dur = (int(row[table.columns.index(name)]) for name in ("ts", jump))
            href = escape(make_link(ts, dur, run))
            cells.append(f'<td><a href="{href}" target="perfetto">show</a></td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    of, shown = max(of, len(table)), min(rows, len(table))
    more = f"<p class=soft>{shown} of {of:,} rows; all are in tables/.</p>" if of > shown else ""
    kind = " dense" if table.width > MANY_COLUMNS else ""
    return wrap_table(heads, "".join(body), label, kind) + more


def wrap_table(heads: str, body: str, label: str, kind: str = "") -> str:
    """Cells as a table that scrolls where it is too wide or too long.

    kind: " whole" for one that is never too long, " dense" for one with many columns.
    """
    return (
        f'<div class="scroll{kind}" role=region tabindex=0 aria-label="{escape(label)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Figures:
    """Numbers the figures of a page and keeps their specifications for its end."""

    def __init__(self) -> None:
        self.specs: list[Spec] = []

    def add_figure(self, spec: Spec, caption: str, title: str = "") -> str:
        """title: what a screen reader says first; then comes what the figure shows, in words."""
        named = f"{title or caption.split('.')[0] or 'Figure'}: {describe_figure(spec)}"
        self.specs.append(spec | {"label": named})
        return f'<figure data-spec="f{len(self.specs)}"><figcaption>{to_prose(caption)}</figcaption></figure>'

    def render_scripts(self) -> str:
        data = [json.dumps(round_values(spec), separators=(",", ":")) for spec in self.specs]
        # no text may end the script, nor begin a comment or a script in it: no < at all, nor > and &
        data = [text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026") for text in data]
        return "".join(
            f'<script type="application/json" id="f{n}">{text}</script>\n' for n, text in enumerate(data, 1)
        )


def describe_figure(spec: Spec) -> str:
    """What a figure shows, for those who cannot see it."""
    kind = spec["type"]
    if kind == "rows":
        sums: dict[str, float] = {}
        for row in spec["rows"]:
            for name, _, length in row["parts"]:
                sums[name] = sums.get(name, 0.0) + length
        longest = sorted(sums, key=lambda name: -sums[name])[:8]
        amounts = ", ".join(f"{name} {format_seconds(sums[name])}" for name in longest)
        return f"bars, {format_number(len(spec['rows']), 'row')}; in all {amounts}."
    if kind == "time":
        return "; ".join(_describe_panel(panel) for panel in spec["panels"]) + "."
    if kind == "columns":
        tops = []
        for series in spec["series"]:
            top = max(range(len(series["y"])), key=series["y"].__getitem__)
            tops.append(f"{series['name']} most at {spec['labels'][top]}: {series['y'][top]:,.4g}")
        unit = spec.get("yunit", "")
        return f"columns, {unit + ', ' if unit else ''}{'; '.join(tops)}."
    highest = max((value for row in spec["values"] for value in row), default=0)
    return f"a row per rank over time, {len(spec['rows'])} rows, at most {highest:.4g} {spec['unit']}."


def _describe_panel(panel: Spec) -> str:
    if panel["kind"] == "stack":
        return f"{panel['label']} over time: {', '.join(series['name'] for series in panel['series'])}"
    texts = []
    for series in panel["series"]:
        if known := [y for y in series["y"] if y is not None]:
            texts.append(f"{series['name']} from {min(known):.4g} to {max(known):.4g}")
    return f"{panel['label']} over time: {', '.join(texts)}"


def round_values(value: Any) -> Any:
    """Six digits are more than a screen can show; values that are not numbers are left out."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: round_values(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [round_values(v) for v in value]
    return value


def render_entry(entry: ReportEntry, figures: Figures) -> str:
    """Title, figure and table of an entry; a table beside a figure is folded."""
    parts = [f"<h3>{escape(entry.title)}</h3>"]
    if entry.plot is not None:
        parts.append(figures.add_figure(entry.plot, entry.caption, entry.title))
    elif entry.caption:
        parts.append(f"<p class=soft>{to_prose(entry.caption)}</p>")
    if entry.table is not None and len(entry.table):
        text = render_table(
            entry.table if entry.shown is None else entry.shown,
            entry.rows, entry.jump, entry.title, entry.run, len(entry.table),
        )  # fmt: skip
        fold = entry.fold or ("the numbers" if entry.plot is not None and not entry.show else "")
        parts.append(f"<details><summary>{escape(fold)}</summary>{text}</details>" if fold else text)
    return f"<section>{''.join(parts)}</section>"


def render_tiles(groups: Mapping[str, Iterable[tuple[str, str]]]) -> str:
    """Numbers in groups side by side, each with its name: (name, value)."""
    made = []
    for title, tiles in groups.items():
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
        if rows:
            made.append(f"<section class=group><h3>{escape(title)}</h3><dl>{rows}</dl></section>")
    return f"<div class=tiles>{''.join(made)}</div>"


def _make_policy(script: str) -> str:
    """The page runs this script and no other, and loads nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def make_page(title: str, body: Sequence[str], figures: Figures) -> str:
    """A whole HTML page without references to anything outside of it."""
    script = (HERE / "page.js").read_text()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        f'<meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_make_policy(script)}">'
        f"<style>{(HERE / 'page.css').read_text()}</style></head>"
        f'<body><main>{"".join(body)}</main><div id="tip"></div>{figures.render_scripts()}'
        f"<script>{script}</script></body></html>\n"
    )
