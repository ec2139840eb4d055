"""The options that NVIDIA's DLRM has and MLCommons' lacks: what a training with them does."""

import json
from pathlib import Path
from typing import Any

TOY = ["--preset", "toy", "--report_every", 1]


def on(toy: Path, *words: object) -> list[object]:
    return [*TOY, "--in_memory_binary_criteo_path", toy, *words]


def table_rows(folder: Path) -> list[int]:
    """Rows of each table, as sharded."""
    plan = json.loads((folder / "plan.json").read_text())
    return [sum(shard["size"][0] for shard in plan[f"t_cat_{table}"]["shards"]) for table in range(len(plan))]


def test_large_tables_are_capped_and_their_ids_folded(toy: Path, train_here: Any) -> None:
    sizes = json.loads((toy / "meta.json").read_text())["table_sizes"]
    capped = [min(size, 100) for size in sizes]
    assert 0 < sum(size > 100 for size in sizes) < len(sizes)
    words = on(toy, "--max_steps", 3, "--no-evaluate_on_epoch_end")
    done = train_here(*words, "--max_table_size", 100)
    listed = train_here(*words, "--num_embeddings_per_feature", ",".join(map(str, capped)))
    assert table_rows(done.folder) == capped
    assert done.losses == listed.losses and done.results["test_auroc"] == listed.results["test_auroc"]
    whole = train_here(*words, "--max_table_size", max(sizes))
    assert table_rows(whole.folder) == [max(size, 1) for size in sizes]
