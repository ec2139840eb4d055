"""The model: embedding tables, a dense MLP, their interaction, and an MLP over it.

Parameters carry torchrec's names (sparse_arch, dense_arch, inter_arch, over_arch), so that weights move
between this model and torchrec.models.dlrm as they are.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dlrm.embeddings.tables import initialize_tables
from dlrm.models.dlrm.interactions import InteractionConfig, find_interaction
from dlrm.models.dlrm.mlp import DenseArch, OverArch
from dlrm.runtime import accelerate
from dlrm.runtime.errors import UserError

Output = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class SparseArch(nn.Module):
    """The embedding tables: ids -> pooled embeddings."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], device: torch.device) -> None:
        super().__init__()
        self.embedding_bag_collection = EmbeddingBagCollection(tables=list(tables), device=device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return self.embedding_bag_collection(features)


class DLRM(nn.Module):
    """dense_features float32 [rows, numerical columns] and ids -> logits [rows, 1]."""

    def __init__(self, sparse: nn.Module, dense: nn.Module, interaction: nn.Module, over: nn.Module) -> None:
        """sparse: ids -> pooled embeddings. dense: [rows, numerical] -> [rows, width]. interaction: both ->
        [rows, n]. over: that -> [rows, 1].
        """
        super().__init__()
        self.sparse_arch, self.dense_arch = sparse, dense
        self.inter_arch, self.over_arch = interaction, over

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        # tables first: on several ranks their all-to-all runs while the dense layers compute
        embedded = self.sparse_arch(sparse_features)
        return self.over_arch(self.inter_arch(self.dense_arch(dense_features), embedded))


class DLRMTrain(nn.Module):
    """(loss, (loss, logits, labels)) of a batch, as torchrec's pipelines expect from their model."""

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Output:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.labels.float())
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def build_dlrm(
    interaction: str,
    tables: Sequence[EmbeddingBagConfig],
    dense_in: int,
    dense_layers: Sequence[int],
    over_layers: Sequence[int],
    dcn_layers: int = 3,
    dcn_rank: int = 512,
    branch1: Sequence[int] = (2048, 2048),
    branch2: Sequence[int] = (2048, 2048),
    self_interaction: bool = False,
    dense_device: torch.device | None = None,
    table_device: torch.device | None = None,
    seed: int = 0,
    init: str = "torch",
) -> DLRMTrain:
    """The whole model.

    dense_in: number of dense features, may be 0 (see DenseArch). dense_device: of all but the tables.
    table_device: None: meta, for `planner.shard_model` to create and fill the tables. init: a key of INITS.
    """
    if init not in INITS:
        raise UserError(f"weight initialisation {init} is unknown; choose from {', '.join(INITS)}")
    for option, layers in (("dense", dense_layers), ("over", over_layers)):
        if not layers or min(layers) < 1:
            raise UserError(f"--{option}_arch_layer_sizes: {list(layers)}: give positive sizes")
    if over_layers[-1] != 1:
        raise UserError(f"--over_arch_layer_sizes: the last must be 1, the logit, not {over_layers[-1]}")
    shape = InteractionConfig(
        [config.feature_names[0] for config in tables],
        [config.embedding_dim for config in tables],
        dense_layers[-1], dcn_layers, dcn_rank, branch1, branch2, self_interaction,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that weights do not depend on the device
        torch.manual_seed(seed)
        dense = DenseArch(dense_in, dense_layers)
        inter = find_interaction(interaction)(shape)
        over = OverArch(inter.out_features, over_layers, None)
        for part in (dense, inter, over):
            INITS[init](part)
            part.to(dense_device)
    with accelerate.hooks.skip_first_weights():
        sparse = SparseArch(tables, table_device or torch.device("meta"))
    initialize_tables(sparse, seed)
    return DLRMTrain(DLRM(sparse, dense, inter, over))


def _initialize_as_in_paper(module: nn.Module) -> None:
    """The DLRM paper's code: weights normal(0, 2 / (in + out)), biases normal(0, 1 / out) by variance."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (part.in_features + part.out_features)))
            nn.init.normal_(part.bias, std=math.sqrt(1 / part.out_features))


INITS = {
    "torch": lambda module: None,
    "paper": _initialize_as_in_paper,
}  # torch: what torchrec's and MLCommons' DLRM have


def compile_dense(model: DLRM, mode: str = "default") -> None:
    """torch.compile the dense layers and the interaction, in place; not the tables."""
    if next(model.over_arch.parameters()).device.type == "cpu" and " " in torch.__file__:
        raise UserError(  # torch 2.13 does not quote paths for the linker
            f"--compile: torch cannot where its path has a space, {torch.__file__}: choose another folder "
            "for the environment with DLRM_VENV"
        )
    for part in (model.dense_arch, model.inter_arch, model.over_arch):
        part.compile(mode=mode)
