"""BERT4Rec: masked items of a history are predicted from both sides (arxiv.org/abs/1904.06690).

The architecture and the parameters' names are those of torchrec's example, so the same weights give the same
losses. So are the initial weights, unless the output is tied: then they are the paper's. But logits are
computed only at masked positions, and for the candidates that are ranked, not for the whole vocabulary at
every position.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from dlrm.runtime.trace import span
from dlrm.trainer.mixed_precision import LossScale

FEATURE, TABLE = "item", "item_embedding"
KS = (1, 5, 10, 20, 50, 100)
LEAST = 10  # up to this k metrics are always reported


class Attention(nn.Module):
    """Multi-head self-attention: [rows, length, width] -> the same. `mask`: bool, true where a token is
    attended to.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """width: a multiple of `heads`. dropout: of the attention weights."""
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.linear_layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.output_linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = (
            linear(x).view(batch, length, self.heads, -1).transpose(1, 2) for linear in self.linear_layers
        )
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, self.rate if self.training else 0.0
        )
        return self.output_linear(attended.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """Two linear layers, `hidden` features and a ReLU between them: [..., width] -> the same."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


class ResidualBlock(nn.Module):
    """Norm before, dropout after, and the input added."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)


class TransformerBlock(nn.Module):
    """Attention and feed-forward layers, each in a residual block. `attention_dropout`: None: `dropout`."""

    def __init__(
        self, width: int, heads: int, dropout: float, attention_dropout: float | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout if attention_dropout is None else attention_dropout)
        self.feed_forward = FeedForward(width, 4 * width, dropout)
        self.input_sublayer, self.output_sublayer = (
            ResidualBlock(width, dropout),
            ResidualBlock(width, dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        first, second = self.input_sublayer, self.output_sublayer
        x = x + first.dropout(self.attention(first.norm(x), mask))
        x = x + second.dropout(self.feed_forward(second.norm(x)))
        return self.dropout(x)


class HistoryArch(nn.Module):
    """Item embeddings, sharded by torchrec, plus positions."""

    def __init__(
        self, vocabulary: int, max_len: int, width: int, dropout: float, table_device: torch.device | None
    ) -> None:
        """vocabulary: items, with padding and mask. width: of an embedding. table_device: `meta` for a table
        that is sharded later.
        """
        super().__init__()
        self.positional = nn.Parameter(torch.randn(max_len, width))
        self.layernorm = nn.LayerNorm([max_len, width])
        self.dropout = nn.Dropout(dropout)
        config = EmbeddingConfig(
            name=TABLE, embedding_dim=width, num_embeddings=vocabulary, feature_names=[FEATURE],
            weight_init_max=1.0, weight_init_min=-1.0,
        )  # fmt: skip
        self.ec = EmbeddingCollection(tables=[config], device=table_device)

    def forward(self, looked_up: torch.Tensor) -> torch.Tensor:
        max_len, width = self.positional.shape
        return self.dropout(self.layernorm(looked_up.view(-1, max_len, width) + self.positional))


class BERT4Rec(nn.Module):
    """`tied`: the output layer's weights are the item embeddings, as in the paper; else its own, as in the
    example. Tied weights come through the same lookup, so one update in backward sees both gradients."""

    def __init__(
        self,
        vocabulary: int,
        max_len: int,
        width: int,
        heads: int,
        layers: int,
        dropout: float = 0.1,
        tied: bool = False,
        table_device: torch.device | None = None,
        attention_dropout: float | None = None,
    ) -> None:
        """Sizes and options.

        vocabulary         number of items, with the padding (0) and the mask
        max_len, width     tokens of a sequence, and features of each
        heads, layers      of attention; transformer blocks
        table_device       where the item embeddings are made, e.g. "meta" before they are sharded
        attention_dropout  None: the same as `dropout`
        """
        super().__init__()
        self.max_len, self.vocabulary, self.tied = max_len, vocabulary, tied
        # divides gradients on their way to the table by the loss scale of fp16
        self.unscale: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.history = HistoryArch(vocabulary, max_len, width, dropout, table_device)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, heads, dropout, attention_dropout) for _ in range(layers)]
        )
        self.out = nn.Linear(width, vocabulary)
        if tied:
            self.out.weight = None  # type: ignore[assignment]

    def forward(self, features: KeyedJaggedTensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [rows, max_len, width], and the output layer's weights [vocabulary, width]."""
        looked_up: dict[str, JaggedTensor] = self.history.ec(features)
        values = looked_up[FEATURE].values()
        if self.unscale and isinstance(values, torch.Tensor) and values.requires_grad:
            values.register_hook(self.unscale)
        count = tokens.numel()
        weights = values[count:] if self.tied else self.out.weight
        x = self.history(values[:count])
        mask = (tokens > 0)[:, None, None, :].expand(-1, 1, tokens.size(1), -1)
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x, weights


def make_features(tokens: torch.Tensor, vocabulary: int, tied: bool) -> KeyedJaggedTensor:
    """The ids to look up: tokens int32 [rows, max_len], then, for tied weights, every item once."""
    values = tokens.reshape(-1)
    if tied:
        values = torch.cat([values, torch.arange(vocabulary, dtype=values.dtype)])
    lengths = torch.ones(len(values), dtype=torch.int32)
    return KeyedJaggedTensor.from_lengths_sync(keys=[FEATURE], values=values, lengths=lengths)


@dataclass
class BertBatch(Pipelineable):
    """The model's input. In training without candidates, labels are the masked items [rows, max_len].

    tokens: int32 [rows, max_len]. In evaluation labels are the right items int64 [rows], candidates int32
    [rows, 1 + negatives], the right one first.
    """

    features: KeyedJaggedTensor
    tokens: torch.Tensor
    labels: torch.Tensor
    candidates: torch.Tensor | None = None

    @span("device", "transfer")
    def to(self, device: torch.device, non_blocking: bool = False) -> "BertBatch":
        rest = (self.tokens, self.labels, self.candidates)
        return BertBatch(
            self.features.to(device, non_blocking),
            *(None if each is None else each.to(device, non_blocking=non_blocking) for each in rest),  # type: ignore[arg-type]
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for each in (self.features, self.tokens, self.labels, self.candidates):
            if each is not None:
                each.record_stream(stream)  # type: ignore[arg-type]

    def pin_memory(self) -> "BertBatch":
        rest = (self.tokens, self.labels, self.candidates)
        return BertBatch(
            self.features.pin_memory(),
            *(None if each is None else each.pin_memory() for each in rest),  # type: ignore[arg-type]
        )


class BERT4RecTrain(nn.Module):
    """(loss, (loss, scores, labels)): of masked items in training, of ranked candidates in evaluation.

    The loss is the mean over the masked items of all ranks, so that it does not depend on how rows are
    distributed; DDP averages the ranks' gradients, hence the factor `ranks`. The reported loss is scaled so
    that its mean over the ranks' rows is that loss.
    """

    def __init__(self, model: BERT4Rec) -> None:
        super().__init__()
        self.model = model
        self.precision: Callable[[], Any] = contextlib.nullcontext
        self.scale: Callable[[torch.Tensor], torch.Tensor] | None = None

    def use_mixed_precision(self, device: str, dtype: torch.dtype, scale: LossScale | None) -> None:
        """Mixed precision for all but the lookup.

        scale: applied between the logits and the lookup.
        """
        self.precision = lambda: torch.autocast(device, dtype)
        if scale:
            self.scale, self.model.unscale = scale.scale_gradient, scale.unscale_for_tables

    def forward(self, batch: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if batch.candidates is not None:
            with self.precision():
                hidden, weights = self.model(batch.features, batch.tokens)
                ranked, bias = batch.candidates, self.model.out.bias
                scores = torch.bmm(weights[ranked], hidden[:, -1, :, None]).squeeze(-1) + bias[ranked]
            return scores.new_zeros(()), (scores.new_zeros(()), scores.detach(), batch.labels)
        targets = batch.labels.reshape(-1)
        masked = targets.nonzero().squeeze(1)
        counts = torch.tensor([len(masked), len(batch.tokens)], dtype=torch.float32, device=targets.device)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        summing = dist.all_reduce(counts, async_op=True) if ranks > 1 else None
        with self.precision():
            hidden, weights = self.model(batch.features, batch.tokens)
            logits = F.linear(hidden.reshape(-1, hidden.size(-1))[masked], weights, self.model.out.bias)
        logits = logits.float()
        if self.scale and logits.requires_grad:
            logits.register_hook(self.scale)
        total = F.cross_entropy(logits, targets[masked], reduction="sum")
        if summing is not None:
            summing.wait()
        masked_items, rows = counts[0].clamp(min=1), counts[1]  # without masked items the loss is 0
        reported = total.detach() / masked_items * (rows / len(batch.tokens))
        return total * (ranks / masked_items), (reported, batch.labels[:, -1].detach(), batch.labels.detach())


def compute_first_item_rank(scores: torch.Tensor) -> torch.Tensor:
    """Rank of the right item, the first candidate: scores [rows, candidates] -> int64 [rows], 0 is best.

    Of equal scores it counts as the last.
    """
    return (scores[:, 1:] >= scores[:, :1]).sum(dim=1)


def sum_ranking_metrics(places: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """float64 [1 + 2 * len(ks)]: users, hits at each k, sums of NDCG at each k; they add up over ranks.

    places: rank of the right item, int64 [users].
    """
    gain = 1 / torch.log2(places.double() + 2)
    within = [places < k for k in ks]
    hits = [inside.double().sum() for inside in within]
    gains = [gain[inside].sum() for inside in within]
    return torch.stack([gain.new_tensor(len(places)), *hits, *gains])


class RankingMetrics:
    """Recall (which is HR, there being one right item) and NDCG over the users of all ranks."""

    def __init__(self, ks: Sequence[int] = KS) -> None:
        self.ks = tuple(ks)
        self._sums: torch.Tensor | None = None

    def update(self, scores: torch.Tensor, labels: torch.Tensor, /) -> None:
        # no metric at a k that all candidates reach
        self.ks = tuple(k for k in self.ks if k <= LEAST or k < scores.size(1))
        sums = sum_ranking_metrics(compute_first_item_rank(scores), self.ks)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, Any]:
        sums = torch.zeros(1 + 2 * len(self.ks), dtype=torch.float64) if self._sums is None else self._sums
        dist.all_reduce(sums)
        users, *rest = sums.tolist()
        names = [f"Recall@{k}" for k in self.ks] + [f"NDCG@{k}" for k in self.ks]
        return {"samples": int(users)} | {
            name: value / users if users else None for name, value in zip(names, rest, strict=True)
        }
