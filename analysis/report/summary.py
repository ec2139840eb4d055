"""The run in numbers: summary.json, the tiles of the report, and the table in the terminal."""

from typing import Any

import polars as pl

from analysis.report.findings import Facts, Finding
from analysis.report.page import format_number, format_seconds, format_size
from analysis.report.run import TracedRun
from analysis.tables import answers, progress
from analysis.tables.answers import PARTS

Row = tuple[str, Any, str, int]  # name, value, as people read it, better: 1 more, -1 less, 0 neither


def _step_row(name: str, microseconds: Any) -> Row:
    seconds = float(microseconds or 0) / 1e6
    return name, seconds, format_seconds(seconds), -1


def list_headlines(run: TracedRun, facts: Facts) -> list[Row]:
    """The numbers that a run is judged by."""
    j, p = run.joined, facts.phases
    train = p.filter(pl.col("phase").is_in(["train", "run"]))
    train_s, stall = (
        facts.mean("wall_s", "train", "run"),
        facts.mean("wait_s", "train", "run") + facts.mean("io_s", "train", "run"),
    )
    io, bare = float(train["io_all_s"].sum()), float(train["io_bare_s"].sum())
    volume = answers.volume(j, "phase")
    rows: list[Row] = [("wall time", facts.wall(), format_seconds(facts.wall()), -1)]
    if facts.launches.height > 1:
        rows.append(("not running between launches", facts.pause(), format_seconds(facts.pause()), -1))
    if speed := run.results.get("samples_per_second"):
        rows.append(("samples per second", speed, f"{speed:,.0f}", 1))
    if (auroc := run.results.get("test_auroc")) is not None:
        rows.append(("test AUROC", auroc, f"{auroc:.5f}", 1))
    for split, told in _last(run.results.get("evaluations") or {}):
        names = sorted(name for name in told if name.startswith(progress.RANKINGS) and name.endswith("@10"))
        rows += [(f"{split} {name}", told[name], f"{told[name]:.5f}", 1) for name in names]
    if train_s:
        rows += [
            ("training", train_s, format_seconds(train_s), -1),
            ("waiting for data, of training", stall / train_s, f"{stall / train_s:.1%}", -1),
        ]
        comm = facts.mean("communication_s", "train", "run")
        rows.append(("communication, of training", comm / train_s, f"{comm / train_s:.1%}", -1))
    if io:
        rows.append(("I/O hidden while training", 1 - bare / io, f"{1 - bare / io:.1%}", 1))
    if len(j["steps"]):
        first = progress.startup(j).group_by("launch", "rank").agg(pl.col("seconds").sum())["seconds"].max()
        step = progress.steps(j)["wall_us"]
        rows += [
            ("first step ends after", first, format_seconds(first), -1),  # type: ignore[arg-type]
            _step_row("step, median", step.median()),
            _step_row("step, 99th percentile", step.quantile(0.99)),
        ]
    for op, verb in (("read", "read"), ("write", "written")):
        found = volume.filter(pl.col("op") == op)
        moved, calls = int(found["bytes"].sum()), int(found["count"].sum())
        rows += [(f"bytes {verb}", moved, format_size(moved), 0), (f"{op}s", calls, f"{calls:,}", 0)]
    return rows


def _last(evaluations: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The test, or where there was none the last validation."""
    return [(split, evaluations[split]) for split in ("test", "val") if evaluations.get(split)][:1]


def make_summary(run: TracedRun, facts: Facts, found: list[Finding]) -> dict[str, Any]:
    """All of it for programs: summary.json."""
    j = run.joined
    return {
        "run": run.name, "ranks": facts.breakdown.height, "hosts": sorted({p.host for p in j.processes}),
        "events": j.events, "calls": j.calls,
        "headline": {name: value for name, value, _, _ in list_headlines(run, facts)},
        "findings": [finding.as_dict() for finding in found],
        "notes": run.notes,
        "launches": facts.launches.to_dicts(),
        "breakdown_s": facts.breakdown.to_dicts(),
        "phases_s": facts.phases.to_dicts(),
        "io_by_phase": answers.volume(j, "phase").to_dicts(),
        "io_by_rank": answers.volume(j, "rank").to_dicts(),
        "operations": answers.operations(j).to_dicts(),
        "startup_s": progress.startup(j).to_dicts(),
        "checkpoints": progress.checkpoints(j).to_dicts(),
        "preprocessing": progress.preprocessing(j).to_dicts(),
    }  # fmt: skip


def format_text(run: TracedRun, facts: Facts, found: list[Finding]) -> str:
    """For the terminal, 100 columns."""
    lines = [
        f"{run.name}: {format_number(facts.breakdown.height, 'rank')}, "
        f"{format_number(run.joined.events, 'event')}",
        "",
    ]
    lines += [f"  {name:<32}{told:>14}" for name, _, told, _ in list_headlines(run, facts)]
    for row in facts.launches.iter_rows(named=True) if facts.launches.height > 1 else ():
        lines.append(
            f"  launch {row['launch']}: {format_number(row['ranks'], 'rank')}, "
            f"{format_seconds(row['wall_s'])} from {format_seconds(row['at_s'])} on, "
            f"{format_number(row['steps'], 'step')}"
            + (f"; {format_seconds(p)} not running before" if (p := row["not_running_before_s"]) else "")
        )
    used = [part for part in PARTS if facts.breakdown[part].sum() > 0]
    lines += ["", "  seconds      " + "".join(f"{part:>14}" for part in used)]
    for row in facts.breakdown.head(32).iter_rows(named=True):
        lines.append(f"  rank {row['rank']:<8}" + "".join(f"{row[part]:>14.3f}" for part in used))
    if facts.breakdown.height > 32:
        lines.append(f"  ... {facts.breakdown.height - 32} more ranks")
    lines += ["", "  Findings, by the time to be won:" if found else "  No findings."]
    for finding in found:
        seconds = format_seconds(finding.seconds) if finding.seconds else ""
        lines.append(f"  {seconds:>9}  {finding.text} {finding.remedy}")
    lines += [f"  note: {note}" for note in run.notes]
    return "\n".join(lines)
