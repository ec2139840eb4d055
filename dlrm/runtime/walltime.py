"""How much walltime the job has left: from --walltime, from PBS (qstat) or Slurm (squeue), or from the
environment.
"""

import json
import math
import os
import subprocess
import time
from collections.abc import Mapping

from dlrm.runtime.batch_job import SLURM, find_batch_job
from dlrm.runtime.errors import UserError

ANSWER_SECONDS = 10


def parse_seconds(text: str) -> float:
    """Seconds of a walltime as PBS and Slurm write it: [HH:]MM:SS, D-HH:MM:SS or seconds."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [float(part) for part in clock.split(":")]
        total = float(days) if dash else 0.0
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or (dash and (len(parts) < 3 or total < 0)):
        raise UserError(f"--walltime {text}: give [HH:]MM:SS, D-HH:MM:SS or seconds")
    if dash:
        parts[0] += 24 * total
    total = 0.0
    for part in parts:
        total = total * 60 + part
    return total


def find_deadline(
    before: float | None, walltime: str | None, environ: Mapping[str, str] = os.environ
) -> float | None:
    """When to stop, as time.monotonic() counts: `before` seconds before the job's walltime is over.

    before    --stop_before_walltime; None: no deadline
    walltime  --walltime; None: ask PBS or Slurm

    The job's time is counted from its start. The scheduler knows that; else the age of this process is taken,
    which is less, and so stops later than it should by the time that the job spent before.
    """
    if before is None:
        return None
    job = find_batch_job(environ)
    if walltime is not None:
        left = parse_seconds(walltime) - _find_process_age()
    elif job and job.scheduler == SLURM:
        left = _ask_slurm(job.id, environ)
    else:
        left = _ask_pbs(job.id if job else "", environ)
    if left is None:
        raise UserError(
            "--stop_before_walltime needs --walltime: neither qstat, squeue, PBS_WALLTIME nor "
            "SLURM_JOB_END_TIME has it"
        )
    return time.monotonic() + left - before


def _find_process_age() -> float:
    """Seconds since this process started."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _ask_pbs(job: str, environ: Mapping[str, str]) -> float | None:
    """Seconds left of the job from qstat; of PBS_WALLTIME where qstat gives no such answer."""
    age, limit = _find_process_age(), environ.get("PBS_WALLTIME")
    if job:
        try:
            facts = next(iter(json.loads(_ask("qstat", "-f", "-F", "json", job))["Jobs"].values()))
            started = time.mktime(time.strptime(facts["stime"], "%a %b %d %H:%M:%S %Y"))
            limit = facts["Resource_List"]["walltime"]
            age = max(age, time.time() - started)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration, AttributeError):
            pass
    return parse_seconds(limit) - age if limit else None


def _ask_slurm(job: str, environ: Mapping[str, str]) -> float | None:
    """Seconds left of the job from squeue, else from the environment. A job without a limit has no end."""
    try:
        left = _ask("squeue", "-h", "-j", job, "-o", "%L").strip()
        return math.inf if left == "UNLIMITED" else parse_seconds(left)
    except (OSError, subprocess.SubprocessError, UserError):
        end = environ.get("SLURM_JOB_END_TIME", "")
        return int(end) - time.time() if end.isdecimal() else None


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True).stdout
