"""RUN -> report.html, summary.json, tables/*.csv."""

import io
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import polars as pl

from analysis.perfetto.links import LinkedRun, make_link
from analysis.report import plots, summary
from analysis.report.about import list_about
from analysis.report.answer import Answer, find_answer
from analysis.report.facts import Facts, Finding
from analysis.report.findings import WORTH_SAYING, find_all, list_rules
from analysis.report.page import (
    Figures,
    ReportEntry,
    format_seconds,
    make_page,
    render_entry,
    render_tiles,
    to_prose,
)
from analysis.report.run import TracedRun, open_run
from analysis.report.sections import list_entries
from analysis.run_folder import outputs, run_settings
from analysis.tables.cores import Map, map_on_threads
from analysis.trace.selection import WHOLE, Selection
from analysis.trace.source import TraceSource
from common.errors import os_errors_as_user_errors
from common.words import format_number

PAGE, SUMMARY = "report.html", "summary.json"
REMEDY = "name another place with -o: a file for the page, or a folder for all files"


def render_findings(found: list[Finding], run: LinkedRun) -> str:
    """The findings as a numbered list; options in a remedy are set as code."""
    if not found:
        return "<p>No rule found anything: I/O and waiting are a small part of this run.</p>"
    items = []
    for f in found:
        won = f"up to {format_seconds(f.seconds)}" if f.seconds else ""
        kind = "" if f.seconds else " class=note"
        remedy = re.sub(r"(--\w+)", r"<code>\1</code>", to_prose(f.remedy))
        items.append(
            f"<li{kind}><b class=won>{won}</b>{to_prose(f.text)} <span class=do>{remedy}</span>"
            f"{render_place(f, run)}</li>"
        )
    return f"<ol class=findings>{''.join(items)}</ol>"


def render_place(finding: Finding, run: LinkedRun) -> str:
    """A link that shows in Perfetto what the finding is about; nothing where it names no slice."""
    if "ts" not in finding.evidence:
        return ""
    href = make_link(int(finding.evidence["ts"]), int(finding.evidence["dur_us"]), run)
    return f' <a href="{escape(href)}" target="perfetto">show</a>'


def render_rules(found: list[Finding]) -> str:
    """All rules that were looked at, folded: what made no finding is an answer too."""
    items = []
    for rule in list_rules(found):
        others = "" if rule["others"] == "-" else f" <span class=soft>{escape(rule['others'])}</span>"
        said = "<b>found</b>" if rule["found"] else "not found"
        items.append(f"<li><code>{rule['rule']}</code> {said}: {escape(rule['condition'])}.{others}</li>")
    return (
        f"<details><summary>All {len(items)} rules that were looked at</summary>"
        f"<p class=soft>{escape(WORTH_SAYING)}</p><ul>{''.join(items)}</ul></details>"
    )


def render_header(run: TracedRun, facts: Facts) -> str:
    """The heading, and a line that says what was run where."""
    hosts = sorted({p.host for p in run.joined.processes if p.host})
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    parts = [f"{format_number(facts.breakdown.height, 'rank')} on {where}"]
    if name := run_settings.find_model_title(run.config):
        parts.insert(0, name)
    if tables := run_settings.list_tables(run.plan):
        parts.append(f"tables: {tables}")
    known = {called: run_settings.read_option(run.config, called) for called in run_settings.OPTIONS}
    for called in ("embedding dimension", "batch size of a rank"):
        if known[called]:
            parts.append(f"{called} {run_settings.format_setting(known[called])}")
    if known["device"]:
        parts.append(run_settings.format_setting(known["device"]))
    parts.append(f"{run.joined.events:,} events, {run.joined.calls:,} of them file calls")
    return f"<h1>{escape(run.name)}</h1><p class=soft>{escape(', '.join(parts))}</p>"


def render_answer(answer: Answer, figures: Figures) -> str:
    """The sentence that most readers come for, and the time that it is about as one bar."""
    bar = plots.plot_answer(answer)
    title = "Where the time of a rank went, and what storage could save at most"
    figure = figures.add_figure(bar, "", title) if bar else ""
    return f'<section class=answer aria-label="Answer"><p>{to_prose(answer.text)}</p>{figure}</section>'


def render_about(run: TracedRun, facts: Facts) -> str:
    """Command, date, versions and dataset, for someone who did not make the run."""
    rows = []
    for name, value in list_about(run, facts):
        text = f"<code>{escape(value)}</code>" if name in ("command", "folder") else escape(value)
        rows.append(f"<dt>{escape(name)}</dt><dd>{text}</dd>")
    return f"<dl class=about>{''.join(rows)}</dl>"


