"""The JSON files beside the traces, with the types that the rest of the analysis relies on.

Each of them may be damaged, or may come from another program: values of another type are left out, and
`notes` says so. A missing file is not noted.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from common.errors import UserError, printable
from common.inputs import open_regular, read_json_object

MAX_BYTES = 16 << 20  # of config.json, plan.json, results.json
SECTIONS = ("data", "model", "run", "optim", "launch")
MAX_LINES, MAX_LINE_BYTES = 300_000, 64 << 10  # of metrics.jsonl
MAX_NAMES = 500  # different values in metrics.jsonl
LATEST = 1e11  # seconds since 1970; later times are damage
LARGEST = 1 << 62


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Sections are objects; a value in them is a number, a text, or a list."""
    config = _read_object(path, notes)
    wrong = [name for name in SECTIONS if name in config and not isinstance(config[name], dict)]
    for name in wrong:
        notes.append(f"{path.name}: {name} is not an object and was left out.")
        del config[name]
    return config


def read_plan(path: Path, notes: list[str]) -> dict[str, Any]:
    return _read_object(path, notes)


def read_results(path: Path, notes: list[str]) -> dict[str, Any]:
    """Numbers are numbers; `evaluations` are objects of numbers."""
    results = _read_object(path, notes, paths=True)
    for name in ("samples_per_second", "test_auroc"):
        if results.get(name) is not None and not is_number(results[name]):
            notes.append(f"{path.name}: {name} is not a number and was left out.")
            del results[name]
    evaluations = results.pop("evaluations", None)
    if isinstance(evaluations, dict):
        results["evaluations"] = {
            split: {name: value for name, value in scores.items() if is_number(value)}
            for split, scores in evaluations.items()
            if isinstance(scores, dict)
        }
    elif evaluations is not None:
        notes.append(f"{path.name}: evaluations is not an object and was left out.")
    return results


def read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    """What an earlier report left; `metrics` are numbers by name."""
    summary = _read_object(path, notes, paths=True)
    metrics = summary.get("metrics")
    summary["metrics"] = metrics if isinstance(metrics, dict) else {}
    return summary


def read_dlio_utilisation(path: Path, notes: list[str]) -> float | None:
    """The training's mean accelerator utilisation in DLIO's summary.json, from 0 to 1: %, or % by epoch. None
    where the file is another program's.
    """
    metric = _read_object(path, notes, paths=True).get("metric")
    if not isinstance(metric, dict):
        return None
    found = metric.get("train_au_mean_percentage", metric.get("train_au_percentage"))
    values: list[Any] = found if isinstance(found, list) else [found]
    if not values or not all(is_number(value) and 0 <= value <= 1000 for value in values):
        return None
    return sum(values) / len(values) / 100


def read_metrics(path: Path, notes: list[str]) -> pl.DataFrame:
    """metrics.jsonl as a table: the columns `split` are texts, all others numbers."""
    columns: dict[str, list[Any]] = {}
    count = 0
    for row in read_metrics_lines(path, notes):
        for name, value in row.items():
            column = columns.setdefault(name, [])
            column += [None] * (count - len(column))
            column.append(value)
        count += 1
    for column in columns.values():
        column += [None] * (count - len(column))
    types = {name: pl.String if name == "split" else pl.Float64 for name in columns}
    types |= {name: pl.Int64 for name in ("step", "epoch") if name in columns}
    return pl.DataFrame(columns, schema=types)


def read_metrics_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines' numbers and `split`; a killed run leaves half a last line."""
    if not os.path.lexists(path):
        return
    names: set[str] = set()
    bad = more = lines = 0
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                if lines == MAX_LINES:
                    notes.append(f"{path.name}: only the first {MAX_LINES:,} lines were read.")
                    break
                lines += 1
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    bad += 1
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    continue
                row = _parse_row(line)
                if row is None:
                    bad += 1
                    continue
                kept = {}
                for name, value in row.items():
                    if name in names or len(names) < MAX_NAMES:
                        names.add(name)
                        kept[name] = value
                    else:
                        more += 1
                yield kept
    except UserError as error:
        notes.append(_make_note(path, error))
    except OSError as error:
        notes.append(f"{printable(path)}: {error.strerror}; the rest was left out.")
    if bad:
        notes.append(f"{path.name}: {bad} lines could not be read.")
    if more:
        notes.append(f"{path.name}: has more than {MAX_NAMES} different values; the others were left out.")


def parse_metrics_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The same of some lines, without those that cannot be read."""
    for line in lines:
        if (row := _parse_row(line.encode(errors="replace"))) is not None:
            yield row


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """NaN is a value here: the loss of a run that went wrong."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    row: dict[str, Any] = {}
    for name, value in found.items():
        if name == "split":
            if isinstance(value, str):
                row[name] = printable(value)[:40]
        elif not isinstance(value, int | float) or isinstance(value, bool) or len(name) > 100:
            continue
        elif name in ("step", "epoch"):
            if isinstance(value, int) and abs(value) < LARGEST:
                row[name] = value
        elif name == "time":
            if 0 <= value <= LATEST:
                row[name] = float(value)
        elif isinstance(value, float) or abs(value) < LARGEST:
            row[printable(name)] = float(value)
    return row


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _read_object(path: Path, notes: list[str], paths: bool = False) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or with a note where it cannot be read.

    notes: where the note goes. paths: its texts may hold names of files in any encoding.
    """
    if not os.path.lexists(path):
        return {}
    try:
        return read_json_object(path, MAX_BYTES, paths=paths)
    except UserError as error:
        notes.append(_make_note(path, error))
        return {}


def _make_note(path: Path, error: UserError) -> str:
    """Within a report the name of the file will do."""
    return f"{path.name}{str(error).removeprefix(printable(path))}; it was left out."
