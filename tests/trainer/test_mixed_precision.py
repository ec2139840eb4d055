"""Mixed precision and clipping: the same training within rounding, and no scale ever reaches a table."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.config.parser import parse_options
from dlrm.models.dlrm.build import build_model, open_batches, shard_dlrm
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.presets import PRESETS
from dlrm.models.dlrm.trainer import DLRMTrainer
from dlrm.runtime import session
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop
from dlrm.trainer.trainer import Trainer, open_run_folder

SMALL = {
    "num_embeddings": 4, "embedding_dim": 8, "dense_arch_layer_sizes": "16,8",
    "over_arch_layer_sizes": "16,1", "batch_size": 64, "learning_rate": 1.0, "seed": 5,
    "limit_train_batches": 6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "0")
    yield


def train_job(*words: object) -> tuple[Trainer, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A job after its steps; its tables and its dense weights."""
    cfg = parse_options(
        Config, [*(f"--{k}={v}" for k, v in SMALL.items()), *map(str, words)], "train", "", PRESETS
    )
    here = Ranks()
    with session.open_session(here, 60) as device:
        records = open_run_folder(cfg, here)
        sets = open_batches(cfg, here)
        module = build_model(cfg, sets, device)
        model, optimizer = shard_dlrm(cfg, module, sets, here, device, records)
        job = DLRMTrainer(cfg, sets, model, optimizer, records, device)
        job.fit()
        state: dict[str, Any] = dict(model.state_dict())
    tables = {n: w.local_shards()[0].tensor.clone() for n, w in state.items() if "sparse_arch" in n}
    dense = {n: w.detach().clone() for n, w in state.items() if "sparse_arch" not in n}
    return job, tables, dense


def read_first_weights(*words: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights before any step."""
    _, tables, dense = train_job("--learning_rate", 0, *words)
    return tables, dense


def find_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """fp32: tables and dense weights after training, and how far the tables moved."""
    _, tables, dense = train_job()
    return tables, dense, find_gap(tables, read_first_weights()[0])


@pytest.mark.parametrize(
    ("words", "within"),
    [
        (["--amp"], 0.3),
        (["--amp", "fp16", "--loss_scale_policy", "static", "--loss_scale", 4096], 0.1),
        (["--amp", "fp16", "--loss_scale_policy", "dynamic", "--loss_scale", 65536], 0.1),
        (["--amp", "fp16", "--loss_scale_policy", "static", "--loss_scale", 1], 0.1),
    ],
    ids=["bf16", "fp16 static", "fp16 dynamic", "fp16 unscaled"],
)
@pytest.mark.parametrize("interaction", ["dot", "dcn"])
def test_amp_trains_the_same_model(words: list[object], within: float, interaction: str) -> None:
    shape = ["--interaction_type", interaction, "--dcn_low_rank_dim", 8]
    _, tables, dense = train_job(*shape)
    start_tables, start_dense = read_first_weights(*shape)
    moved = find_gap(tables, start_tables)
    job, amp_tables, amp_dense = train_job(*shape, *words)
    assert moved > 1e-3, "the tables must move for this to say anything"
    assert 0 < find_gap(tables, amp_tables) < within * moved
    assert 0 < find_gap(dense, amp_dense) < within * find_gap(dense, start_dense)
    assert job.progress.skipped_steps == 0


def test_overflow_leaves_the_weights_alone(plain: Any) -> None:
    job, tables, dense = train_job("--amp", "fp16", "--loss_scale_policy", "static", "--loss_scale", 1e12)
    before_tables, before_dense = read_first_weights()
    assert job.progress.skipped_steps == 6
    assert find_gap(dense, before_dense) == 0
    assert all(bool(torch.isfinite(table).all()) for table in tables.values())
    assert find_gap(tables, before_tables) <= plain[2] * 1.1  # no row moved by a scaled gradient


def test_dynamic_scaling_recovers() -> None:
    words = ["--amp", "fp16", "--loss_scale", 2.0**24, "--limit_train_batches", 40]
    job, tables, dense = train_job(*words)
    assert 0 < job.progress.skipped_steps < 30 and job.progress.loss_scale < 2.0**24
    assert find_gap(dense, read_first_weights()[1]) > 0
    assert all(bool(torch.isfinite(table).all()) for table in tables.values())


def test_the_scale_grows_after_good_steps() -> None:
    from dlrm.trainer.mixed_precision import GROWTH_STEPS, LossScale

    at = loop.Progress(loss_scale=8.0)
    scale = LossScale(at, dynamic=True)
    for _ in range(GROWTH_STEPS):
        scale.update(False)
    assert (at.loss_scale, at.skipped_steps) == (16.0, 0)
    scale.update(True)
    assert (at.loss_scale, at.skipped_steps, at.steps_since_overflow) == (8.0, 1, 0)
    still = LossScale(loop.Progress(loss_scale=8.0), dynamic=False)
    still.update(True)
    assert still.state.loss_scale == 8.0


def test_clipping_bounds_the_dense_step() -> None:
    clip, lr = 0.01, 1.0
    _, before = read_first_weights()
    _, _, free = train_job("--max_steps", 1)
    _, _, clipped = train_job("--max_steps", 1, "--grad_clip", clip)

    def step(after: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(after[name] - before[name]).flatten() for name in before]).double()

    assert step(free).norm() > lr * clip * 2
    assert float(step(clipped).norm()) == pytest.approx(lr * clip, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(step(free), step(clipped), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-4)  # shorter, not elsewhere


def test_a_resumed_run_goes_on_with_its_scale(toy: Path, tmp_path: Path, train_here: Any) -> None:
    words = [
        "--preset", "toy", "--in_memory_binary_criteo_path", toy, "--batch_size", 384, "--report_every", 1,
        "--amp", "fp16", "--loss_scale_policy", "dynamic", "--loss_scale", 2.0**24, "--max_steps", 20,
    ]  # fmt: skip
    kept = ["--checkpoint_dir", tmp_path / "kept"]
    whole = train_here(*words)
    begun = train_here(*words, *kept, "--max_steps", 9)
    done = train_here(*words, *kept)

    def losses(run: Any) -> dict[int, float]:
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    assert set(losses(done)) == set(range(10, 21))
    assert losses(begun) | losses(done) == losses(whole)
    # with its first scale it would skip again
    assert (
        0 < begun.results["skipped_steps"] == done.results["skipped_steps"] == whole.results["skipped_steps"]
    )
