"""Metrics of binary predictions over exactly the rows that the ranks evaluated, each counted once.

AUROC is exact, not binned: it is the share of (click, no click) pairs in which the click has the higher
score, where a tie counts half. No rank ever holds all scores: the ranks exchange them so that each rank has
one range of values, and sorts it alone.
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
        # rows, clicks, sum of log losses, correct predictions, sum of predicted probabilities
        self._sums = torch.zeros(5, dtype=torch.float64)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Both of the batch's length, any shape and float type; labels are 0 or 1."""
        logits, labels = logits.detach().float().reshape(-1), labels.detach().float().reshape(-1)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        correct = ((logits > 0) == (labels > 0.5)).sum()
        sums = (labels.sum(), losses, correct, torch.sigmoid(logits).sum())
        self._sums += torch.stack([torch.tensor(len(logits)), *(each.double().cpu() for each in sums)])
        self._scores.append(logits)
        self._labels.append(labels.to(torch.int8))

    def compute(self) -> dict[str, Any]:
        """The metrics over all ranks' rows, and None for those that one class alone does not define.

        A collective. The collected rows are dropped.
        """
        device = self._scores[0].device if self._scores else torch.device("cpu")
        scores = torch.cat(self._scores) if self._scores else torch.empty(0, device=device)
        labels = torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int8, device=device)
        self._scores, self._labels = [], []
        sums = self._sums.to(device)
        dist.all_reduce(sums)
        rows, clicks, loss, correct, predicted = sums.tolist()
        if not rows:
            return {"samples": 0, "auroc": None}
        rate = clicks / rows
        both_classes = 0 < clicks < rows
        # of a model that predicts the average click rate for every row
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if both_classes else None
        return {
            "samples": int(rows),
            "auroc": compute_auroc(scores, labels),
            "log_loss": loss / rows,
            "accuracy": correct / rows,
            "normalized_entropy": loss / rows / entropy if entropy else None,
            "calibration": predicted / clicks if clicks else None,
        }


def compute_auroc(scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Exact AUROC over the rows of all ranks; None when there is only one class. A collective.

    scores  [rows of this rank] float;  labels  [rows of this rank], 0 or 1. Ranks may have different numbers
    of rows, also none.
    """
    scores, labels = _exchange_by_value(scores, labels)
    scores, order = torch.sort(scores)
    positive = labels[order].long()
    # equal scores form one group; every count is an integer, so the result does not depend on the ranks
    _, group, sizes = torch.unique_consecutive(scores, return_inverse=True, return_counts=True)
    positives = torch.zeros(len(sizes), dtype=torch.long, device=scores.device).index_add_(0, group, positive)
    negatives = sizes - positives
    below = negatives.cumsum(0) - negatives  # negatives of this rank with a lower score than the group's

    mine = torch.stack([positives.sum(), negatives.sum()])
    totals = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, mine)
    below = below + sum(int(total[1]) for total in totals[: dist.get_rank()])  # lower ranks: lower scores
    twice = (positives * (2 * below + negatives)).sum().reshape(1)  # twice the pairs: a tie counts half
    dist.all_reduce(twice)
    clicks, others = (int(sum(total[i] for total in totals)) for i in (0, 1))
    return twice.item() / (2 * clicks * others) if clicks and others else None


def _exchange_by_value(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange rows so that each rank has one range of scores: ranges rise with the rank, and equal scores
    are on one rank.

    The cuts between ranges are quantiles of 64 x (number of ranks) scores that each rank picks from its own:
    they only balance the ranks, the result is exact whatever they are.
    """
    world = dist.get_world_size()
    if world == 1:
        return scores, labels
    samples = 64 * world
    picks = torch.full((samples,), math.nan, device=scores.device)
    if len(scores):
        places = torch.linspace(0, len(scores) - 1, samples, device=scores.device).long()
        picks = torch.sort(scores[places])[0]
    gathered = [torch.empty_like(picks) for _ in range(world)]
    dist.all_gather(gathered, picks)
    known = torch.cat(gathered)
    known = torch.sort(known[~known.isnan()])[0]
    if not len(known):
        return scores, labels
    cuts = known[[len(known) * rank // world for rank in range(1, world)]]
    owner = torch.bucketize(scores, cuts, right=True)
    order = torch.argsort(owner, stable=True)
    send_counts = torch.bincount(owner, minlength=world)
    receive_counts = torch.empty_like(send_counts)
    dist.all_to_all_single(receive_counts, send_counts)
    sent, received = send_counts.tolist(), receive_counts.tolist()

    def exchange_values(values: torch.Tensor) -> torch.Tensor:
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values[order].contiguous(), received, sent)
        return out

    return exchange_values(scores), exchange_values(labels)
