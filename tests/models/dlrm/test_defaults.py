"""Defaults that fit the dataset: what is chosen, what wins over it, and when MLCommons' own are warned of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.config.parser import parse_options
from dlrm.data.criteo import DatasetMeta
from dlrm.models.dlrm import defaults
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.presets import PRESETS
from dlrm.trainer.spec import ChosenOptions

MEMORY = 64 << 30  # bytes of each rank
CRITEO_1TB = 4_373_472_329  # rows
LARGE_TABLES = [227_605_432, 130_229_467, 292_775_614, 40_790_948, 187_188_510] + [10_000] * 21


def dataset(folder: Path, rows: list[int], sizes: list[int] | None = None) -> Path:
    folder.mkdir()
    DatasetMeta(rows, sizes or [100] * 26).save(folder)
    return folder


def choose_for(folder: Path, *words: object, ranks: int = 1) -> ChosenOptions:
    argv = ["--in_memory_binary_criteo_path", str(folder), *map(str, words)]
    cfg = parse_options(Config, argv, "python -m dlrm.train", "", PRESETS)
    return defaults.choose_options(cfg, ranks, ranks * MEMORY)


def fit_to_dataset(folder: Path, *words: object, ranks: int = 1) -> ChosenOptions:
    return choose_for(folder, "--defaults", "dataset", *words, ranks=ranks)


@pytest.mark.parametrize("rows", [5_000, 20_000, 460_000, 45_840_617, CRITEO_1TB])
@pytest.mark.parametrize("ranks", [1, 3, 8, 80])
def test_any_size_on_any_number_of_ranks_is_sensible(tmp_path: Path, rows: int, ranks: int) -> None:
    chosen = fit_to_dataset(dataset(tmp_path / "d", [rows, rows // 23]), ranks=ranks)
    data, optim = chosen.options.data, chosen.options.optim
    batch = data.batch_size * ranks
    assert 32 <= batch <= 65_536 + ranks  # what all ranks together take, whatever their number
    steps = -(-rows // batch)
    assert steps >= 50 and 0.005 <= optim.learning_rate <= 0.02
    assert 0 < optim.lr_warmup_steps < optim.lr_decay_start < steps
    assert optim.lr_decay_start + optim.lr_decay_steps == steps
    assert chosen.summary.startswith(f"chosen for {rows:,} rows on {ranks} rank")
    assert f"batch {data.batch_size:,} " in chosen.summary and "(yours win)" in chosen.summary
    assert f"learning rate {optim.learning_rate:g}" in chosen.summary


def test_the_full_dataset_gets_the_batch_of_mlperf(tmp_path: Path) -> None:
    chosen = fit_to_dataset(dataset(tmp_path / "d", [CRITEO_1TB // 24] * 24), ranks=8)
    assert chosen.options.data.batch_size == 8192 and chosen.options.optim.learning_rate == 0.005


@pytest.mark.parametrize(
    ("words", "group", "name", "value"),
    [
        (["--batch_size", 7], "data", "batch_size", 7),
        (["--learning_rate", 0.3], "optim", "learning_rate", 0.3),
        (["--learning_rate", 0.3], "optim", "optimizer", "sgd"),  # the rate is that of MLCommons' optimizer
        (["--optimizer", "adagrad"], "optim", "optimizer", "adagrad"),
        (["--lr_warmup_steps", 9], "optim", "lr_decay_steps", 0),
        (["--test_batch_size", 11], "data", "test_batch_size", 11),
        (["--max_table_size", 12], "model", "max_table_size", 12),
        (["--preset", "kaggle"], "optim", "learning_rate", 0.1),
        (["--preset", "kaggle"], "data", "batch_size", 128),
        (["--batch_size", 32, "--learning_rate", 15.0], "optim", "learning_rate", 15.0),  # equal to a default
    ],
)
def test_what_is_given_wins(tmp_path: Path, words: list[Any], group: str, name: str, value: Any) -> None:
    chosen = fit_to_dataset(dataset(tmp_path / "d", [20_000, 2_000]), *words)
    assert getattr(getattr(chosen.options, group), name) == value


def test_tables_are_capped_as_the_published_runs_cap_them_where_they_do_not_fit(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", [CRITEO_1TB, 100], LARGE_TABLES)
    caps = [fit_to_dataset(folder, ranks=ranks).options.model.max_table_size for ranks in (1, 2, 8)]
    assert caps == [10_000_000, 80_000_000, None]  # 64 floats a row in 64 GiB, 128 GiB, 512 GiB
    assert "tables of at most 10,000,000 rows" in fit_to_dataset(folder).summary
    assert fit_to_dataset(folder, "--store_type", "cached_ssd").options.model.max_table_size is None
    assert fit_to_dataset(folder, "--num_embeddings", 5).options.model.max_table_size is None


def test_a_resumed_run_keeps_its_cap(toy: Path, run_ranks: Any) -> None:
    """The machine's memory would give none, as one with more memory than that of the first launch."""
    words = ["--defaults", "dataset", "--in_memory_binary_criteo_path", toy, "--checkpoint_every_steps", 2]
    first = run_ranks(1, "dlrm.train", *words, "--max_steps", 4, "--max_table_size", 50)
    assert first.codes == [0], first
    again = run_ranks(1, "dlrm.train", *words, "--max_steps", 6)
    assert again.codes == [0], again
    assert "tables of at most 50 rows" in again.out[0] and ": step 4, epoch 0" in again.out[0]
    config = json.loads((first.folder / "config.json").read_text())
    assert config["model"]["max_table_size"] == 50


