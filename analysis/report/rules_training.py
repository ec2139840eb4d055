"""Rules over the training itself, from metrics.jsonl: a loss that does not fall.

The same two as `dlrm/trainer/loss_watch.py` has while the run goes on, here over the whole run.
"""

import math

import polars as pl

from analysis.report.facts import TRAIN, Facts, Finding

ABOVE_STEPS = 50  # steps at least, up to the last, with a loss above the first one
LEAST_STEPS = 100  # of a training that is compared with the entropy
AT_ENTROPY = 0.995
FALLS = 0.99
REMEDY = (
    "Train again: everything else in this report is about a run that learned nothing. {} Or let the options "
    "be chosen for the data, with --defaults dataset."
)
LOWER = "Try --learning_rate 0.1 with sgd, 0.02 with adagrad, or --preset kaggle."


def find_no_learning(f: Facts) -> Finding | None:
    """The loss became NaN, ended above its first value, or sits at what a constant prediction has."""
    if not {"step", "loss"} <= set(f.metrics.columns):
        return None
    reports = f.metrics.drop_nulls(["step", "loss"]).sort("step", maintain_order=True)
    if not len(reports):
        return None
    text, evidence = _find_trouble(reports)
    if not text:
        return None
    lost = sum(f.find_longest_phase(phase) for phase in TRAIN)
    advice = LOWER if f.is_own_run else "Lower the learning rate."
    return Finding("no_learning", lost, text, REMEDY.format(advice), evidence)


def _find_trouble(reports: pl.DataFrame) -> tuple[str, dict[str, object]]:
    """(what is wrong in one sentence, its numbers); an empty text where nothing is."""
    steps, losses = reports["step"].to_list(), reports["loss"].to_list()
    last, first = losses[-1], losses[0]
    evidence: dict[str, object] = {"first_loss": first, "last_loss": last, "step": steps[-1]}
    if not math.isfinite(last):
        return f"The loss became {last} at step {steps[-1]}, and the training ended.", evidence
    fine = [step for step, loss in zip(steps, losses, strict=True) if loss <= first]
    above = steps[-1] - fine[-1] if fine and math.isfinite(first) else 0
    if above >= ABOVE_STEPS:
        text = f"The loss stayed above its first value, {first:.4f}, for the last {above:,} steps."
        return text, evidence | {"steps_above": above}
    if "click_share" not in reports.columns or steps[-1] < LEAST_STEPS:
        return "", evidence
    late = reports.filter((pl.col("step") > steps[-1] / 2) & pl.col("click_share").is_not_null())
    share = late["click_share"].mean()
    if late.height < 2 or not isinstance(share, float) or not 0 < share < 1:
        return "", evidence
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    loss = float(late["loss"].to_numpy().mean())
    half = late.height // 2
    before, after = (float(part["loss"].to_numpy().mean()) for part in (late[:half], late[half:]))
    if not loss >= AT_ENTROPY * entropy or (half and after < FALLS * before):
        return "", evidence
    text = (
        f"The model learned no more than the share of clicks: in the second half of the training the loss is "
        f"{loss:.4f}, and the same prediction for every row would have {entropy:.4f}."
    )
    return text, evidence | {"loss": loss, "entropy": entropy}
