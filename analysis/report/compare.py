"""Two runs side by side: what changed, by how much, and each one's figures and findings."""

from html import escape
from pathlib import Path

from analysis.report import plots, plots_io, summary
from analysis.report.facts import Facts, Finding
from analysis.report.findings import find_all
from analysis.report.page import Figures, format_number, make_page
from analysis.report.report import render_findings, render_header
from analysis.report.run import TracedRun, open_run
from analysis.run_folder import outputs, run_settings
from analysis.tables import answers, progress
from analysis.tables.gather import Map, map_on_threads
from common.errors import os_errors_as_user_errors, printable

PAGE = "compare.html"
Side = tuple[TracedRun, Facts, list[Finding]]
NOISE = 0.02  # a change smaller than this has no colour
LENGTHS = ("wall_seconds", "training_seconds")  # shorter is better only where as much was done


def open_side(path: str | Path, over: Map) -> Side:
    run = open_run(path, over)
    facts = Facts(run.joined, run.config, run.metrics)
    return run, facts, find_all(facts)


def name_runs(one: Side, two: Side) -> tuple[str, str]:
    """Folders of the same name are named by their paths."""
    a, b = one[0], two[0]
    return (a.name, b.name) if a.name != b.name else (printable(a.path), printable(b.path))


def compare_rows(one: Side, two: Side) -> list[tuple[str, str, str, str, str]]:
    """Label, value of A, value of B, change, verdict: better, worse or nothing."""
    a = {each.key: each for each in summary.list_headlines(one[0], one[1])}
    b = {each.key: each for each in summary.list_headlines(two[0], two[1])}
    unfair: tuple[str, ...] = tuple(a) if are_different_models(one, two) else ()
    if one[0].results.get("samples") != two[0].results.get("samples"):
        unfair = unfair or LENGTHS
    found = []
    for key in dict.fromkeys([*a, *b]):
        old, new = a.get(key), b.get(key)
        if old is None or new is None:
            label = (old or new).label  # pyright: ignore[reportOptionalMemberAccess]
            found.append((label, old.text if old else "-", new.text if new else "-", "", ""))
            continue
        change, verdict = "", ""
        if old.value:
            part = new.value / old.value - 1
            change = f"{part:+.1%}" if abs(part) < 10 else f"x {new.value / old.value:.3g}"
            if abs(part) >= NOISE and old.better and key not in unfair:
                verdict = "better" if part * old.better > 0 else "worse"
        found.append((old.label, old.text, new.text, change, verdict))
    return found


def are_different_models(one: Side, two: Side) -> bool:
    """Whether these are runs of different models."""
    a, b = run_settings.find_model_title(one[0].config), run_settings.find_model_title(two[0].config)
    return bool(a and b and a != b)


def list_differences(one: Side, two: Side) -> tuple[str, list[tuple[str, str, str]]]:
    """What a reader must know before the numbers: a sentence, and the settings that differ."""
    a, b = one[0], two[0]
    unlike = list(run_settings.differing_settings((a.config, a.plan), (b.config, b.plan)))
    if lacking := [name for name, run in zip(name_runs(one, two), (a, b), strict=True) if not run.config]:
        return f"{' and '.join(lacking)}: no config.json, so it is not known which settings differ.", []
    if are_different_models(one, two):
        sentence = (
            f"These are different models, {run_settings.find_model_title(a.config)} and "
            f"{run_settings.find_model_title(b.config)}: times and bytes are shown side by side, "
            "but none is better or worse than the other's."
        )
    elif unlike:
        sentence = f"The runs differ in {format_number(len(unlike), 'setting')}:"
    else:
        sentence = "The settings are the same."
    return sentence, unlike


def format_text(one: Side, two: Side) -> str:
    """The same for the terminal: what differs, the numbers, the findings of both runs."""
    a, b = (name[-22:] for name in name_runs(one, two))
    sentence, unlike = list_differences(one, two)
    lines = [sentence, *(f"  {name}: {x} -> {y}" for name, x, y in unlike), ""]
    lines += [f"{'':<32}{a:>24}{b:>24}{'change':>12}"]
    lines += [f"{n:<32}{x:>24}{y:>24}{c:>12}  {v}" for n, x, y, c, v in compare_rows(one, two)]
    for run, _, found in (one, two):
        lines += ["", f"{run.name}:"] + [f"  {finding.text}" for finding in found or []]
        lines += [] if found else ["  no findings"]
    return "\n".join(lines)


