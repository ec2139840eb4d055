"""How much time the job has left: from an option, from the environment, or from PBS itself."""

import json
import os
import subprocess
import time
from collections.abc import Mapping

from dlrm.runtime.errors import UserError

ASK_SECONDS = 10  # for qstat


def parse_seconds(text: str) -> float:
    """[HH:]MM:SS or seconds."""
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0:
        raise UserError(f"--walltime {text}: wanted [HH:]MM:SS or seconds")
    total = 0.0
    for part in parts:
        total = total * 60 + part
    return total


def find_deadline(
    before: float | None, walltime: str | None, environ: Mapping[str, str] = os.environ
) -> float | None:
    """The moment, by time.monotonic(), that lies `before` seconds ahead of the job's end."""
    if before is None:
        return None
    limit, used = walltime, _age_of_job()
    if limit is None and environ.get("PBS_JOBID"):
        limit, used = _ask_pbs(environ["PBS_JOBID"], used)
    limit = limit or environ.get("PBS_WALLTIME")
    if limit is None:
        raise UserError("--stop_before_walltime needs --walltime: neither the environment nor qstat tells it")
    return time.monotonic() + parse_seconds(limit) - used - before


def _age_of_job() -> float:
    """Seconds since this process began."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _ask_pbs(job: str, age: float) -> tuple[str | None, float]:
    """(walltime, seconds used), as far as qstat says."""
    try:
        asking = ["qstat", "-f", "-F", "json", job]
        told = subprocess.run(asking, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
        facts = next(iter(json.loads(told.stdout)["Jobs"].values()))
        limit = facts["Resource_List"]["walltime"]
        begun = time.mktime(time.strptime(facts["stime"], "%a %b %d %H:%M:%S %Y"))
        return limit, max(age, time.time() - begun)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration, AttributeError):
        return None, age
