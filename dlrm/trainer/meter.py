"""Loss and speed between two reports of a training, over all ranks.

In: each step's loss and rows. Out: what one line of metrics.jsonl says.
"""

import time

import torch
import torch.distributed as dist


class ThroughputMeter:
    """Mean loss over all ranks, and samples per second, since the last report."""

    def __init__(self, device: torch.device, labels_are_clicks: bool = False) -> None:
        # [sum of loss x rows, rows, labels that are 1, labels] of this rank, float64: summed on the device,
        # so that a step that is not reported never waits for the GPU
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._labels_are_clicks = labels_are_clicks
        self._since = time.perf_counter()
        self.steps = 0
        self.click_share: float | None = None  # of the labels between the last two calls of reduce_and_reset

    def add_step(self, loss: torch.Tensor, rows: int, labels: torch.Tensor | None = None) -> None:
        """`loss`: the mean over this rank's `rows` rows, a scalar tensor."""
        self._sums[0] += loss.detach() * rows
        self._sums[1] += rows
        if labels is not None and self._labels_are_clicks:
            self._sums[2] += labels.detach().sum()
            self._sums[3] += rows
        self.steps += 1

    def reduce_and_reset(self) -> tuple[float, int, float]:
        """(mean loss, rows, seconds) since the last call. A collective: called at the same step."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        loss, rows, clicks, labels = sums.tolist()
        self.click_share = clicks / labels if labels else None
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._sums.zero_()
        self.steps = 0
        return loss / max(rows, 1), int(rows), seconds

    def exclude_time(self, seconds: float) -> None:
        """Do not count these seconds: they were spent on a validation or a checkpoint."""
        self._since += seconds

    @property
    def sums(self) -> torch.Tensor:
        """This rank's sums since the last report, [4] float64; a checkpoint stores and refills them."""
        return self._sums
