"""RUN -> report.html, summary.json, tables/*.csv."""

import json
import re
from html import escape
from pathlib import Path

from analysis import settings, summary
from analysis.facts import Facts, Finding
from analysis.findings import findings
from analysis.page import Entry, Figures, entry_html, number, page, prose, seconds, tiles_html
from analysis.run import Run, open_run
from analysis.sections import entries
from analysis.tables.gather import Map, on_threads
from common.errors import UserError


def findings_html(found: list[Finding]) -> str:
    if not found:
        return "<p>No rule found anything: I/O and waiting are a small part of this run.</p>"
    items = []
    for f in found:
        won = f"up to {seconds(f.seconds)}" if f.seconds else ""
        kind = "" if f.seconds else " class=note"
        remedy = re.sub(r"(--\w+)", r"<code>\1</code>", prose(f.remedy))
        items.append(f"<li{kind}><b class=won>{won}</b>{prose(f.text)} <span class=do>{remedy}</span></li>")
    return f"<ol class=findings>{''.join(items)}</ol>"


def header_html(run: Run, facts: Facts) -> str:
    hosts = sorted({p.host for p in run.joined.processes if p.host})
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    told = [f"{number(facts.breakdown.height, 'rank')} on {where}"]
    if name := settings.model(run.config):
        told.insert(0, name)
    if tables := settings.tables(run.plan):
        told.append(f"tables: {tables}")
    known = {called: settings.option(run.config, called) for called in settings.OPTIONS}
    told += [f"{called} {known[called]}" for called in ("embedding dimension", "batch size of a rank")
             if known[called]]  # fmt: skip
    if known["device"]:
        told.append(str(known["device"]))
    told.append(f"{run.joined.events:,} events, {run.joined.calls:,} of them file calls")
    return f"<h1>{escape(run.name)}</h1><p class=soft>{escape(', '.join(told))}</p>"


def html(run: Run, facts: Facts, found: list[Finding], things: list[Entry]) -> str:
    figures, sections = Figures(), list(dict.fromkeys(e.section for e in things))
    names = ("Findings", *sections, "Notes")
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in names)
    body = [
        header_html(run, facts),
        f"<nav>{links}</nav>",
        tiles_html((name, told) for name, _, told, _ in summary.headline(run, facts)),
        '<h2 id="findings">Findings</h2><p class=soft>By the time there is to win, at best. '
        "What is hidden behind compute does not count.</p>",
        findings_html(found),
    ]
    for section in sections:
        body.append(f'<h2 id="{anchor(section)}">{escape(section)}</h2>')
        body += [entry_html(e, figures) for e in things if e.section == section and e.has_something]
    notes = "".join(f"<li>{prose(note)}</li>" for note in run.notes) or "<li>The traces are complete.</li>"
    body.append(f'<h2 id="notes">Notes</h2><ul>{notes}</ul>')
    return page(f"{run.name}: I/O report", body, figures)


def anchor(section: str) -> str:
    return "".join(c for c in section.lower() if c.isalnum())


def write(path: str | Path, over: Map = on_threads) -> tuple[Path, str]:
    """All files of the report, beside the run; the page's path and the terminal's text."""
    run = open_run(path, over)
    facts = Facts(run.joined, run.config)
    found, things = findings(facts), entries(run, facts)
    told = json.dumps(summary.summary(run, facts, found), indent=1)
    try:
        tables = run.home / "tables"
        tables.mkdir(exist_ok=True)
        for entry in things:
            if entry.name and entry.table is not None:
                entry.table.write_csv(tables / f"{entry.name}.csv")
        replace(run.home / "summary.json", told + "\n")
        replace(run.home / "report.html", html(run, facts, found, things))
    except OSError as error:
        raise UserError(
            f"{error.filename or run.home}: {error.strerror}; the report is written there"
        ) from error
    return run.home / "report.html", summary.text(run, facts, found)


def terminal(path: str | Path, over: Map = on_threads) -> str:
    """The numbers and findings as text; writes nothing."""
    run = open_run(path, over)
    facts = Facts(run.joined, run.config)
    return summary.text(run, facts, findings(facts))


def replace(path: Path, text: str) -> None:
    """All or nothing: who reads while we write sees the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
