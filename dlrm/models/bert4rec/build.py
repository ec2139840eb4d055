"""A BERT4Rec from its options: the model, the plan of its item table, the shards and their optimizer."""

import warnings
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.embeddings import planner
from dlrm.embeddings.tables import FirstWeights, draw_truncated_normal, draw_uniform
from dlrm.models.bert4rec.dataloaders import BertDatasets
from dlrm.models.bert4rec.model import TABLE, BERT4Rec, BERT4RecTrain
from dlrm.models.bert4rec.options import BertConfig
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import optimizers
from dlrm.trainer.run_folder import RunFolder

BOUND = 1.0  # --output linear: first item embeddings are uniform in +-1, as in the example
DEVIATION = 0.02  # --output tied: first weights are truncated normal, as in the paper
ALL_ROWS = ("adam", "adamw")  # on CPUs not fused: as in the example, each step also moves rows not looked up
WITH_GRADIENTS = ("row_wise", "table_wise")  # shardings of a table whose optimizer is not fused


def build_model(cfg: BertConfig, datasets: BertDatasets, device: torch.device) -> BERT4RecTrain:
    """The model for these data on this device, the same on all ranks; its table on the meta device."""
    return build_bert4rec(cfg, datasets.data.vocabulary, device)


def build_bert4rec(cfg: BertConfig, vocabulary: int, device: torch.device) -> BERT4RecTrain:
    """The model on this device, the same on all ranks; its table on the meta device."""
    model = cfg.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed or 0)
        module = BERT4RecTrain(
            BERT4Rec(
                vocabulary, cfg.data.max_len, model.emb_dim, model.nhead, model.num_layers, model.dropout,
                model.output == "tied", torch.device("meta"), model.attention_dropout,
            )
        )  # fmt: skip
        if model.output == "tied":
            draw_paper_weights(module)
    for name, parameter in list(module.named_parameters()):  # all but the table
        if not parameter.is_meta:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.data.to(device)))
    return module


def choose_first_weights(cfg: BertConfig) -> FirstWeights:
    """The distribution of the item table's first weights."""
    return draw_truncated_normal(DEVIATION) if cfg.model.output == "tied" else draw_uniform(BOUND)


@torch.no_grad()
def draw_paper_weights(module: nn.Module) -> None:
    """The paper's first weights for all but the table: its scores are products with item embeddings, which
    would be large with the example's. Norms keep theirs.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta or isinstance(part, nn.LayerNorm):
                continue
            if name == "bias":
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, 0.0, DEVIATION, -2 * DEVIATION, 2 * DEVIATION)


def shard_bert4rec(
    cfg: BertConfig,
    module: BERT4RecTrain,
    datasets: BertDatasets,
    here: Ranks,
    device: torch.device,
    run_folder: RunFolder,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan the item table over the ranks, create this rank's shard, wrap the transformer in DDP."""
    # fbgemm's dense kernel has a gradient (tests compare it with PyTorch's), torch misses its registration
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
    optim = cfg.optim
    replicated = cfg.plan.mode == "ddp"
    fused = not replicated and (device.type != "cpu" or optim.optimizer not in ALL_ROWS)
    constraints: dict[str, dict[str, Any]] = {}
    if cfg.plan.sharding_file:
        constraints = planner.load_constraints(cfg.plan.sharding_file)
    elif replicated:
        constraints = {TABLE: {"sharding": "data_parallel"}}
    elif device.type == "cpu":
        constraints = {
            TABLE: {"sharding": "row_wise"}
        }  # there is one table: whole, only one rank would look up
    if fused:
        optimizers.apply_in_backward(
            module.model.history.ec.parameters(), optim.optimizer, optim.lr, device, optim.eps,
            weight_decay=optim.weight_decay,
        )  # fmt: skip
    made = planner.make_plan(
        module, device, here, cfg.data.train_batch_size, constraints, [float(cfg.data.max_len)]
    )
    chosen = planner.plan_as_dict(made)[TABLE]["sharding"]
    if not fused and not replicated:
        if chosen not in WITH_GRADIENTS:
            raise UserError(
                f"--sharding_file: {chosen} with --optimizer {optim.optimizer} does not work on CPUs: "
                f"choose {' or '.join(WITH_GRADIENTS)}, or another optimizer"
            )
        made = planner.with_gradients(made)
    run_folder.record_plan(
        planner.plan_as_dict(made), planner.describe_plan(made), cfg.plan.print_sharding_plan
    )
    model = planner.shard_model(module, made, device, cfg.run.seed or 0, choose_first_weights(cfg))
    torch.manual_seed((cfg.run.seed or 0) * here.world_size + here.rank)  # dropout differs between ranks
    return model, optimizers.make_dense_optimizer(
        model, optim.optimizer, optim.lr, optim.eps, weight_decay=optim.weight_decay, all_rows=True
    )
