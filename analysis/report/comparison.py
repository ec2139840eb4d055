"""What differs between several runs. In: their folders. Out: a Comparison, numbers by setting.

Runs whose settings are equal repeat each other. How far their numbers lie apart is the noise; only a change
beyond it is called better or worse. Where no setting was repeated the noise is not known, and nothing is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from analysis.report import summary
from analysis.report.facts import TRAIN, Facts, Finding
from analysis.report.findings import find_all
from analysis.report.page import format_seconds, format_size
from analysis.report.run import TracedRun, open_run
from analysis.run_folder import run_settings
from analysis.run_folder.outputs import find_output_folder
from analysis.tables.gather import Map
from analysis.workload.fidelity import Fidelity, compare_tables, find_original
from common.errors import UserError, printable

SEED = "run.seed"  # runs that differ in it alone repeat each other
LENGTHS = (  # shorter is better only where as much was done
    "wall_seconds", "training_seconds", "wait_seconds", "communication_seconds", "io_not_hidden_seconds",
)  # fmt: skip
OF_STEPS = ("step_median_seconds", "step_p99_seconds")  # only where a step has as many samples
OF_TRAINING = (
    ("wait_seconds", "waiting for data", ("wait_s", "io_s")),
    ("communication_seconds", "communication", ("communication_s",)),
    ("io_not_hidden_seconds", "I/O not hidden", ("io_not_hidden_s",)),
)
# Student's t, 97.5 %, by degrees of freedom from 1 on; beyond them that of 16, a little too large for more
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
_T_LIMIT = 2.12


@dataclass
class ComparedRun:
    """One run, its numbers by key, and its settings by name."""

    run: TracedRun
    facts: Facts
    findings: list[Finding]
    name: str
    settings: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)  # key -> what it is called
    values: dict[str, float] = field(default_factory=dict)
    better: dict[str, int] = field(default_factory=dict)  # 1: more is better, -1: less is

    def add(self, key: str, label: str, value: float, better: int) -> None:
        """Add a number. label: what it is called. better: 1 if more of it is better, -1 if less is, 0 if
        neither.
        """
        self.labels[key], self.values[key], self.better[key] = label, float(value), better

    @property
    def samples(self) -> float:
        return run_settings.to_number(self.run.results.get("samples"))

    @property
    def samples_of_step(self) -> float:
        batch, ranks = (
            run_settings.read_option(self.run.config, name) for name in ("batch size of a rank", "ranks")
        )
        return run_settings.to_number(batch) * max(1.0, run_settings.to_number(ranks))


@dataclass
class Setting:
    """Runs whose settings are equal, under a letter."""

    letter: str
    runs: list[ComparedRun]

    def list_values(self, key: str) -> list[float]:
        return [run.values[key] for run in self.runs if key in run.values]

    def list_repeats(self, key: str) -> list[float]:
        """Of a run and its copy, which have all numbers in common, only one tells about the noise."""
        found = {tuple(run.values.items()): run.values[key] for run in self.runs if key in run.values}
        return list(found.values())

    def mean(self, key: str) -> float | None:
        values = self.list_values(key)
        return sum(values) / len(values) if values else None


class Change(NamedTuple):
    """From the first setting to another: text, how much of it may be noise, and better, worse or nothing."""

    value: float | None
    text: str
    noise: float | None
    verdict: str

    @property
    def noise_text(self) -> str:
        return "" if self.noise is None else self.text and f"±{_format_amount(self.noise, self.text)}"


class Row(NamedTuple):
    """One number of all settings."""

    key: str
    label: str
    means: list[float | None]
    texts: list[str]
    changes: list[Change]  # of every setting but the first
    ranges: list[tuple[str, str]]  # of every setting: its runs' lowest and highest


@dataclass
class Comparison:
    settings: list[Setting]
    fidelities: list[Fidelity] = field(default_factory=list)  # of emulated and replayed runs

    @cached_property
    def runs(self) -> list[ComparedRun]:
        return [run for setting in self.settings for run in setting.runs]

    @cached_property
    def is_repeated(self) -> bool:
        return any(len(setting.list_repeats("wall_seconds")) > 1 for setting in self.settings)

    @cached_property
    def models(self) -> list[str]:
        found = [run_settings.find_model_title(run.run.config) for run in self.runs]
        return list(dict.fromkeys(filter(None, found)))

    @cached_property
    def differing(self) -> dict[str, list[str]]:
        """Settings that are not the same everywhere: name -> the value of each setting's first run."""
        firsts = [setting.runs[0] for setting in self.settings]
        if not all(first.run.config for first in firsts):  # `describe` says that they are unknown
            return {}
        own = [
            run_settings.run_settings(first.run.config, first.run.plan)
            if len(self.models) > 1 else first.settings
            for first in firsts
        ]  # fmt: skip
        names = dict.fromkeys(name for settings in own for name in settings)
        found = {name: [settings.get(name, "-") for settings in own] for name in names if name != SEED}
        return {name: values for name, values in found.items() if len(set(values)) > 1}

    def describe(self) -> str:
        """What a reader must know before the numbers."""
        if self.fidelities:
            return " ".join(
                f"{Path(each.copy).name} is a copy of {Path(each.original).name}: {each.describe()}."
                for each in self.fidelities
            )
        lacking = [run.name for run in self.runs if not run.run.config]
        if lacking:
            first = f"{' and '.join(lacking)}: no config.json, so it is not known which settings differ."
        elif len(self.models) > 1:
            names = " and ".join(self.models)
            first = (
                f"These are different models, {names}: times and bytes are shown side by side, but none is "
                "better or worse than the other's."
            )
        elif len(self.settings) == 1:
            first = f"{len(self.runs)} runs with the same settings: how far they lie apart is the noise."
        else:
            n = len(self.differing)
            first = f"The runs differ in {n} setting{'' if n == 1 else 's'}."
        if self.is_repeated and len(self.settings) > 1 and len(self.models) < 2:
            return (
                f"{first} The noise is that of repeated runs of one setting; a change is called better or "
                "worse where it is larger (95 %, Student's t)."
            )
        if self.is_repeated or len(self.models) > 1:
            return first
        return (
            f"{first} One run each: how much of a change is noise is not known, so nothing is called better "
            "or worse. To know it, repeat a run and compare all of them."
        )

    @cached_property
    def rows(self) -> list[Row]:
        keys = dict.fromkeys(key for run in self.runs for key in run.labels)
        return [self._compare(key) for key in keys]

    def _compare(self, key: str) -> Row:
        label = next(run.labels[key] for run in self.runs if key in run.labels)
        means = [setting.mean(key) for setting in self.settings]
        texts = ["-" if mean is None else format_value(key, mean) for mean in means]
        changes = [self._find_change(key, self.settings[0], other) for other in self.settings[1:]]
        values = [setting.list_values(key) for setting in self.settings]
        ranges = [(format_value(key, min(v)), format_value(key, max(v))) if v else ("-", "-") for v in values]
        return Row(key, label, means, texts, changes, ranges)

    def _find_change(self, key: str, first: Setting, other: Setting) -> Change:
        """How a number's mean changed from one setting to another, and whether that is more than the
        noise.
        """
        old, new = first.mean(key), other.mean(key)
        if old is None or new is None:
            return Change(None, "", None, "")
        scale = 1.0 if is_absolute(key) else abs(old)
        if not scale:
            return Change(None, "", None, "")
        value = (new - old) / scale
        noise = self._find_noise(key, len(first.list_repeats(key)), len(other.list_repeats(key)))
        better = next(run.better[key] for run in self.runs if key in run.better)
        fair = better and key not in self._unfair
        verdict = ""
        if fair and noise is not None and abs(value) > noise:
            verdict = "better" if value * better > 0 else "worse"
        return Change(value, format_change(key, value), noise if fair else None, verdict)

    @cached_property
    def _unfair(self) -> set[str]:
        """Numbers that cannot be better or worse between these runs."""
        if len(self.models) > 1:
            return {key for run in self.runs for key in run.labels}
        found = set[str]()
        if len({run.samples for run in self.runs}) > 1:
            found.update(LENGTHS)
        if len({run.samples_of_step for run in self.runs}) > 1:
            found.update(OF_STEPS)
        return found

    def _find_noise(self, key: str, n: int, m: int) -> float | None:
        """By how much means of n and of m runs may differ by chance, from the runs that repeat each other."""
        squares, freedom = 0.0, 0
        for setting in self.settings:
            values = setting.list_repeats(key)
            mean = sum(values) / max(1, len(values))
            if len(values) > 1 and mean:
                scale = 1.0 if is_absolute(key) else abs(mean)
                squares += sum(((value - mean) / scale) ** 2 for value in values)
                freedom += len(values) - 1
        if not freedom:
            return None
        t = _T[freedom - 1] if freedom <= len(_T) else _T_LIMIT
        return t * math.sqrt(squares / freedom) * math.sqrt(1 / n + 1 / m)

    def as_dict(self) -> dict[str, Any]:
        """For programs: compare.json."""
        return {
            "settings": [
                {
                    "letter": setting.letter,
                    "runs": [run.name for run in setting.runs],
                    "differs": {name: values[place] for name, values in self.differing.items()},
                }
                for place, setting in enumerate(self.settings)
            ],
            "says": self.describe(),
            "metrics": {
                row.key: {
                    "label": row.label,
                    "values": [setting.list_values(row.key) for setting in self.settings],
                    "mean": row.means,
                    "change": [change.value for change in row.changes],
                    "change_is": "difference" if is_absolute(row.key) else "ratio minus 1",
                    "noise": [change.noise for change in row.changes],
                    "verdict": [change.verdict for change in row.changes],
                }
                for row in self.rows
            },
            "findings": {run.name: [finding.as_dict() for finding in run.findings] for run in self.runs},
            **({"fidelity": [each.as_dict() for each in self.fidelities]} if self.fidelities else {}),
        }


