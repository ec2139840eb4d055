"""The run in numbers: summary.json, the tiles of the report, and the table in the terminal."""

import textwrap
from typing import Any, NamedTuple

import polars as pl

from analysis.report.answer import find_answer
from analysis.report.facts import TRAIN, Facts, Finding
from analysis.report.findings import list_rules
from analysis.report.many_ranks import (
    LISTED_NODES,
    LISTED_RANKS,
    MANY_RANKS,
    choose_ranks,
    group_file_systems,
    sum_nodes,
)
from analysis.report.page import format_seconds, format_size
from analysis.report.run import TracedRun
from analysis.tables import answers, device, progress
from analysis.tables.answers import PARTS
from analysis.tables.gather import JoinedTables
from analysis.tables.utilisation import TABLE, find_mean_utilisation
from analysis.trace.clocks import list_clocks, make_clocks
from common.words import format_number

# Until the next release: columns of tables, and labels in `headline`, which that release will not have.
EARLIER_COLUMNS = {"io_not_hidden_s": "io_bare_s", "io_not_hidden_us": "io_bare_us"}
EARLIER_LABELS = {
    "read_bytes": "bytes read", "write_bytes": "bytes written",
    "read_count": "reads", "write_count": "writes",
}  # fmt: skip

LEAST_IO_SECONDS = 0.01  # of which a share says something


class Headline(NamedTuple):
    """One of the numbers by which runs are compared."""

    key: str  # in summary.json
    label: str  # on pages and in the terminal
    value: Any
    text: str  # the value with its unit
    better: int  # 1: more is better, -1: less is, 0: neither


GROUPS = {  # on the page; what is in no group is about I/O
    "Speed": (
        "wall_seconds", "pause_seconds", "samples_per_second", "test_auroc", "training_seconds",
        "communication_share", "core_wait_share", "step_median_seconds", "step_p99_seconds",
    ),
    "I/O": (),
    "Start-up": ("first_step_seconds",),
}  # fmt: skip


def _make_seconds(key: str, label: str, seconds: Any) -> Headline:
    value = float(seconds or 0)
    return Headline(key, label, value, format_seconds(value), -1)


def list_headlines(run: TracedRun, facts: Facts) -> list[Headline]:
    """Times in seconds, shares from 0 to 1, amounts in bytes: docs/report.md lists the keys."""
    j, p = run.joined, facts.phases
    train = p.filter(pl.col("phase").is_in(["train", "run"]))
    train_s = facts.average_seconds("wall_s", "train", "run")
    stall_s = facts.average_seconds("wait_s", "train", "run") + facts.average_seconds("io_s", "train", "run")
    io, not_hidden = float(train["io_all_s"].sum()), float(train["io_not_hidden_s"].sum())
    rows = [_make_seconds("wall_seconds", "wall time", facts.find_wall_seconds())]
    if facts.launches.height > 1:
        rows.append(_make_seconds("pause_seconds", "not running between launches", facts.pause_seconds()))
    if speed := run.results.get("samples_per_second"):
        rows.append(Headline("samples_per_second", "samples per second", speed, f"{speed:,.0f}", 1))
    if (auroc := run.results.get("test_auroc")) is not None:
        rows.append(Headline("test_auroc", "test AUROC", auroc, f"{auroc:.5f}", 1))
    for split, scores in _find_last_scores(run.results.get("evaluations") or {}):
        for name in sorted(scores):
            if name.startswith(progress.RANKINGS) and name.endswith("@10"):
                key = f"{split}_{name.removesuffix('@10').lower()}_at_10"
                rows.append(Headline(key, f"{split} {name}", scores[name], f"{scores[name]:.5f}", 1))
    if train_s:
        of = "training" if len(j["steps"]) else "the run"
        wait, comm = (
            stall_s / train_s,
            facts.average_seconds("communication_s", "train", "run") / train_s,
        )
        rows += [
            _make_seconds("training_seconds", "training" if len(j["steps"]) else "the run", train_s),
            Headline("wait_share", f"waiting for data, of {of}", wait, f"{wait:.1%}", -1),
            Headline("communication_share", f"communication, of {of}", comm, f"{comm:.1%}", -1),
        ]
        if len(facts.core_waits):
            share = facts.core_waits["seconds"][0] / train_s
            label = f"waiting for a core, of {of}"
            rows.append(Headline("core_wait_share", label, share, f"{share:.1%}", -1))
    if run.dlio_utilisation is not None:
        rows += _list_dlio_headlines(run)
    if io >= LEAST_IO_SECONDS:
        hidden = 1 - not_hidden / io
        rows.append(Headline("hidden_io_share", "I/O hidden while training", hidden, f"{hidden:.1%}", 1))
    if len(j["steps"]):
        starts = progress.list_startup(j).group_by("launch", "rank").agg(pl.col("seconds").sum())
        if len(starts):
            rows.append(_make_seconds("first_step_seconds", "first step ends after", starts["seconds"].max()))
        step = progress.list_steps(j)["wall_us"].cast(pl.Float64) / 1e6
        rows += [
            _make_seconds("step_median_seconds", "step, median", step.median()),
            _make_seconds("step_p99_seconds", "step, 99th percentile", step.quantile(0.99)),
        ]
    volume = answers.sum_volume(j, "phase")
    if len(facts.dataset_files):
        of_files = answers.sum_volume(j, "file").filter(pl.col("op") == "read")
        moved = int(of_files.filter(pl.col("file").is_in(facts.dataset_files.implode()))["bytes"].sum())
        label = "bytes read, of the dataset"
        rows.append(Headline("dataset_read_bytes", label, moved, format_size(moved), 0))
    for op, label in (("read", "bytes read, all files"), ("write", "bytes written, all files")):
        found = volume.filter(pl.col("op") == op)
        moved, calls = int(found["bytes"].sum()), int(found["count"].sum())
        rows.append(Headline(f"{op}_bytes", label, moved, format_size(moved), 0))
        rows.append(Headline(f"{op}_count", f"{op}s, all files", calls, f"{calls:,}", 0))
    return rows + _list_device_headlines(j)


