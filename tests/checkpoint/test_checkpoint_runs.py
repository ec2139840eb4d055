"""Checkpoints of real trainings: when they are made, and what can be done with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.ranks import metrics

from dlrm.checkpoint.folder import list_checkpoints, read_description
from dlrm.runtime.errors import UserError

TOY = ["--preset", "toy", "--report_every", 5, "--batch_size", 384]


def words(toy: Path, *more: object) -> list[object]:
    return [*TOY, "--in_memory_binary_criteo_path", toy, *more]


def list_saved_steps(root: Path) -> list[int]:
    return sorted(read_description(path).state["step"] for path in list_checkpoints(root))


def pick_numbers(done: Any) -> dict[str, Any]:
    return {key: done.results[key] for key in ("val_scores", "test_auroc", "steps", "samples")}


def test_they_come_when_asked_for(toy: Path, train_here: Any) -> None:
    def made(*more: object) -> list[int]:
        done = train_here(*words(toy, "--max_steps", 10, "--keep_checkpoints", 0, *more))
        return list_saved_steps(done.folder / "checkpoints")

    assert made() == []
    assert made("--checkpoint_every_steps", 4) == [4, 8, 10]
    assert made("--save_initial_model") == [0, 10]
    assert made("--save_model_after_each_eval", "--validation_freq_within_epoch", 3) == [3, 6, 9, 10]
    assert len(made("--checkpoint_every_minutes", 0.005)) >= 1


def test_epoch_ends_and_another_folder(toy: Path, tmp_path: Path, train_here: Any) -> None:
    more = ["--epochs", 2, "--limit_train_batches", 5, "--checkpoint_dir", tmp_path / "a place"]
    train_here(*words(toy, *more))
    assert list_saved_steps(tmp_path / "a place") == [5, 10]
    assert [read_description(path).state["epoch"] for path in list_checkpoints(tmp_path / "a place")] == [
        2,
        1,
    ]
    scores = [read_description(path).score for path in list_checkpoints(tmp_path / "a place")]
    assert all(score is not None and 0 < score < 1 for score in scores)


def test_more_epochs_go_on_where_fewer_ended(toy: Path, tmp_path: Path, train_here: Any) -> None:
    more = ["--limit_train_batches", 12, "--shuffle_training_set"]
    whole = train_here(*words(toy, "--epochs", 3, *more))
    kept = ["--checkpoint_dir", tmp_path / "kept"]
    train_here(*words(toy, "--epochs", 1, *more, *kept))
    done = train_here(*words(toy, "--epochs", 3, *more, *kept))
    assert pick_numbers(done) == pick_numbers(whole)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("more", [["--shuffle_batches"], ["--source", "memory"], ["--amp", "bf16"]], ids=str)
def test_the_middle_of_an_epoch_to_the_bit(
    toy: Path, tmp_path: Path, train_here: Any, optimizer: str, more: list[object]
) -> None:
    more = ["--max_steps", 20, "--optimizer", optimizer, "--validation_freq_within_epoch", 8, *more]
    whole = train_here(*words(toy, *more))
    kept = ["--checkpoint_dir", tmp_path / "kept", "--keep_checkpoints", 0]
    train_here(*words(toy, *more, *kept, "--checkpoint_every_steps", 7, "--max_steps", 9))
    (gone,) = [path for path in list_checkpoints(tmp_path / "kept") if path.name.endswith("-9")]
    shutil.rmtree(gone)  # as if killed before: on from step 7, in the middle of a report
    done = train_here(*words(toy, *more, *kept))
    assert pick_numbers(done) == pick_numbers(whole)
    assert metrics(done.folder) == metrics(whole.folder)[-len(metrics(done.folder)) :]


def test_a_damaged_one_is_passed_over(
    toy: Path, tmp_path: Path, train_here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--max_steps", 12]
    whole = train_here(*words(toy, *more))
    kept = ["--checkpoint_dir", tmp_path / "kept", "--checkpoint_every_steps", 4]
    train_here(*words(toy, *more, *kept, "--max_steps", 8))
    newest = list_checkpoints(tmp_path / "kept")[0]
    data = newest / "rank00000.safetensors"
    with open(data, "r+b") as file:
        file.seek(data.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    done = train_here(*words(toy, *more, *kept))
    output = capsys.readouterr()
    assert "skipped" in output.err and str(data) in output.err and "checksum" in output.err
    assert "-step-4: step 4" in output.out
    assert pick_numbers(done) == pick_numbers(whole)
    for path in list_checkpoints(tmp_path / "kept"):
        (path / "checkpoint.json").unlink()
    with pytest.raises(UserError, match="none of .* checkpoints can be read"):
        train_here(*words(toy, *more, *kept))


def test_test_only_and_going_on_from_a_given_one(toy: Path, tmp_path: Path, train_here: Any) -> None:
    whole = train_here(*words(toy, "--max_steps", 12, "--checkpoint_every_steps", 6))
    given = ["--load_checkpoint_path", whole.folder / "checkpoints"]
    tested = train_here(*words(toy, "--mode", "test", *given))
    assert tested.results["test_auroc"] == whole.results["test_auroc"]
    assert tested.results["test_samples"] == whole.results["test_samples"] == 1500
    sixth = [path for path in list_checkpoints(whole.folder / "checkpoints") if path.name.endswith("-6")][0]
    on = train_here(*words(toy, "--max_steps", 12, "--load_checkpoint_path", sixth))
    assert pick_numbers(on) == pick_numbers(whole)
    anew = train_here(*words(toy, "--max_steps", 5, "--load_model_only", *given))
    assert anew.results["steps"] == 5
    with pytest.raises(UserError, match="--load_checkpoint_path"):
        train_here(*words(toy, "--mode", "test"))
    with pytest.raises(UserError, match="no checkpoint in it: give a run folder"):
        train_here(*words(toy, "--load_checkpoint_path", tmp_path / "nothing"))


def test_what_does_not_fit_is_refused(toy: Path, tmp_path: Path, train_here: Any) -> None:
    kept = ["--checkpoint_dir", tmp_path / "kept", "--max_steps", 2]
    train_here(*words(toy, *kept))
    for more, output in (
        (["--embedding_dim", 32, "--dense_arch_layer_sizes", "64,32"], "model options"),
        (["--optimizer", "rowwise_adagrad"], "optim"),
        (["--interaction_type", "dcn"], "another model|model options"),
        (["--shuffle_training_set"], "--shuffle_training_set"),
    ):
        with pytest.raises(UserError, match=output):
            train_here(*words(toy, *kept, "--max_steps", 4, *more))
    done = train_here(*words(toy, *kept, "--resume", "never", "--embedding_dim", 32,
                             "--dense_arch_layer_sizes", "64,32"))  # fmt: skip
    assert done.results["steps"] == 2


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "batch", "sharding"), [(1, 384, None), (3, 128, "row_wise"), (2, 192, "data_parallel")]
)
def test_another_world_and_plan(
    toy: Path, tmp_path: Path, train: Any, ranks: int, batch: int, sharding: str | None
) -> None:
    more = ["--batch_size", 192, "--max_steps", 30, "--report_every", 1]
    whole = train(2, *words(toy, *more))
    assert whole.codes == [0, 0], whole.err
    kept = ["--checkpoint_dir", tmp_path / "kept"]
    assert train(2, *words(toy, *more, *kept, "--max_steps", 13)).codes == [0, 0]
    constraints = {f"t_cat_{i}": {"sharding": sharding} for i in range(0, 26, 2)} if sharding else {}
    (tmp_path / "plan.json").write_text(json.dumps(constraints))
    other = ["--batch_size", batch, "--sharding_file", tmp_path / "plan.json"]
    done = train(ranks, *words(toy, *more, *kept, *other))
    assert done.codes == [0] * ranks, done.err
    assert done.results["steps"] == 30 and done.results["samples"] == whole.results["samples"]
    assert done.results["test_auroc"] == pytest.approx(whole.results["test_auroc"], abs=1e-4)
    theirs = {line["step"]: line["loss"] for line in metrics(whole.folder) if "loss" in line}
    mine = {line["step"]: line["loss"] for line in metrics(done.folder) if "loss" in line}
    assert set(mine) < set(theirs)
    assert all(mine[step] == pytest.approx(theirs[step], rel=1e-4) for step in mine)
