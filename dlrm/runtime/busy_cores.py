"""Whether other work needs the cores that this job's threads are about to use.

OpenMP's threads wait for each other by spinning. Where another process has the core of one of them, all
others spin until it gets its turn: a step then takes ten times as long.
"""

import os
from collections.abc import Mapping

from dlrm.runtime.ranks import Ranks


def describe_busy_cores(
    here: Ranks,
    load: float | None = None,
    cores: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> str | None:
    """One line where the load of this host leaves fewer cores than its ranks have threads; otherwise None.

    load: running processes, by default the mean of the last minute; it does not have this job's ranks, which
    have just begun. cores: by default those that this process may use. Ranks of one thread do not spin.
    """
    load = os.getloadavg()[0] if load is None else load
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    text = environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(text) if text.isdecimal() and int(text) else cores
    ranks = max(1, here.local_world_size)
    if threads < 2 or environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or load <= cores - ranks:
        return None
    starting = f"{ranks} {'rank' if ranks == 1 else 'ranks'} of {threads} threads"
    return (
        f"{here.host}: the load is {load:.1f} on {cores} cores, which {starting} are about to use: "
        "threads that wait for a core slow down all others: try DLRM_THREADS=1 or OMP_WAIT_POLICY=passive"
    )
