"""What a run prints and records: progress bar, plain lines, TensorBoard, counts of ids, unused options."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.terminal import run_on_terminal

from dlrm.config.parser import parse_options
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.unused_options import list_unused_options

ROOT = Path(__file__).parents[2]
HOTS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 10, 27, 10, 3, 1, 1]


def test_a_bar_on_a_terminal_and_lines_elsewhere(toy: Path, tmp_path: Path, train: Any) -> None:
    words = [
        "--preset",
        "toy",
        "--in_memory_binary_criteo_path",
        toy,
        "--print_progress",
        "--report_every",
        5,
    ]
    seen = run_on_terminal("-m", "dlrm.train", *words, "--output_dir", tmp_path / "terminal")
    assert re.search(r"train:\s+100%\|█+\| 59/59 \[\d+:\d+<00:00", seen)
    assert re.search(r"loss 0\.\d+, lr 0\.02, [\d,]+ samples/s, step_time 0\.\d{6}", seen)
    assert "test: samples 1500" in seen
    plain = train(1, *words)
    assert "%|" not in plain.err[0] + plain.out[0]
    last = r"epoch 0 step 59/59: loss 0\.\d+, lr 0\.02, [\d,]+ samples/s, step_time 0\.\d{6}, eta 0:00:00"
    assert re.search(last, plain.out[0])


def test_tensorboard_has_the_reports(toy: Path, train_here: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train_here(
        "--preset", "toy", "--in_memory_binary_criteo_path", toy, "--tensorboard", "--report_every", 10
    )  # fmt: skip
    board = EventAccumulator(str(done.folder / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("train/loss")]
    steps = [line["step"] for line in done.metrics if "loss" in line]
    assert found == [pytest.approx(pair) for pair in zip(steps, done.losses, strict=True)]
    assert board.Scalars("val/auroc")[0].value == pytest.approx(done.results["val_scores"][0])
    assert len(board.Scalars("test/auroc")) == 1


def test_multi_hot_ids_are_made_and_counted(toy: Path, train_here: Any) -> None:
    done = train_here(
        "--preset", "toy", "--in_memory_binary_criteo_path", toy,
        "--multi_hot_sizes", ",".join(map(str, HOTS)), "--collect_multi_hot_freqs_stats",
        "--batch_size", 1000, "--max_steps", 6,
    )  # fmt: skip
    stored = np.concatenate([np.load(toy / f"day_{day}_sparse.npy") for day in range(5)])[:6000]
    before = np.load(done.folder / "stats_pre_hash_0_uniform.npz")
    after = np.load(done.folder / "stats_post_hash_0_uniform.npz")
    for feature, many in enumerate(HOTS):
        counts = before[str(feature)]
        assert np.array_equal(counts, np.bincount(stored[:, feature], minlength=len(counts)))
        assert after[str(feature)].sum() == 6000 * many
        if many == 1:
            assert np.array_equal(after[str(feature)], counts)


def test_settings_that_do_nothing_are_named(train: Any) -> None:
    done = train(
        2, "--num_embeddings", 20, "--limit_train_batches", 2, "--mmap_mode", "--dcn_num_layers", 2,
        "--loss_scale", 8, "--lr_decay_start", 5, "--learning_rate", 0.1, "--batch_size", 8,
    )  # fmt: skip
    assert done.codes == [0, 0], done.err
    warnings = done.err[0].splitlines()
    for option in ("--mmap_mode", "--dcn_num_layers", "--loss_scale", "--lr_decay_start"):
        assert sum(option + ":" in line for line in warnings) == 1, warnings
    assert not done.err[1]


@pytest.mark.parametrize(
    "words, why", [(["--source", "stream"], "the source is stream"), ([], None), (["--source", "mmap"], None)]
)
def test_mapping_beside_another_source_is_reported(words: list[str], why: str | None) -> None:
    common = ["--in_memory_binary_criteo_path", "x", "--mmap_mode"]
    warnings = list_unused_options(parse_options(Config, [*common, *words], "train", ""), "cpu")
    assert warnings == ([f"--mmap_mode: not used, {why}"] if why else [])


@pytest.mark.parametrize(
    "words", [["--mmap_mode"], ["--shuffle_training_set"], ["--source", "memory"]], ids=str
)
def test_every_source_serves_the_same_rows(words: list[str], toy: Path, train_here: Any) -> None:
    common = ["--preset", "toy", "--in_memory_binary_criteo_path", toy, "--report_every", 1, "--max_steps", 8]
    streamed, other = train_here(*common), train_here(*common, *words)
    if "--shuffle_training_set" in words:
        assert streamed.losses[0] != other.losses[0]
    else:
        assert streamed.losses == other.losses
    assert streamed.results["test_samples"] == other.results["test_samples"] == 1500


def test_shuffled_batches_have_the_same_rows(toy: Path, train_here: Any) -> None:
    common = ["--preset", "toy", "--in_memory_binary_criteo_path", toy, "--report_every", 1, "--max_steps", 5]
    plain, shuffled = train_here(*common), train_here(*common, "--shuffle_batches")
    assert plain.losses != shuffled.losses  # another order of addition
    assert plain.losses == pytest.approx(shuffled.losses, abs=1e-5)
