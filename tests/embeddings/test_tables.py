"""Table configs and first weights; that they are the same under any sharding is in test_planner.py."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.cpu import startup
from dlrm.data.criteo import name_features
from dlrm.embeddings import tables
from dlrm.embeddings.tables import initialize_tables, list_table_weights, make_table_configs
from dlrm.runtime.errors import UserError


def weights(seed: int = 0, rows: int = 40_000, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    configs = make_table_configs([rows, rows], 32, ["cat_0", "cat_1"], dtype)
    bags = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
    initialize_tables(bags, seed)
    return {table: weight for _, table, weight in list_table_weights(bags)}  # type: ignore[misc]


def test_configs_follow_the_features() -> None:
    configs = make_table_configs([10] * 26, 16)
    assert [config.feature_names for config in configs] == [[name] for name in name_features(26)]
    assert configs[3].name == "t_cat_3" and configs[3].embedding_dim == 16


def test_uniform_between_the_papers_bounds() -> None:
    weight = weights()["t_cat_0"].numpy()
    bound = math.sqrt(1 / 40_000)
    share, _ = np.histogram(weight, bins=20, range=(-bound, bound))
    assert np.abs(weight).max() <= bound
    assert share.sum() == weight.size
    assert np.abs(share / weight.size - 0.05).max() < 0.002
    flat = weight[::7].ravel()
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.01


def test_truncated_normal_first_weights() -> None:
    weight = torch.empty(40_000, 32)
    draw = tables.draw_truncated_normal(0.02)
    tables.fill_shard(weight, 0, 0, 40_000, 32, "t", 1, draw)
    assert weight.abs().max() <= 0.04 and abs(float(weight.mean())) < 1e-4
    assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=5e-3)  # the tails are cut off
    part = torch.empty(100, 8)
    tables.fill_shard(part, 32_700, 16, 40_000, 32, "t", 1, draw)
    assert torch.equal(part, weight[32_700:32_800, 16:24])


def test_seed_table_and_block_all_matter() -> None:
    first, again, other = weights(1), weights(1), weights(2)
    step = tables.BLOCK // 32
    assert torch.equal(first["t_cat_0"], again["t_cat_0"])
    assert not torch.equal(first["t_cat_0"], other["t_cat_0"])
    assert not torch.equal(first["t_cat_0"], first["t_cat_1"])
    assert not torch.equal(first["t_cat_0"][:100], first["t_cat_0"][step : step + 100])


def test_half_precision_tables_hold_the_same_numbers() -> None:
    exact, half = weights()["t_cat_0"], weights(dtype="fp16")["t_cat_0"]
    assert half.dtype == torch.float16
    assert torch.equal(half, exact.half())


@pytest.mark.parametrize("first, last", [(0, 40_000), (100, 300), (30_000, 40_000), (32_768, 32_769)])
@pytest.mark.parametrize("columns", [slice(0, 32), slice(8, 20)])
def test_a_shard_is_a_cut_of_the_table(first: int, last: int, columns: slice) -> None:
    whole = weights()["t_cat_0"]
    shard = torch.empty(last - first, columns.stop - columns.start)
    tables.fill_shard(shard, first, columns.start, 40_000, 32, "t_cat_0", 0, None)
    assert torch.equal(shard, whole[first:last, columns])


def test_any_number_of_threads_draws_the_same() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = weights()["t_cat_0"]
        torch.set_num_threads(3)
        assert torch.equal(weights()["t_cat_0"], alone)
    finally:
        torch.set_num_threads(threads)


def test_large_zeros_are_made_when_they_are_touched() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, size = resident(), (4 * startup.LARGE // 8, 2)
    with startup.skip_first_weights():
        made = torch.zeros(size, dtype=torch.float16, device=torch.device("cpu"))
        small, nowhere = torch.zeros(3), torch.zeros(size, device="meta")
    assert made.shape == size and made.dtype == torch.float16 and nowhere.is_meta and not small.any()
    assert resident() - before < made.nbytes // 2
    assert not made.any() and made.add_(1).sum(dtype=torch.float64).item() == made.numel()


def test_mistakes_are_reported() -> None:
    with pytest.raises(UserError, match="25 values for 26 tables"):
        make_table_configs([5] * 25, 16, name_features(26))
    with pytest.raises(UserError, match="0 is not a size"):
        make_table_configs([5] * 25 + [0], 16)
    with pytest.raises(UserError, match="multiples of 4"):
        make_table_configs([5] * 26, 10)
    with pytest.raises(UserError, match="choose from fp32, fp16"):
        make_table_configs([5] * 26, 16, dtype="int8")
