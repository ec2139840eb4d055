"""Several runs together, as text, page and JSON: what differs, by how much, and whether it is noise."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from analysis.report import plots_compare
from analysis.report.comparison import (
    Comparison,
    ScalingPoint,
    Setting,
    compare_runs,
    make_scaling_table,
    scale_over,
)
from analysis.report.page import Figures, make_page, render_table, wrap_table
from analysis.report.report import render_findings
from analysis.run_folder import outputs
from analysis.tables.cores import Map, map_on_threads
from analysis.workload.fidelity import Fidelity, describe_files
from common.errors import os_errors_as_user_errors

PAGE, NUMBERS = "compare.html", "compare.json"
WIDTH = 80  # columns of a terminal


# --- for the terminal


def format_text(comparison: Comparison, points: Sequence[ScalingPoint] = (), called: str = "") -> str:
    """All of it in lines of at most 80 columns."""
    lines = [
        *textwrap.wrap(comparison.describe(), WIDTH),
        *_format_settings(comparison),
        "",
        *_format_numbers(comparison),
    ]
    if points:
        lines += ["", *_format_scaling(points, called)]
    for fidelity in comparison.fidelities:
        lines += ["", *_format_fidelity(fidelity)]
    for label, run in plots_compare.label_runs(comparison):
        lines += ["", f"findings of {label}:"]
        for finding in run.findings:
            lines += _wrap(f"  {finding.text}")
        lines += [] if run.findings else ["  none"]
    return "\n".join(lines)


def _format_fidelity(fidelity: Fidelity) -> Iterator[str]:
    yield from _wrap(f"how faithful {Path(fidelity.copy).name} is: {fidelity.describe()}")
    for name, error in fidelity.errors.items():
        yield f"  {name:<27.27}{error:>11.2%}"
    for file, requests, size, copied, copied_size, missing, extra in describe_files(fidelity):
        if missing != "0" or extra != "0":
            yield from _wrap(
                f"  {file}: {requests} requests of {size} bytes, in the copy {copied} of {copied_size}; "
                f"{missing} missing, {extra} extra"
            )


def _format_settings(comparison: Comparison) -> Iterator[str]:
    for place, setting in enumerate(comparison.settings):
        yield from _wrap(f"  {setting.letter}: {_name_runs(setting)}")
        for name, values in comparison.differing.items():
            yield from _wrap(f"     {name}: {values[place]}")


def _wrap(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(text.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _name_runs(setting: Setting) -> str:
    return ", ".join(run.name for run in setting.runs)


def _format_numbers(comparison: Comparison) -> Iterator[str]:
    """Two settings with the change beside them; of more, the numbers, then what changed against A. Of one,
    how far its runs lie apart.
    """
    if len(comparison.settings) == 1:
        yield f"{'':<29}{'mean':>12}{'lowest':>12}{'highest':>12}"
        for row in comparison.rows:
            low, high = row.ranges[0]
            yield f"{row.label:<29.29}{row.texts[0]:>12}{low:>12}{high:>12}"
        return
    if len(comparison.settings) == 2:
        yield f"{'':<29}{'A':>11}{'B':>11}{'change':>14}" + ("  noise" if comparison.is_repeated else "")
        for row in comparison.rows:
            change = row.changes[0]
            noise = f"  {change.noise_text} {change.verdict}".rstrip()
            yield f"{row.label:<29.29}{row.texts[0]:>11}{row.texts[1]:>11}{change.text:>14}{noise}".rstrip()
        return
    for begin in range(0, len(comparison.settings), 4):
        places = range(begin, min(begin + 4, len(comparison.settings)))
        yield f"{'':<29}" + "".join(f"{comparison.settings[place].letter:>12}" for place in places)
        for row in comparison.rows:
            yield f"{row.label:<29.29}" + "".join(f"{row.texts[place]:>12}" for place in places)
        yield ""
    for place, setting in enumerate(comparison.settings[1:]):
        judged = [row for row in comparison.rows if row.changes[place].verdict]
        if judged:
            yield f"{setting.letter} against A, beyond the noise:"
        for row in judged:
            change = row.changes[place]
            yield f"  {row.label:<29.29}{change.text:>14}  {change.noise_text} {change.verdict}"


def _format_scaling(points: Sequence[ScalingPoint], called: str) -> Iterator[str]:
    yield f"{called:<20}{'runs':>6}{'samples/s':>13}{'times':>9}{'of proportional':>18}"
    for point in points:
        efficiency = "" if point.efficiency is None else f"{point.efficiency:.0%}"
        value = str(point.value)[:20]
        speed = f"{point.samples_per_second:,.0f}"
        yield f"{value:<20}{point.runs:>6}{speed:>13}{point.times:>9.2f}{efficiency:>18}".rstrip()


# --- the page


def render_comparison(comparison: Comparison, points: Sequence[ScalingPoint] = (), called: str = "") -> str:
    """The page: what differs, the numbers, all runs in common figures, and each one's findings."""
    figures, runs = Figures(), plots_compare.label_runs(comparison)
    title = _make_title(comparison)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(comparison.describe())}</p>"]
    parts += [_render_settings(comparison), _render_numbers(comparison)]
    if points:
        parts.append(f"<h2>By {escape(called)}</h2>")
        if spec := plots_compare.plot_scaling(points, called):
            parts.append(figures.add_figure(spec, "Mean of the runs of each value.", f"By {called}"))
        parts.append(render_table(make_scaling_table(list(points), called), label=f"By {called}"))
    for fidelity in comparison.fidelities:
        parts.append(_render_fidelity(fidelity))
    parts.append("<h2>All runs on one axis</h2>")
    for name, spec, caption in (
        (
            "Where the time went",
            plots_compare.plot_times(runs),
            "Seconds of wall clock, by what the main thread did.",
        ),
        (
            "How much I/O is hidden",
            plots_compare.plot_hidden_io(runs),
            "Of a rank while it trains, on average.",
        ),
        ("By step", plots_compare.plot_curves(runs, "step"), "Drag to zoom."),
        ("Over time", plots_compare.plot_curves(runs, "time"), "From each run's own begin. Drag to zoom."),
        ("Distribution of steps", plots_compare.plot_step_times(runs), "On the slowest rank."),
        ("Request sizes", plots_compare.plot_request_sizes(runs), "Reads, start-up left out."),
        ("Start-up", plots_compare.plot_startup(runs), "To the end of the first step, of the first rank."),
    ):
        if spec:
            parts.append(f"<h3>{escape(name)}</h3>{figures.add_figure(spec, caption, name)}")
    parts.append("<h2>Findings</h2>")
    for label, run in runs:
        findings = render_findings(run.findings, run.run.linked)
        parts.append(f"<h3>{escape(label)}: {escape(run.name)}</h3>{findings}")
    return make_page(title, parts, figures)


