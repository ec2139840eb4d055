"""The options that NVIDIA's DLRM has and MLCommons' lacks: what a training with them does."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.ranks import words_of_each_step

from dlrm.runtime.errors import UserError


def table_rows(folder: Path) -> list[int]:
    """Rows of each table, as sharded."""
    plan = json.loads((folder / "plan.json").read_text())
    return [sum(shard["size"][0] for shard in plan[f"t_cat_{table}"]["shards"]) for table in range(len(plan))]


def test_large_tables_are_capped_and_their_ids_folded(toy: Path, train_here: Any) -> None:
    sizes = json.loads((toy / "meta.json").read_text())["table_sizes"]
    capped = [min(size, 100) for size in sizes]
    assert 0 < sum(size > 100 for size in sizes) < len(sizes)
    words = words_of_each_step(toy, "--max_steps", 3, "--no-evaluate_on_epoch_end")
    done = train_here(*words, "--max_table_size", 100)
    listed = train_here(*words, "--num_embeddings_per_feature", ",".join(map(str, capped)))
    assert table_rows(done.folder) == capped
    assert done.losses == listed.losses and done.results["test_auroc"] == listed.results["test_auroc"]
    whole = train_here(*words, "--max_table_size", max(sizes))
    assert table_rows(whole.folder) == [max(size, 1) for size in sizes]


def test_training_stops_once_the_test_set_reaches_an_auc(toy: Path, train: Any) -> None:
    """On two ranks; 59 steps of 256 rows are an epoch. No validation before half of one."""
    done = train(
        2,
        *words_of_each_step(toy, "--batch_size", 128, "--epochs", 5, "--validation_freq_within_epoch", 7),
        *["--validation_split", "test", "--validation_auroc", 0.6, "--test_after", 0.5],
        *["--benchmark_warmup_steps", 5, "--no-evaluate_on_training_end"],
    )  # fmt: skip
    assert done.codes == [0, 0], done.err
    found = [line for line in done.metrics if "split" in line]
    assert {line["split"] for line in found} == {"test"} and found[0]["step"] == 35
    scores = [line["auroc"] for line in found]
    assert scores[-1] >= 0.6 and all(score < 0.6 for score in scores[:-1])
    results = done.results
    assert results["steps"] == found[-1]["step"] < 5 * 59
    assert results["best_auroc"] == results["best_score"] == results["test_auroc"] == max(scores)
    assert results["best_epoch"] == pytest.approx(results["steps"] / 59)
    timed = results["samples_per_second"] * results["seconds"]["train"]
    assert timed == pytest.approx(results["samples"] - 5 * 256)
    steps = [line for line in done.metrics if "loss" in line]
    assert all(line["step_time"] == pytest.approx(256 / line["samples_per_second"]) for line in steps)


def test_a_resumed_run_remembers_the_best_validation(toy: Path, train_here: Any, run_ranks: Any) -> None:
    """One diverges after its first epoch: the best one is not the last."""
    words = words_of_each_step(
        toy, "--optimizer", "sgd", "--learning_rate", 0.1, "--checkpoint_every_steps", 1000,
        "--change_lr", "--lr_change_point", 1.0, "--lr_after_change_point", 8,
    )  # fmt: skip
    first = run_ranks(1, "dlrm.train", *words)
    assert first.results["best_epoch"] == 1 and len(first.results["val_scores"]) == 1
    second = run_ranks(1, "dlrm.train", *words, "--epochs", 3)
    assert len(second.results["val_scores"]) == 3
    assert second.results["best_auroc"] == first.results["best_auroc"] == second.results["val_scores"][0]
    assert (
        second.results["best_epoch"] == 1
        and max(second.results["val_scores"]) == second.results["best_score"]
    )


def test_the_warm_up_starts_where_its_factor_says(toy: Path, train_here: Any) -> None:
    words = ["--lr_schedule", "nvidia", "--lr_warmup_steps", 4, "--learning_rate", 0.08, "--max_steps", 5]
    done = train_here(*words_of_each_step(toy, *words, "--lr_warmup_factor", 1))
    rates = [line["lr"] for line in done.metrics if "loss" in line]
    assert rates == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.08])


def test_a_share_of_the_rows_in_batches_of_random_order(toy: Path, train: Any, tmp_path: Path) -> None:
    """Stopped and resumed, it is the run that was not; a tenth of 15,000 rows are six steps of two ranks."""
    words = words_of_each_step(
        toy, "--batch_size", 128, "--dataset_subset", 0.1, "--shuffle_batch_order", "--epochs", 2
    )
    words += ["--no-evaluate_on_training_end", "--checkpoint_dir", tmp_path / "saved"]
    straight = train(2, *words, "--no-checkpoint_epochs")
    assert straight.codes == [0, 0], straight.err
    assert straight.results["steps"] == 12 and straight.results["samples"] == 2 * 1500
    plain = train(2, *[word for word in words[:-2] if word != "--shuffle_batch_order"])
    assert straight.losses[:6] != plain.losses[:6]
    words[-1] = tmp_path / "again"
    stopped = train(2, *words, "--max_steps", 8)
    resumed = train(2, *words, "--load_checkpoint_path", tmp_path / "again")
    assert stopped.losses + resumed.losses == straight.losses


@pytest.mark.parametrize(
    "words",
    [["--dataset_subset", 0], ["--dataset_subset", 1.5], ["--lr_warmup_factor", -1], ["--test_after", -1]],
)
def test_a_wrong_value_is_named(words: list[object], train_here: Any) -> None:
    with pytest.raises(UserError, match=str(words[0])):
        train_here("--num_embeddings", 9, *words)
