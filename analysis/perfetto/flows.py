"""Which read fed which step: arrows of the Perfetto trace."""

import numpy as np
from numba import types
from numba.typed import Dict

from analysis.trace.arguments import read_argument
from analysis.trace.scan import EventBlock
from analysis.trace.strings import ID, compiled

MAX_FLOWS = 10_000  # that end in one step


class ReadToStepFlows:
    """From each data/read of a batch to the train/step of the same batch, within one process.

    A batch number may come again in the next epoch: a step uses up the reads that it is linked to.
    """

    def __init__(self, seed: int) -> None:
        self.waiting = Dict.empty(types.int64, types.int64)  # batch -> round << 20 | reads not yet taken
        self.seed = seed

    def find_flows(self, block: EventBlock) -> tuple[np.ndarray, np.ndarray]:
        """flow_base and flow_count for proto.encode_events, one each per event (int64)."""
        base, count = np.zeros(len(block), np.int64), np.zeros(len(block), np.int64)
        reads = (block.cat == ID["data"]) & (block.name == ID["read"])
        steps = (block.cat == ID["train"]) & (block.name == ID["step"])
        chosen = np.flatnonzero(reads | steps)
        if len(chosen):
            batch = read_argument(block, ID["batch"], -1)
            _number_flows(chosen, reads, batch, self.waiting, self.seed, base, count)
        return base, count


@compiled
def _number_flows(chosen, reads, batch, waiting, seed, base, count):
    """Fills `base` and `count` for `find_flows`. batch: each event's batch, -1 where it has none."""
    for i in chosen:
        b = batch[i]
        if b < 0:
            continue
        state = waiting.get(b, 0)
        taken, pending = state >> 20, state & 0xFFFFF
        base[i] = (np.int64(seed) << 48) ^ (b << 20) ^ (taken << 44)
        if reads[i]:
            if pending < MAX_FLOWS:
                count[i] = -1 - pending
                waiting[b] = state + 1
        else:
            count[i] = min(pending, MAX_FLOWS)
            waiting[b] = (taken + 1) << 20
