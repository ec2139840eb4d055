"""Metrics of binary predictions over exactly the rows that the ranks saw, each counted once.

AUROC is exact: scores are dealt to the ranks by value, so each rank sorts its share once and no rank
ever holds all of them. With ties; equal to the share of (click, no click) pairs ranked right.
"""

import math
from typing import Any

import torch
import torch.distributed as dist


class AurocCollector:
    """Collects one rank's logits and labels, five bytes a row, and the sums of the other metrics."""

    def __init__(self) -> None:
        self._scores: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._sums = torch.zeros(5, dtype=torch.float64)  # rows, clicks, log loss, right, predicted clicks

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        logits, labels = logits.detach().float().reshape(-1), labels.detach().float().reshape(-1)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        right = ((logits > 0) == (labels > 0.5)).sum()
        sums = (labels.sum(), losses, right, torch.sigmoid(logits).sum())
        self._sums += torch.stack([torch.tensor(len(logits)), *(each.double().cpu() for each in sums)])
        self._scores.append(logits)
        self._labels.append(labels.to(torch.int8))

    def result(self) -> dict[str, Any]:
        """The metrics over all ranks' rows; None where the set does not define one."""
        device = self._scores[0].device if self._scores else torch.device("cpu")
        scores = torch.cat(self._scores) if self._scores else torch.empty(0, device=device)
        labels = torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int8, device=device)
        self._scores, self._labels = [], []
        sums = self._sums.to(device)
        dist.all_reduce(sums)
        rows, clicks, loss, right, predicted = sums.tolist()
        if not rows:
            return {"samples": 0, "auroc": None}
        rate = clicks / rows
        both = 0 < clicks < rows
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if both else None
        return {
            "samples": int(rows),
            "auroc": compute_auroc(scores, labels),
            "log_loss": loss / rows,
            "accuracy": right / rows,
            "normalized_entropy": loss / rows / entropy if entropy else None,
            "calibration": predicted / clicks if clicks else None,
        }


def compute_auroc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Exact AUROC over the scores of all ranks; None when only one class is there."""
    scores, labels = _exchange_by_value(scores, labels)
    scores, order = torch.sort(scores)
    positive = labels[order].long()
    _, group, sizes = torch.unique_consecutive(scores, return_inverse=True, return_counts=True)
    positives = torch.zeros(len(sizes), dtype=torch.long, device=scores.device).index_add_(0, group, positive)
    negatives = sizes - positives
    below = negatives.cumsum(0) - negatives

    mine = torch.stack([positives.sum(), negatives.sum()])
    totals = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, mine)
    below = below + sum(int(total[1]) for total in totals[: dist.get_rank()])
    twice = (positives * (2 * below + negatives)).sum().reshape(1)  # a tie counts half
    dist.all_reduce(twice)
    clicks, others = (int(sum(total[i] for total in totals)) for i in (0, 1))
    return twice.item() / (2 * clicks * others) if clicks and others else None


def _exchange_by_value(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank ends with one range of score values, ranges rising with the rank, equal scores together."""
    world = dist.get_world_size()
    if world == 1:
        return scores, labels
    samples = 64 * world
    picks = torch.full((samples,), math.nan, device=scores.device)
    if len(scores):
        picks = torch.sort(scores[torch.linspace(0, len(scores) - 1, samples, device=scores.device).long()])[
            0
        ]
    gathered = [torch.empty_like(picks) for _ in range(world)]
    dist.all_gather(gathered, picks)
    known = torch.cat(gathered)
    known = torch.sort(known[~known.isnan()])[0]
    if not len(known):
        return scores, labels
    cuts = known[[len(known) * rank // world for rank in range(1, world)]]
    owner = torch.bucketize(scores, cuts, right=True)
    order = torch.argsort(owner, stable=True)
    give = torch.bincount(owner, minlength=world)
    take = torch.empty_like(give)
    dist.all_to_all_single(take, give)
    sent, received = give.tolist(), take.tolist()

    def deal(values: torch.Tensor) -> torch.Tensor:
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values[order].contiguous(), received, sent)
        return out

    return deal(scores), deal(labels)
