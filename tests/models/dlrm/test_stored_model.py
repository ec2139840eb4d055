"""Testing and timing a checkpoint: its model and table sizes come from the checkpoint itself."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dlrm.models.dlrm.stored_model import read_table_sizes

MODEL = """--interaction_type dcn --dcn_num_layers 2 --dcn_low_rank_dim 4 --embedding_dim 8
--dense_arch_layer_sizes 16,8 --over_arch_layer_sizes 16,1 --max_table_size 90
--optimizer adagrad --learning_rate 0.02"""


def test_a_table_of_too_long_a_number_is_none() -> None:
    names = ["model/x.t_cat_3.weight", f"model/x.t_cat_{'9' * 5000}.weight"]
    found: Any = SimpleNamespace(tensors=[SimpleNamespace(name=name, shape=(7, 8)) for name in names])
    assert read_table_sizes(found) == (7,)


@pytest.fixture
def trained(toy: Any, train: Any) -> Any:
    """Two ranks; with a model that no default or preset gives."""
    words = ["--in_memory_binary_criteo_path", toy, "--batch_size", 128, "--max_steps", 12]
    done = train(2, *words, *MODEL.split(), "--checkpoint_every_steps", 100, "--evaluate_on_training_end")
    assert done.codes == [0, 0], done.err
    return done


def test_model_and_sizes_come_from_the_checkpoint(trained: Any, toy: Any, train: Any) -> None:
    words = ["--load_checkpoint_path", trained.folder, "--in_memory_binary_criteo_path", toy]
    tested = train(1, "--mode", "test", *words)
    assert tested.codes == [0], tested.err
    assert tested.results["test_auroc"] == pytest.approx(trained.results["test_auroc"], abs=1e-6)
    assert json.loads((tested.folder / "config.json").read_text())["model"]["embedding_dim"] == 8

    timed = train(
        2, "--mode", "inference_benchmark", *words, "--inference_benchmark_batch_sizes", "2,1500",
        "--inference_benchmark_steps", 5, "--benchmark_warmup_steps", 2,
    )  # fmt: skip
    assert timed.codes == [0, 0], timed.err
    found = json.loads(timed.out[0].splitlines()[-1])
    assert found["model"]["interaction_type"] == "dcn" and found["world_size"] == 2 and not timed.out[1]
    assert timed.results["inference_benchmark"] == found["results"]
    assert [each["batch_size"] for each in found["results"]] == [2, 1500]
    for each in found["results"]:
        assert each["iterations"] == 5
        assert each["samples_per_second"] == pytest.approx(
            each["batch_size"] / each["latency_ms"]["mean"] * 1e3, rel=1e-6
        )
    # with the weights of the checkpoint; calibration is the mean prediction over the mean label
    labels = np.load(toy / "day_5_labels.npy")[1500:]
    expected = trained.results["evaluations"]["test"]["calibration"] * labels.mean()
    assert found["results"][1]["mean_prediction"] == pytest.approx(expected, rel=2e-4)
    assert not (timed.folder / "checkpoints").exists()


def test_contradictions_in_one_line(trained: Any, toy: Any, train: Any) -> None:
    words = [
        "--mode", "test", "--load_checkpoint_path", trained.folder, "--in_memory_binary_criteo_path", toy,
    ]  # fmt: skip
    done = train(2, *words, "--embedding_dim", 32)
    assert done.codes == [2, 2] and "--embedding_dim 32" in done.err[0] and "has 8" in done.err[0]
    assert done.err[0].count("\n") == 1 and not done.err[1]


def test_new_weights_and_random_rows(train: Any) -> None:
    words = ["--mode", "inference_benchmark", "--num_embeddings", 50, "--inference_benchmark_steps", 3]
    done = train(1, *words, "--inference_benchmark_batch_sizes", "1,5000")
    assert done.codes == [0], done.err
    assert [each["batch_size"] for each in done.results["inference_benchmark"]] == [1, 5000]
    wrong = train(2, *words)
    assert wrong.codes == [2, 2]
    assert "--inference_benchmark_batch_sizes 1: not a multiple of the 2 ranks" in wrong.err[0] + wrong.err[1]


@pytest.mark.parametrize("columns", [(0, 3), (5, 7)])
def test_a_model_of_other_columns(other_columns: Any, train: Any, columns: tuple[int, int]) -> None:
    dataset = ["--in_memory_binary_criteo_path", other_columns(*columns) / "npy"]
    words = ["--embedding_dim", 8, "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "16,1"]
    words += ["--batch_size", 100, "--optimizer", "adagrad", "--max_steps", 8]
    made = train(2, *dataset, *words, "--checkpoint_every_steps", 100, "--evaluate_on_training_end")
    assert made.codes == [0, 0], made.err
    saved = ["--load_checkpoint_path", made.folder]
    tested = train(1, "--mode", "test", *saved, *dataset)
    assert tested.codes == [0], tested.err
    assert tested.results["test_auroc"] == pytest.approx(made.results["test_auroc"], abs=1e-6)
    timed = train(
        1, "--mode", "inference_benchmark", *saved, "--inference_benchmark_batch_sizes", 50,
        "--inference_benchmark_steps", 2,
    )  # fmt: skip
    assert timed.codes == [0] and timed.results["inference_benchmark"][0]["batch_size"] == 50, timed.err
