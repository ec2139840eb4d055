"""The dense layers: ReLU multilayer perceptrons, torchrec's MLP under torchrec's names."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torchrec.modules.mlp import MLP

from dlrm.runtime import accelerate


def count_layer_weights(inputs: int, layers: Sequence[int]) -> int:
    """Weights and biases of an MLP."""
    return sum((above + 1) * below for above, below in pairwise([inputs, *layers]))


class DenseArch(nn.Module):
    """A ReLU MLP under the name that torchrec gives it.

    Without inputs it gets a column of ones: its output is then one learned vector, the same for every row,
    with which the embeddings interact.
    """

    def __init__(self, inputs: int, layers: Sequence[int], device: torch.device | None = None) -> None:
        super().__init__()
        self.constant = not inputs
        self.model = MLP(max(inputs, 1), list(layers), bias=True, activation="relu", device=device)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.constant:
            features = features.new_ones(len(features), 1)
        return accelerate.hooks.run_mlp(self.model, features, True)


class OverArch(nn.Module):
    """A ReLU MLP whose last layer is linear."""

    def __init__(self, inputs: int, layers: Sequence[int], device: torch.device | None) -> None:
        """layers: the width of each layer; the last is that of the output."""
        super().__init__()
        hidden = list(layers[:-1])
        self.model = nn.Sequential(
            MLP(inputs, hidden, bias=True, activation="relu", device=device) if hidden else nn.Identity(),
            nn.Linear(hidden[-1] if hidden else inputs, layers[-1], device=device),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return accelerate.hooks.run_mlp(self.model, features, False)
