"""Adam for tables, applied to the rows that a batch looked up: what torch.optim.SparseAdam does.

fbgemm has that kernel for GPUs only. On CPUs `AdamTables` stands in for fbgemm's class, with the update in
the backward pass, like fbgemm's other optimizers; data-parallel tables have `RowAdam`. The step counter,
which corrects the bias of the moments, counts all steps, not those of a row.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed import batched_embedding_kernel


def update_rows(
    weights: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, rows: torch.Tensor,
    gradients: torch.Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """A step of Adam on some rows, in place.

    weights, mean, square: [all rows, width]; rows: int64 [n], all different; gradients: [n, width]; step: the
    first is 1.
    """
    if not len(rows):
        return
    old = mean[rows]
    new_mean = old + (gradients - old) * (1 - betas[0])
    old = square[rows]
    new_square = old + (gradients.square() - old) * (1 - betas[1])
    mean[rows], square[rows] = new_mean, new_square
    size = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    weights[rows] -= new_mean.div_(new_square.sqrt_().add_(eps)).mul_(size).to(weights.dtype)


class AdamTables(SplitTableBatchedEmbeddingBagsCodegen):
    """fbgemm's tables on CPUs with Adam: fbgemm looks rows up, the backward pass updates them here."""

    def __init__(self, *arguments: Any, optimizer: EmbOptimType, weight_decay: float = 0.0, **more: Any):
        assert optimizer == EmbOptimType.ADAM and not weight_decay
        # to fbgemm it is an optimizer without state
        super().__init__(*arguments, optimizer=EmbOptimType.EXACT_SGD, **more)
        assert self.use_cpu and self.pooling_mode in (PoolingMode.SUM, PoolingMode.NONE)
        self.steps = 0
        self.moments = [
            (torch.zeros(weights.shape, device="cpu"), torch.zeros(weights.shape, device="cpu"))
            for weights in self.split_embedding_weights()
        ]

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        assert all(value is None for value in (*rest, *named.values())), "weights of ids are not supported"
        if torch.is_grad_enabled():
            return _LookUp.apply(self.placeholder_autograd_tensor, self, indices, offsets)
        return super().forward(indices, offsets)

    @torch.no_grad()
    def update(self, indices: torch.Tensor, offsets: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update the rows of one lookup. gradient: of its output, [batch, all columns] or, unpooled, [ids,
        columns].
        """
        self.steps += 1
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        batch = (len(offsets) - 1) // len(self.feature_table_map)
        if not batch:
            return
        widths: Any = self.D_offsets
        ends, columns = offsets[::batch].tolist(), widths.tolist()
        lengths, samples = offsets.diff(), torch.arange(batch)
        for feature, table in enumerate(self.feature_table_map):
            begin, end = ends[feature : feature + 2]
            if self.pooling_mode == PoolingMode.NONE:
                each = gradient[begin:end]
            else:
                bags = samples.repeat_interleave(lengths[feature * batch : (feature + 1) * batch])
                each = gradient[:, columns[feature] : columns[feature + 1]][bags]
            found.setdefault(table, []).append((indices[begin:end].long(), each))
        weights, options = self.split_embedding_weights(), self.optimizer_args
        for table, parts in found.items():
            ids, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
            rows, places = ids.unique(return_inverse=True)
            summed = gradients.new_zeros(len(rows), gradients.size(1)).index_add_(0, places, gradients)
            update_rows(
                weights[table], *self.moments[table], rows, summed, self.steps, self.get_learning_rate(),
                (options.beta1, options.beta2), options.eps,
            )  # fmt: skip

    # what torchrec's EmbeddingFusedOptimizer asks for

    def split_optimizer_states(self) -> list[list[torch.Tensor]]:
        return [list(each) for each in self.moments]

    def get_optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        return [{"exp_avg": mean, "exp_avg_sq": square} for mean, square in self.moments]

    def set_optimizer_step(self, step: int) -> None:
        self.steps = step


class _LookUp(torch.autograd.Function):
    """Makes autograd call `AdamTables.update`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, _: torch.Tensor, tables: AdamTables, indices: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        ctx.looked_up = (tables, indices, offsets)
        return SplitTableBatchedEmbeddingBagsCodegen.forward(tables, indices, offsets)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[None, None, None, None]:
        tables, indices, offsets = ctx.looked_up
        tables.update(indices, offsets, gradient)
        return None, None, None, None


class RowAdam(torch.optim.Optimizer):
    """The same for data-parallel tables. Their gradient has all rows: those of zeros were not looked up."""

    def __init__(
        self, parameters: Any, lr: float, betas: tuple[float, float], eps: float, foreach: bool = False
    ) -> None:
        """parameters: tables [rows, width]. foreach: without effect, torch's optimizers have it."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for weights in group["params"]:  # now, so that a checkpoint of fused tables finds them by name
                self.state[weights] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weights),
                    "exp_avg_sq": torch.zeros_like(weights),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                state = self.state[weights]
                state["step"] += 1
                rows = weights.grad.any(dim=1).nonzero().squeeze(1)
                update_rows(
                    weights, state["exp_avg"], state["exp_avg_sq"], rows, weights.grad[rows],
                    int(state["step"]), group["lr"], group["betas"], group["eps"],
                )  # fmt: skip


@contextlib.contextmanager
def use_row_adam_on_cpu(module: nn.Module, device: torch.device) -> Iterator[None]:
    """In the block torchrec makes `AdamTables` where the tables' optimizer is Adam and the device a CPU.

    torchrec has no hook for a kernel of one's own, so the class that it would make is replaced meanwhile.
    """
    wanted = (each for weights in module.parameters() for each in getattr(weights, "_optimizer_classes", []))
    if device.type != "cpu" or torch.optim.Adam not in wanted:
        yield
        return
    kernels: Any = batched_embedding_kernel
    kernels.SplitTableBatchedEmbeddingBagsCodegen = AdamTables
    try:
        yield
    finally:
        kernels.SplitTableBatchedEmbeddingBagsCodegen = SplitTableBatchedEmbeddingBagsCodegen
