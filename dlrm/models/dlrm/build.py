"""A DLRM from its options: the model, its optimizer, the plan, the shards of its tables."""

from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.config import options
from dlrm.config.options import Config
from dlrm.cpu import startup
from dlrm.data import criteo
from dlrm.embeddings import planner
from dlrm.embeddings.tables import make_table_configs
from dlrm.models.dlrm.model import DLRMTrain, build_dlrm, compile_dense
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import optimizers
from dlrm.trainer.run_folder import RunFolder


def build_model(cfg: Config, sizes: list[int], device: torch.device) -> DLRMTrain:
    """The model on this device, its tables still to be made, their optimizer already attached."""
    module = assemble_model(cfg.model, sizes, device, cfg.run.seed or 0, cfg.run.compile)
    attach_optimizer(cfg, module, device)
    return module


def attach_optimizer(cfg: Config, module: Any, device: torch.device) -> None:
    optimizers.apply_in_backward(
        module.model.sparse_arch.parameters(), cfg.optim.name, cfg.optim.learning_rate, device, cfg.optim.eps
    )


def assemble_model(
    model: options.ModelOptions, sizes: list[int], device: torch.device, seed: int, compiled: bool
) -> DLRMTrain:
    """The model as its options say."""
    module = build_dlrm(
        model.interaction_type,
        make_table_configs(sizes, model.embedding_dim),
        criteo.NUM_DENSE,
        model.dense_arch_layer_sizes,
        model.over_arch_layer_sizes,
        model.dcn_num_layers,
        model.dcn_low_rank_dim,
        model.interaction_branch1_layer_sizes,
        model.interaction_branch2_layer_sizes,
        model.self_interaction,
        dense_device=device,
        seed=seed,
    )
    if compiled:
        compile_dense(module.model)
    return module


def shard_dlrm(
    cfg: Config,
    module: Any,
    here: Ranks,
    device: torch.device,
    records: RunFolder,
    poolings: list[float] | None = None,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    wishes = planner.load_constraints(cfg.plan.sharding_file) if cfg.plan.sharding_file else {}
    tiers, memory = None, None
    if cfg.plan.store_type != "device_mem" or any("store" in wish for wish in wishes.values()):
        from dlrm.embeddings.ssd import placement  # and with it numba, which takes long to import

        tiers, wishes = placement.prepare_ssd_tables(
            cfg.plan, module, here, device, cfg.optim.name, cfg.run.seed or 0, cfg.run.output_dir, wishes,
            poolings, records.say,
        )  # fmt: skip
        if tiers:
            records.claim(tiers.folder, "training with tables in it")
        memory = placement.ENDLESS if tiers else None
    made = planner.make_plan(module, device, here, cfg.data.batch_size, wishes, poolings, memory)
    record_plan(made, records, cfg.plan.print_sharding_plan)
    if tiers:
        module.model.sparse_arch = tiers.narrow(module.model.sparse_arch, made)
        attach_optimizer(cfg, module, device)
    with startup.unfilled():
        model = planner.shard_model(module, made, device, cfg.run.seed or 0)
    if tiers:
        tiers.attach(model)
    return model, optimizers.make_dense_optimizer(
        model, cfg.optim.name, cfg.optim.learning_rate, cfg.optim.eps
    )


class NoSsdTables:
    """In the place of `tiers.Tiers` where no table lies in a file."""

    def ready(self) -> None: ...

    def watch(self, pipeline: Any) -> None: ...

    def bytes_read(self) -> dict[str, int]:
        return {}

    def bytes_written(self) -> dict[str, int]:
        return {}

    def readings(self, step: int) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def record_plan(made: ShardingPlan, records: RunFolder, show: bool) -> None:
    records.save("plan.json", planner.plan_as_dict(made))
    if show:
        records.say(planner.describe_plan(made))