def _render_fidelity(fidelity: Fidelity) -> str:
    title = f"How faithful {Path(fidelity.copy).name} is"
    body = ""
    for name, error in fidelity.errors.items():
        texts = [f"{value:.4g}" for value in fidelity.values.get(name, ())] or ["", ""]
        values = "".join(f"<td class=n>{text}</td>" for text in texts)
        body += f"<tr><td>{escape(name)}</td>{values}<td class=n>{error:.2%}</td></tr>"
    heads = "".join(f"<th scope=col class=n>{each}</th>" for each in ("original", "copy", "error"))
    errors = wrap_table(f"<th scope=col>of</th>{heads}", body, title, " whole")
    columns = ("requests", "bytes", "of the copy", "bytes", "missing", "extra")
    heads = "".join(f"<th scope=col class=n>{each}</th>" for each in columns)
    rows = ""
    for file, *numbers in describe_files(fidelity):
        rows += f"<tr><td>{escape(file)}</td>{''.join(f'<td class=n>{each}</td>' for each in numbers)}</tr>"
    files = wrap_table(f"<th scope=col>file</th>{heads}", rows, "Requests by file", " whole")
    return f"<h2>{escape(title)}</h2><p>{escape(fidelity.describe())}</p>{errors}{files}"


def _make_title(comparison: Comparison) -> str:
    names = [run.name for run in comparison.runs]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) < 5 else f"{len(names)} runs compared"


