"""BERT4Rec against a plain PyTorch one, written from the paper; rankings against sorting."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlrm.config.parser import parse_options
from dlrm.models.bert4rec.model import RankingMetrics
from dlrm.models.bert4rec.options import BertConfig
from dlrm.models.bert4rec.spec import SPEC
from dlrm.runtime import session
from dlrm.runtime.ranks import Ranks
from dlrm.trainer.run_folder import RunFolder
from dlrm.trainer.trainer import make_trainer

WORDS = """--dataset_name markov --random_user_count 60 --random_item_count 40 --random_size 900 --max_len 12
    --negatives 10 --negative_sampling uniform --emb_dim 16 --nhead 4 --num_layers 2 --dropout 0 --lr 0.01
    --train_batch_size 8 --report_every 1 --max_steps 20 --mask_prob 0.3 --seed 3"""


class Plain(nn.Module):
    """Pre-norm transformer over item + position, no fbgemm, no torchrec, all logits."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, tied: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.norm = nn.LayerNorm([length, width])
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "relu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.out = None if tied else nn.Parameter(torch.zeros(vocabulary, width))

    def take(self, state: dict[str, torch.Tensor]) -> None:
        """Our weights under torch's names."""
        mine = {
            "items.weight": state["history.ec.embeddings.item_embedding.weight"],
            "places": state["history.positional"],
            "norm.weight": state["history.layernorm.weight"],
            "norm.bias": state["history.layernorm.bias"],
            "bias": state["out.bias"],
        }
        if self.out is not None:
            mine["out"] = state["out.weight"]
        for number in range(len(self.blocks)):
            ours = f"transformer_blocks.{number}."
            for kind in ("weight", "bias"):
                parts = [state[f"{ours}attention.linear_layers.{i}.{kind}"] for i in range(3)]
                mine[f"blocks.{number}.self_attn.in_proj_{kind}"] = torch.cat(parts)
                for theirs, name in (
                    ("self_attn.out_proj", "attention.output_linear"), ("linear1", "feed_forward.w_1"),
                    ("linear2", "feed_forward.w_2"), ("norm1", "input_sublayer.norm"),
                    ("norm2", "output_sublayer.norm"),
                ):  # fmt: skip
                    mine[f"blocks.{number}.{theirs}.{kind}"] = state[f"{ours}{name}.{kind}"]
        self.load_state_dict(mine)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.items(tokens) + self.places)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=tokens == 0)
        return x @ (self.items.weight if self.out is None else self.out).T + self.bias


def job_of(words: list[str], folder: Path) -> tuple[Any, BertConfig]:
    cfg = parse_options(BertConfig, [*words, "--output_dir", str(folder)], "bert4rec", "")
    return make_trainer(
        SPEC.load_parts(), cfg, Ranks(), torch.device("cpu"), RunFolder(str(folder), True)
    ), cfg


def gather_state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            (shard,) = value.local_shards()
            value = shard.tensor
        found[name.removeprefix("model.")] = value.detach().clone()
    return found


@pytest.mark.parametrize("mode", ["dmp", "ddp"])
@pytest.mark.parametrize("output", ["linear", "tied"])
def test_twenty_steps_are_those_of_plain_pytorch(
    output: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    words = [*WORDS.split(), "--mode", mode, "--output", output, "--weight_decay", "0.01"]
    with session.open_session(Ranks(), 60):
        job, cfg = job_of(words, tmp_path)
        plain = Plain(42, 12, 16, 4, 2, output == "tied")
        plain.take(gather_state(job.model))
        batches = [batch for _, batch in zip(range(20), job.datasets.train.batches, strict=False)]
        job.datasets.train.batches.batch_number = -1  # as before the first batch
        job.fit()
        reports = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        lines = [report["loss"] for report in reports if "loss" in report]
        ours_after = job.evaluate("val")
        judged = list(job.datasets.val)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01, weight_decay=0.01)
    losses = []
    for batch in batches:
        logits = plain(batch.tokens)
        loss = F.cross_entropy(logits.reshape(-1, 42), batch.labels.reshape(-1), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(lines) == 20 and min(losses) < losses[0] - 0.01
    np.testing.assert_allclose(lines, losses, rtol=2e-4)
    plain.eval()
    scores = torch.cat([plain(b.tokens)[:, -1].gather(1, b.candidates.long()) for b in judged])
    for name, value in rank_by_sorting(scores.detach().numpy(), (1, 5, 10)).items():
        assert ours_after[name] == pytest.approx(value, abs=0.02), name  # a near tie may fall otherwise
    assert ours_after["samples"] == len(scores) == 60


def rank_by_sorting(scores: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """By sorting each user's candidates, the right one being the first; ties go against it."""
    places = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda n: (-row[n], n == 0))
        places.append(order.index(0))
    found = {}
    for k in ks:
        found[f"Recall@{k}"] = sum(p < k for p in places) / len(places)
        found[f"NDCG@{k}"] = sum(1 / math.log2(p + 2) for p in places if p < k) / len(places)
    return found


def test_rankings_are_those_of_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    scores = torch.randint(0, 60, (300, 101), generator=torch.Generator().manual_seed(0)).float()  # with ties
    with session.open_session(Ranks(), 60):
        gathered = RankingMetrics()
        for part in scores.split(77):
            gathered.update(part, part)
        found = gathered.compute()
        few = RankingMetrics()
        few.update(scores[:, :11], scores)
        short = few.compute()
        assert RankingMetrics().compute()["samples"] == 0
    expected = rank_by_sorting(scores.numpy(), (1, 5, 10, 20, 50, 100))
    assert found.pop("samples") == 300
    assert found == pytest.approx(expected, abs=1e-12)
    assert set(short) == {"samples", *(f"{kind}@{k}" for kind in ("Recall", "NDCG") for k in (1, 5, 10))}
