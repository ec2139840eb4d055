"""OneFlow's commands as its README has them: its preprocessing tool, then its training on what that made."""

import json
from pathlib import Path
from typing import Any

import polars as pl
from support.ranks import python

MODULE = "dlrm.scripts.dlrm_train_eval"
SMALL = ["--embedding_vec_size", 8, "--bottom_mlp=16,8", "--top_mlp", "16", "--learning_rate", 1]


def test_from_text_to_evaluations(toy: Path, tmp_path: Path, run_ranks: Any) -> None:
    """Two ranks share the batch, steps end the training, the test rows are scored every so many steps."""
    text, parquet = toy.with_name("tsv"), tmp_path / "parquet"
    made = python(
        "scripts/tools/criteo1t_parquet.py", f"--input_dir={text}", f"--output_dir={parquet}",
        f"--spark_tmp_dir={tmp_path / 'spark'}", "--export_dataset_info",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    ids = pl.read_parquet(parquet / "train" / "*.parquet")["C3"]
    assert set(ids // 40_000_000) == {2}
    (sizes,) = (line for line in (parquet / "README.md").read_text().splitlines() if "[" in line)
    done = run_ranks(
        2, MODULE, "--data_dir", parquet, "--persistent_path", tmp_path / "store",
        "--table_size_array", sizes.split("[")[1].strip("] ").replace(" ", ""), *SMALL,
        "--train_batch_size", 256, "--eval_batch_size", 128, "--train_batches", 12, "--warmup_batches", 4,
        "--decay_start", 8, "--decay_batches", 4, "--eval_interval", 5, "--cache_memory_budget_mb", 40,
        "--loss_print_interval", 1, "--interaction_itself", "--amp", "--disable_fusedmlp",
        "--model_save_dir", tmp_path / "saved", "--save_initial_model",
    )  # fmt: skip
    assert done.codes == [0, 0], done.err
    config = json.loads((done.folder / "config.json").read_text())
    assert config["data"]["batch_size"] == 128 and config["model"]["over_arch_layer_sizes"] == [16, 1]
    assert done.results["steps"] == 12 and {e["split"] for e in done.metrics if "split" in e} == {"test"}
    rates = [line["lr"] for line in done.metrics if "loss" in line and "split" not in line]
    assert rates[:4] == [0.25, 0.5, 0.75, 1] and rates[-1] == 0
    assert (tmp_path / "store" / "t_cat_25.rows").exists() and any((tmp_path / "saved").iterdir())


def test_mistakes_in_one_line(tmp_path: Path) -> None:
    for script, words, says in (
        ("dlrm_train_eval.py", ["--data_dir", tmp_path], "--persistent_path"),
        ("dlrm_train_eval.py", ["--data_dir", tmp_path, "--persistent_path", "p"], f"{tmp_path}"),
        ("tools/criteo1t_parquet.py", ["--input_dir", tmp_path / "no", "--output_dir", "o"], "no"),
        ("tools/criteo1t_parquet.py", ["--mod_id", "3"], "did you mean --mod_idx"),
    ):
        done = python(f"scripts/{script}", *words)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
