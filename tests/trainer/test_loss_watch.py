"""A training that learns nothing says so once, while it runs; one that learns says nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.runtime.errors import UserError
from dlrm.trainer.loss_watch import LossWatch, compute_binary_entropy


def watch(losses: Iterable[float], share: float | None = 0.5, total: int = 1000, first: int = 1) -> list[str]:
    """The warnings about these losses, reported at step 1 and then every 20 steps."""
    seen, warnings = LossWatch(total), []
    for number, loss in enumerate(losses):
        step = first + 20 * number
        warnings.append(
            seen.add_report({"step": step, "loss": loss, "samples": 64 * step, "click_share": share})
        )
    return [line for line in warnings if line]


def test_a_loss_that_falls_is_fine() -> None:
    assert watch(np.linspace(0.7, 0.5, 60)) == []
    assert watch(np.linspace(0.7, 0.12, 60), share=0.03) == []


def test_a_rise_at_the_beginning_is_fine() -> None:
    assert watch([0.69, 0.9, 0.8, *np.linspace(0.68, 0.5, 50)]) == []
    # of a run that learned: its first batch of 64 rows was a lucky one, and the warm-up takes 28 steps
    assert watch([0.6884, 0.7083, 0.7075, 0.6939, 0.6514, 0.6445, *np.linspace(0.64, 0.6, 50)]) == []


def test_a_loss_above_its_first_value_is_told_once_after_50_steps() -> None:
    warnings = watch([0.697, 1.7, 1.7, 1.7, 1.7, 1.7, 1.7])
    assert warnings == ["the loss has stayed above its first value, 0.6970, for 60 steps and is 1.7000"]


def test_a_resumed_training_has_no_first_value() -> None:
    assert watch([0.4, 0.41, 0.41, 0.41, 0.41, 0.41], first=101) == []


@pytest.mark.parametrize("share", [0.5, 0.03])
def test_a_loss_at_the_entropy_is_told(share: float) -> None:
    warnings = watch([0.7] + [compute_binary_entropy(share) * 1.001] * 50, share)
    assert len(warnings) == 1 and "no better than the same prediction for every row" in warnings[0]
    assert watch([0.7] + [compute_binary_entropy(share) * 0.98] * 50, share) == []


def test_without_labels_only_the_first_value_counts() -> None:
    assert watch([0.7] + [0.6931] * 50, share=None) == []


def test_a_diverging_run_is_warned_and_goes_on(toy: Path, train_here: Any, capfd: Any) -> None:
    done = train_here(
        "--in_memory_binary_criteo_path", toy, "--seed", 0, "--max_steps", 120, "--batch_size", 64,
        "--learning_rate", 0.0, "--report_every", 10,
    )  # fmt: skip
    warnings = [line for line in capfd.readouterr().err.splitlines() if "the loss" in line]
    assert (
        len(warnings) == 1
        and "try --learning_rate 0.1" in warnings[0]
        and "or --preset kaggle" in warnings[0]
    ), warnings
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    share = [line["click_share"] for line in lines if "loss" in line]
    assert lines[-1]["step"] == 120 and all(0.1 < each < 0.6 for each in share)


def test_after_nan_the_metrics_have_it_and_the_error_says_why(
    toy: Path, train_here: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the loss became nan in steps .*: lower --learning_rate"):
        train_here(
            "--in_memory_binary_criteo_path", toy, "--batch_size", 1024, "--learning_rate", 3000.0,
            "--report_every", 5,
        )  # fmt: skip
    (metrics,) = tmp_path.glob("here*/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert not np.isfinite(last["loss"])
