"""Mixed precision of the dense part, loss scaling and gradient clipping.

Why not torch.amp.GradScaler: it scales the loss and unscales before the optimizer's step. The tables have no
such step: torchrec updates them inside the backward pass, and they would be updated with scaled gradients. So
the scale is limited to the dense part. Gradients are multiplied where they enter it, at the logits; they are
divided where they leave it towards the tables (in fp32; a row that overflowed becomes zero), and before the
step of the dense optimizer.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROWTH_STEPS = 2000  # steps without overflow after which the scale doubles
GROWTH, BACKOFF = 2.0, 0.5
MAX_SCALE, MIN_SCALE = 2.0**24, 2.0**-8


class ScaleState(Protocol):
    """The current loss scale. `loop.Progress` has these fields, so that checkpoints store them."""

    loss_scale: float
    steps_since_overflow: int  # or since the scale changed
    skipped_steps: int


class LossScale:
    """A constant scale, or (`dynamic`) one that is halved on overflow and doubled after GROWTH_STEPS without.

    The same on all ranks, because the gradients that decide are averages over the ranks.
    """

    def __init__(self, state: ScaleState, dynamic: bool) -> None:
        self.state, self.dynamic = state, dynamic

    def scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.state.loss_scale

    def unscale_for_tables(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., embedding_dim], same dtype. A row that overflowed becomes zero: that row is not updated."""
        unscaled = gradient.float() / self.state.loss_scale
        finite = torch.isfinite(unscaled).all(dim=-1, keepdim=True)
        return torch.where(finite, unscaled, 0.0).to(gradient.dtype)

    def update(self, overflow: bool) -> None:
        """After each step: did its dense gradients overflow?"""
        state = self.state
        state.skipped_steps += overflow
        state.steps_since_overflow = 0 if overflow else state.steps_since_overflow + 1
        if self.dynamic and overflow:
            state.loss_scale = max(MIN_SCALE, state.loss_scale * BACKOFF)
        elif self.dynamic and state.steps_since_overflow == GROWTH_STEPS:
            state.loss_scale, state.steps_since_overflow = min(MAX_SCALE, state.loss_scale * GROWTH), 0


def cast_dense_part(
    model: nn.Module, device: torch.device, kind: str, scale: LossScale | None = None
) -> None:
    """Run a DLRM's dense arch, interaction and over arch in `kind` ("bf16" or "fp16"). Call it once per
    model.

    The parts' `forward` is wrapped, rather than the whole model's: the tables keep their own dtype, and the
    hooks on gradients must sit exactly where the dense part begins and ends.
    """
    dtype = TYPES[kind]

    def wrap_in_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_in_autocast(*inputs: Any) -> Any:
            with torch.autocast(device.type, dtype):
                return forward(*inputs)

        return forward_in_autocast

    def forward_interaction(dense: torch.Tensor, sparse: Any) -> torch.Tensor:
        values = sparse.values()
        if scale and values.requires_grad:
            values.register_hook(scale.unscale_for_tables)
        return inter_arch(dense, sparse)

    def forward_over_arch(features: torch.Tensor) -> torch.Tensor:
        logits = over_arch(features).float()  # the loss, and the hook's product, in fp32
        if scale and logits.requires_grad:
            logits.register_hook(scale.scale_gradient)
        return logits

    parts: Any = model
    parts.dense_arch.forward = wrap_in_autocast(parts.dense_arch.forward)
    inter_arch = wrap_in_autocast(parts.inter_arch.forward)
    parts.inter_arch.forward = forward_interaction
    over_arch = wrap_in_autocast(parts.over_arch.forward)
    parts.over_arch.forward = forward_over_arch


class Optimizer(Protocol):
    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


class ScaledClippedOptimizer:
    """Before the optimizer's step: unscale the dense gradients, skip the step if they overflowed, clip them.

    The dense gradients are averages over all ranks, so every rank takes or skips the same steps. In a skipped
    step the tables have been updated already, except for the rows whose gradients overflowed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dense: Iterable[nn.Parameter],
        clip: float | None = None,
        scale: LossScale | None = None,
    ) -> None:
        """`dense`: the parameters outside the tables. `clip`: the largest norm of their gradients, None: any.
        `scale`: the loss scale of fp16, None: gradients are not scaled.
        """
        self.optimizer, self.dense = optimizer, list(dense)
        self.clip, self.scale = clip, scale

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.dense if parameter.grad is not None]
        if self.scale:
            torch._foreach_div_(gradients, self.scale.state.loss_scale)
            overflow = not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
            self.scale.update(overflow)
            if overflow:
                return
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.dense, self.clip, foreach=True)
        self.optimizer.step()
