"""One BERT4Rec training: its data, model and plan; the course of it is every model's (`job.run`)."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.embeddings import planner
from dlrm.models.bert4rec.dataloaders import BertDatasets, open_datasets
from dlrm.models.bert4rec.model import TABLE, BERT4Rec, BERT4RecTrain, RankingMetrics
from dlrm.models.bert4rec.options import BertConfig
from dlrm.models.dlrm.build import record_plan
from dlrm.runtime import session, trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import mixed_precision, optimizers, trainer
from dlrm.trainer.run_folder import RunFolder

BOUND = 1.0  # the item embeddings begin uniform in +-1, as in the example
WITH_GRADIENTS = ("row_wise", "table_wise")  # shardings of a table whose optimizer is not fused


def train(cfg: BertConfig, here: Ranks) -> None:
    # fbgemm's dense kernel has a gradient (tests hold it against PyTorch's), torch misses its registration
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
    trainer.run(cfg, here, make)


def make(cfg: BertConfig, here: Ranks, device: torch.device, records: RunFolder) -> "BertJob":
    with session.errors_on_all_ranks(), trace.span("startup", "data"):
        sets = open_datasets(cfg, here)
    records.say(
        f"{sets.data.users:,} users, {sets.data.item_count:,} items, {len(sets.data.items):,} ratings, "
        f"{sets.train.batches.source.rows:,} training sequences"
    )
    with session.errors_on_all_ranks(), trace.span("startup", "build"):
        module = build(cfg, sets.data.vocabulary, device)
    with session.errors_on_all_ranks(), trace.span("startup", "plan"):
        model, optimizer = shard(cfg, module, here, device, records)
    torch.manual_seed((cfg.run.seed or 0) * here.world_size + here.rank)  # dropout: each rank its own
    return BertJob(cfg, sets, model, optimizer, records, device)


def build(cfg: BertConfig, vocabulary: int, device: torch.device) -> BERT4RecTrain:
    """The model on this device, alike on all ranks, its table still to be made."""
    model = cfg.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed or 0)
        module = BERT4RecTrain(
            BERT4Rec(
                vocabulary, cfg.data.max_len, model.emb_dim, model.nhead, model.num_layers, model.dropout,
                model.output == "tied", table_device=torch.device("meta"),
            )
        )  # fmt: skip
    for name, parameter in list(module.named_parameters()):  # all but the table
        if not parameter.is_meta:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.data.to(device)))
    return module


def shard(
    cfg: BertConfig, module: BERT4RecTrain, here: Ranks, device: torch.device, records: RunFolder
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    how = cfg.optim
    replicated = cfg.plan.mode == "ddp"
    fused = not replicated and (device.type != "cpu" or optimizers.RULES[how.optimizer].on_cpu)
    wishes: dict[str, dict[str, Any]] = {}
    if cfg.plan.sharding_file:
        wishes = planner.load_constraints(cfg.plan.sharding_file)
    elif replicated:
        wishes = {TABLE: {"sharding": "data_parallel"}}
    elif device.type == "cpu":
        wishes = {TABLE: {"sharding": "row_wise"}}  # one table: whole, it would be one rank's work alone
    if fused:
        optimizers.apply_in_backward(
            module.model.history.ec.parameters(), how.optimizer, how.lr, device, how.eps,
            weight_decay=how.weight_decay,
        )  # fmt: skip
    made = planner.make_plan(
        module, device, here, cfg.data.train_batch_size, wishes, [float(cfg.data.max_len)]
    )
    chosen = planner.plan_as_dict(made)[TABLE]["sharding"]
    if not fused and not replicated:
        if chosen not in WITH_GRADIENTS:
            raise UserError(
                f"--sharding_file: {chosen} with --optimizer {how.optimizer} does not work on CPUs: "
                f"choose {' or '.join(WITH_GRADIENTS)}, or another optimizer"
            )
        made = planner.with_gradients(made)
    record_plan(made, records, cfg.plan.print_sharding_plan)
    model = planner.shard_model(module, made, device, cfg.run.seed or 0, BOUND)
    return model, optimizers.make_dense_optimizer(
        model, how.optimizer, how.lr, how.eps, weight_decay=how.weight_decay
    )


class BertJob(trainer.Trainer):
    score = "NDCG@10"
    predictions = RankingMetrics
    sets: BertDatasets

    def make_schedule(self) -> None:
        """The rate depends on the epoch alone."""

    def cast(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        whole: Any = self.model.module
        whole.cast(self.device.type, mixed_precision.TYPES[kind], scale)

    def rate(self) -> float:
        how = self.cfg.optim
        return how.lr * how.gamma ** (self.progress.epoch // how.decay_step)

    def evaluate(self, split: str) -> dict[str, Any]:
        result, best = super().evaluate(split), self.sets.reachable
        if split == "test" and best:
            reached = (f"{name} {result[name]:.4f} of {value:.4f}" for name, value in best.items())
            self.records.say(f"{split}, reached of what can be expected at best: {', '.join(reached)}")
        return result

    def outcome(self) -> Mapping[str, Any]:
        best = {"reachable": self.sets.reachable} if self.sets.reachable else {}
        return {"score": self.score, "val_scores": self.progress.val_aurocs, **best}