def test_rows_are_counted_without_meta_json(tmp_path: Path) -> None:
    for day, rows in enumerate((300, 400, 50)):
        for part, columns in (("dense", 13), ("sparse", 26), ("labels", 1)):
            np.save(tmp_path / f"day_{day}_{part}.npy", np.zeros((rows, columns), np.float32))
    assert defaults.count_training_rows(tmp_path) == 700


def test_mlcommons_defaults_stay_with_a_warning(tmp_path: Path) -> None:
    small, large = dataset(tmp_path / "s", [20_000, 10]), dataset(tmp_path / "l", [CRITEO_1TB, 10])
    chosen = choose_for(small)
    assert chosen.options.data.batch_size == 32 and chosen.options.optim.learning_rate == 15.0
    assert chosen.summary == "" and len(chosen.warnings) == 1
    assert "here are 625 steps of 32 rows" in chosen.warnings[0]
    assert "--learning_rate 0.1, --preset kaggle or --defaults dataset" in chosen.warnings[0]
    assert choose_for(large, "--batch_size", 8192, ranks=8).warnings == ()
    assert choose_for(small, "--learning_rate", 15).warnings == ()


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad", "adam"])
def test_another_optimizer_does_not_take_the_rate_of_sgd(tmp_path: Path, name: str) -> None:
    folder = dataset(tmp_path / "d", [20_000, 10])
    chosen = choose_for(folder, "--optimizer", name)
    assert chosen.options.optim.learning_rate <= 0.02
    assert f"--optimizer {name} without --learning_rate" in chosen.warnings[0]
    assert choose_for(folder, "--optimizer", name, "--learning_rate", 15).options.optim.learning_rate == 15


def test_a_small_dataset_is_learned_by_default_and_the_run_folder_says_how(toy: Path, train: Any) -> None:
    words = ["--defaults", "dataset", "--in_memory_binary_criteo_path", toy, "--evaluate_on_training_end"]
    done = train(2, *words)
    assert done.codes == [0, 0], done
    results = json.loads((done.folder / "results.json").read_text())
    assert results["test_auroc"] > 0.75
    config = json.loads((done.folder / "config.json").read_text())
    assert config["optim"]["optimizer"] == "rowwise_adagrad" and config["data"]["batch_size"] == 32
    output = config["launch"]["chosen"]
    assert output.startswith("chosen for 15,000 rows on 2 ranks: batch 32 a rank") and output in done.out[0]
    assert "defaults" in config["run"]["given_options"]
