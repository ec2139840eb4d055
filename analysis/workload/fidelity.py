"""How faithful a copy of a run is: an emulated or a replayed one beside its original.

In: two run folders with traces. Out: `Fidelity`: per file the requests that only one of them made, and how
far step times, waiting and bandwidth over time are apart. Compared are the files that hold the workload: the
dataset, checkpoints, tables in files; of a replay every file that it played. What a program reads of itself,
and the run folder's own logs, are not part of the workload.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.run_folder import records
from analysis.run_folder.run_settings import list_dataset_paths
from analysis.tables.gather import JoinedTables, gather_tables
from analysis.tables.read import RankEvents
from analysis.trace.classify import DATA_OPS
from analysis.trace.launches import Launch
from analysis.workload.steps import Workload, join_workload, measure_rank_workload
from common.inputs import read_json_object

REPLAY = "replay.json"  # of a replay: its entry "run" is the run folder that was replayed
PLAYED_FILES = "replayed_files.json"  # of a replay: path -> the original's path
REQUESTS = "copied_requests"  # the table's name
BINS = 50  # of the bandwidth over time
_CHECKPOINT = re.compile(r"/checkpoints/[^/]*/(rank\d+\.safetensors|checkpoint\.json)$")
_TABLE = re.compile(r"/store/(?:([^/]+\.rows)|\.([^/]+\.json)\.[0-9a-f]{16}\.partial)$")


@dataclass(frozen=True)
class FileDifference:
    """Requests of one file; `missing` and `extra`: those of the original, or the copy, alone."""

    file: str
    requests: int  # of the original
    bytes: int
    copied_requests: int
    copied_bytes: int
    missing: int
    extra: int


@dataclass
class Fidelity:
    """Errors are shares of the original's value; of what is a share itself, the difference of the two."""

    original: str
    copy: str
    files: list[FileDifference] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)  # what -> error
    values: dict[str, tuple[float, float]] = field(default_factory=dict)  # what -> original's, copy's
    note: str = ""  # what was not compared, and why

    @property
    def different_requests(self) -> int:
        return sum(each.missing + each.extra for each in self.files)

    @property
    def worst(self) -> tuple[str, float]:
        """What is furthest from the original, and how far."""
        return max(self.errors.items(), key=lambda each: each[1], default=("nothing", 0.0))

    def describe(self) -> str:
        """One sentence."""
        requests = sum(each.requests for each in self.files)
        count = self.different_requests
        what = f"all {requests:,} requests are the original's, to the byte"
        if count:
            what = f"requests that differ: {count:,}, of {requests:,}"
        name, error = self.worst
        return f"{what}; the largest error is {error:.1%}, of {name}{self.note and f' ({self.note})'}"

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "different_requests": self.different_requests,
            "worst": dict(zip(("name", "error"), self.worst, strict=True)),
        }


def find_original(run: Path) -> str | None:
    """The run folder that this run is a copy of, as its config.json or replay.json says; else None."""
    launch = records.read_config(run / "config.json", []).get("launch")
    value = launch.get("emulated") if isinstance(launch, dict) else None
    if value is None and (run / REPLAY).exists():
        value = read_json_object(run / REPLAY).get("run")
    return value if isinstance(value, str) else None


def compare_with_original(original: str | Path, copy: str | Path) -> Fidelity:
    """UserError where a folder has no traces."""
    joined = [gather_tables(run, more=measure_requests, details=True) for run in (original, copy)]
    return compare_tables(original, copy, *joined)


def measure_requests(job: Launch, events: RankEvents) -> dict[str, pl.DataFrame]:
    """The tables of one rank that a comparison needs. The events: with details."""
    calls = events.calls.filter(pl.col("op").is_in(DATA_OPS) & ~pl.col("failed"))
    calls = calls.with_columns(
        pl.col("op").cast(pl.String), pl.coalesce("path", pl.col("file").cast(pl.String)).alias("path")
    )
    requests = calls.select("path", "op", "position", "size", "ts")
    return measure_rank_workload(job, events) | {REQUESTS: requests}


