"""Where each table lives: --store_type, what a sharding file says of single tables, or what fits.

device_mem        in the device's memory; on CPUs that is the host's
cached_host_mem   CUDA: rows in the host's memory, fbgemm caches them on the GPU; on CPUs as device_mem
cached_ssd        CPUs: files under --persistent_path and a cache (`tiers`); CUDA: fbgemm's SSD kernel
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlrm.config.options import PlanOptions
from dlrm.embeddings.planner import memory_of_rank, table_shapes
from dlrm.embeddings.ssd.cached_table import TableShare
from dlrm.embeddings.ssd.ssd_tables import STATE, SsdTables
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

MEMORY, HOST, SSD = "device_mem", "cached_host_mem", "cached_ssd"
TYPES = (MEMORY, HOST, SSD, "auto")
FILED = ("table_wise", "row_wise")  # shardings that tables in files can have
ENDLESS = 1 << 50  # bytes that the planner is told of when tables lie in files
FULL = 0.7  # of a rank's memory that `auto` fills with tables

Constraints = dict[str, dict[str, Any]]


def choose_store_types(
    asked: str, tables: list[TableShare], wishes: Mapping[str, Mapping[str, Any]], cuda: bool, memory: int,
    host: int,
) -> tuple[dict[str, str], str]:  # fmt: skip
    """Table -> where it lives, and why. `memory`, `host`: bytes of all ranks."""
    need = sum(4 * table.rows * (table.dim + table.state) for table in tables)
    why = f"--store_type {asked}"
    if asked == "auto":
        asked = MEMORY if need <= FULL * memory else HOST if cuda and need <= FULL * host else SSD
        why = f"{asked}: tables and optimizer take {need / 1e9:.3g} GB, memory has {memory / 1e9:.3g}"
    places = {}
    for table in tables:
        place = wishes.get(table.name, wishes.get("*", {})).get("store", asked)
        places[table.name] = MEMORY if place == HOST and not cuda else place
    if asked == HOST and not cuda:
        why += ": on CPUs the device's memory is the host's, tables are as with device_mem"
    return places, why


def make_constraints(
    tables: list[TableShare], places: Mapping[str, str], given: Mapping[str, Mapping[str, Any]], cuda: bool,
    budget: int, folder: Path,
) -> Constraints:  # fmt: skip
    """The sharding file's wishes for every table, with what its place demands."""
    cached = sum(4 * table.rows * table.dim for table in tables if places[table.name] != MEMORY)
    made: Constraints = {}
    for table in tables:
        place = places[table.name]
        wish = {k: v for k, v in given.get(table.name, given.get("*", {})).items() if k != "store"}
        if place == SSD and not cuda:
            wished = wish.get("sharding", "table_wise")
            possible = [word for word in FILED if word in ([wished] if isinstance(wished, str) else wished)]
            if not possible:
                raise UserError(
                    f"sharding file: {table.name}: {wished}, but tables in files are {' or '.join(FILED)} on "
                    "CPUs: leave its sharding out, or keep it in device_mem"
                )
            wish = {"sharding": possible}
        elif place == HOST:  # not tried on a GPU, like the next
            wish |= {"kernel": "fused_uvm_caching", "cache_load_factor": min(1.0, budget / max(1, cached))}
        elif place == SSD:
            wish |= {"kernel": "key_value", "storage": str(folder)}
        made[table.name] = wish
    return made


def describe_tables(
    shapes: Mapping[str, tuple[int, int]], optimizer: str, poolings: list[float] | None
) -> list[TableShare]:
    many = poolings or [1.0] * len(shapes)
    return [
        TableShare(name, rows, dim, STATE.get(optimizer, lambda dim: dim)(dim), pooling)
        for (name, (rows, dim)), pooling in zip(shapes.items(), many, strict=True)
    ]


def prepare_ssd_tables(
    wanted: PlanOptions, module: nn.Module, here: Ranks, device: torch.device, optimizer: str, seed: int,
    output_dir: str | None, given: Mapping[str, Mapping[str, Any]], poolings: list[float] | None,
    say: Callable[[str], None],
) -> tuple[SsdTables | None, Mapping[str, Mapping[str, Any]]]:  # fmt: skip
    """(the tables in files, if there are any; what the planner is to be told)."""
    tables = describe_tables(table_shapes(module), optimizer, poolings)
    cuda = device.type == "cuda"
    memory, host = (memory_of_rank(each, here) * here.world_size for each in (device, torch.device("cpu")))
    places, why = choose_store_types(wanted.store_type, tables, given, cuda, memory, host)
    if wanted.store_type == MEMORY and set(places.values()) == {MEMORY}:
        return None, {name: {k: v for k, v in wish.items() if k != "store"} for name, wish in given.items()}
    say(f"tables: {why}")
    path = wanted.persistent_path or (output_dir and str(Path(output_dir) / "store"))
    if path is None and SSD in places.values():
        raise UserError("--store_type cached_ssd: where? give --persistent_path or --output_dir")
    budget, folder = int(wanted.cache_memory_budget_mb * 1e6), Path(path or ".").absolute()
    wishes = make_constraints(tables, places, given, cuda, budget, folder)
    filed = [table for table in tables if places[table.name] == SSD and not cuda]
    return SsdTables(filed, folder, budget, optimizer, seed, say) if filed else None, wishes
