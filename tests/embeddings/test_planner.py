"""Sharding plans: the planner follows --sharding_file and memory limits; no plan changes what is learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import on_ranks

from dlrm.embeddings.planner import describe_plan, find_rank_memory, load_constraints, make_plan, plan_as_dict
from dlrm.embeddings.tables import make_table_configs
from dlrm.models.dlrm.model import DLRMTrain, build_dlrm
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer.optimizers import apply_in_backward

CPU = torch.device("cpu")
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "row_wise": {"*": {"sharding": "row_wise"}},
    "column_wise": {"*": {"sharding": "column_wise", "min_partition": 4}},
    "data_parallel": {"*": {"sharding": "data_parallel"}},
    "mixed": {
        "t_cat_0": {"sharding": "data_parallel"},
        "t_cat_1": {"sharding": "row_wise"},
        "t_cat_3": {"sharding": "column_wise", "min_partition": 4},
    },
}
TASKS: list[dict[str, Any]] = [
    {"interaction": interaction, "optimizer": optimizer, "constraints": constraints, "rows": 48}
    for interaction, optimizer in (("dot", "sgd"), ("dot", "adagrad"), ("dcn", "sgd"), ("dot", "adam"))
    for constraints in PLANS.values()
] + [
    {"interaction": "cat", "optimizer": "rowwise_adagrad", "constraints": PLANS[name], "rows": 48}
    for name in ("default", "row_wise")
]


def results(folder: Path, ranks: int, **tasks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The tasks of each backend on so many real ranks."""
    done = on_ranks(folder, ranks, "support.model_ranks", json.dumps(tasks), output=False, timeout=300)
    assert done.codes == [0] * ranks, done.err
    return json.loads(done.out[0].splitlines()[-1])


@pytest.mark.mpi
def test_no_plan_and_no_number_of_ranks_changes_what_is_learned(tmp_path: Path) -> None:
    runs = {ranks: results(tmp_path, ranks, gloo=TASKS)["gloo"] for ranks in (1, 2)}
    for number, task in enumerate(TASKS):
        twins = [
            t["interaction"] == task["interaction"] and t["optimizer"] == task["optimizer"] for t in TASKS
        ]
        expected = runs[1][twins.index(True)]
        for ranks, run in runs.items():
            messages = f"{task} on {ranks} ranks"
            np.testing.assert_allclose(run[number]["losses"], expected["losses"], rtol=1e-6, err_msg=messages)
            for table, weight in expected["first"].items():
                np.testing.assert_array_equal(run[number]["first"][table], weight, err_msg=messages)
                last, expected_last = np.array(run[number]["last"][table]), np.array(expected["last"][table])
                np.testing.assert_allclose(last, expected_last, rtol=1e-4, atol=1e-6, err_msg=messages)
                assert not np.array_equal(last, weight), messages
    names = list(PLANS)
    shardings = {
        name: {entry["sharding"] for entry in runs[2][names.index(name)]["plan"].values()} for name in names
    }
    assert shardings["default"] == {"table_wise"}
    assert all(shardings[name] == {name} for name in ("row_wise", "column_wise", "data_parallel"))
    assert len(shardings["mixed"]) == 4


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_through_shared_memory_all_plans_are_the_same(tmp_path: Path, ranks: int) -> None:
    """Whole tables go directly, all others as torchrec sends them, from ranks with more and fewer rows."""
    tasks = [task | {"rows": 49} for task in TASKS]
    plain = [task for task in tasks if not task["constraints"]]
    # several hosts: gloo, which by itself has no way to gather parts of different sizes
    split = [task for task in tasks if task["constraints"] == PLANS["row_wise"]][:2]
    found_by = results(tmp_path, ranks, gloo=plain, gloo_uneven=split, shared=tasks)
    usual, shared = found_by["gloo"], found_by["shared"]
    for task, found in zip(tasks, shared, strict=True):
        like = [
            t["interaction"] == task["interaction"] and t["optimizer"] == task["optimizer"] for t in plain
        ]
        expected = usual[like.index(True)]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6, err_msg=str(task))
        for table, weight in expected["last"].items():
            np.testing.assert_allclose(found["last"][table], weight, rtol=1e-4, atol=1e-6, err_msg=str(task))
        assert found["direct"] == [True] if task["constraints"] == {} else not all(found["direct"]), task
    assert not any(any(found["direct"]) for found in usual)
    for task, found in zip(split, found_by["gloo_uneven"], strict=True):
        expected = shared[tasks.index(task)]
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6, err_msg=str(task))
        for table, weight in expected["last"].items():
            np.testing.assert_allclose(found["last"][table], weight, rtol=1e-4, atol=1e-6, err_msg=str(task))


