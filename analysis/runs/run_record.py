"""One run in a row: what it was, how far it came, and its numbers, from the small files of its folder alone.

In: RUN with config.json, plan.json, metrics.jsonl, results.json, summary.json, log.txt, as far as they are
there. Out: a RunRecord. The traces are not read: a row costs milliseconds, whatever the run's length.
"""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.run_folder import records, run_settings
from common.errors import UserError, printable
from common.inputs import open_regular
from common.lock import find_lock_owner

TAIL_BYTES = 64 << 10  # of log.txt and metrics.jsonl, which holds more than a hundred lines
ENDED = re.compile(r"training ended with exit code ([0-9]{1,3})\b")
STOPPED = 75  # exit code of a run that saved a checkpoint because it was asked to stop
TRAINING = ("train", "run")
# config.json's names of what columns of the list show
SHOWN = {"model", "ranks", "batch size of a rank", "learning rate", "data", "run.seed"}
LABELS = {"batch": "batch size of a rank", "rate": "learning rate", "ranks": "ranks"}


@dataclass
class RunRecord:
    """A run. Numbers that its folder does not have are None."""

    folder: Path
    state: str
    started: float | None  # seconds since 1970
    model: str
    ranks: int | None
    batch: int | None  # of a rank
    rate: float | None
    step: int | None
    samples_per_second: float | None
    wait_share: float | None  # of training, from 0 to 1
    io_not_hidden_seconds: float | None  # of training, a rank on average
    score: float | None
    score_name: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # by the names used in reports

    @property
    def name(self) -> str:
        return printable(self.folder.name)


def is_run_folder(folder: Path) -> bool:
    """Whether a program wrote its options, or traces, there."""
    if not folder.is_dir():
        return False
    if (folder / "config.json").is_file():
        return True
    for place in (folder, folder / "trace"):
        if place.is_dir() and any(name.endswith((".pfw", ".pfw.gz")) for name in os.listdir(place)):
            return True
    return False


def read_run(folder: Path) -> RunRecord:
    notes: list[str] = []
    config = records.read_config(folder / "config.json", notes)
    plan = records.read_plan(folder / "plan.json", notes)
    results = records.read_results(folder / "results.json", notes)
    summary = records.read_summary(folder / "summary.json", notes)
    last = read_last_metrics(folder / "metrics.jsonl")
    name, score = find_score(results, last)
    measured = summary.get("metrics", {})
    steps = [row for row in last if "split" not in row]
    speed = results.get("samples_per_second") or (steps[-1].get("samples_per_second") if steps else None)
    numbers = {label: run_settings.read_option(config, option) for label, option in LABELS.items()}
    return RunRecord(
        folder=folder,
        state=find_state(folder, bool(results), bool(last)),
        started=_find_start(folder),
        model=run_settings.find_model_title(config),
        ranks=_whole(numbers["ranks"]),
        batch=_whole(numbers["batch"]),
        rate=_number(numbers["rate"]),
        step=_whole(results.get("steps")) or (steps[-1].get("step") if steps else None),
        samples_per_second=_number(speed),
        wait_share=_number(measured.get("wait_share")),
        io_not_hidden_seconds=_find_not_hidden(summary),
        score=score,
        score_name=name,
        config=config,
        settings=run_settings.list_settings(config, plan),
    )


def find_state(folder: Path, has_results: bool, has_metrics: bool) -> str:
    """running, done, stopped, failed (CODE), ended early, or not started: in this order of evidence.

    A run that holds the folder's lock is running, on whichever node. One without results that does not hold
    it has ended; log.txt says how, unless it was killed together with its script.
    """
    if find_lock_owner(folder):
        return "running"
    if has_results:
        return "done"
    codes = ENDED.findall(_read_tail(folder / "log.txt"))
    if codes:
        return "stopped" if int(codes[-1]) == STOPPED else f"failed ({codes[-1]})"
    return "ended early" if has_metrics else "not started" if (folder / "config.json").is_file() else "traces"


def read_last_metrics(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl, the newest at the end."""
    return list(records.parse_metrics_lines(_read_tail(path).splitlines()[-200:]))


def find_score(results: dict[str, Any], last: list[dict[str, Any]]) -> tuple[str, float | None]:
    """(name, value) of what the model is judged by: of the test, else of the newest evaluation."""
    evaluations = results.get("evaluations") or {}
    rows = [evaluations[split] for split in ("test", "val") if split in evaluations]
    rows += [row for row in reversed(last) if "split" in row]
    for row in rows:
        for name in ("auroc", "NDCG@10"):
            if (value := _number(row.get(name))) is not None:
                return name, value
    return "", None


def _find_start(folder: Path) -> float | None:
    """When the folder was made: of its files env.txt, or else config.json, is written first."""
    for name in ("env.txt", "config.json"):
        try:
            return os.lstat(folder / name).st_mtime
        except OSError:
            continue
    return None


def _find_not_hidden(summary: dict[str, Any]) -> float | None:
    """Seconds of I/O in training that nothing hides, a rank's on average; earlier reports list ranks."""
    known = _number(summary.get("metrics", {}).get("io_not_hidden_seconds"))
    return known if known is not None else _sum_phases(summary.get("phases_s", []), "io_not_hidden_s")


def _sum_phases(phases: Any, column: str) -> float | None:
    """Seconds of training, of a rank on average."""
    if not isinstance(phases, list):
        return None
    rows = [row for row in phases if isinstance(row, dict) and row.get("phase") in TRAINING]
    values = [value for row in rows if (value := _number(row.get(column))) is not None]
    ranks = {row.get("rank") for row in rows if isinstance(row.get("rank"), int)}
    return sum(values) / len(ranks) if values and ranks else None


def _read_tail(path: Path) -> str:
    """The last whole lines of a plain file, as far as TAIL_BYTES reach."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except (UserError, OSError):
        return ""
    if size > TAIL_BYTES:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


def _number(value: Any) -> float | None:
    return float(value) if records.is_number(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if records.is_number(value) and abs(value) < 1 << 62 else None


def list_differences(runs: Iterable[RunRecord]) -> dict[Path, dict[str, str]]:
    """For each run the settings that are not the same in all runs and have no column of their own."""
    runs = list(runs)
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(value)
    known = [run for run in runs if run.settings]
    differing = [
        name for name, found in values.items()
        if name not in SHOWN and (len(found) > 1 or any(name not in run.settings for run in known))
    ]  # fmt: skip
    return {
        run.folder: {name: run.settings[name] for name in differing if name in run.settings} for run in runs
    }


def describe_age(seconds: float) -> str:
    """12 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def describe_start(started: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else ""