def compare_tables(
    original: str | Path, copy: str | Path, of_original: JoinedTables, of_copy: JoinedTables
) -> Fidelity:
    """The two runs by their tables, with those that `measure_requests` makes."""
    played = _read_played_files(Path(copy))
    joined = of_original, of_copy
    first, second = (
        _name_requests(each[REQUESTS], Path(run), played)
        for each, run in zip(joined, (original, copy), strict=True)
    )
    if played:
        first = first.filter(pl.col("file").is_in(list(set(played.values()))))
    found = Fidelity(str(original), str(copy))
    keys = ["file", "op", "position", "size"]
    if _shares_processes(Path(copy)):
        keys.remove("position")
        found.note = "offsets not compared: several ranks were replayed in one process"
    found.files = _compare_files(first, second, keys)
    counts = [max(1, len(requests)) for requests in (first, second)]
    found.errors["requests"] = found.different_requests / sum(counts)
    found.errors["sizes of requests"] = _compare_histograms(first["size"], second["size"])
    works = [join_workload(each.tables, each.launches) for each in joined]
    if not all(len(work.steps) for work in works):  # a trace of another program: no steps to compare
        _compare_rates(found, first, second, _find_start(first), _find_start(second))
        return found
    _add_values(found, *(_measure_training(*each) for each in zip(works, joined, strict=True)))
    _compare_rates(found, first, second, *(int(work.steps["start"].min()) for work in works))  # type: ignore[arg-type]
    return found


def _read_played_files(run: Path) -> dict[str, str]:
    path = run / PLAYED_FILES
    values = read_json_object(path) if path.exists() else {}
    return {str(name): str(value) for name, value in values.items()}


def _name_requests(requests: pl.DataFrame, run: Path, played: Mapping[str, str]) -> pl.DataFrame:
    """Those on the workload's files: file (as both runs name it), op, position, size, ts."""
    folders = list_dataset_paths(records.read_config(run / "config.json", []))
    names = _name_files(requests["path"].drop_nulls().unique(), folders, played)
    named = pl.col("path").replace_strict(names, default=None, return_dtype=pl.String)
    return requests.with_columns(named.alias("file")).filter(pl.col("file").is_not_null()).drop("path")


def _name_files(paths: Iterable[str], folders: list[str], played: Mapping[str, str]) -> dict[str, str]:
    """Path -> the name that a copy of the file has, too; nothing for what is not part of the workload."""
    found = {}
    for path in paths:
        if played:
            found[path] = played.get(path, path)
        elif inside := next((each for each in folders if path.startswith(each + "/")), None):
            found[path] = f"data/{os.path.relpath(path, inside)}"
        elif match := _CHECKPOINT.search(path):
            found[path] = f"checkpoints/{match[1]}"
        elif match := _TABLE.search(path):
            found[path] = f"store/{match[1] or match[2]}"
    return found


def _shares_processes(run: Path) -> bool:
    """Whether a replay played several ranks in one process: where two of them have a file open, the trace
    cannot tell whose position a read moves.
    """
    if not (run / REPLAY).exists():
        return False
    values = read_json_object(run / REPLAY)
    ranks, processes = values.get("ranks"), values.get("processes")
    return isinstance(ranks, list) and isinstance(processes, int) and processes < len(ranks)


def _compare_files(first: pl.DataFrame, second: pl.DataFrame, keys: list[str]) -> list[FileDifference]:
    """keys: the columns by which requests are equal."""
    counts = first.group_by(keys).len("first").join(
        second.group_by(keys).len("second"), on=keys, how="full", coalesce=True, nulls_equal=True
    ).with_columns(pl.col("first", "second").fill_null(0).cast(pl.Int64))  # fmt: skip
    over = (pl.col("first") - pl.col("second")).clip(0).sum()
    under = (pl.col("second") - pl.col("first")).clip(0).sum()
    rows = counts.group_by("file").agg(
        pl.col("first").sum().alias("requests"),
        (pl.col("first") * pl.col("size")).sum().alias("bytes"),
        pl.col("second").sum().alias("copied_requests"),
        (pl.col("second") * pl.col("size")).sum().alias("copied_bytes"),
        over.alias("missing"),
        under.alias("extra"),
    )
    return [FileDifference(**row) for row in rows.sort("file").iter_rows(named=True)]


