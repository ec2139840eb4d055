"""Which rank has which table: torchrec's planner, with this machine's memory and the user's constraints.

A sharding file is JSON, table name -> constraints, with "*" for all tables that are not named:
    {"*": {"sharding": "table_wise"}, "t_cat_0": {"sharding": ["row_wise"], "kernel": "fused"}}
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import (
    CacheParams,
    KeyValueParams,
    ModuleSharder,
    ShardingPlan,
    ShardingType,
)

from common.errors import UserError, printable
from common.inputs import read_json
from common.memory import find_host_memory, find_memory_limit, format_size
from dlrm.embeddings.row_adam import use_row_adam_on_cpu
from dlrm.embeddings.tables import FirstWeights, initialize_tables
from dlrm.runtime import accelerate
from dlrm.runtime.ranks import Ranks

SHARDINGS = [sharding.value for sharding in ShardingType]
KERNELS = [kernel.value for kernel in EmbeddingComputeKernel]
STORES = ("device_mem", "cached_host_mem", "cached_ssd")
CONSTRAINTS = ("sharding", "kernel", "min_partition", "cache_load_factor", "store")
MODEL_PARALLEL = [name for name in SHARDINGS if name != ShardingType.DATA_PARALLEL.value]
# tried first without constraints: on CPUs whole tables, if they fit, because splitting them only costs time
FIRST_CHOICE = {"cpu": [ShardingType.TABLE_WISE.value], "cuda": MODEL_PARALLEL}
LARGEST_FILE = 1 << 20  # bytes of a sharding file
LARGEST_NUMBER = 1 << 31
RESERVED = 0.15  # share of a GPU's memory for the dense part, activations, communication buffers


class _RowWiseToo:
    """Adds row-wise sharding on CPUs: torchrec's modules can do it, but its planner does not offer it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered = super().sharding_types(compute_device_type)  # type: ignore[misc]
        return offered if ShardingType.ROW_WISE.value in offered else [*offered, ShardingType.ROW_WISE.value]


class _Bags(_RowWiseToo, EmbeddingBagCollectionSharder):
    pass


class _Sequences(_RowWiseToo, EmbeddingCollectionSharder):
    pass


def make_sharders() -> list[ModuleSharder[nn.Module]]:
    return [_Bags(), _Sequences()]  # type: ignore[list-item]


