"""What was run, for someone who did not run it: command, date, versions, dataset; as (name, value)."""

import shlex
from datetime import datetime, timezone
from typing import Any

import polars as pl

from analysis.report.facts import Facts
from analysis.report.page import format_seconds, format_size
from analysis.report.run import TracedRun
from analysis.run_folder import run_settings
from analysis.tables import answers, device
from common.errors import printable
from common.words import format_number

MAX_COMMAND = 4000  # characters
PLAUSIBLE_US = 10**15  # times after September 2001 are the clock's; others count from something else


def list_about(run: TracedRun, facts: Facts) -> list[tuple[str, str]]:
    """Names and values; what the run's files do not say is left out."""
    launch: dict[str, Any] = run.config.get("launch", {})
    known = [
        ("command", describe_command(launch.get("command"))),
        ("date", describe_date(run, facts)),
        ("hosts", describe_hosts(run)),
        ("versions", describe_versions(launch.get("versions"))),
        ("dataset", describe_dataset(run, facts)),
        ("file systems", describe_file_systems(run)),
        ("folder", printable(run.folder.resolve())),
    ]
    return [(name, value) for name, value in known if value]


def describe_command(words: Any) -> str:
    """As one would type it; what launcher.sh and mpiexec put before it is not recorded."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return ""
    return printable(shlex.join(words))[:MAX_COMMAND]


def describe_date(run: TracedRun, facts: Facts) -> str:
    """When the first event was, in universal time: reports are read in other places than runs are made."""
    if not PLAUSIBLE_US < run.begin_us < 4 * PLAUSIBLE_US:
        return ""
    begin = datetime.fromtimestamp(run.begin_us // 10**6, timezone.utc)
    ran = format_seconds(facts.find_wall_seconds())
    jobs = facts.launches.height
    return f"{begin:%Y-%m-%d %H:%M:%S} UTC, {ran}{f' in {jobs} launches' if jobs > 1 else ''}"


def describe_hosts(run: TracedRun) -> str:
    hosts = sorted({p.host for p in run.joined.processes if p.host})
    more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
    return ", ".join(hosts[:8]) + more


def describe_versions(versions: Any) -> str:
    if not isinstance(versions, dict):
        return ""
    return run_settings.format_setting(", ".join(f"{name} {version}" for name, version in versions.items()))


def describe_file_systems(run: TracedRun) -> str:
    """What each of the run's folders is on: ext4 at / (--output_dir, --dataset_path)."""
    found = device.list_file_systems(run.joined).filter(pl.col("type") != "")
    found = found.group_by("type", "mount", "reads_are", maintain_order=True).agg(pl.col("folder").unique())
    parts = []
    for kind, mount, reads, folders in found.iter_rows():
        memory = ", which is memory" if reads == "memory" else ""
        parts.append(f"{kind} at {mount}{memory} ({', '.join(sorted(folders))})")
    return "; ".join(parts)


def describe_dataset(run: TracedRun, facts: Facts) -> str:
    """Where the data was, and how much of it was read."""
    paths = run_settings.list_dataset_paths(run.config)
    data = run.config.get("data")
    name = data.get("dataset_name") if isinstance(data, dict) else None
    where = ", ".join(map(printable, paths)) or (str(name) if name else "")
    files = len(facts.dataset_files)
    if not files:
        return where
    reads = answers.sum_volume(run.joined, "file").filter(pl.col("op") == "read")
    moved = int(reads.filter(pl.col("file").is_in(facts.dataset_files.implode()))["bytes"].sum())
    return f"{where + ': ' if where else ''}{format_number(files, 'file')}, {format_size(moved)} read"
