"""Forward and backward of the dense layers, in place, with the products that `blas` chose.

The hook `run_mlp` of `dlrm.runtime.accelerate`.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from dlrm.cpu import blas


class LinearReluChain(torch.autograd.Function):
    """Linear layers with a ReLU after each (after the last one only if `last`), as autograd computes them.

    features: float32 [rows, inputs]. parameters: weight [outputs, inputs] and bias [outputs] of each layer.
    """

    @staticmethod
    def forward(ctx: Any, last: bool, features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights, biases = list(parameters[::2]), parameters[1::2]
        values = [features]
        for weight, bias in zip(weights, biases, strict=True):
            values.append(blas.mm(values[-1], weight.t()).add_(bias))
            if last or len(values) <= len(weights):
                values[-1].relu_()
        ctx.save_for_backward(*values, *weights)
        ctx.last = last
        return values[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """gradient: of the output, float32 [rows, outputs of the last layer]."""
        layers = len(ctx.saved_tensors) // 2
        values, weights = ctx.saved_tensors[: layers + 1], ctx.saved_tensors[layers + 1 :]
        gradients: list[torch.Tensor] = []  # of biases and weights, from the last layer to the first
        current: Any = gradient
        for layer in reversed(range(layers)):
            if layer < layers - 1:  # a tensor of this function: may be overwritten
                torch.ops.aten.threshold_backward.grad_input(
                    current, values[layer + 1], 0, grad_input=current
                )
            elif ctx.last:
                current = torch.ops.aten.threshold_backward(current, values[layer + 1], 0)
            gradients += [current.sum(0), blas.mm(current.t(), values[layer])]
            needed = layer > 0 or ctx.needs_input_grad[1]
            current = blas.mm(current, weights[layer]) if needed else None
        return None, current, *reversed(gradients)


def run_mlp(module: nn.Module, features: torch.Tensor, last_relu: bool) -> torch.Tensor:
    """The layers' output: by `LinearReluChain` in plain float32, else as torch's own modules compute it."""
    if not blas.is_plain_float32(features):
        return module(features)
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    parameters = [each for linear in linears for each in (linear.weight, linear.bias)]
    return LinearReluChain.apply(last_relu, features, *parameters)  # type: ignore[return-value]
