"""Mixed precision of the dense part, loss scaling and gradient clipping.

Tables are updated inside the backward pass, so a scaled loss would reach them scaled. Here the scale
lives in the dense part only: gradients are multiplied where they enter it, at the logits, and divided where
they leave it towards the tables (in fp32, rows that overflowed to zero) and before the dense step.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROWTH_STEPS = 2000  # without overflow, then the scale doubles
GROWTH, BACKOFF = 2.0, 0.5
LARGEST, SMALLEST = 2.0**24, 2.0**-8


class Scaling(Protocol):
    """Where the scale stands; kept with the training's progress, so that checkpoints have it."""

    loss_scale: float
    good_steps: int  # since the last overflow or change
    skipped_steps: int


class LossScale:
    """Static, or halved on overflow and doubled after many good steps. The same on all ranks."""

    def __init__(self, at: Scaling, dynamic: bool) -> None:
        self.at, self.dynamic = at, dynamic

    def up(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.at.loss_scale

    def down(self, gradient: torch.Tensor) -> torch.Tensor:
        """For the tables: rows that overflowed change nothing."""
        unscaled = gradient.float() / self.at.loss_scale
        finite = torch.isfinite(unscaled).all(dim=-1, keepdim=True)
        return torch.where(finite, unscaled, 0.0).to(gradient.dtype)

    def update(self, overflow: bool) -> None:
        at = self.at
        at.skipped_steps += overflow
        at.good_steps = 0 if overflow else at.good_steps + 1
        if self.dynamic and overflow:
            at.loss_scale = max(SMALLEST, at.loss_scale * BACKOFF)
        elif self.dynamic and at.good_steps == GROWTH_STEPS:
            at.loss_scale, at.good_steps = min(LARGEST, at.loss_scale * GROWTH), 0


def cast_dense_part(
    model: nn.Module, device: torch.device, kind: str, scale: LossScale | None = None
) -> None:
    """Run this DLRM's towers and interaction in `kind`. Call it once."""
    dtype = TYPES[kind]

    def autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
        def within(*inputs: Any) -> Any:
            with torch.autocast(device.type, dtype):
                return forward(*inputs)

        return within

    def interact(dense: torch.Tensor, sparse: Any) -> torch.Tensor:
        values = sparse.values()
        if scale and values.requires_grad:
            values.register_hook(scale.down)
        return inner(dense, sparse)

    def last(features: torch.Tensor) -> torch.Tensor:
        logits = over(features).float()  # the loss and the hook's product in fp32
        if scale and logits.requires_grad:
            logits.register_hook(scale.up)
        return logits

    parts: Any = model
    parts.dense_arch.forward = autocast(parts.dense_arch.forward)
    inner = autocast(parts.inter_arch.forward)
    parts.inter_arch.forward = interact
    over = autocast(parts.over_arch.forward)
    parts.over_arch.forward = last


class Optimizer(Protocol):
    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


class ScaledClippedOptimizer:
    """The optimizer's step for the dense gradients: unscaled, clipped, left out when they overflowed.

    Those gradients are averages over all ranks, so every rank decides alike.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dense: Iterable[nn.Parameter],
        clip: float | None = None,
        scale: LossScale | None = None,
    ) -> None:
        self.optimizer, self.dense = optimizer, list(dense)
        self.clip, self.scale = clip, scale

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.dense if parameter.grad is not None]
        if self.scale:
            torch._foreach_div_(gradients, self.scale.at.loss_scale)
            overflow = not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
            self.scale.update(overflow)
            if overflow:
                return
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.dense, self.clip, foreach=True)
        self.optimizer.step()
