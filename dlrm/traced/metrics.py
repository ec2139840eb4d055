"""Lines of RUN/metrics.jsonl, as a training of this project writes them, for a script that asks for it."""

import json
import os
import time
from typing import Any

from common.descriptors import close_descriptor
from common.owned import OutputFolder
from dlrm.runtime.ranks import find_ranks
from dlrm.traced.process import VARIABLE
from dlrm.traced.steps import steps

METRICS = "metrics.jsonl"


def log_metrics(**values: float | str) -> None:
    """Append a line on rank 0. An evaluation's values have `split`. Nothing happens without a run folder."""
    folder = os.environ.get(VARIABLE)
    if not folder or not find_ranks().first:
        return
    clocks: dict[str, Any] = {"time": time.time(), "cpu_seconds": time.process_time()}
    line = json.dumps({"step": steps.step, "epoch": steps.epoch, **values, **clocks}) + "\n"
    output = OutputFolder(folder)
    descriptor = output.open_growing(METRICS)
    try:
        os.write(descriptor, line.encode())
    finally:
        close_descriptor(descriptor)
    output.record_files([METRICS])
