"""Training with tables in files: the numbers of tables in memory, at any budget, also after a resume."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import trace_processor
from support.ranks import Finished, Train, python

from dlrm.embeddings.ssd import placement
from dlrm.embeddings.ssd.cached_table import TableShare
from dlrm.runtime.errors import UserError

SMALL = [
    "--preset", "toy", "--report_every", 1, "--num_embeddings", 3000, "--batch_size", 128,
    "--limit_train_batches", 12, "--limit_val_batches", 2, "--limit_test_batches", 2, "--learning_rate", 0.1,
]  # fmt: skip
FILES = ["--store_type", "cached_ssd", "--cache_memory_budget_mb", 1.5]


def check_same_results(one: Finished, other: Finished) -> None:
    assert one.losses == other.losses and len(one.losses) == 12
    assert one.results["val_scores"] == other.results["val_scores"]
    assert one.results["test_auroc"] == other.results["test_auroc"] is not None


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_losses_are_those_of_tables_in_memory(train_here: Train, optimizer: str) -> None:
    words = [*SMALL, "--optimizer", optimizer]
    memory = train_here(*words)
    for budget in (1.5 if optimizer == "adam" else 1, 100):  # two floats of state for a weight
        files = train_here(*words, *FILES[:3], budget)
        check_same_results(files, memory)
        evicted = sum(line["cache_evictions"] for line in files.metrics if "loss" in line)
        assert (evicted > 0) == (budget < 100)
        assert all(0 <= line["cache_hit_rate"] < 1 for line in files.metrics)
        assert files.metrics[0]["store_bytes_read"] > 0


def test_two_ranks(train: Train, toy: Path) -> None:
    words = [*SMALL, "--in_memory_binary_criteo_path", toy, "--multi_hot_sizes", ",".join(["2"] * 26)]
    memory, files = train(2, *words), train(2, *words, *FILES)
    assert memory.codes == files.codes == [0, 0], files.err
    check_same_results(files, memory)
    read = files.results["bytes_read"]
    for rank in ("0", "1"):
        stores = {path: count for path, count in read[rank].items() if path.endswith(".rows")}
        assert stores and min(stores.values()) > 0
    owned = [{path for path in read[rank] if path.endswith(".rows")} for rank in ("0", "1")]
    assert len(owned[0] | owned[1]) == 26 and not owned[0] & owned[1]


def test_two_ranks_share_the_rows_of_tables(train: Train, toy: Path, tmp_path: Path) -> None:
    sharding_file = tmp_path / "sharding.json"
    sharding_file.write_text('{"t_cat_0": {"sharding": "row_wise"}, "t_cat_5": {"sharding": "row_wise"}}')
    words = [
        *SMALL,
        "--in_memory_binary_criteo_path",
        toy,
        "--num_embeddings",
        3001,
        "--optimizer",
        "adagrad",
    ]
    parts = ["--sharding_file", sharding_file]
    saves = ["--checkpoint_dir", tmp_path / "saved", "--checkpoint_every_steps", 5, "--keep_checkpoints", 0]
    memory, files = train(2, *words, *parts), train(2, *words, *FILES, *parts, *saves)
    assert memory.codes == files.codes == [0, 0], files.err
    check_same_results(files, memory)
    stores = files.folder / "store"
    assert {path.name for path in stores.glob("t_cat_0.*.rows")} == {
        "t_cat_0.0-1501.rows",
        "t_cat_0.1501-3001.rows",
    }
    (saved,) = (tmp_path / "saved").glob("*-step-5")
    after = train(2, *words, *FILES, *parts, "--load_checkpoint_path", saved)
    assert after.losses == memory.losses[5:], after.err
    assert after.results["test_auroc"] == memory.results["test_auroc"]
    whole = train(2, *words, *FILES, "--load_checkpoint_path", saved, "--persistent_path", stores)
    assert whole.losses == pytest.approx(memory.losses[5:], abs=1e-6)  # sums in another order
    again = train(2, *words, *FILES, *parts, "--persistent_path", stores)  # made for another sharding
    assert again.codes == [2, 2] and "t_cat_0.json: rows of t_cat_0 for another sharding" in "".join(
        again.err
    )


COLUMN_WISE = '{"*": {"sharding": "column_wise", "min_partition": 8}}'


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_columns_of_tables(train_here: Train, tmp_path: Path, optimizer: str) -> None:
    """Two parts of each table on a rank: each has its file, its cache and its slice of the checkpoint."""
    sharding_file = tmp_path / "sharding.json"
    sharding_file.write_text(COLUMN_WISE)
    words, parts = [*SMALL, "--optimizer", optimizer], ["--sharding_file", sharding_file]
    saves = ["--checkpoint_dir", tmp_path / "saved", "--checkpoint_every_steps", 5, "--keep_checkpoints", 0]
    memory = train_here(*words, *parts)
    files = train_here(*words, *parts, *FILES[:3], 4, *saves)
    check_same_results(files, memory)
    assert sum(line["cache_evictions"] for line in files.metrics if "loss" in line) > 0
    names = {path.name for path in (files.folder / "store").glob("t_cat_0.*rows")}
    assert names == {"t_cat_0.columns-0-8.rows", "t_cat_0.columns-8-16.rows"}
    (saved,) = (tmp_path / "saved").glob("*-step-5")
    for more in ([*parts, *FILES[:3], 4], parts, [], [*FILES[:3], 100]):
        after = train_here(*words, *more, "--load_checkpoint_path", saved)
        assert after.losses == pytest.approx(memory.losses[5:], rel=1e-6)
    other = ["--persistent_path", files.folder / "store"]
    with pytest.raises(UserError, match="rows of t_cat_0 for another sharding"):
        train_here(*words, *FILES[:3], 100, *other)


def test_two_ranks_share_the_columns_of_tables(train: Train, toy: Path, tmp_path: Path) -> None:
    sharding_file = tmp_path / "sharding.json"
    sharding_file.write_text(COLUMN_WISE)
    words = [*SMALL, "--in_memory_binary_criteo_path", toy, "--sharding_file", sharding_file]
    memory, files = train(2, *words), train(2, *words, *FILES)
    assert memory.codes == files.codes == [0, 0], files.err
    check_same_results(files, memory)
    plan = json.loads((files.folder / "plan.json").read_text())["t_cat_0"]
    assert {(shard["rank"], *shard["size"]) for shard in plan["shards"]} == {(0, 3000, 8), (1, 3000, 8)}


def test_stopped_and_resumed_through_either_kind_of_table(train_here: Train, tmp_path: Path) -> None:
    whole = train_here(*SMALL)
    saved = tmp_path / "saved"
    first = train_here(*SMALL, *FILES, "--max_steps", 5, "--checkpoint_dir", saved)
    for kind in (FILES, [], ["--store_type", "cached_host_mem"]):  # the checkpoint holds whole tables
        after = train_here(*SMALL, *kind, "--load_checkpoint_path", saved)
        assert first.losses[:5] + after.losses == whole.losses
        assert after.results["test_auroc"] == whole.results["test_auroc"]


def test_adam_resumes_from_a_checkpoint_only(train_here: Train, tmp_path: Path) -> None:
    words = [*SMALL, "--optimizer", "adam", "--learning_rate", 0.01]
    whole, saved = train_here(*words), tmp_path / "saved"
    files = [*FILES, "--persistent_path", tmp_path / "store"]
    train_here(*words, *files, "--max_steps", 5, "--checkpoint_dir", saved)
    after = train_here(*words, *files, "--load_checkpoint_path", saved)
    assert after.losses == whole.losses[5:]
    assert train_here(*words, "--load_checkpoint_path", saved).losses == whole.losses[5:]
    with pytest.raises(UserError, match="whose number of steps only a checkpoint has"):
        train_here(*words, *files)


def test_row_files_of_an_earlier_job_are_continued_with_a_notice(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--persistent_path", tmp_path / "store"]
    words = [*SMALL, "--limit_train_batches", 3, *FILES, *store]
    first = train_here(*words, "--checkpoint_dir", tmp_path / "saved")
    train_here(*words, "--load_checkpoint_path", tmp_path / "saved")  # the checkpoint's rows, not the files'
    notice = f"{tmp_path / 'store'} already has row files: continuing with the rows of 26 tables"
    assert notice not in capsys.readouterr().out
    second = train_here(*words)
    assert notice in capsys.readouterr().out
    assert first.losses[0] != second.losses[0]
    facts: dict[str, Any] = json.loads((tmp_path / "store" / "t_cat_0.json").read_text())
    assert facts["clean"] and facts["rows"] == 3000
    values = np.fromfile(tmp_path / "store" / "t_cat_0.rows", np.float32).reshape(3000, 32)
    assert (values[:, 16:].max(1) > 0).any()  # adagrad's sums


def test_wrong_options_are_errors(train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="touches .* of --cache_memory_budget_mb"):
        train_here(*SMALL, *FILES[:3], 0.05)
    for budget in ("nan", "inf", 0):
        with pytest.raises(UserError, match=f"budget_mb {float(budget)}: must be a number of at least 0.001"):
            train_here(*SMALL, *FILES[:3], budget)
    sharding_file = tmp_path / "sharding.json"
    for sharding, optimizer in (("data_parallel", "sgd"), ("column_wise", "rowwise_adagrad")):
        sharding_file.write_text(f'{{"t_cat_0": {{"sharding": "{sharding}"}}}}')
        with pytest.raises(UserError, match=f"{sharding}, but tables in files are table_wise or row_wise"):
            train_here(*SMALL, *FILES, "--optimizer", optimizer, "--sharding_file", sharding_file)


def test_single_tables_by_the_sharding_file(train_here: Train, tmp_path: Path) -> None:
    sharding_file = tmp_path / "sharding.json"
    sharding_file.write_text('{"t_cat_3": {"store": "cached_ssd"}, "t_cat_9": {"store": "cached_ssd"}}')
    some = train_here(*SMALL, "--cache_memory_budget_mb", 0.1, "--sharding_file", sharding_file)
    check_same_results(some, train_here(*SMALL))
    assert {path.name for path in (some.folder / "store").glob("*.rows")} == {"t_cat_3.rows", "t_cat_9.rows"}


COUNTERS = ("cache_hit_rate", "cache_evictions", "store_bytes_read", "store_bytes_written")


def test_counters_in_metrics_trace_and_report(train: Train, tmp_path: Path) -> None:
    run = train(1, *SMALL, *FILES, "--trace")
    assert run.codes == [0], run.err
    lines = [line for line in run.metrics if "loss" in line]
    assert len(lines) == 12 and all(set(COUNTERS) <= set(line) for line in lines)

    paths, moved, counted = {}, {"pread64": 0, "pwrite64": 0}, []
    for path in run.folder.glob("trace/*.pfw.gz"):
        text = gzip.decompress(path.read_bytes()).decode()
        events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        paths |= {e["args"]["value"]: e["args"]["name"] for e in events if e["name"] == "FH"}
        for event in events:
            if event["name"] in moved and paths[event["args"]["fhash"]].endswith(".rows"):
                moved[event["name"]] += event["args"]["ret"]
        counted += [e for e in events if e.get("cat") == "counter" and e["name"] == "store_bytes_read"]
    for key, call in (("bytes_read", "pread64"), ("bytes_written", "pwrite64")):
        output = {path: n for path, n in run.results[key]["0"].items() if path.endswith(".rows")}
        assert sum(output.values()) == moved[call] > 0  # the same as the system calls in the trace
    assert moved["pwrite64"] >= sum(line["store_bytes_written"] for line in lines) > 0
    traced = [event["args"]["value"] for event in counted[:12]]  # one lookup for all tables
    assert traced == [line["store_bytes_read"] for line in lines]

    for words in (["perfetto", "-o", tmp_path / "x.pftrace"], ["report"]):
        done = python("-m", "analysis", words[0], run.folder, *words[1:])
        assert done.returncode == 0, done.stderr
    with trace_processor.open_trace(tmp_path / "x.pftrace") as opened:
        found = opened.rows(
            "select t.name as name, count(*) as n from counter c join track t on c.track_id = t.id group by 1"
        )
    assert all(dict(found)[name] >= 12 for name in COUNTERS)
    page = (run.folder / "report.html").read_text()
    for label in ("cache hit rate", "evictions per step", "store bytes read", "store bytes written"):
        assert f'"{label}"' in page


def test_auto_decides_by_sizes_and_memory_and_gives_the_reason() -> None:
    tables = [TableShare("a", 1_000_000, 64, 64), TableShare("b", 100, 64, 64)]  # 512 MB
    gb = 1_000_000_000
    for cuda, memory, host, expected in (
        (False, gb, gb, "device_mem"),  # 51 %
        (False, 0.7 * gb, gb, "cached_ssd"),
        (True, gb, gb, "device_mem"),
        (True, 0.1 * gb, gb, "cached_host_mem"),
        (True, 0.1 * gb, 0.2 * gb, "cached_ssd"),
    ):
        places, why = placement.choose_store_types("auto", tables, {}, cuda, int(memory), int(host))
        assert places == {"a": expected, "b": expected}
        output = f"{expected}: tables and optimizer take 0.512 GB, memory has {memory / 1e9:.3g}"
        assert why == output
    constraints = {"b": {"store": "device_mem"}}
    places, _ = placement.choose_store_types("auto", tables, constraints, False, gb // 10, gb // 10)
    assert places == {"a": "cached_ssd", "b": "device_mem"}


def test_auto_takes_files_where_memory_is_short(
    train_here: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--store_type", "auto", "--cache_memory_budget_mb", 1.5]
    memory = train_here(*words)
    assert "tables: device_mem: tables and optimizer take 0.00998 GB, memory has" in capsys.readouterr().out
    assert not (memory.folder / "store").exists()
    monkeypatch.setattr(placement, "find_rank_memory", lambda *_: 10_000_000)
    files = train_here(*words)
    assert (
        "tables: cached_ssd: tables and optimizer take 0.00998 GB, memory has 0.01" in capsys.readouterr().out
    )
    assert len(list((files.folder / "store").glob("*.rows"))) == 26
    check_same_results(files, memory)


def test_oneflows_recipe(train: Train, tmp_path: Path) -> None:
    """Its way from logs to evaluations, by the table of names in the guide to training."""
    for words in (
        ["toy", tmp_path / "tsv", "--days", 3, "--rows", 2000],
        ["run", "--input_dir", tmp_path / "tsv", "--output_dir", tmp_path / "data", "--format", "parquet"],
    ):
        done = python("-m", "dlrm.prep", *words)
        assert done.returncode == 0, done.stderr
    found = re.search(r"table_size_array = \[(.*)\]", (tmp_path / "data" / "README.md").read_text())
    assert found is not None
    sizes = found[1].replace(" ", "")
    run = train(
        1, "--in_memory_binary_criteo_path", tmp_path / "data",
        "--num_embeddings_per_feature", sizes, "--embedding_dim", 16,
        "--dense_arch_layer_sizes", "64,32,16", "--over_arch_layer_sizes", "64,32,1",
        "--interaction_type", "dot", "--self_interaction",
        "--store_type", "cached_ssd", "--cache_memory_budget_mb", 2, "--persistent_path", tmp_path / "store",
        "--batch_size", 128, "--test_batch_size", 256, "--max_steps", 30,
        "--validation_freq_within_epoch", 10,
        "--learning_rate", 1, "--optimizer", "sgd", "--lr_schedule", "nvidia",
        "--lr_warmup_steps", 5, "--lr_decay_start", 20, "--lr_decay_steps", 10, "--report_every", 1,
        "--checkpoint_dir", tmp_path / "saved", "--save_initial_model", "--save_model_after_each_eval",
        "--keep_checkpoints", 0,
    )  # fmt: skip
    assert run.codes == [0], run.err
    rates = [line["lr"] for line in run.metrics if "loss" in line]
    warm, hold = [n / 5 for n in range(1, 6)], [1.0] * 15
    assert rates == pytest.approx([*warm, *hold, *(((10 - n) / 10) ** 2 for n in range(1, 11))])
    validations = [line for line in run.metrics if line.get("split") == "val"]
    assert [line["step"] for line in validations] == [10, 20, 30]
    assert all(line["samples"] == 1000 for line in validations)
    assert np.mean(run.losses[-5:]) < np.mean(run.losses[:5])
    facts = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*.json")]
    assert sorted(map(str, (f["rows"] for f in facts))) == sorted(sizes.split(","))
    steps = {path.name.split("-step-")[1] for path in (tmp_path / "saved").iterdir()}
    assert {"0", "10", "20", "30"} <= steps
