"""The runs in a folder of results, a row each: what was run, how it went, and what makes it differ.

In: RESULTS, conditions and an order. Out: text for the terminal, CSV, or JSON.
"""

import csv
import io
import json
import operator
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from analysis.report.page import format_seconds
from analysis.run_folder import run_settings
from analysis.runs.run_record import RunRecord, describe_start, is_run_folder, list_differences, read_run
from common.errors import UserError, os_errors_as_user_errors, printable, quote_for_shell
from common.words import format_number

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt,
    "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"([^<>=!]+)(>=|<=|!=|=|>|<)(.*)", re.S)
NARROWEST = 60  # columns of a terminal for which lines are cut
LEFT_ALIGNED = ("run", "state", "started", "model", "score", "differs")


def find_runs(results: Path) -> list[Path]:
    """The run folders in a folder, oldest name first; or the folder itself, where it is a run."""
    if not results.is_dir():
        raise UserError(f"{printable(results)}: no such folder; name the one that holds your runs")
    if is_run_folder(results):
        return [results]
    with os_errors_as_user_errors(results):
        names = sorted(os.listdir(results))
    return [results / name for name in names if is_run_folder(results / name)]


def list_runs(
    results: Path, conditions: Iterable[str], sort: str | None, reverse: bool = False
) -> list[RunRecord]:
    """The runs that fulfil all conditions (NAME=VALUE, NAME>=VALUE, ...), in the order of a column or an
    option. Runs without that value come last.
    """
    runs = [read_run(folder) for folder in find_runs(results)]
    if not runs:
        raise UserError(f"{printable(results)}: no runs in it; a run is a folder with config.json or traces")
    for condition in conditions:
        test = _parse_condition(condition, runs)
        runs = [run for run in runs if test(run)]
    if sort:
        _check_name(sort, runs, "--sort")
        valued = [run for run in runs if find_value(run, sort) is not None]
        rest = [run for run in runs if find_value(run, sort) is None]
        valued.sort(key=lambda run: _order(find_value(run, sort)), reverse=reverse)
        return valued + rest
    return runs[::-1] if reverse else runs


def find_value(run: RunRecord, name: str) -> Any:
    """The value of a column, or of a setting by the name that it has in reports or as an option."""
    row = describe_run(run)
    if name in row:
        return row[name]
    return run_settings.find_setting(run.config, name)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers before texts."""
    number = _as_number(value)
    return (1, 0.0, str(value)) if number is None else (0, number, "")


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _check_name(name: str, runs: list[RunRecord], option: str) -> None:
    if not runs or name in describe_run(runs[0]) or any(find_value(run, name) is not None for run in runs):
        return
    columns = ", ".join(describe_run(runs[0]))
    raise UserError(
        f"{option} {printable(name)}: no run has such a value; name an option, e.g. optimizer, or one of "
        f"{columns}"
    )


def _parse_condition(text: str, runs: list[RunRecord]) -> Callable[[RunRecord], bool]:
    """A condition of --where, e.g. "ranks>=4". runs: all of them; one at least must have such a value."""
    found = _CONDITION.fullmatch(text)
    if not found:
        raise UserError(
            f"--where {printable(text)}: give a name, a sign and a value, e.g. 'ranks>=4' or model=DLRM"
        )
    name, sign, wanted = found[1].strip(), found[2], found[3].strip()
    _check_name(name, runs, "--where")
    limit = _as_number(wanted)

    def fulfils(run: RunRecord) -> bool:
        value = find_value(run, name)
        number = _as_number(value)
        if number is not None and limit is not None:
            return OPERATORS[sign](number, limit)
        if sign in ("=", "!="):  # words in whatever case
            return OPERATORS[sign](str(value or "").lower(), wanted.lower())
        return False

    return fulfils


def describe_run(run: RunRecord) -> dict[str, Any]:
    """A row with plain values: the columns of CSV and JSON."""
    return {
        "run": run.name,
        "state": run.state,
        "started": describe_start(run.started),
        "model": run.model,
        "ranks": run.ranks,
        "batch": run.batch,
        "rate": run.rate,
        "step": run.step,
        "samples_per_second": run.samples_per_second,
        "wait_share": run.wait_share,
        "io_not_hidden_seconds": run.io_not_hidden_seconds,
        "score": run.score,
        "score_name": run.score_name,
    }


def format_json(runs: list[RunRecord]) -> str:
    differing = list_differences(runs)
    rows = [
        describe_run(run) | {"folder": printable(run.folder), "differs": differing[run.folder]}
        for run in runs
    ]
    return json.dumps(rows, indent=1)


def format_csv(runs: list[RunRecord]) -> str:
    differing = list_differences(runs)
    out = io.StringIO()
    rows = [describe_run(run) | {"differs": _join(differing[run.folder])} for run in runs]
    writer = csv.DictWriter(out, [*rows[0]] if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().removesuffix("\n")


def format_table(results: Path, runs: list[RunRecord]) -> str:
    """A line for each run, cut where it is wider than the terminal, and whole in a pipe or a file."""
    differing = list_differences(runs)
    rows = [_shorten(run, _join(differing[run.folder])) for run in runs]
    names = [*rows[0]] if rows else []
    shown = [name for name in names if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in shown}
    width = max(NARROWEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else sys.maxsize
    lines = []
    for row in [{name: name for name in shown}, *rows]:
        cells = [
            row[name].ljust(widths[name]) if name in LEFT_ALIGNED else row[name].rjust(widths[name])
            for name in shown
        ]  # fmt: skip
        line = "  ".join(cells).rstrip()
        lines.append(line if len(line) <= width else line[: width - 3] + "...")
    count = format_number(len(runs), "run")
    return "\n".join([*lines, "", f"{count} in {printable(results)}"])


def _shorten(run: RunRecord, differs: str) -> dict[str, str]:
    """A row of the terminal's table."""

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return {
        "run": run.name,
        "state": run.state,
        "started": describe_start(run.started),
        "model": run.model,
        "ranks": show(run.ranks, ","),
        "batch": show(run.batch, ","),
        "rate": show(run.rate, "g"),
        "steps": show(run.step, ","),
        "samples/s": show(run.samples_per_second, ",.0f"),
        "waiting": show(run.wait_share, ".1%"),
        "I/O not hidden": "" if (s := run.io_not_hidden_seconds) is None else format_seconds(s),
        "score": "" if run.score is None else f"{run.score_name} {run.score:.4f}",
        "differs": differs,
    }


def _join(settings: dict[str, str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in settings.items())


def refuse_results_folder(folder: Path) -> None:
    """For commands that take one run: a folder of runs is answered with their list."""
    if not folder.is_dir() or is_run_folder(folder):
        return
    runs = [read_run(each) for each in find_runs(folder)]
    if runs:
        print(format_table(folder, runs), flush=True)
        newest = max(runs, key=lambda run: run.started or 0.0)
        raise UserError(
            f"{printable(folder)}: holds {format_number(len(runs), 'run')}; name one of them, "
            f"e.g. {quote_for_shell(newest.folder)}"
        )
