"""Pooled embeddings from one rank's lookup to the other's interaction through shared memory.

torchrec's output dist copies every embedding seven times between lookup and interaction, and every gradient
five times on its way back. Here it is two and two: into the memory that the ranks share, and from there into
the columns that the interaction reads. Only for whole tables (table-wise) on ranks of one host; all other
shardings keep torchrec's output dists.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed import comm_ops
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from dlrm.cpu.process_group import ShmProcessGroup
from dlrm.cpu.shared_memory import ArrivingMessage, ShmChannels

EMPTY = torch.empty(0)
# torchrec's own spans, which a trace has where torchrec is patched
record_function: Any = comm_ops.record_function  # type: ignore[attr-defined]


def install_shared_memory_dists(model: nn.Module) -> int:
    """Replace torchrec's dist in all sharded modules that allow it; returns in how many.

    The hook `replace_output_dists`.
    """
    replaced = 0
    for part in model.modules():
        for dist in getattr(part, "_output_dists", []):
            plain = type(dist) is TwPooledEmbeddingDist and not dist._callbacks and dist._codecs is None
            if plain and isinstance(dist._pg, ShmProcessGroup):
                shared = ShmPooledEmbeddingDist(dist._pg.segments, dist._dim_sum_per_rank)
                dist._dist = shared  # pyright: ignore[reportAttributeAccessIssue]
                replaced += 1
    return replaced


class ShmPooledEmbeddingDist(nn.Module):
    """Embeddings [rows of all ranks, columns of this rank's tables] -> [this rank's rows, all columns].

    widths: columns of each rank's tables.
    """

    def __init__(self, segments: ShmChannels, widths: Sequence[int]) -> None:
        super().__init__()
        self.segments = segments
        self.columns = make_slices(widths)

    def forward(
        self, embeddings: torch.Tensor, batch_size_per_rank: Sequence[int] = ()
    ) -> "ShmPooledAwaitable":
        ranks = self.segments.size
        return ShmPooledAwaitable(
            self, embeddings, make_slices(batch_size_per_rank or [len(embeddings) // ranks] * ranks)
        )


def make_slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths."""
    return [slice(*ends) for ends in pairwise(accumulate([0, *counts]))]


class ShmPooledAwaitable(Awaitable[torch.Tensor]):
    """One batch in transfer: sent when this is created, complete after `wait`.

    embeddings: [rows of all ranks, columns of this rank's tables]. rows: each rank's rows in it.
    """

    def __init__(self, dist: ShmPooledEmbeddingDist, embeddings: torch.Tensor, rows: list[slice]) -> None:
        super().__init__()
        self.segments, self.columns, self.rows = dist.segments, dist.columns, rows
        self.own = dist.segments.rank
        self.type = embeddings.dtype
        own_rows = rows[self.own]
        self.values = torch.empty(own_rows.stop - own_rows.start, self.columns[-1].stop, dtype=self.type)
        self.gradient = EMPTY  # of `embeddings`, set by the backward pass
        self.arriving: ArrivingMessage | None = None
        self.token: torch.Tensor = PostEmbeddings.apply(embeddings, self)  # type: ignore[assignment]

    def _wait_impl(self) -> torch.Tensor:
        values: Any = TakeEmbeddings.apply(self.token, self)
        self.token = self.values = EMPTY  # else the tensors and this object would keep each other alive
        return values

    def post_embeddings(self, embeddings: torch.Tensor) -> None:
        """Send each rank its rows; copy this rank's own."""
        with record_function("## All2All_Pooled_fwd ##"):
            segments = self.segments
            row = embeddings.size(1) * embeddings.element_size()
            parts = [(rows.start * row, rows.stop * row) for rows in self.rows]
            number = segments.post_copy(embeddings.contiguous().view(-1).view(torch.uint8), parts)
            self.values[:, self.columns[self.own]] = embeddings[self.rows[self.own]]
            self.arriving = ArrivingMessage(segments, number, self.place_embeddings)

    def place_embeddings(self, peer: int, part: torch.Tensor) -> None:
        """Copy a peer's embeddings (uint8 bytes) into its columns."""
        columns = self.columns[peer]
        self.values[:, columns] = self.as_matrix(part, len(self.values), columns.stop - columns.start)

    def post_gradient(self, gradient: torch.Tensor) -> None:
        """Send each rank its columns of the gradient [own rows, all columns], divided as torchrec does it."""
        with record_function("## All2All_Pooled_bwd ##"):
            segments, own = self.segments, self.own
            divisor = segments.size if comm_ops.get_gradient_division() else 1
            widths = [columns.stop - columns.start for columns in self.columns]
            sizes = [0 if rank == own else gradient[:, c].nbytes for rank, c in enumerate(self.columns)]
            parts = list(pairwise(accumulate([0, *sizes])))
            number, out = segments.begin_message(parts[-1][1])
            for peer in segments.peers:
                target = self.as_matrix(out[slice(*parts[peer])], len(gradient), widths[peer])
                torch.div(gradient[:, self.columns[peer]], divisor, out=target)
            segments.send_message(number, parts)
            self.gradient = torch.empty(self.rows[-1].stop, widths[own], dtype=self.type)
            torch.div(gradient[:, self.columns[own]], divisor, out=self.gradient[self.rows[own]])
            self.arriving = ArrivingMessage(segments, number, self.place_gradient)

    def place_gradient(self, peer: int, part: torch.Tensor) -> None:
        target = self.gradient[self.rows[peer]]
        target.copy_(self.as_matrix(part, *target.shape))

    def as_matrix(self, part: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """A peer's part, uint8 [bytes], as numbers [rows, columns]."""
        if part.numel() != rows * columns * self.type.itemsize:
            raise RuntimeError(
                f"rank {self.own} received {part.numel()} bytes, expected {rows} x {columns} numbers"
            )
        return part.view(self.type).view(rows, columns)

    def await_peers(self) -> None:
        with record_function("## All2All_Pooled_wait ##"):
            assert self.arriving is not None
            self.arriving.receive_parts()
            self.arriving = None


class PostEmbeddings(torch.autograd.Function):
    """Sends embeddings; its backward receives their gradients, as late as possible."""

    @staticmethod
    def forward(ctx: Any, embeddings: torch.Tensor, batch: ShmPooledAwaitable) -> torch.Tensor:
        ctx.batch = batch
        batch.post_embeddings(embeddings)
        return embeddings.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch, ctx.batch = ctx.batch, None
        batch.await_peers()
        return batch.gradient, None


class TakeEmbeddings(torch.autograd.Function):
    """Receives embeddings; its backward sends their gradients."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, batch: ShmPooledAwaitable) -> torch.Tensor:
        ctx.batch, ctx.token = batch, token.shape
        batch.await_peers()
        return batch.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch, ctx.batch = ctx.batch, None
        batch.post_gradient(gradient)
        return gradient.new_empty(ctx.token), None
