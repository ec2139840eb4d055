"""Feature interactions: dot products of all pairs, DCN-v2, projection, or concatenation.

In: the dense layers' output [rows, dense] and torchrec's KeyedTensor of pooled embeddings, whose columns are
in the order of the sharding. Out: what torchrec's architectures return, columns in the tables' order.
"""

import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm.models.dlrm.mlp import DenseArch, count_layer_weights
from dlrm.models.dlrm.options import INTERACTIONS
from dlrm.runtime.errors import UserError


@dataclass(frozen=True)
class InteractionConfig:
    """What an interaction needs to know of the model."""

    names: Sequence[str]  # features, in the tables' order
    dims: Sequence[int]  # their widths
    dense: int  # width of the dense layers' output
    dcn_layers: int = 3
    dcn_rank: int = 512
    branch1: Sequence[int] = ()
    branch2: Sequence[int] = ()
    self_interaction: bool = False
    device: torch.device | None = None

    @property
    def flat(self) -> int:
        """Width of all embeddings and dense features together."""
        return self.dense + sum(self.dims)


class Interaction(nn.Module):
    """What every interaction is: a module that says beforehand how large it will be.

    forward: (float [rows, dense], KeyedTensor of pooled embeddings) -> float [rows, out_features].
    """

    def __init__(self, shape: InteractionConfig) -> None:
        super().__init__()
        self.out_features = self.count_outputs(shape)

    @classmethod
    def count_outputs(cls, shape: InteractionConfig) -> int:
        """Columns of the output; also called before the module is made, with any widths."""
        raise NotImplementedError

    @classmethod
    def count_weights(cls, shape: InteractionConfig) -> int:
        """Parameters of its own, so that a model that is too large is refused before it is made."""
        return 0


class PairOrder(NamedTuple):
    """Column numbers of the pairs, for one order of the tables' columns."""

    take: torch.Tensor  # int64 [pairs]: columns of the flat Z Z^T
    # int64 [entries * entries]: for each element of Z Z^T the column of its pair in the output
    spread: torch.Tensor
    diagonal: bool


class PairDots(torch.autograd.Function):
    """[rows, dim], [rows, tables * dim] -> [rows, dim + pairs]: dense features, dot products of all pairs.

    Z Z^T is symmetric, so its gradient is (G + G^T) Z: one product where autograd would make two. The pairs
    are gathered by flat column numbers in both directions, so nothing is scattered.
    """

    @staticmethod
    def forward(ctx: Any, dense: torch.Tensor, sparse: torch.Tensor, order: PairOrder) -> torch.Tensor:
        batch, dim = dense.shape
        ctx.types, ctx.order, work = (dense.dtype, sparse.dtype), order, dense
        if torch.is_autocast_enabled(dense.device.type):
            half = torch.get_autocast_dtype(dense.device.type)
            work, sparse = dense.to(half), sparse.to(half)
        z = torch.cat((work, sparse), dim=1).view(batch, -1, dim)
        ctx.save_for_backward(z)
        dots = torch.bmm(z, z.mT).view(batch, -1)
        return torch.cat((work, dots.index_select(1, order.take)), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        # entries: the dense features and the tables. pairs: float [rows, entries, entries], G + G^T
        batch, entries, dim = z.shape
        pairs = gradient.index_select(1, ctx.order.spread).view(batch, entries, entries)
        diagonal = pairs.diagonal(dim1=1, dim2=2)
        if ctx.order.diagonal:
            diagonal.mul_(2)
        else:
            diagonal.zero_()
        dense = torch.bmm(pairs[:, :1], z).view(batch, dim).add_(gradient[:, :dim])
        sparse = torch.bmm(pairs[:, 1:], z).view(batch, -1)
        return dense.to(ctx.types[0]), sparse.to(ctx.types[1]), None


class InteractionArch(Interaction):
    """The original DLRM: torchrec's; `self_interaction` adds each embedding's product with itself."""

    def __init__(self, shape: InteractionConfig) -> None:
        super().__init__(shape)
        wrong = [f"{n} {d}" for n, d in zip(shape.names, shape.dims, strict=True) if d != shape.dense]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"dot products need tables as wide as the last dense layer ({shape.dense}), "
                f"not {', '.join(wrong[:3])}{more}: change --embedding_dim or --dense_arch_layer_sizes, "
                "or choose --interaction_type dcn"
            )
        self.names, self.dim, self.diagonal = list(shape.names), shape.dense, shape.self_interaction
        self._orders: dict[tuple[str, ...], PairOrder] = {}

    @classmethod
    def count_outputs(cls, shape: InteractionConfig) -> int:
        entries = len(shape.names) + 1
        return shape.dense + entries * (entries - 1) // 2 + entries * shape.self_interaction

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedTensor) -> torch.Tensor:
        values = sparse_features.values()
        keys = tuple(sparse_features.keys())
        if keys not in self._orders:
            self._orders[keys] = self._make_order(keys, values.device)
        return PairDots.apply(dense_features, values, self._orders[keys])  # type: ignore[return-value]

    def _make_order(self, keys: tuple[str, ...], device: torch.device) -> PairOrder:
        entry = torch.tensor([0] + [1 + keys.index(name) for name in self.names])
        n = len(entry)
        first, second = torch.triu_indices(n, n, offset=int(not self.diagonal))
        row, column = entry[first], entry[second]
        spread = torch.zeros(n, n, dtype=torch.int64)
        spread[row, column] = spread[column, row] = self.dim + torch.arange(len(row))
        return PairOrder((row * n + column).to(device), spread.view(-1).to(device), self.diagonal)


