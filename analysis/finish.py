"""All analyses at the end of a job, from one reading of the traces.

Both Perfetto traces, the check of bytes, and the report. One that fails does not keep the others from their
results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from analysis.perfetto import convert
from analysis.report import report
from analysis.tables import check
from analysis.trace.source import Progress, SharedReading, TraceSource


@dataclass(frozen=True)
class Analysis:
    """One of the commands that `finish` runs."""

    command: str  # what does the same alone
    run: Callable[[str, TraceSource], Any]


ANALYSES = (
    Analysis("perfetto", lambda run_dir, source: convert.convert_to_pftrace(run_dir, source=source)),
    Analysis(
        "perfetto --posix",
        lambda run_dir, source: convert.convert_to_pftrace(run_dir, posix=True, source=source),
    ),
    Analysis("check", lambda run_dir, source: check.check_run(run_dir, source)),
    Analysis("report", lambda run_dir, source: report.write_report(run_dir, source=source)),
)


@dataclass
class AnalysisOutcome:
    """What one analysis gave, or why it gave nothing."""

    command: str
    result: Any = None
    error: BaseException | None = None


def run_analyses(run_dir: str, progress: Progress | None = None) -> list[AnalysisOutcome]:
    reading = SharedReading(run_dir)
    sharers = [reading.add(a.command, lambda source, a=a: a.run(run_dir, source)) for a in ANALYSES]
    reading.run(progress)
    return [AnalysisOutcome(sharer.name, sharer.result, sharer.error) for sharer in sharers]