def _render_settings(comparison: Comparison) -> str:
    rows = [("runs", [_name_runs(setting) for setting in comparison.settings])]
    rows += list(comparison.differing.items())
    heads = "".join(f"<th scope=col>{escape(setting.letter)}</th>" for setting in comparison.settings)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return wrap_table(f"<th scope=col>setting</th>{heads}", body, "Settings", " whole")


def _render_numbers(comparison: Comparison) -> str:
    repeats = len(comparison.settings) == 1
    names = ("mean", "lowest", "highest") if repeats else (comparison.settings[0].letter,)
    heads = "".join(f"<th scope=col class=n>{escape(name)}</th>" for name in names)
    for setting in comparison.settings[1:]:
        heads += f"<th scope=col class=n>{escape(setting.letter)}</th><th scope=col class=n>against A</th>"
        heads += "<th scope=col class=n>noise</th>" if comparison.is_repeated else ""
    body = []
    for row in comparison.rows:
        cells = f"<td>{escape(row.label)}</td><td class=n>{escape(row.texts[0])}</td>"
        cells += "".join(f"<td class=n>{escape(text)}</td>" for text in row.ranges[0]) if repeats else ""
        for text, change in zip(row.texts[1:], row.changes, strict=True):
            cells += f"<td class=n>{escape(text)}</td>"
            cells += f'<td class="n {change.verdict}">{escape(change.text)} {change.verdict}</td>'
            cells += f"<td class=n>{escape(change.noise_text)}</td>" if comparison.is_repeated else ""
        body.append(f"<tr>{cells}</tr>")
    return wrap_table(f"<td></td>{heads}", "".join(body), "Numbers", " whole")


# --- the command


def write_comparison(
    paths: Sequence[str | Path], output: Path | None = None, over: Map = map_on_threads, called: str = ""
) -> tuple[Path, str]:
    """Writes compare.html and compare.json into the last run's folder, or as the file `output` the page
    (the numbers, if its name ends in .json). called: a setting to draw the runs over. Returns the path of
    what was written and the terminal's text.
    """
    folder = outputs.find_output_folder(paths[-1])
    if output is None and Path(paths[-1]).exists():
        names = {PAGE: is_own_page, NUMBERS: outputs.is_own_comparison}
        outputs.check_folder(folder, names, "name another file with -o")
    comparison = compare_runs(paths, over)
    points = scale_over(comparison, called) if called else []
    page = outputs.seal_page(render_comparison(comparison, points, called), "compare")
    found = comparison.as_dict()
    if points:
        found["scaling"] = {"setting": called, "points": [point._asdict() for point in points]}
    numbers = (json.dumps(found, indent=1) + "\n").encode()
    text = format_text(comparison, points, called)
    if output is not None:
        as_json = output.suffix == ".json"
        is_own = outputs.is_own_comparison if as_json else is_own_page
        with outputs.named_file(output, is_own) as partial, os_errors_as_user_errors(output):
            partial.write_bytes(numbers if as_json else page)
        return output, text
    with outputs.results_in(folder) as results:
        results.write(NUMBERS, numbers, outputs.is_own_comparison)
        results.write(PAGE, page, is_own_page)
    return folder / PAGE, text


def is_own_page(path: Path) -> bool:
    return outputs.is_own_page(path, "compare") or outputs.is_earlier_page(path)
