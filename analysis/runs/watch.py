"""One run while it goes: how far it is, how fast, what it waits for, and ranks without a heartbeat.

In: RUN on any node that sees its files. Out: some lines on stdout, again and again until the run has ended.
Each look reads a few kilobytes: progress.json, the end of metrics.jsonl, the names of checkpoints.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.report.page import format_size
from analysis.run_folder import records
from analysis.runs.run_record import describe_age, is_run_folder, read_last_metrics, read_run
from common.errors import UserError, printable
from common.inputs import read_bytes
from common.lock import find_lock_owner
from common.words import format_number

BARS = "▁▂▃▄▅▆▇█"
BARS_WIDTH = 48  # of the loss curve
STALE_SECONDS = 30  # an older progress.json means that rank 0 does not write any more
QUEUE_SECONDS = 60  # between two questions to the scheduler
MOST_PROGRESS_BYTES = 4096
CHECKPOINT = re.compile(r"\d+-step-\d+")
JOB = re.compile(r"^(PBS_JOBID|SLURM_JOB_ID)='?([\w.\[\]-]{1,100})'?$", re.M)
ASK = {"PBS_JOBID": ["qstat"], "SLURM_JOB_ID": ["squeue", "-h", "-o", "%T %M of %l", "-j"]}


@dataclass
class Look:
    """What one look at a running training found."""

    at: float
    progress: dict[str, Any] = field(default_factory=dict)  # progress.json
    rows: list[dict[str, Any]] = field(default_factory=list)  # the last ones of metrics.jsonl


def watch_run(run: Path, seconds: float, once: bool) -> int:
    """Print what is known every `interval` seconds, until the run ends; with `once` a single time."""
    if not run.is_dir():
        raise UserError(f"{printable(run)}: no such folder; give the folder of a run, e.g. results/<name>")
    if not is_run_folder(run):
        raise UserError(f"{printable(run)}: is not a run folder (no config.json in it yet?)")
    heading, queue, asked, before = _describe_settings(run), "", -1e9, None
    in_place = sys.stdout.isatty() and not once
    printed = 0
    while True:
        look = Look(time.time(), read_progress(run), read_last_metrics(run / "metrics.jsonl"))
        owner = find_lock_owner(run)
        if time.monotonic() - asked > QUEUE_SECONDS:
            queue, asked = ask_scheduler(run), time.monotonic()
        lines = [heading, *describe_look(run, look, before, owner)] + ([queue] if queue else [])
        if in_place and printed:
            print(f"\x1b[{printed}A\x1b[J", end="")  # up, and clear to the end
        print("\n".join(lines), flush=True)
        printed = len(lines)
        if once or not owner:
            return 0
        before = look
        time.sleep(seconds)
        if not in_place:
            print(flush=True)


def _describe_settings(run: Path) -> str:
    found = read_run(run)
    parts = [found.model or "a run", format_number(found.ranks, "rank") if found.ranks else ""]
    parts += [f"batch {found.batch:,}" if found.batch else "", f"lr {found.rate:g}" if found.rate else ""]
    return f"{printable(run)}: {', '.join(part for part in parts if part)}"


def read_progress(run: Path) -> dict[str, Any]:
    """progress.json with plain values; empty where there is none, or another program's."""
    try:
        found = json.loads(read_bytes(run / "progress.json", MOST_PROGRESS_BYTES))
    except (UserError, OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    kept = {name: value for name, value in found.items() if records.is_number(value)}
    kept["evaluating"] = found.get("evaluating") is True
    silent = found.get("silent")
    kept["silent"] = [
        (row[0], printable(row[1])[:80], row[2])
        for row in (silent if isinstance(silent, list) else [])
        if isinstance(row, list) and len(row) == 3 and records.is_number(row[0]) and records.is_number(row[2])
    ]
    return kept


def describe_look(run: Path, look: Look, before: Look | None, owner: dict[str, Any]) -> list[str]:
    """The lines of one look. before: the look before it, for rates. owner: who holds the folder's lock."""
    steps = [row for row in look.rows if "split" not in row]
    lines = [_describe_state(run, look, owner), *_describe_position(look, steps)]
    if steps:
        lines.append(_describe_speed(steps[-1], look, before))
        losses = [row["loss"] for row in steps if "loss" in row]
        if len(losses) > 1:
            lines.append(f"loss {losses[0]:.4f} {draw_bars(losses)} {losses[-1]:.4f}")
    if scored := [row for row in look.rows if "split" in row]:
        names = [name for name in ("auroc", "NDCG@10", "log_loss") if name in scored[-1]]
        values = ", ".join(f"{name} {scored[-1][name]:.5f}" for name in names)
        lines.append(f"{scored[-1]['split']} at step {scored[-1].get('step', '?')}: {values}")
    if newest := find_newest_checkpoint(run):
        lines.append(newest)
    return lines + _describe_ranks(look, bool(owner))


def _describe_state(run: Path, look: Look, owner: dict[str, Any]) -> str:
    if owner:
        age = describe_age(look.at - owner["since"])
        return f"running for {age}: process {owner['pid']} of user {owner['user']} on {owner['host']}"
    return f"not running: {read_run(run).state}"


def _describe_position(look: Look, steps: list[dict[str, Any]]) -> list[str]:
    """Step, epoch and how long it will take yet, by the speed since this launch began."""
    known = look.progress
    step = known.get("step", steps[-1].get("step") if steps else None)
    if step is None:
        return ["no step yet: starting"]
    text, total = f"step {step:,.0f}", known.get("total_steps", 0)
    if total > 0:
        text += f" of {total:,.0f} ({step / total:.1%})"
    if "epoch" in known:
        text += f", epoch {known['epoch']:.0f}"
    done = step - known.get("steps_before", 0)
    spent = known.get("time", 0) - known.get("started", 0)
    if total > step and done > 0 and spent > 0:
        text += f", {describe_age(spent * (total - step) / done)} to go"
    return [text + (", evaluating" if known["evaluating"] else "")] if known else [text]


def _describe_speed(last: dict[str, Any], look: Look, before: Look | None) -> str:
    """Samples per second of all ranks; what rank 0 waited and read since the look before, or in all."""
    parts = [f"{last['samples_per_second']:,.0f} samples/s"] if "samples_per_second" in last else []
    now, then = look.progress, before.progress if before else {}
    if then.get("time") == now.get("time"):
        then = {}  # nothing new: since it began
    seconds = now.get("time", 0) - then.get("time", now.get("started", 0))
    if seconds > 0:
        waited = now.get("wait_seconds", -1) - then.get("wait_seconds", 0)
        moved = now.get("bytes_read", -1) - then.get("bytes_read", 0)
        if waited >= 0:
            parts.append(f"{waited / seconds:.1%} waiting for data")
        if moved >= 0:
            parts.append(f"reading {format_size(moved / seconds)}/s")
        if len(parts) > 1:
            parts[-1] += " (rank 0)"
    return ", ".join(parts)


def _describe_ranks(look: Look, running: bool) -> list[str]:
    """Ranks without a heartbeat, as rank 0 saw it; and rank 0 itself, where it has stopped writing."""
    if not running or not look.progress:
        return []
    age = look.at - look.progress.get("time", look.at)
    if age > STALE_SECONDS:
        return [f"no heartbeat of rank 0 for {describe_age(age)}"]
    silent = look.progress["silent"]
    lines = [
        f"no heartbeat of rank {rank:.0f} on {host} for {describe_age(seconds)}"
        for rank, host, seconds in silent
    ]
    more = int(look.progress.get("silent_count", 0)) - len(silent)
    return lines + ([f"and of {format_number(more, 'rank')} more"] if more > 0 else [])


def draw_bars(values: list[float]) -> str:
    """A curve of one line: means of equal stretches, lowest to highest."""
    finite = [value for value in values if abs(value) < float("inf")]
    width = min(BARS_WIDTH, len(finite))
    if not width:
        return ""
    edges = [len(finite) * i // width for i in range(width + 1)]
    means = [
        sum(finite[low:high]) / (high - low)
        for low, high in zip(edges, edges[1:], strict=False)
        if high > low
    ]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / (span or 1.0) * len(BARS)))] for mean in means)


def find_newest_checkpoint(run: Path) -> str:
    """Its step and age, from the names in RUN/checkpoints; a folder elsewhere is not looked for."""
    newest = (-1.0, "")
    try:
        with os.scandir(run / "checkpoints") as entries:
            for entry in entries:
                if CHECKPOINT.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    newest = max(newest, (entry.stat().st_mtime, entry.name))
    except OSError:
        return ""
    if newest[0] < 0:
        return ""
    return f"newest checkpoint: {newest[1]}, {describe_age(time.time() - newest[0])} ago"


def ask_scheduler(run: Path) -> str:
    """The job's state in the queue, where this node has the scheduler's command and env.txt names the job."""
    try:
        found = JOB.search(read_bytes(run / "env.txt", 1 << 20).decode(errors="replace"))
    except (UserError, OSError):
        return ""
    if not found:
        return ""
    command = [*ASK[found[1]], found[2]]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return f"queue: {command[0]} does not know job {found[2]}"
    return f"queue: job {printable(lines[-1])[:120]}"
