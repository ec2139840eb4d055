"""Notices a training that learns nothing, from its reports of the loss.

In: the values of each report, as metrics.jsonl has them. Out: one line, once. `analysis` has the same two
rules for its findings (analysis/report/rules_training.py).
"""

import math
from collections.abc import Mapping
from typing import Any

ABOVE_STEPS = 50  # so long may the loss stay above its first value, ...
ABOVE = 1.02  # ... by this factor: the first value is that of one batch, which may be a lucky one
WINDOW = (50, 500)  # steps over which the loss is compared with the entropy: from .. to, a quarter of all
AT_ENTROPY = 0.995  # of the labels' entropy: what counts as no better than a constant

FALLS = 0.99  # the second half of these steps has less than this share of the first half's loss

Report = tuple[int, float, float, float]  # step, rows, loss, share of clicks


def _average_reports(reports: list[Report]) -> tuple[float, float]:
    """(loss, share of clicks) over all rows."""
    total = sum(rows for _, rows, _, _ in reports)
    losses = sum(rows * loss for _, rows, loss, _ in reports)
    return losses / total, sum(rows * share for _, rows, _, share in reports) / total


def compute_binary_entropy(share: float) -> float:
    """The log loss of a constant that predicts this share of ones."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


class LossWatch:
    """The reports so far, as far as they are needed to judge the next one."""

    def __init__(self, total_steps: int = 0) -> None:
        self._window = min(max(total_steps // 4, WINDOW[0]), WINDOW[1])
        self._first = math.inf  # the loss of step 1; a resumed run has none
        self._fine_until = 0  # last step at which the loss was not clearly above it
        self._reports: list[Report] = []
        self._samples = 0
        self._has_warned = False

    def add_report(self, report: Mapping[str, Any]) -> str | None:
        """What is wrong, the first time that something is. `report`: step, loss, samples, click_share."""
        step, loss, share = report["step"], report["loss"], report.get("click_share")
        rows, self._samples = report["samples"] - self._samples, report["samples"]
        if self._has_warned:
            return None
        if step == 1:
            self._first = loss
        if loss <= ABOVE * self._first:
            self._fine_until = step
        trouble = None
        if step - self._fine_until >= ABOVE_STEPS and math.isfinite(self._first):
            trouble = (
                f"the loss has stayed above its first value, {self._first:.4f}, for "
                f"{step - self._fine_until} steps and is {loss:.4f}"
            )
        elif share is not None:
            trouble = self._compare_with_entropy(step, rows, loss, share)
        self._has_warned = trouble is not None
        return trouble

    def _compare_with_entropy(self, step: int, rows: int, loss: float, share: float) -> str | None:
        """What is wrong, where the loss of the last reports is that of a model which ignores its input.

        rows   samples since the report before;  loss, share  their mean loss, and the share of clicks
        """
        self._reports.append((step, rows, loss, share))
        while self._reports[-1][0] - self._reports[0][0] >= self._window:
            kept = self._reports[1:]
            if kept[-1][0] - kept[0][0] < self._window:
                break
            self._reports = kept
        first = self._reports[0][0]
        if step - first < self._window or step < 2 * self._window:
            return None
        within = self._reports[1:]  # the steps after `first`
        mean_loss, share = _average_reports(within)
        entropy = compute_binary_entropy(share)
        half = len(within) // 2
        falls = half > 0 and _average_reports(within[half:])[0] < FALLS * _average_reports(within[:half])[0]
        if mean_loss < AT_ENTROPY * entropy or falls:
            return None
        return (
            f"the loss of steps {first + 1} to {step} is {mean_loss:.4f}, no better than the same prediction "
            f"for every row, which has {entropy:.4f} (the entropy of the share of clicks)"
        )
