"""A run in Python: `run = analysis.load("results/NAME")`, then `run.steps`, `run.calls`, ...

In: a run folder, or any folder of DFTracer files. Out: polars frames. Nothing is read before it is asked
for: `settings`, `metrics` and `results` read JSON files; the other tables share one reading of the traces;
`calls` and `spans`, which have a row for each event, read them again, and need about 200 bytes of memory an
event. docs/python.md lists the columns and their units. The commands are built on the same tables.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from analysis.report.facts import Facts, Finding
from analysis.report.findings import find_all
from analysis.report.run import TracedRun, open_run
from analysis.run_folder import records, run_settings
from analysis.run_folder.outputs import find_output_folder
from analysis.tables import answers, progress
from analysis.tables.read import read_rank
from analysis.trace.launches import plan_launches
from analysis.trace.source import FileSource
from common.errors import UserError, printable

CALLS = ("launch", "rank", "pid", "tid", "cat", "name", "op", "ts", "dur", "file", "offset", "size", "failed")
SPANS = (
    "launch", "rank", "pid", "tid", "cat", "name", "kind", "ts", "dur", "file", "bytes", "epoch", "step",
    "batch", "value", "split",
)  # fmt: skip
METRICS = {
    "step": pl.Int64, "epoch": pl.Int64, "split": pl.String, "time": pl.Float64, "loss": pl.Float64,
    "samples_per_second": pl.Float64,
}  # fmt: skip
FINDING = {"rule": pl.String, "severity": pl.String, "seconds": pl.Float64, "text": pl.String}


class LoadedRun:
    """The tables of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{printable(path)}: no such folder; give the folder of a run")
        self.notes: list[str] = []  # what is damaged in its JSON files

    def __repr__(self) -> str:
        return f"<run {printable(self.path)}>"

    # --- the small files

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json: all options as resolved; empty where another program made the traces."""
        return records.read_config(find_output_folder(self.path) / "config.json", self.notes)

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json; empty while the run is going, or if it did not reach its end."""
        return records.read_results(find_output_folder(self.path) / "results.json", self.notes)

    @cached_property
    def settings(self) -> pl.DataFrame:
        """A row per setting, what matters most first: name, value."""
        plan = records.read_plan(find_output_folder(self.path) / "plan.json", self.notes)
        found = run_settings.list_settings(self.config, plan)
        return pl.DataFrame(
            {"name": [*found], "value": [*found.values()]}, schema={"name": pl.String, "value": pl.String}
        )

    @cached_property
    def metrics(self) -> pl.DataFrame:
        """metrics.jsonl: a row per report of the training (split is null) and per evaluation. The columns of
        METRICS are always there.
        """
        found = records.read_metrics(find_output_folder(self.path) / "metrics.jsonl", self.notes)
        return pl.concat([pl.DataFrame(schema=METRICS), found], how="diagonal")

    # --- the traces, read once

    @cached_property
    def traced(self) -> TracedRun:
        """The joined tables that the report is made from."""
        return open_run(self.path)

    @cached_property
    def facts(self) -> Facts:
        """What the rules look at."""
        return Facts(self.traced.joined, self.traced.config, self.traced.metrics)

    @cached_property
    def steps(self) -> pl.DataFrame:
        """A row per training step of each rank."""
        steps = self.traced.joined["steps"].sort("launch", "ts", "rank")
        return steps.select("launch", "rank", pl.exclude("launch", "rank"))

    @cached_property
    def ranks(self) -> pl.DataFrame:
        """A row per rank: where its wall time went, in seconds."""
        return self.facts.breakdown.rename({name: f"{name}_s" for name in ("wall", *answers.PARTS)})

    @cached_property
    def files(self) -> pl.DataFrame:
        """A row per file and operation, start-up left out: the largest first."""
        return answers.sum_files(self.traced.joined).sort("bytes", "file", descending=[True, False])

    @cached_property
    def phases(self) -> pl.DataFrame:
        """A row per rank and phase: its seconds, by kind."""
        return self.facts.phases

    @cached_property
    def checkpoints(self) -> pl.DataFrame:
        """A row per span of saving or loading a checkpoint."""
        return progress.list_checkpoints(self.traced.joined)

    @cached_property
    def timeline(self) -> pl.DataFrame:
        """A row per stretch of time: shares of the ranks' time by kind, and MB/s of all ranks."""
        return progress.make_timeline(self.traced.joined)

    @cached_property
    def findings(self) -> pl.DataFrame:
        """A row per finding, by the seconds that could be saved."""
        found: list[Finding] = find_all(self.facts)
        rows = [(f.rule, f.severity, f.seconds, f"{f.text} {f.remedy}".rstrip()) for f in found]
        return pl.DataFrame(rows, schema=FINDING, orient="row")

    # --- a row for each event

    @cached_property
    def calls(self) -> pl.DataFrame:
        """A row per intercepted file call, by launch, rank and time."""
        return self._events[0]

    @cached_property
    def spans(self) -> pl.DataFrame:
        """A row per span of the program and per counter: everything in the trace that is not a file call."""
        return self._events[1]

    @cached_property
    def _events(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        calls, spans = [], []
        for job in plan_launches(FileSource(self.path)):
            events = read_rank(job.rank, job.files, job.clock)
            place = pl.lit(job.launch, pl.Int32).alias("launch"), pl.lit(job.rank, pl.Int32).alias("rank")
            calls.append(events.calls.with_columns(*place).select(CALLS).sort("ts"))
            spans.append(events.spans.with_columns(*place).select(SPANS).sort("ts"))
        return pl.concat(calls), pl.concat(spans)
