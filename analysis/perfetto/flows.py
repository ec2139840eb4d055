"""Which read fed which step: arrows of the Perfetto trace."""

import numpy as np

from analysis.trace.arguments import read_argument
from analysis.trace.scan import EventBlock
from analysis.trace.strings import ID

MAX_FLOWS = 10_000  # that end in one step


class ReadToStepFlows:
    """From each data/read of a batch to the train/step of the same batch, within one process.

    A batch number may come again in the next epoch: a step uses up the reads that it is linked to.
    """

    def __init__(self, seed: int) -> None:
        self._waiting: dict[int, tuple[int, int]] = {}  # batch -> its round, reads that no step has taken yet
        self._seed = seed

    def find_flows(self, block: EventBlock) -> tuple[np.ndarray, np.ndarray]:
        """flow_base and flow_count for proto.encode_events, one each per event (int64)."""
        base, count = np.zeros(len(block), np.int64), np.zeros(len(block), np.int64)
        reads = (block.cat == ID["data"]) & (block.name == ID["read"])
        steps = (block.cat == ID["train"]) & (block.name == ID["step"])
        chosen = np.flatnonzero(reads | steps)
        if len(chosen):
            batch = read_argument(block, ID["batch"], -1)
            chosen = chosen[batch[chosen] >= 0]
            base[chosen], count[chosen] = self._number_flows(batch[chosen].tolist(), reads[chosen].tolist())
        return base, count

    def _number_flows(self, batches: list[int], reads: list[bool]) -> tuple[np.ndarray, list[int]]:
        """The same of events with these batches, in the order of time. reads: which are reads, not steps."""
        waiting, rounds, count = self._waiting, [], []
        for batch, is_read in zip(batches, reads, strict=True):
            taken, pending = waiting.get(batch, (0, 0))
            rounds.append(taken)
            if not is_read:
                count.append(min(pending, MAX_FLOWS))
                waiting[batch] = taken + 1, 0
            elif pending < MAX_FLOWS:
                count.append(-1 - pending)
                waiting[batch] = taken, pending + 1
            else:
                count.append(0)
        known = np.array(batches, np.int64) << 20
        return (np.int64(self._seed) << 48) ^ known ^ (np.array(rounds, np.int64) << 44), count