def load_constraints(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The sharding file: table or * -> constraints. UserError for mistakes seen without the model."""
    try:
        constraints = read_json(path, LARGEST_FILE)
    except UserError as error:
        raise UserError(
            f'--sharding_file {error}; give a JSON file like {{"t_cat_0": {{"sharding": "row_wise"}}}}'
        ) from None
    if not isinstance(constraints, dict) or not all(
        isinstance(value, dict) for value in constraints.values()
    ):
        raise UserError(f'{printable(path)}: must be like {{"t_cat_0": {{"sharding": "row_wise"}}}}')
    for table, constraint in constraints.items():
        for key, value in constraint.items():
            if wrong := _find_error(key, value):
                raise UserError(f"{printable(path)}: {printable(table)[:60]}: {printable(wrong)[:300]}")
    return constraints


def _find_error(key: str, value: Any) -> str | None:
    """What is wrong with one constraint, in words; None if nothing is."""
    if key not in CONSTRAINTS:
        return f"{key[:60]} is unknown; choose from {', '.join(CONSTRAINTS)}"
    allowed = {"sharding": SHARDINGS, "kernel": KERNELS, "store": STORES}.get(key)
    if not allowed:
        whole = key == "min_partition"
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if number and 0 < value <= (LARGEST_NUMBER if whole else 1):
            return None
        kind = "whole number above 0" if whole else "number above 0 and at most 1"
        return f"{key} {str(value)[:60]}: must be a {kind}"
    words = value if isinstance(value, list) and value and key != "store" else [value]
    unknown = [word for word in words if word not in allowed]
    return f"{key} {str(unknown[0])[:60]} is unknown: {', '.join(allowed)}" if unknown else None


def _make_constraints(
    tables: Sequence[str],
    constraints: Mapping[str, Mapping[str, Any]],
    poolings: Sequence[float] | None,
    default: list[str],
) -> dict[str, ParameterConstraints]:
    """torchrec's constraints for every table.

    constraints: the sharding file's. poolings: ids per sample of each table, None: 1. default: the sharding
    types of tables without a `sharding`.
    """
    unknown = set(constraints) - {*tables, "*"}
    if unknown:
        named = printable(", ".join(sorted(unknown)))[:200]
        raise UserError(f"sharding file: no table {named}; there are {tables[0]} .. {tables[-1]}")
    ids_per_sample = [1.0] * len(tables) if poolings is None else poolings
    made = {}
    for table, ids in zip(tables, ids_per_sample, strict=True):
        constraint = constraints.get(table, constraints.get("*", {}))
        sharding, kernel = constraint.get("sharding", default), constraint.get("kernel")
        cache, storage = constraint.get("cache_load_factor"), constraint.get("storage")
        made[table] = ParameterConstraints(
            sharding_types=[sharding] if isinstance(sharding, str) else list(sharding),
            compute_kernels=[kernel] if isinstance(kernel, str) else kernel,
            min_partition=constraint.get("min_partition"),
            pooling_factors=[float(ids)],
            cache_params=None if cache is None else CacheParams(load_factor=float(cache)),
            key_value_params=storage and KeyValueParams(ssd_storage_directory=storage),
        )
    return made


def make_plan(
    module: nn.Module,
    device: torch.device,
    ranks: Ranks,
    batch_size: int,
    constraints: Mapping[str, Mapping[str, Any]] | None = None,
    poolings: Sequence[float] | None = None,
    memory: int | None = None,
) -> ShardingPlan:
    """The planner's plan, made on rank 0 and sent to all. Call it after `optimizers.apply_in_backward`.

    batch_size: per rank. constraints: as `load_constraints` returns them. poolings: ids per sample of each
    table (multi-hot). memory: bytes that a rank may use for tables; None: the device's.
    Tables without a constraint are never data-parallel: those cannot be updated in the backward pass.
    """
    tables = list_table_shapes(module)
    choices = [FIRST_CHOICE[device.type], MODEL_PARALLEL]
    candidates = [_make_constraints(list(tables), constraints or {}, poolings, choice) for choice in choices]
    result: list[Any] = [None]
    if ranks.first:
        limit = find_rank_memory(device, ranks) if memory is None else memory
        for candidate in candidates:
            result = [_plan_or_reason(module, device, ranks, batch_size, candidate, limit, tables)]
            if not isinstance(result[0], str):
                break
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], str):
        raise UserError(result[0])
    return result[0]


def _plan_or_reason(
    module: nn.Module, device: torch.device, ranks: Ranks, batch_size: int,
    constraints: dict[str, ParameterConstraints], limit: int, tables: dict[str, tuple[int, int]],
) -> ShardingPlan | str:  # fmt: skip
    """The plan, or the message of the UserError if there is none. limit: bytes per rank."""
    memory = {"ddr_cap_bytes" if device.type == "cpu" else "hbm_cap_bytes": limit}
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(
                world_size=ranks.world_size,
                local_world_size=ranks.local_world_size,
                **memory,  # type: ignore[arg-type]
            ),
            kernel_config=KernelConfig(compute_device=device.type),
        ),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(RESERVED if device.type == "cuda" else 0.0),
        constraints=constraints,
        debug=False,
    )
    try:
        return planner.plan(module, make_sharders())
    except (PlannerError, RuntimeError) as error:
        rows = {name: rows * width * 4 for name, (rows, width) in tables.items()}
        largest = max(rows, key=lambda name: rows[name])
        reason = (str(error).strip() or type(error).__name__).split(". ")[0].splitlines()[0]
        if not isinstance(error, PlannerError):  # torchrec's enumerator: nothing satisfies the constraints
            return f"sharding file: torchrec cannot shard so on {device.type}: {reason}"
        return (
            f"no sharding plan: {len(rows)} tables of {format_size(sum(rows.values()))} (largest {largest}, "
            f"{format_size(rows[largest])}) for {ranks.world_size} ranks with {format_size(limit)} each: "
            "use more ranks, smaller tables, --store_type cached_ssd (tables in files, CPU ranks) or another "
            f"--sharding_file (planner: {reason})"
        )


def find_rank_memory(device: torch.device, ranks: Ranks) -> int:
    """Bytes that one rank may use: its GPU's, or its share of the memory of the host or its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(find_host_memory() // max(1, ranks.local_world_size), find_memory_limit())


def list_table_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Table -> (rows, width)."""
    shapes = {}
    for part in module.modules():
        configs = getattr(part, "embedding_bag_configs", None) or getattr(part, "embedding_configs", None)
        for config in configs() if callable(configs) else []:  # type: ignore[attr-defined]
            shapes[config.name] = (config.num_embeddings, config.embedding_dim)
    return shapes


def with_gradients(plan: ShardingPlan) -> ShardingPlan:
    """The same shards, each with an ordinary gradient: for optimizers that fbgemm cannot fuse on CPUs.

    torchrec's planner refuses to plan this kernel, its modules can run it. Changes `plan`.
    """
    for modules in plan.plan.values():
        for sharding in modules.values():  # type: ignore[attr-defined]
            sharding.compute_kernel = EmbeddingComputeKernel.DENSE.value
    return plan


def _give_each_id_a_bag(model: nn.Module) -> None:
    """fbgemm's dense kernel on CPUs sums each bag even for sequences, so every id gets its own bag."""

    def replace_offsets(_: Any, args: Any, named: dict[str, Any]) -> Any:
        return args, named | {"offsets": torch.arange(len(named["indices"]) + 1)}

    for part in model.modules():
        for lookup in getattr(part, "_lookups", []):  # not registered as submodules
            for kernel in lookup.modules():
                dense = isinstance(kernel, DenseTableBatchedEmbeddingBagsCodegen) and kernel.use_cpu
                if dense and kernel.pooling_mode == PoolingMode.NONE and len(kernel.embedding_specs) == 1:
                    kernel.register_forward_pre_hook(replace_offsets, with_kwargs=True)


def shard_model(
    module: nn.Module,
    plan: ShardingPlan,
    device: torch.device,
    seed: int = 0,
    first_weights: FirstWeights | None = None,
) -> DistributedModelParallel:
    """Create this rank's shards, fill them (the same weights under any plan), wrap the dense part in DDP.

    first_weights: of the tables; None: as `initialize_tables` draws them.
    """
    with warnings.catch_warnings(), use_row_adam_on_cpu(module, device):
        warnings.simplefilter("ignore", FutureWarning)  # torchrec uses names that torch has deprecated
        model = DistributedModelParallel(module, device=device, plan=plan, sharders=make_sharders())
    _give_each_id_a_bag(model)
    accelerate.hooks.replace_output_dists(model)
    initialize_tables(model, seed, first_weights)
    return model


def plan_as_dict(plan: ShardingPlan) -> dict[str, Any]:
    """As JSON: table -> sharding, kernel, shards with rank, device, offset and size (rows, columns)."""
    tables: dict[str, Any] = {}
    for modules in plan.plan.values():
        for table, sharding in modules.items():  # type: ignore[attr-defined]
            shards = [
                {
                    "rank": shard.placement.rank(),
                    "device": str(shard.placement.device()),
                    "offset": list(shard.shard_offsets),
                    "size": list(shard.shard_sizes),
                }
                for shard in getattr(sharding.sharding_spec, "shards", [])
            ]
            kernel = sharding.compute_kernel
            tables[table] = {"sharding": sharding.sharding_type, "kernel": kernel, "shards": shards}
    return tables


def describe_plan(plan: ShardingPlan) -> str:
    """The plan as text: a line for each table, and the bytes of each rank."""
    bytes_of_rank: dict[int, int] = {}
    lines = [f"{'table':<12} {'sharding':<18} {'kernel':<18} shards"]
    for table, entry in plan_as_dict(plan).items():
        shards = []
        for shard in entry["shards"]:
            rows, columns = shard["size"]
            bytes_of_rank[shard["rank"]] = bytes_of_rank.get(shard["rank"], 0) + rows * columns * 4
            shards.append(f"rank {shard['rank']}: {rows} x {columns}")
        lines.append(
            f"{table:<12} {entry['sharding']:<18} {entry['kernel']:<18} {', '.join(shards) or 'every rank'}"
        )
    lines += [
        f"rank {rank} holds {format_size(bytes_of_rank[rank])} of tables" for rank in sorted(bytes_of_rank)
    ]
    return "\n".join(lines)
