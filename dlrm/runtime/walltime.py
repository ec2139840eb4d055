"""How much walltime the job has left: from --walltime, from PBS (qstat), or from the environment."""

import json
import os
import subprocess
import time
from collections.abc import Mapping

from dlrm.runtime.errors import UserError

QSTAT_SECONDS = 10


def parse_seconds(text: str) -> float:
    """Seconds of a walltime as PBS writes it: [HH:]MM:SS or seconds."""
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0:
        raise UserError(f"--walltime {text}: give [HH:]MM:SS or seconds")
    total = 0.0
    for part in parts:
        total = total * 60 + part
    return total


def find_deadline(
    before: float | None, walltime: str | None, environ: Mapping[str, str] = os.environ
) -> float | None:
    """When to stop, as time.monotonic() counts: `before` seconds before the job's walltime is over.

    before    --stop_before_walltime; None: no deadline
    walltime  --walltime; None: ask PBS

    The job's time is counted from its start. PBS knows that; else the age of this process is taken, which is
    less, and so stops later than it should by the time that the job spent before.
    """
    if before is None:
        return None
    limit, used = walltime, _find_process_age()
    if limit is None and environ.get("PBS_JOBID"):
        limit, used = _ask_pbs(environ["PBS_JOBID"], used)
    limit = limit or environ.get("PBS_WALLTIME")
    if limit is None:
        raise UserError("--stop_before_walltime needs --walltime: neither qstat nor PBS_WALLTIME has it")
    return time.monotonic() + parse_seconds(limit) - used - before


def _find_process_age() -> float:
    """Seconds since this process started."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _ask_pbs(job: str, age: float) -> tuple[str | None, float]:
    """(walltime, seconds used) from qstat; (None, `age`) where qstat does not answer or is not understood."""
    try:
        command = ["qstat", "-f", "-F", "json", job]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QSTAT_SECONDS, check=True)
        job_facts = next(iter(json.loads(answer.stdout)["Jobs"].values()))
        limit = job_facts["Resource_List"]["walltime"]
        started = time.mktime(time.strptime(job_facts["stime"], "%a %b %d %H:%M:%S %Y"))
        return limit, max(age, time.time() - started)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration, AttributeError):
        return None, age
