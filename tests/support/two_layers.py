"""A model from outside the package, as CONTRIBUTING.md describes it: pooled embeddings and one linear layer.

`DLRM_MODELS=two_layers` names this module. It imports torch only in `load_parts`, so that --help is quick.
"""

from dataclasses import dataclass, field
from typing import Any

from dlrm.config.options import CheckpointOptions, PlanOptions, RunOptions
from dlrm.config.parser import option
from dlrm.trainer.spec import ModelParts, ModelSpec, ScriptOptions

TABLE_SIZES = [50] * 26
BATCHES = 6  # of each set, per rank


@dataclass(frozen=True)
class DataOptions:
    rows: int = option(16, "rows of a batch, per rank")


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(0.1, "learning rate of SGD")
    amp: str = option("off", "mixed precision: there is none", ("off",))
    grad_clip: float | None = option(None, "largest norm of the dense gradients")


@dataclass(frozen=True)
class Options:
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimizerOptions = field(default_factory=OptimizerOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


def load_parts() -> ModelParts:
    import torch
    from torch import nn
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    from dlrm.data.batches import BatchLoader
    from dlrm.data.prefetch import Prefetcher
    from dlrm.data.readers import open_source
    from dlrm.embeddings import planner
    from dlrm.embeddings.tables import make_table_configs
    from dlrm.trainer import optimizers
    from dlrm.trainer.metrics import AurocCollector
    from dlrm.trainer.trainer import Trainer

    class Datasets:
        """Random rows: dense float32 [n, 13], ids int32 [n, 26], labels int32 [n]."""

        def __init__(self, options: Options, here: Any) -> None:
            size, total = options.data.rows, BATCHES * options.data.rows * here.world_size
            self.train, self.val, self.test = (
                Prefetcher(
                    BatchLoader(
                        open_source("random", "", stage, rows=total, table_sizes=TABLE_SIZES),
                        size, here.rank, here.world_size, TABLE_SIZES,
                    )
                )
                for stage in ("train", "val", "test")
            )  # fmt: skip

        def bytes_read(self) -> dict[str, int]:
            return {}

        def close(self) -> None: ...

    class TwoLayers(nn.Module):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            tables = make_table_configs(TABLE_SIZES, 8)
            self.embeddings = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
            self.linear = nn.Linear(13 + 8 * len(TABLE_SIZES), 1, device=device)

        def forward(self, batch: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            pooled = self.embeddings(batch.sparse_features).values()
            logits = self.linear(torch.cat((batch.dense_features, pooled), dim=1)).squeeze(-1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
            return loss, (loss.detach(), logits.detach(), batch.labels.detach())

    def build_model(options: Options, _: Datasets, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        module = TwoLayers(device)
        rate = options.optim.learning_rate
        optimizers.apply_in_backward(module.embeddings.parameters(), "sgd", rate, device)
        return module

    def shard_model(
        options: Options, module: nn.Module, _: Datasets, here: Any, device: torch.device, run_folder: Any
    ) -> tuple[Any, Any]:
        plan = planner.make_plan(module, device, here, options.data.rows)
        run_folder.record_plan(planner.plan_as_dict(plan), planner.describe_plan(plan), False)
        model = planner.shard_model(module, plan, device)
        return model, optimizers.make_dense_optimizer(model, "sgd", options.optim.learning_rate)

    class TwoLayersTrainer(Trainer):
        make_metrics = AurocCollector

    return ModelParts(Datasets, build_model, shard_model, TwoLayersTrainer)


SPEC = ModelSpec(
    name="two_layers",
    title="Two layers",
    description="Train one linear layer over pooled embeddings.",
    options=Options,
    presets={},
    script=ScriptOptions(
        variables={"BATCH_SIZE": ("--rows", "{}"), "LEARNING_RATE": ("--learning_rate", "{}")},
        always=("--evaluate_on_training_end",),
    ),
    load_parts=load_parts,
)
