"""NVIDIA's commands as its README has them, on a dataset of ours."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

MODULE = "dlrm.scripts.main"
SMALL = ["--embedding_dim=8", "--bottom_mlp_sizes=16,8", "--top_mlp_sizes", "16,1", "--nofp16"]
SMALL += ["--test_batch_size", "500"]


def test_train_test_and_benchmark(toy: Path, tmp_path: Path, run_ranks: Any) -> None:
    """Two ranks share the batch; the two other modes find the model in the checkpoint."""
    saved = tmp_path / "saved"
    trained = run_ranks(
        2, MODULE, "--mode", "train", "--dataset", toy, *SMALL, "--batch_size", 256, "--lr=1",
        "--warmup_steps=20", "--test_freq=20", "--auc_threshold", 0.6, "-shuffle", "--print_freq", 10,
        "--max_table_size", 90, "--hash_indices", "--save_checkpoint_path", saved,
    )  # fmt: skip
    assert trained.codes == [0, 0], trained.err
    config = json.loads((trained.folder / "config.json").read_text())
    assert config["data"]["batch_size"] == 128 and config["data"]["shuffle_batch_order"]
    assert config["optim"]["lr_decay_start"] == 64000 and config["run"]["seed"] == 12345
    assert {line["split"] for line in trained.metrics if "split" in line} == {"test"}
    assert re.search(r"loss 0\.\d+, lr 0\.5, .* step_time \d+\.\d{6}, eta \d:\d\d:\d\d", trained.out[0])
    best = trained.results["best_auroc"]
    assert 0 < trained.results["best_epoch"] <= 1

    words = ["--dataset", toy, "--load_checkpoint_path", saved, "--nofp16", "--test_batch_size=500"]
    tested = run_ranks(1, MODULE, "--mode", "test", *words, output=False)
    assert tested.codes == [0], tested.err
    assert f"auroc {best:.6g}" in tested.out[0]
    timed = run_ranks(
        1, MODULE, "--mode", "inference_benchmark", *words, "--inference_benchmark_batch_sizes=1,64,999999",
        "--inference_benchmark_steps=3", output=False,
    )  # fmt: skip
    assert timed.codes == [0] and "batch_sizes 999999: the test set has" in timed.err[0], timed.err
    found = json.loads(timed.out[0].splitlines()[-1])
    assert [each["batch_size"] for each in found["results"]] == [1, 64]
    assert found["model"]["embedding_dim"] == 8 and found["results"][0]["iterations"] == 3


def test_synthetic_data_and_steps_left_out_of_throughput(run_ranks: Any) -> None:
    sizes = ",".join(["20"] * 26)
    done = run_ranks(
        1, MODULE, *SMALL, "--synthetic_dataset", "--synthetic_dataset_table_sizes", sizes, "--batch_size=64",
        "--max_steps", 12, "--benchmark_warmup_steps", 4, "--lr", 0.1,
    )  # fmt: skip
    assert done.codes == [0], done.err
    results = done.results
    assert results["steps"] == 12
    timed = results["samples_per_second"] * results["seconds"]["train"]
    assert timed == pytest.approx((12 - 4) * 64)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--dataset . --batch_size 3", "--batch_size 3: must be a multiple of the 2 ranks"),
        ("--mode train", "give --dataset"),
        ("--dataset . --lrr 3", "lrr"),
        ("--dataset . --epochs many", "epochs"),
    ],
)
def test_mistakes_in_one_line(words: str, says: str, run_ranks: Any) -> None:
    done = run_ranks(2, MODULE, *words.split(), output=False)
    assert done.codes == [2, 2]
    assert says in done.err[0] and done.err[0].count("\n") == 1 and not done.err[1]


def test_binary_files_are_refused_with_the_remedy(tmp_path: Path, run_ranks: Any) -> None:
    (tmp_path / "train_data.bin").write_bytes(b"")
    done = run_ranks(1, MODULE, "--dataset", tmp_path, output=False)
    assert done.codes == [2] and "python -m dlrm.prep run" in done.err[0]
