"""The trace of a preprocessing command, `--trace_dir`: what is recorded while it runs, and what it counts."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.owned import OutputFolder
from dlrm.prep.io.files import bytes_read, bytes_written, os_errors_as_user_errors
from dlrm.prep.job.options import BYTE_COUNTS
from dlrm.prep.job.workers import Workers
from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks


@contextmanager
def trace_command(trace_dir: Path | None, folders: Mapping[str, str], here: Ranks) -> Iterator[None]:
    """Record what happens inside, unless `trace_dir` is None. `folders`: as in `trace.start_tracing`."""
    if trace_dir is None:
        yield
        return
    with os_errors_as_user_errors(trace_dir):
        trace.start_tracing(trace_dir, here, role="prep", folders=folders)
    try:
        yield
    finally:
        trace.stop_tracing()


def save_byte_counts(trace_dir: Path | None, workers: Workers) -> None:
    """results.json: the bytes that each rank read and wrote per file, which `analysis check` compares with
    the trace. All ranks call it.
    """
    counters = workers.all_gather((dict(bytes_read), dict(bytes_written)))
    if trace_dir and workers.first:
        results = {
            "bytes_read": {str(rank): read for rank, (read, _) in enumerate(counters)},
            "bytes_written": {str(rank): written for rank, (_, written) in enumerate(counters)},
            "world_size": workers.size,
        }
        OutputFolder(trace_dir).write(BYTE_COUNTS, json.dumps(results, indent=1) + "\n", mode=0o666)