def _compare_histograms(first: pl.Series, second: pl.Series) -> float:
    """The share of requests that would have to be of another size (in powers of two) to be as the others."""
    shares = []
    for sizes in (first, second):
        counts = np.bincount(np.frexp(sizes.to_numpy().clip(0).astype(np.float64))[1], minlength=65)
        shares.append(counts / max(1, counts.sum()))
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def _measure_training(work: Workload, joined: JoinedTables) -> dict[str, float]:
    """Step time, waiting, I/O that nothing hides, and the time of training in all; seconds and shares.

    Waiting and I/O are, step by step, those of the rank with most of them: whether the others then wait for
    data, too, or for that rank, is decided by which one happened to begin first.
    """
    steps = work.steps.filter(pl.col("phase") == "train")
    whole = steps.group_by("rank").agg(pl.col("period_us").sum())["period_us"].mean() or 1
    waited = (pl.col("wait_us") + pl.col("rows_us")).max()
    waits = steps.group_by("launch", "epoch", "step").agg(waited.alias("us"))
    return {
        "step time, median": float(steps["period_us"].median() or 0) / 1e6,  # type: ignore[arg-type]
        "step time, 95th percentile": float(steps["period_us"].quantile(0.95) or 0) / 1e6,
        "training time": float(whole) / 1e6,  # type: ignore[arg-type]
        "waiting share": float(waits["us"].sum()) / max(1.0, float(whole)),  # type: ignore[arg-type]
        "unhidden I/O, share": _measure_unhidden_io(joined),
    }


def _measure_unhidden_io(joined: JoinedTables) -> float:
    """The share of the training, in each step and between the steps of the rank with most of it."""
    of_rank = joined["time"].filter(pl.col("phase") == "train").group_by("rank").agg(
        pl.col("io_not_hidden_us", "wall_us").sum()
    )  # fmt: skip
    steps = joined["steps"].select("launch", "rank", "epoch", "step", pl.col("io_not_hidden_us").alias("us"))
    in_steps = steps.group_by("launch", "epoch", "step").agg(pl.col("us").max())["us"].sum()
    between = of_rank.join(steps.group_by("rank").agg(pl.col("us").sum()), on="rank")
    rest = between.select((pl.col("io_not_hidden_us") - pl.col("us")).max()).item() or 0
    return float(in_steps + max(0, rest)) / max(1.0, float(of_rank["wall_us"].mean() or 1))  # type: ignore[arg-type]


def _add_values(found: Fidelity, first: Mapping[str, float], second: Mapping[str, float]) -> None:
    for name, value in first.items():
        other = second[name]
        found.values[name] = (value, other)
        share = name.endswith("share")
        found.errors[name] = abs(other - value) if share else abs(other - value) / value if value else 0.0


def _find_start(requests: pl.DataFrame) -> int:
    return int(requests["ts"].min() or 0)  # type: ignore[arg-type]


def _compare_rates(
    found: Fidelity, first: pl.DataFrame, second: pl.DataFrame, start: int, second_start: int
) -> None:
    """Bandwidth over time: how far the bytes moved up to a time are apart, on average, as a share of all.

    start, second_start: from which the times of each run count, so that start-up is not part of it.
    """
    times = [
        (requests["ts"] - begin).to_numpy() for requests, begin in ((first, start), (second, second_start))
    ]
    end = max([int(each.max()) for each in times if len(each)] or [0])
    edges = np.linspace(0, max(1, end) + 1, BINS + 1)
    moved = [
        np.histogram(each, edges, weights=requests["size"].to_numpy())[0]
        for each, requests in zip(times, (first, second), strict=True)
    ]
    total = max(1.0, float(moved[0].sum()))
    apart = np.abs(np.cumsum(moved[0]) - np.cumsum(moved[1])).mean()
    found.errors["bandwidth over time"] = float(apart / total)


def describe_files(fidelity: Fidelity, most: int = 20) -> list[tuple[str, ...]]:
    """(file, requests, bytes, those of the copy, missing, extra) as text: differing ones first."""
    ordered = sorted(fidelity.files, key=lambda each: (-(each.missing + each.extra), -each.bytes, each.file))
    return [
        (each.file, *(f"{n:,}" for n in (each.requests, each.bytes, each.copied_requests, each.copied_bytes)),
         f"{each.missing:,}", f"{each.extra:,}")
        for each in ordered[:most]
    ]  # fmt: skip