def model(sizes: list[int], optimizer: str = "sgd") -> DLRMTrain:
    tables = make_table_configs(sizes, 16, [f"cat_{i}" for i in range(len(sizes))])
    made = build_dlrm("dot", tables, 13, [16], [4, 1])
    apply_in_backward(made.model.sparse_arch.parameters(), optimizer, 0.1, CPU)
    return made


def test_default_is_whole_tables_in_balance() -> None:
    plan = make_plan(model([1000 * (i + 1) for i in range(26)]), CPU, Ranks(0, 0, 4, 4), 64)
    entries = plan_as_dict(json.loads(json.dumps(plan_as_dict(plan))) and plan)
    assert {entry["sharding"] for entry in entries.values()} == {"table_wise"}
    held = [0] * 4
    for entry in entries.values():
        held[entry["shards"][0]["rank"]] += entry["shards"][0]["size"][0]
    assert sum(held) == 1000 * 26 * 27 // 2
    assert max(held) < 1.3 * min(held)
    text = describe_plan(plan)
    assert "t_cat_25" in text and "rank 3 holds" in text and "26000 x 16" in text


def test_a_table_too_large_for_a_rank_is_split() -> None:
    plan = make_plan(model([1000, 500_000]), CPU, Ranks(0, 0, 2, 2), 8, memory=24 << 20)
    shards = plan_as_dict(plan)["t_cat_1"]["shards"]
    assert len(shards) == 2 and {shard["rank"] for shard in shards} == {0, 1}


def test_tables_that_fit_nowhere_are_reported_with_sizes() -> None:
    with pytest.raises(UserError, match=r"largest t_cat_1, 30.52 MiB\) for 2 ranks with 8 MiB each"):
        make_plan(model([1000, 500_000]), CPU, Ranks(0, 0, 2, 2), 8, memory=8 << 20)


def test_memory_of_a_rank_is_its_share() -> None:
    assert find_rank_memory(CPU, Ranks(0, 0, 4, 4)) == find_rank_memory(CPU, Ranks()) // 4


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"t_cat_0": {"sharding": "diagonal"}}', "t_cat_0: sharding diagonal is unknown"),
        ('{"t_cat_0": {"kernel": "warm"}}', "t_cat_0: kernel warm is unknown"),
        ('{"t_cat_0": {"colour": "red"}}', "t_cat_0: colour is unknown"),
        ('{"*": {"sharding": 5}}', "sharding 5 is unknown"),
        ('{"*": {"sharding": []}}', r"sharding \[\] is unknown"),
        ('{"*": {"store": ["cached_ssd"]}}', r"store \['cached_ssd'\] is unknown"),
        ('{"*": {"cache_load_factor": "x"}}', "cache_load_factor x: must be a number above 0"),
        ('["t_cat_0"]', "must be like"),
        ("{", "Expecting"),
    ],
)
def test_mistakes_in_the_sharding_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sharding.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_constraints(path)


def test_a_sharding_file_that_is_not_there(tmp_path: Path) -> None:
    message = r"^--sharding_file \S+/none: No such file or directory; give a JSON file"
    with pytest.raises(UserError, match=message):
        load_constraints(tmp_path / "none")


def test_sharding_file_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "sharding.json"
    path.write_text('{"*": {"sharding": ["row_wise"]}, "t_cat_0": {"sharding": "table_wise"}}')
    plan = make_plan(model([1000, 2000, 10]), CPU, Ranks(0, 0, 2, 2), 8, load_constraints(path))
    kinds = {table: entry["sharding"] for table, entry in plan_as_dict(plan).items()}
    assert kinds == {"t_cat_0": "table_wise", "t_cat_1": "row_wise", "t_cat_2": "row_wise"}
    with pytest.raises(UserError, match="no table t_cat_9"):
        make_plan(model([1000]), CPU, Ranks(), 8, {"t_cat_9": {}})
    with pytest.raises(UserError, match="torchrec cannot shard so on cpu"):
        make_plan(model([1000]), CPU, Ranks(), 8, {"*": {"sharding": "table_wise", "kernel": "fused_uvm"}})


def test_unavailable_optimizers_are_reported() -> None:
    with pytest.raises(UserError, match="--optimizer lion is unknown"):
        model([10], "lion")