def _list_dlio_headlines(run: TracedRun) -> list[Headline]:
    """A run of DLIO or MLPerf Storage: what its summary.json says, and the same from the trace."""
    said, traced = run.dlio_utilisation, find_mean_utilisation(run.joined[TABLE])
    rows = [Headline("dlio_au", "accelerator utilisation, by DLIO", said, f"{said:.1%}", 1)]
    if traced is not None:
        rows.append(Headline("traced_au", "accelerator utilisation, traced", traced, f"{traced:.1%}", 1))
    return rows


def _list_device_headlines(j: JoinedTables) -> list[Headline]:
    """What came from a device, what from memory; nothing where no rank has the kernel's counters."""
    source = device.find_read_source(j)
    if source is None:
        return []
    sums = device.sum_device(j).row(0, named=True)
    written, faults = sums["device_write_bytes"], sums["major_faults"]
    rows = [
        Headline("device_read_bytes", "read from a device", source.device, format_size(source.device), 0),
        Headline("cache_read_bytes", "read from memory", source.cache, format_size(source.cache), 0),
        Headline("device_write_bytes", "written to a device", written, format_size(written), 0),
    ]
    if source.share is not None:
        label = "of bytes read, from a device"
        rows.insert(2, Headline("device_read_share", label, source.share, f"{source.share:.1%}", 0))
    if faults is not None:
        rows.append(Headline("major_faults", "page faults that waited", faults, f"{faults:,}", 0))
    return rows


def group_headlines(run: TracedRun, facts: Facts) -> dict[str, list[tuple[str, str]]]:
    """The same as (label, text) by what they are about; and of the start-up what only the page shows."""
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
    for each in list_headlines(run, facts):
        scored = each.key.endswith("_at_10")
        found = next((name for name, keys in GROUPS.items() if each.key in keys), "I/O")
        groups["Speed" if scored else found].append((each.label, each.text))
    startup, wall = facts.average_seconds("wall_s", "startup"), facts.average_seconds("wall_s")
    if startup and wall:
        volume = answers.sum_volume(run.joined, "phase")
        read = volume.filter((pl.col("phase") == "startup") & (pl.col("op") == "read"))
        parts = progress.list_startup(run.joined).filter(~pl.col("part").is_in(["between", "first step"]))
        groups["Start-up"].append(("start-up, of the run's time", f"{startup / wall:.1%}"))
        for row in parts.sort("seconds", descending=True).head(1).iter_rows(named=True):
            groups["Start-up"].append((f"longest part: {row['part']}", format_seconds(row["seconds"])))
        groups["Start-up"] += [
            ("file calls, of a rank", format_seconds(facts.average_seconds("io_s", "startup"))),
            ("bytes read, all ranks", format_size(int(read["bytes"].sum()))),
            ("reads, all ranks", f"{int(read['count'].sum()):,}"),
        ]
    return groups


