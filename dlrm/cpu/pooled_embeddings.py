"""Pooled embeddings from one rank's tables straight into the other's interaction, through shared memory.

torchrec's output dist copies every embedding seven times on its way from lookup to interaction and every
gradient five times on its way back. Here it is two and two: into the segment that the ranks share, and from
there into its columns. Only for whole tables on ranks of one host (`exchange`); everywhere else torchrec's
own way stays.
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

NOTHING = torch.empty(0)
mark: Any = comm_ops.record_function  # type: ignore[attr-defined]  # traced where torchrec is patched


def install_shared_memory_dists(model: nn.Module) -> int:
    """Put it in place of torchrec's in all sharded tables that allow it. Returns how many collections."""
    found = 0
    for part in model.modules():
        for dist in getattr(part, "_output_dists", []):
            plain = type(dist) is TwPooledEmbeddingDist and not dist._callbacks and dist._codecs is None
            if plain and isinstance(dist._pg, ShmProcessGroup):
                dist._dist = ShmPooledEmbeddingDist(dist._pg.segments, dist._dim_sum_per_rank)
                found += 1
    return found


class ShmPooledEmbeddingDist(nn.Module):
    """Embeddings [rows of all ranks, columns of this rank's tables] -> [this rank's rows, all columns]."""

    def __init__(self, segments: ShmChannels, widths: Sequence[int]) -> None:
        super().__init__()
        self.segments = segments
        self.columns = slices_of(widths)

    def forward(
        self, embeddings: torch.Tensor, batch_size_per_rank: Sequence[int] = ()
    ) -> "ShmPooledAwaitable":
        ranks = self.segments.size
        return ShmPooledAwaitable(
            self, embeddings, slices_of(batch_size_per_rank or [len(embeddings) // ranks] * ranks)
        )


def slices_of(counts: Sequence[int]) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate([0, *counts]))]


class ShmPooledAwaitable(Awaitable[torch.Tensor]):
    """One batch on its way: posted when made, in place when waited for."""

    def __init__(self, direct: ShmPooledEmbeddingDist, embeddings: torch.Tensor, rows: list[slice]) -> None:
        super().__init__()
        self.segments, self.columns, self.rows = direct.segments, direct.columns, rows
        self.own = direct.segments.rank
        self.type = embeddings.dtype
        mine = rows[self.own]
        self.values = torch.empty(mine.stop - mine.start, self.columns[-1].stop, dtype=self.type)
        self.gradient = NOTHING  # of the embeddings, all ranks' rows
        self.arriving: ArrivingMessage | None = None
        self.token: torch.Tensor = PostEmbeddings.apply(embeddings, self)  # type: ignore[assignment]

    def _wait_impl(self) -> torch.Tensor:
        values: Any = TakeEmbeddings.apply(self.token, self)
        self.token = self.values = NOTHING  # else tensors and batch would keep each other
        return values

    def post(self, embeddings: torch.Tensor) -> None:
        with mark("## All2All_Pooled_fwd ##"):
            segments = self.segments
            row = embeddings.size(1) * embeddings.element_size()
            parts = [(rows.start * row, rows.stop * row) for rows in self.rows]
            number = segments.post(embeddings.contiguous().view(-1).view(torch.uint8), parts)
            self.values[:, self.columns[self.own]] = embeddings[self.rows[self.own]]
            self.arriving = ArrivingMessage(segments, number, self.place)

    def place(self, peer: int, part: torch.Tensor) -> None:
        columns = self.columns[peer]
        self.values[:, columns] = self.matrix(part, len(self.values), columns.stop - columns.start)

    def post_gradient(self, gradient: torch.Tensor) -> None:
        """To each rank the columns of its tables. torchrec takes the mean over the ranks; so does this."""
        with mark("## All2All_Pooled_bwd ##"):
            segments, own = self.segments, self.own
            share = segments.size if comm_ops.get_gradient_division() else 1
            widths = [columns.stop - columns.start for columns in self.columns]
            sizes = [0 if rank == own else gradient[:, c].nbytes for rank, c in enumerate(self.columns)]
            parts = list(pairwise(accumulate([0, *sizes])))
            number, out = segments.begin(parts[-1][1])
            for peer in segments.peers:
                target = self.matrix(out[slice(*parts[peer])], len(gradient), widths[peer])
                torch.div(gradient[:, self.columns[peer]], share, out=target)
            segments.send(number, parts)
            self.gradient = torch.empty(self.rows[-1].stop, widths[own], dtype=self.type)
            torch.div(gradient[:, self.columns[own]], share, out=self.gradient[self.rows[own]])
            self.arriving = ArrivingMessage(segments, number, self.place_gradient)

    def place_gradient(self, peer: int, part: torch.Tensor) -> None:
        target = self.gradient[self.rows[peer]]
        target.copy_(self.matrix(part, *target.shape))

    def matrix(self, part: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        if part.numel() != rows * columns * self.type.itemsize:
            raise RuntimeError(
                f"{part.numel()} bytes came where rank {self.own} expected {rows} x {columns} numbers"
            )
        return part.view(self.type).view(rows, columns)

    def finish(self) -> None:
        with mark("## All2All_Pooled_wait ##"):
            assert self.arriving is not None
            self.arriving.finish()
            self.arriving = None


class PostEmbeddings(torch.autograd.Function):
    """Sends embeddings; backward, receives their gradients: late, so that other work goes on meanwhile."""

    @staticmethod
    def forward(ctx: Any, embeddings: torch.Tensor, batch: ShmPooledAwaitable) -> torch.Tensor:
        ctx.batch = batch
        batch.post(embeddings)
        return embeddings.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch, ctx.batch = ctx.batch, None
        batch.finish()
        return batch.gradient, None


class TakeEmbeddings(torch.autograd.Function):
    """Receives embeddings; backward, sends their gradients."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, batch: ShmPooledAwaitable) -> torch.Tensor:
        ctx.batch, ctx.token = batch, token.shape
        batch.finish()
        return batch.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch, ctx.batch = ctx.batch, None
        batch.post_gradient(gradient)
        return gradient.new_empty(ctx.token), None