def compare_runs(paths: Sequence[str | Path], over: Map) -> Comparison:
    copies = _find_copies(paths)
    detailed = {path for pair in copies for path in pair}
    runs = [_open_run(path, over, path in detailed) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = printable(run.run.path)
    _add_per_sample(runs)
    groups: dict[Any, list[ComparedRun]] = {}
    for number, run in enumerate(runs):
        settings = tuple((k, v) for k, v in run.settings.items() if k != SEED)
        groups.setdefault(settings if run.run.config else number, []).append(run)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    named = [letters[i] if i < len(letters) else f"S{i + 1}" for i in range(len(groups))]
    settings = [Setting(name, found) for name, found in zip(named, groups.values(), strict=True)]
    by_path = dict(zip(paths, runs, strict=True))
    fidelities = [
        compare_tables(original, copy, *(by_path[path].run.joined for path in (original, copy)))
        for original, copy in copies
    ]
    return Comparison(settings, fidelities)


def _find_copies(paths: Sequence[str | Path]) -> list[tuple[str | Path, str | Path]]:
    """(original, copy): each emulated or replayed run, where its original is one of these runs, too."""
    found = []
    for copy in paths:
        if original := find_original(find_output_folder(copy)):
            same = [path for path in paths if Path(path).resolve() == Path(original).resolve()]
            found += [(path, copy) for path in same[:1]]
    return found


def _open_run(path: str | Path, over: Map, with_requests: bool) -> ComparedRun:
    run = open_run(path, over, with_requests=with_requests)
    facts = Facts(run.joined, run.config, run.metrics)
    settings = run_settings.list_settings(run.config, run.plan)
    compared = ComparedRun(run, facts, find_all(facts), run.name, settings)
    for each in summary.list_headlines(run, facts):
        # a share has no verdict: it also grows where all the rest becomes faster
        compared.add(each.key, each.label, each.value, 0 if each.key.endswith("_share") else each.better)
        if each.key == "training_seconds":
            for key, label, columns in OF_TRAINING:
                compared.add(key, label, sum(facts.average_seconds(name, *TRAIN) for name in columns), -1)
    return compared


def _add_per_sample(runs: list[ComparedRun]) -> None:
    """Where a step or a training has not as many samples in all runs."""
    if len({run.samples_of_step for run in runs}) > 1 and all(run.samples_of_step for run in runs):
        for run in runs:
            if (step := run.values.get("step_median_seconds")) is not None:
                run.add("step_median_seconds_per_sample", "step, of a sample", step / run.samples_of_step, -1)
    if len({run.samples for run in runs}) > 1 and all(run.samples for run in runs):
        for run in runs:
            for key, label, better in (
                ("training_seconds", "training, of a sample", -1),
                ("wait_seconds", "waiting, of a sample", -1),
                ("dataset_read_bytes", "dataset read, of a sample", 0),
            ):
                if key in run.values:
                    run.add(f"{key}_per_sample", label, run.values[key] / run.samples, better)


def is_absolute(key: str) -> bool:
    """Whether a change is a difference (in points of shares and scores), not a ratio."""
    return key.endswith(("_share", "_auroc", "_at_10"))


def format_value(key: str, value: float) -> str:
    if key.endswith("_share"):
        return f"{value:.1%}"
    if key.endswith(("_auroc", "_at_10")):
        return f"{value:.5f}"
    if "_bytes" in key:
        return format_size(value)
    return format_seconds(value) if "_seconds" in key else f"{value:,.0f}"


def format_change(key: str, value: float) -> str:
    if key.endswith("_share"):
        return f"{100 * value:+.1f} points"
    if is_absolute(key):
        return f"{value:+.5f}"
    return f"{value:+.1%}" if abs(value) < 10 else f"x {value + 1:.3g}"


def _format_amount(value: float, like: str) -> str:
    if like.endswith("points"):
        return f"{100 * value:.1f} points"
    return f"{value:.1%}" if like.endswith("%") or like.startswith("x") else f"{value:.5f}"


# --- by one setting


class ScalingPoint(NamedTuple):
    """What one value of a setting gave, on average over its runs."""

    value: Any
    runs: int
    samples_per_second: float
    times: float  # as fast as the first value
    efficiency: float | None  # of a setting that is a number: `times` by how many times the first value it is
    step_seconds: float | None
    wait_share: float | None
    communication_share: float | None


def scale_over(comparison: Comparison, called: str) -> list[ScalingPoint]:
    """The runs by the value of one setting, in its order."""
    groups: dict[Any, list[ComparedRun]] = {}
    for run in comparison.runs:
        value = run_settings.find_setting(run.run.config, called)
        if value is None:
            raise UserError(f"--vs {called}: {run.name} has no such setting{_suggest(comparison)}")
        key = value if isinstance(value, int | float | str) else str(value)
        groups.setdefault(key, []).append(run)
    if len(groups) < 2:
        value = run_settings.format_setting(next(iter(groups)))
        raise UserError(f"--vs {called}: it is {value} in all of these runs{_suggest(comparison)}")
    slow = [run.name for run in comparison.runs if not run.values.get("samples_per_second")]
    if slow:
        raise UserError(f"--vs {called}: {slow[0]} has no samples per second in its results.json")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in groups)
    values = sorted(groups, key=(lambda value: value) if numbers else str)
    found: list[ScalingPoint] = []
    for value in values:
        of_value = Setting("", groups[value])
        speed = of_value.mean("samples_per_second") or 0.0
        times = speed / found[0].samples_per_second if found else 1.0
        ratio = value / values[0] if numbers and values[0] else 0
        shown = (of_value.mean(k) for k in ("step_median_seconds", "wait_share", "communication_share"))
        efficiency = times / ratio if ratio else None
        found.append(ScalingPoint(value, len(of_value.runs), speed, times, efficiency, *shown))
    return found


def _suggest(comparison: Comparison) -> str:
    names = ", ".join(list(comparison.differing)[:8])
    return f"; these differ: {names}" if names else "; give runs that differ in it"


def make_scaling_table(points: list[ScalingPoint], called: str) -> pl.DataFrame:
    """The same as a reader wants it: shares in percent."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.1%}"

    return pl.DataFrame(
        {
            called: [str(point.value) for point in points],
            "runs": [point.runs for point in points],
            "samples_per_second": [round(point.samples_per_second) for point in points],
            "times the first": [point.times for point in points],
            "of proportional": [percent(point.efficiency) for point in points],
            "step, median": [format_seconds(point.step_seconds) for point in points],
            "waiting for data": [percent(point.wait_share) for point in points],
            "communication": [percent(point.communication_share) for point in points],
        }
    )
