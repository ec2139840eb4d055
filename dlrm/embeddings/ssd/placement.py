"""Where each table is stored: by --store_type, the sharding file's `store` of single tables, or by size.

device_mem        in the device's memory; on CPUs that is the host's
cached_host_mem   CUDA: rows in the host's memory, fbgemm caches them on the GPU; on CPUs as device_mem
cached_ssd        CPUs: files under --persistent_path and a cache (`SsdTables`); CUDA: fbgemm's SSD kernel
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlrm.config.options import PlanOptions
from dlrm.embeddings.planner import find_rank_memory, list_table_shapes
from dlrm.embeddings.ssd.cached_table import TableShare
from dlrm.embeddings.ssd.ssd_tables import COLUMN_WISE, STATE, SsdTables
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

MEMORY, HOST, SSD = "device_mem", "cached_host_mem", "cached_ssd"
TYPES = (MEMORY, HOST, SSD, "auto")
SSD_SHARDINGS = ("table_wise", "row_wise", COLUMN_WISE)  # shardings that tables in files support
UNLIMITED = 1 << 50  # bytes of memory for the planner when tables are in files
AUTO_SHARE = 0.7  # largest share of a rank's memory that `auto` fills with tables

Constraints = dict[str, dict[str, Any]]


def choose_store_types(
    store_type: str, tables: list[TableShare], constraints: Mapping[str, Mapping[str, Any]], cuda: bool,
    memory: int, host: int,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """(table -> store type, the reason in words).

    constraints: the sharding file's. memory, host: bytes of device and host memory of all ranks together.
    """
    need = sum(4 * table.rows * (table.dim + table.state) for table in tables)
    reason = f"--store_type {store_type}"
    if store_type == "auto":
        store_type = (
            MEMORY if need <= AUTO_SHARE * memory else HOST if cuda and need <= AUTO_SHARE * host else SSD
        )
        reason = f"{store_type}: tables and optimizer take {need / 1e9:.3g} GB, memory has {memory / 1e9:.3g}"
    stores = {}
    for table in tables:
        store = constraints.get(table.name, constraints.get("*", {})).get("store", store_type)
        stores[table.name] = MEMORY if store == HOST and not cuda else store
    if store_type == HOST and not cuda:
        reason += ": on CPUs the device's memory is the host's, tables are as with device_mem"
    return stores, reason


def make_constraints(
    tables: list[TableShare], stores: Mapping[str, str], given: Mapping[str, Mapping[str, Any]], cuda: bool,
    budget: int, folder: Path,
) -> Constraints:  # fmt: skip
    """The planner's constraints for every table: those of the sharding file, and what its store requires."""
    cached = sum(4 * table.rows * table.dim for table in tables if stores[table.name] != MEMORY)
    made: Constraints = {}
    for table in tables:
        store = stores[table.name]
        constraint = {k: v for k, v in given.get(table.name, given.get("*", {})).items() if k != "store"}
        if store == SSD and not cuda:
            wanted = constraint.get("sharding", "table_wise")
            # row-wise adagrad has a number for each row of a shard, which is none of the whole table's
            able = [each for each in SSD_SHARDINGS if each != COLUMN_WISE or table.state != 1]
            allowed = [name for name in able if name in ([wanted] if isinstance(wanted, str) else wanted)]
            if not allowed:
                raise UserError(
                    f"sharding file: {table.name}: {wanted}, but tables in files are "
                    f"{' or '.join(able)} on CPUs with this optimizer: remove its sharding, or store it in "
                    "device_mem"
                )
            kept = {k: v for k, v in constraint.items() if k == "min_partition"}
            constraint = {"sharding": allowed, **kept}
        elif store == HOST:  # not tested on a GPU, like the next
            constraint |= {
                "kernel": "fused_uvm_caching",
                "cache_load_factor": min(1.0, budget / max(1, cached)),
            }
        elif store == SSD:
            constraint |= {"kernel": "key_value", "storage": str(folder)}
        made[table.name] = constraint
    return made


def describe_tables(
    shapes: Mapping[str, tuple[int, int]], optimizer: str, poolings: list[float] | None
) -> list[TableShare]:
    """The tables with their optimizer state. shapes: table -> (rows, width); poolings: ids per sample."""
    many = poolings or [1.0] * len(shapes)
    return [
        TableShare(name, rows, dim, STATE.get(optimizer, lambda dim: dim)(dim), pooling)
        for (name, (rows, dim)), pooling in zip(shapes.items(), many, strict=True)
    ]


def prepare_ssd_tables(
    options: PlanOptions, module: nn.Module, here: Ranks, device: torch.device, optimizer: str, seed: int,
    output_dir: str | None, given: Mapping[str, Mapping[str, Any]], poolings: list[float] | None,
    say: Callable[[str], None],
) -> tuple[SsdTables | None, Mapping[str, Mapping[str, Any]]]:  # fmt: skip
    """(the tables in files, or None; constraints for the planner). The only entry to this folder.

    given: the sharding file's constraints. say: prints on the first rank which stores were chosen, and why.
    """
    tables = describe_tables(list_table_shapes(module), optimizer, poolings)
    cuda = device.type == "cuda"
    memory, host = (find_rank_memory(each, here) * here.world_size for each in (device, torch.device("cpu")))
    stores, reason = choose_store_types(options.store_type, tables, given, cuda, memory, host)
    if options.store_type == MEMORY and set(stores.values()) == {MEMORY}:
        return None, {
            name: {k: v for k, v in values.items() if k != "store"} for name, values in given.items()
        }
    say(f"tables: {reason}")
    path = options.persistent_path or (output_dir and str(Path(output_dir) / "store"))
    if path is None and SSD in stores.values():
        raise UserError("--store_type cached_ssd needs a folder: give --persistent_path or --output_dir")
    budget, folder = int(options.cache_memory_budget_mb * 1e6), Path(path or ".").absolute()
    constraints = make_constraints(tables, stores, given, cuda, budget, folder)
    in_files = [table for table in tables if stores[table.name] == SSD and not cuda]
    return SsdTables(in_files, folder, budget, optimizer, seed, say) if in_files else None, constraints
