"""A DLRM from its options: its batches, the model, its optimizer, the sharding plan, this rank's shards."""

from functools import partial
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from common.memory import refuse_too_large
from dlrm.data.collate import BatchCollator
from dlrm.data.criteo import name_features
from dlrm.embeddings import planner
from dlrm.embeddings.tables import make_table_configs
from dlrm.models.dlrm.dataloaders import DLRMDatasets, open_datasets
from dlrm.models.dlrm.interactions import InteractionConfig, find_interaction
from dlrm.models.dlrm.mlp import count_layer_weights
from dlrm.models.dlrm.model import DLRMTrain, SparseArch, build_dlrm, compile_dense
from dlrm.models.dlrm.options import Config, ModelOptions
from dlrm.runtime import accelerate
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import optimizers
from dlrm.trainer.run_folder import RunFolder

WEIGHT_BYTES = 8  # of memory for a weight of the dense part: itself and its gradient


def open_batches(cfg: Config, here: Ranks) -> DLRMDatasets:
    """This rank's batches of the three sets, as torchrec takes them."""
    make_collator = partial(BatchCollator, pin_memory=cfg.data.pin_memory)
    return open_datasets(cfg, here, make_collator, on_gpu=torch.cuda.is_available())


def build_model(cfg: Config, datasets: DLRMDatasets, device: torch.device) -> DLRMTrain:
    """The model on this device; its tables on the meta device, with their optimizer attached."""
    module = assemble_model(
        cfg.model, datasets.numerical, datasets.sizes, device, cfg.run.seed or 0, cfg.run.compile
    )
    attach_optimizer(cfg, module, device)
    return module


def attach_optimizer(cfg: Config, module: Any, device: torch.device) -> None:
    """Let fbgemm update the tables in the backward pass. `module`: a DLRMTrain."""
    optimizers.apply_in_backward(
        module.model.sparse_arch.parameters(), cfg.optim.name, cfg.optim.learning_rate, device, cfg.optim.eps
    )


def assemble_model(
    model: ModelOptions, numerical: int, sizes: list[int], device: torch.device, seed: int, compiled: bool
) -> DLRMTrain:
    """The model of these options, its tables on the meta device.

    numerical: columns of counts. sizes: rows of each table. device: of the dense part.
    """
    refuse_too_large(
        WEIGHT_BYTES * count_dense_weights(model, numerical, len(sizes)),
        "the dense part (--dense_arch_layer_sizes, --over_arch_layer_sizes, --embedding_dim and the sizes "
        "of its --interaction_type)",
        "give smaller sizes",
    )
    module = build_dlrm(
        model.interaction_type,
        make_table_configs(sizes, model.embedding_dim),
        numerical,
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


def count_dense_weights(model: ModelOptions, numerical: int, tables: int) -> int:
    """Weights and biases of everything but the tables."""
    if not model.dense_arch_layer_sizes:
        return 0
    shape = InteractionConfig(
        name_features(tables), [model.embedding_dim] * tables, model.dense_arch_layer_sizes[-1],
        model.dcn_num_layers, model.dcn_low_rank_dim, model.interaction_branch1_layer_sizes,
        model.interaction_branch2_layer_sizes, model.self_interaction,
    )  # fmt: skip
    interaction = find_interaction(model.interaction_type)
    return (
        count_layer_weights(max(numerical, 1), model.dense_arch_layer_sizes)
        + interaction.count_weights(shape)
        + count_layer_weights(interaction.count_outputs(shape), model.over_arch_layer_sizes)
    )


def shard_dlrm(
    cfg: Config,
    module: DLRMTrain,
    datasets: DLRMDatasets,
    here: Ranks,
    device: torch.device,
    run_folder: RunFolder,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Plan the tables over the ranks, create this rank's shards, wrap the dense part in DDP."""
    poolings = datasets.poolings
    constraints = planner.load_constraints(cfg.plan.sharding_file) if cfg.plan.sharding_file else {}
    ssd_tables, memory = None, None
    if cfg.plan.store_type != "device_mem" or any("store" in each for each in constraints.values()):
        # the only import of tables in files: training without them does not load numba
        from dlrm.embeddings.ssd import placement

        ssd_tables, constraints = placement.prepare_ssd_tables(
            cfg.plan, module, here, device, cfg.optim.name, cfg.run.seed or 0, cfg.run.output_dir,
            constraints,
            poolings, run_folder.print_line,
        )  # fmt: skip
        if ssd_tables:
            run_folder.lock_folder(ssd_tables.folder, "training with tables in it")
        memory = placement.UNLIMITED if ssd_tables else None
    made = planner.make_plan(module, device, here, cfg.data.batch_size, constraints, poolings, memory)
    run_folder.record_plan(
        planner.plan_as_dict(made), planner.describe_plan(made), cfg.plan.print_sharding_plan
    )
    if ssd_tables:
        sparse: Any = module.model.sparse_arch
        configs = ssd_tables.shrink_configs(sparse.embedding_bag_collection, made)
        module.model.sparse_arch = SparseArch(configs, torch.device("meta"))
        attach_optimizer(cfg, module, device)
    with accelerate.hooks.skip_first_weights():
        model = planner.shard_model(module, made, device, cfg.run.seed or 0)
    if ssd_tables:
        ssd_tables.attach(model)
    return model, optimizers.make_dense_optimizer(
        model, cfg.optim.name, cfg.optim.learning_rate, cfg.optim.eps
    )