def _make_panel(side: Side, figures: Figures) -> list[str]:
    """One run's figures and findings as pieces of HTML; both runs have as many pieces."""
    run, facts, found = side
    j = run.joined
    curves, sizes = progress.make_curves(j, run.metrics), answers.count_request_sizes(j, "phase")
    steps = progress.list_steps(j)
    shown = [
        ("Where each rank's time went", plots.plot_time_by_rank(facts.breakdown), "Seconds of wall clock."),
        ("How much I/O is hidden", plots.plot_hidden_io(facts.phases), "Seconds."),
        (
            "Over the run",
            plots.plot_over_time(progress.make_timeline(j), curves, progress.find_gaps(j)),
            "Drag to zoom.",
        ),
        ("Time of each step", plots.plot_step_times(steps, run.begin_us), "On the slowest rank."),
        ("Distribution of steps", plots.plot_step_histogram(steps), ""),
        ("Request sizes", plots_io.plot_request_sizes(sizes), "All phases."),
        ("Time of an operation", plots_io.plot_latency(j["latencies"]), "All phases."),
        ("Start-up", plots.plot_startup(progress.list_startup(j)), "To the end of the first step."),
    ]
    blocks = [render_header(run, facts) + render_findings(found)]
    for title, spec, caption in shown:
        blocks.append(f"<h3>{escape(title)}</h3>{figures.add_figure(spec, caption)}" if spec else "")
    return blocks


def render_comparison(one: Side, two: Side) -> str:
    """The page: what differs, the numbers, then both runs side by side."""
    figures = Figures()
    sides = "".join(f"<th>{escape(name)}</th>" for name in name_runs(one, two))
    heads = "<th></th>" + "".join(
        f"<th class=n>{escape(name)}</th>" for name in (*name_runs(one, two), "change")
    )
    body = "".join(
        f"<tr><td>{escape(n)}</td><td class=n>{escape(x)}</td><td class=n>{escape(y)}</td>"
        f'<td class="n {verdict}">{escape(change)} {verdict}</td></tr>'
        for n, x, y, change, verdict in compare_rows(one, two)
    )
    sentence, unlike = list_differences(one, two)
    options = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(x)}</td><td>{escape(y)}</td></tr>" for k, x, y in unlike
    )
    parts = [
        f"<h1>{escape(one[0].name)} and {escape(two[0].name)}</h1>",
        f"<p>{escape(sentence)}</p>",
        _table_html(f"<th>setting</th>{sides}", options) if options else "",
        _table_html(heads, body),
    ]
    for left, right in zip(_make_panel(one, figures), _make_panel(two, figures), strict=True):
        parts.append(f"<div class=pair><div>{left}</div><div>{right}</div></div>")
    return make_page(f"{one[0].name} and {two[0].name}", parts, figures)


def _table_html(heads: str, body: str) -> str:
    return (
        f'<div class="scroll whole"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def write_comparison(
    a: str | Path, b: str | Path, output: Path | None = None, over: Map = map_on_threads
) -> tuple[Path, str]:
    """Writes compare.html into the second run's folder, or the page as the file `output`. Returns its path
    and the terminal's text.
    """
    home = outputs.output_folder(b)
    if output is None and Path(b).exists():
        outputs.check_folder(home, {PAGE: is_own_page}, "name another file with -o")
    one, two = open_side(a, over), open_side(b, over)
    made = outputs.seal_page(render_comparison(one, two), "compare")
    if output is not None:
        with outputs.named_file(output, is_own_page) as partial, os_errors_as_user_errors(output):
            partial.write_bytes(made)
        return output, format_text(one, two)
    with outputs.results_in(home) as results:
        results.write(PAGE, made, is_own_page)
    return home / PAGE, format_text(one, two)


def is_own_page(path: Path) -> bool:
    return outputs.is_own_page(path, "compare") or outputs.is_earlier_page(path)