def _find_last_scores(evaluations: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The test, or where there was none the last validation."""
    return [(split, evaluations[split]) for split in ("test", "val") if evaluations.get(split)][:1]


def with_earlier_names(table: pl.DataFrame) -> pl.DataFrame:
    """Until the next release renamed columns are there under their earlier names too, at the end."""
    return table.with_columns(
        pl.col(name).alias(earlier) for name, earlier in EARLIER_COLUMNS.items() if name in table.columns
    )


def make_summary(run: TracedRun, facts: Facts, found: list[Finding]) -> dict[str, Any]:
    """All of it for programs: summary.json. Of very many ranks and nodes only some are listed."""
    j, headlines = run.joined, list_headlines(run, facts)
    chosen = choose_ranks(facts)
    clocks = list_clocks(j.processes, make_clocks(j.processes))
    systems = device.list_file_systems(j)
    if chosen.ranks > LISTED_RANKS:
        clocks = sorted(clocks, key=lambda row: -abs(row["moved_us"]))[:LISTED_NODES]
        systems = group_file_systems(systems)

    def list_ranks(table: pl.DataFrame) -> list[dict[str, Any]]:
        return chosen.list_rows(table).to_dicts()

    return {
        # the first keys are those by which analysis/run_folder/outputs.py knows the file
        "run": run.name, "ranks": facts.breakdown.height, "hosts": sorted({p.host for p in j.processes}),
        "events": j.events, "calls": j.calls,
        "metrics": {each.key: each.value for each in headlines}
        | {"io_not_hidden_seconds": facts.average_over_ranks("io_not_hidden_s", *TRAIN)},
        "headline": {EARLIER_LABELS.get(each.key, each.label): each.value for each in headlines},
        "findings": [finding.as_dict() for finding in found],
        "rules": list_rules(found),
        "notes": run.notes,
        "answer": find_answer(facts).as_dict(),
        "clocks": clocks,
        "launches": facts.launches.to_dicts(),
        "ranks_listed": chosen.list_rows(facts.breakdown)["rank"].to_list(),
        "slowest_ranks": list(chosen.slowest), "typical_rank": chosen.typical,
        "nodes": sum_nodes(facts).head(LISTED_NODES).to_dicts(),
        "breakdown_s": list_ranks(facts.breakdown),
        "phases_s": list_ranks(with_earlier_names(facts.phases)),
        "io_by_phase": answers.sum_volume(j, "phase").to_dicts(),
        "io_by_rank": list_ranks(answers.sum_volume(j, "rank")),
        "device": list_ranks(device.sum_device(j, "rank", "phase")),
        "file_systems": systems.to_dicts(),
        "operations": answers.sum_operations(j).to_dicts(),
        "startup_s": list_ranks(progress.list_startup(j)),
        "checkpoints": list_ranks(progress.list_checkpoints(j)),
        "preprocessing": progress.sum_preprocessing(j).to_dicts(),
    }  # fmt: skip


def format_text(run: TracedRun, facts: Facts, found: list[Finding]) -> str:
    """For the terminal, 100 columns."""
    lines = [
        f"{run.name}: {format_number(facts.breakdown.height, 'rank')}, "
        f"{format_number(run.joined.events, 'event')}",
        "",
        *textwrap.wrap(find_answer(facts).text, 100),
        "",
    ]
    lines += [f"  {each.label:<32}{each.text:>14}" for each in list_headlines(run, facts)]
    for row in facts.launches.iter_rows(named=True) if facts.launches.height > 1 else ():
        lines.append(
            f"  launch {row['launch']}: {format_number(row['ranks'], 'rank')}, "
            f"{format_seconds(row['wall_s'])} from {format_seconds(row['at_s'])} on, "
            f"{format_number(row['steps'], 'step')}"
            + (f"; {format_seconds(p)} not running before" if (p := row["not_running_before_s"]) else "")
        )
    used = [part for part in PARTS if facts.breakdown[part].sum() > 0]
    lines += ["", "  seconds      " + "".join(f"{part:>14}" for part in used)]
    chosen = choose_ranks(facts)
    for row in chosen.show(facts.breakdown).iter_rows(named=True):
        lines.append(f"  rank {row['rank']:<8}" + "".join(f"{row[part]:>14.3f}" for part in used))
    if chosen.ranks > MANY_RANKS:
        means = facts.breakdown.select(used).mean().row(0)
        lines.append(f"  {'mean':<13}" + "".join(f"{mean:>14.3f}" for mean in means))
        lines += ["", *textwrap.wrap(chosen.describe().strip(), 100)]
    lines += ["", "  Findings, by the time that could be saved:" if found else "  No findings."]
    for finding in found:
        seconds = format_seconds(finding.seconds) if finding.seconds else ""
        lines.append(f"  {seconds:>9}  {finding.text} {finding.remedy}")
    lines += [f"  note: {note}" for note in run.notes]
    return "\n".join(lines)
