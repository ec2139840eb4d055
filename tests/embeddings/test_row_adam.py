"""Adam on tables on CPUs: the numbers of torch.optim.SparseAdam; stopped and resumed to the bit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from support.ranks import Train, words
from torch import nn

from dlrm.checkpoint.folder import list_checkpoints
from dlrm.embeddings.row_adam import AdamTables, RowAdam

ROWS, WIDTHS, BATCH, STEPS, LR, EPS = (50, 9), (8, 4), 6, 5, 0.1, 1e-6


def make_ids(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids of two tables, offsets) with repeated ids and empty bags."""
    draw = np.random.default_rng(step)
    lengths = draw.integers(0, 4, 2 * BATCH)
    ids = [draw.integers(0, ROWS[n // BATCH], each) for n, each in enumerate(lengths)]
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.NONE])
def test_the_numbers_are_those_of_sparse_adam(pooling: PoolingMode) -> None:
    widths = WIDTHS if pooling == PoolingMode.SUM else (8, 8)
    tables = AdamTables(
        [(r, w, EmbeddingLocation.HOST, ComputeDevice.CPU) for r, w in zip(ROWS, widths, strict=True)],
        optimizer=EmbOptimType.ADAM, learning_rate=LR, eps=EPS, pooling_mode=pooling,
    )  # fmt: skip
    kind: Any = nn.EmbeddingBag if pooling == PoolingMode.SUM else nn.Embedding
    more = {"mode": "sum"} if pooling == PoolingMode.SUM else {}
    plain = [kind(r, w, sparse=True, **more) for r, w in zip(ROWS, widths, strict=True)]
    for weights, each in zip(tables.split_embedding_weights(), plain, strict=True):
        weights.data.copy_(each.weight.data)
    optimizer = torch.optim.SparseAdam([each.weight for each in plain], lr=LR, eps=EPS)
    for step in range(STEPS):
        ids, offsets = make_ids(step)
        middle, lr = int(offsets[BATCH]), LR / (step + 1)
        tables.set_learning_rate(lr)
        optimizer.param_groups[0]["lr"] = lr
        parts = ((ids[:middle], offsets[:BATCH]), (ids[middle:], offsets[BATCH:-1] - middle))
        if pooling == PoolingMode.SUM:
            expected = torch.cat([each(*part) for each, part in zip(plain, parts, strict=True)], dim=1)
        else:
            expected = torch.cat([each(part[0]) for each, part in zip(plain, parts, strict=True)])
        found = tables(indices=ids, offsets=offsets)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (expected * factor).sum().backward()
        optimizer.step()
        (found * factor).sum().backward()
    with torch.no_grad():
        before = [weights.clone() for weights in tables.split_embedding_weights()]
        tables(indices=ids, offsets=offsets)  # a lookup without gradients changes nothing
    for weights, same, state, each in zip(
        tables.split_embedding_weights(), before, tables.get_optimizer_state(), plain, strict=True
    ):
        assert torch.equal(weights, same)
        torch.testing.assert_close(weights.data, each.weight.data, rtol=1e-6, atol=1e-7)
        for key, value in state.items():
            torch.testing.assert_close(value, optimizer.state[each.weight][key], rtol=1e-6, atol=1e-9)


def test_data_parallel_tables_follow_the_same_rule() -> None:
    """Their gradients are dense; rows of zeros stay, whatever their moments are."""
    first = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    dense, sparse = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    ours, theirs = RowAdam([dense], LR, (0.9, 0.999), EPS), torch.optim.SparseAdam([sparse], LR, eps=EPS)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        rows = torch.randperm(30, generator=draw)[:7].sort().values
        values = torch.randn(7, 4, generator=draw)
        dense.grad = torch.zeros(30, 4).index_copy(0, rows, values)
        sparse.grad = torch.sparse_coo_tensor(rows[None], values, (30, 4), check_invariants=True)
        ours.step()
        theirs.step()
    torch.testing.assert_close(dense.data, sparse.data, rtol=1e-6, atol=1e-7)


def test_stopped_and_resumed_to_the_bit(toy: Path, tmp_path: Path, train_here: Train) -> None:
    more = ["--optimizer", "adam", "--learning_rate", 0.01, "--max_steps", 12, "--report_every", 1]
    whole = train_here(*words(toy, *more))
    kept = ["--checkpoint_dir", tmp_path / "kept", "--keep_checkpoints", 0]
    train_here(*words(toy, *more, *kept, "--checkpoint_every_steps", 5, "--max_steps", 7))
    (newest,) = [path for path in list_checkpoints(tmp_path / "kept") if path.name.endswith("-7")]
    shutil.rmtree(newest)
    done = train_here(*words(toy, *more, *kept))
    assert done.losses == whole.losses[5:] and len(whole.losses) == 12
    assert done.results["test_auroc"] == whole.results["test_auroc"]
    sharding_file = tmp_path / "sharding.json"
    sharding_file.write_text('{"*": {"sharding": "data_parallel"}}')
    fifth = next(path for path in list_checkpoints(tmp_path / "kept") if path.name.endswith("-5"))
    other = train_here(*words(toy, *more, "--load_checkpoint_path", fifth, "--sharding_file", sharding_file))
    assert other.losses == pytest.approx(whole.losses[5:], rel=1e-5)