class ConcatArch(Interaction):
    """Dense features and all embeddings side by side (NVIDIA's `cat`)."""

    def __init__(self, shape: InteractionConfig) -> None:
        super().__init__(shape)
        self.names = list(shape.names)

    @classmethod
    def count_outputs(cls, shape: InteractionConfig) -> int:
        return shape.flat

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedTensor) -> torch.Tensor:
        if list(sparse_features.keys()) == self.names:
            columns = [sparse_features.values()]
        else:
            found = sparse_features.to_dict()
            columns = [found[name] for name in self.names]
        return torch.cat([dense_features, *columns], dim=1)


class InteractionDCNArch(ConcatArch):
    """DCN-v2 with low-rank kernels: torchrec's InteractionDCNArch."""

    def __init__(self, shape: InteractionConfig) -> None:
        super().__init__(shape)
        self.crossnet = LowRankCrossNet(shape.flat, shape.dcn_layers, shape.dcn_rank).to(shape.device)

    @classmethod
    def count_weights(cls, shape: InteractionConfig) -> int:
        return shape.dcn_layers * (2 * shape.flat * shape.dcn_rank + shape.flat)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedTensor) -> torch.Tensor:
        return self.crossnet(super().forward(dense_features, sparse_features))


class InteractionProjectionArch(ConcatArch):
    """Dot products of two MLPs' outputs: torchrec's InteractionProjectionArch."""

    def __init__(self, shape: InteractionConfig) -> None:
        super().__init__(shape)
        for option, layers in (("branch1", shape.branch1), ("branch2", shape.branch2)):
            if not layers or layers[-1] % shape.dense:
                raise UserError(
                    f"--interaction_{option}_layer_sizes: the last of {list(layers)} must be a multiple "
                    f"of the width of the last dense layer, {shape.dense}"
                )
        self.dim = shape.dense
        self.interaction_branch1 = DenseArch(shape.flat, shape.branch1, shape.device)
        self.interaction_branch2 = DenseArch(shape.flat, shape.branch2, shape.device)

    @classmethod
    def count_outputs(cls, shape: InteractionConfig) -> int:
        return shape.dense + math.prod(
            branch[-1] // shape.dense for branch in (shape.branch1, shape.branch2) if branch
        )

    @classmethod
    def count_weights(cls, shape: InteractionConfig) -> int:
        return sum(count_layer_weights(shape.flat, branch) for branch in (shape.branch1, shape.branch2))

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedTensor) -> torch.Tensor:
        flat = super().forward(dense_features, sparse_features)
        batch = flat.size(0)
        left = self.interaction_branch1(flat).reshape(batch, -1, self.dim)
        right = self.interaction_branch2(flat).reshape(batch, self.dim, -1)
        return torch.cat((dense_features, torch.bmm(left, right).reshape(batch, -1)), dim=1)


def find_interaction(name: str) -> type[Interaction]:
    """The class that --interaction_type names."""
    if name not in INTERACTIONS:
        raise UserError(f"--interaction_type {name} is unknown; choose from {', '.join(INTERACTIONS)}")
    return pkgutil.resolve_name(INTERACTIONS[name])