def render_html(run: TracedRun, facts: Facts, found: list[Finding], entries: list[ReportEntry]) -> str:
    """The page: answer, findings, numbers, what was run, one section after the other, notes."""
    entries = [entry for entry in entries if entry.has_something]
    figures, sections = Figures(), list(dict.fromkeys(e.section for e in entries))
    names = ("Findings", "Numbers", "The run", *sections, "Notes")
    links = "".join(f'<a href="#{make_anchor(name)}">{escape(name)}</a>' for name in names)
    groups = summary.group_headlines(run, facts)
    body = [
        render_header(run, facts),
        render_answer(find_answer(facts), figures),
        f"<nav aria-label=Sections>{links}</nav>",
        '<h2 id="findings">Findings</h2><p class=soft>By the time there is to win, at best. '
        "What is hidden behind compute does not count.</p>",
        render_findings(found, run.linked),
        render_rules(found),
        f'<h2 id="numbers">Numbers</h2>{render_tiles(groups)}',
        f'<h2 id="therun">The run</h2>{render_about(run, facts)}',
    ]
    for section in sections:
        body.append(f'<h2 id="{make_anchor(section)}">{escape(section)}</h2>')
        body += [render_entry(e, figures) for e in entries if e.section == section]
    notes = "".join(f"<li>{to_prose(note)}</li>" for note in run.notes) or "<li>The traces are complete.</li>"
    body.append(f'<h2 id="notes">Notes</h2><ul>{notes}</ul>')
    return make_page(f"{run.name}: I/O report", body, figures)


def make_anchor(section: str) -> str:
    return "".join(c for c in section.lower() if c.isalnum())


def write_report(
    path: str | Path,
    output: Path | None = None,
    over: Map = map_on_threads,
    source: TraceSource | None = None,
    parquet: bool = False,
    selection: Selection = WHOLE,
    kineto: Sequence[Path] = (),
) -> tuple[Path, str]:
    """All files of the report, beside the run or in the folder `output`; or only the page, as a file of that
    name. Returns the page's path and the terminal's text.

    parquet: whether each table is written as Parquet too, beside the CSV file. selection: the part
    that is read; without `output` only the page is written, under a name that says which. kineto: profiles of
    torch.profiler besides the run's own.
    """
    if output is None and not selection.is_whole:
        output = outputs.find_output_folder(path) / f"report{selection.name_part()}.html"
    folder = outputs.find_output_folder(path) if output is None else output if output.is_dir() else None
    if folder is not None and Path(path).exists():
        early = {PAGE: is_own_page, SUMMARY: outputs.is_own_summary, "tables/breakdown.csv": lambda _: True}
        outputs.check_folder(folder, early, REMEDY)
    run = open_run(path, over, source, selection=selection, kineto=kineto)
    facts = Facts(run.joined, run.config, run.metrics)
    found, entries = find_all(facts), list_entries(run, facts)
    text = summary.format_text(run, facts, found)
    made = outputs.seal_page(render_html(run, facts, found, entries), "report")
    if folder is None:
        assert output is not None
        with outputs.named_file(output, is_own_page) as partial, os_errors_as_user_errors(output):
            partial.write_bytes(made)
        return output, text
    ours = is_own_page(folder / PAGE) or outputs.is_own_summary(folder / SUMMARY)
    numbers = json.dumps(summary.make_summary(run, facts, found), indent=1) + "\n"
    with outputs.results_in(folder, complete="tables/") as results:
        for entry in entries:
            if entry.name and entry.table is not None:
                data = encode_csv(summary.with_earlier_names(entry.table))
                header = outputs.has_header(_list_headers(data))
                results.write(f"tables/{entry.name}.csv", data, header if ours else lambda _: False)
                if parquet:
                    name = f"tables/{entry.name}.parquet"
                    results.write(name, encode_parquet(entry.table), lambda _: False)
        results.write(SUMMARY, numbers.encode(), outputs.is_own_summary)
        results.write(PAGE, made, is_own_page)
    return folder / PAGE, text


def is_own_page(path: Path) -> bool:
    return outputs.is_own_page(path, "report") or outputs.is_earlier_page(path)


def _list_headers(data: bytes) -> list[bytes]:
    """The first line of a table, as this version and as earlier ones wrote it."""
    header = data[: data.index(b"\n") + 1].decode()
    earlier = header
    for new, old in summary.EARLIER_COLUMNS.items():
        if new in header:
            earlier = earlier.replace("," + old, "").replace(new, old)
    return [header.encode(), earlier.encode()]


def encode_csv(table: pl.DataFrame) -> bytes:
    """Text that a spreadsheet would take for a formula begins with an apostrophe."""
    texts = [name for name, dtype in table.schema.items() if dtype == pl.String]
    formula = [pl.col(name).str.contains(r"^[=+\-@\t\r]") for name in texts]
    safe = [
        pl.when(is_formula).then(pl.lit("'") + pl.col(name)).otherwise(pl.col(name)).alias(name)
        for name, is_formula in zip(texts, formula, strict=True)
    ]
    return table.with_columns(safe).write_csv().encode()


def encode_parquet(table: pl.DataFrame) -> bytes:
    out = io.BytesIO()
    table.write_parquet(out)
    return out.getvalue()


def render_terminal(path: str | Path, over: Map = map_on_threads) -> str:
    """The numbers and findings as text; writes nothing."""
    run = open_run(path, over)
    facts = Facts(run.joined, run.config, run.metrics)
    return summary.format_text(run, facts, find_all(facts))
