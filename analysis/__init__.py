"""Read a run folder: traces to Perfetto, tables, a report. Needs no torch, and nothing of dlrm/.

In: RUN. Out: .pftrace, report.html, summary.json, tables/*.csv, exit codes; in Python `load(RUN)`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from common.numba_cache import use_private_cache

if TYPE_CHECKING:
    from analysis.loaded_run import LoadedRun

use_private_cache()


def load(run: str | Path) -> "LoadedRun":
    """The tables of a run as polars frames, read when they are asked for: steps, calls, ranks, files, ...."""
    from analysis.loaded_run import LoadedRun  # polars and numba are not loaded before

    return LoadedRun(run)
