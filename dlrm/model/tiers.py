"""Tables larger than memory: torchrec holds as many rows as the budget allows, the rest lies in files.

torchrec's table is the cache: it has one row per slot, and ids become slots just before fbgemm looks them up.
The rows of a batch stay until its backward pass has updated them; changed rows are written when they leave.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dlrm import trace
from dlrm.errors import UserError
from dlrm.model.dlrm import Sparse
from dlrm.model.rowcache import SLOT_BYTES, Full, RowCache
from dlrm.model.store import RowStore, raw

STATE: dict[str, Callable[[int], int]] = {  # floats of optimizer state per row
    "sgd": lambda dim: 0,
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
}
ENTRY = re.compile(r"embedding_bags\.([^.]+)\.weight(/momentum1)?$")
COUNTS = ("lookups", "misses", "evictions", "bytes_read", "bytes_written")


@dataclass(frozen=True)
class Table:
    name: str
    rows: int
    dim: int
    state: int  # floats of optimizer state per row
    pooling: float = 1.0

    @property
    def slot_bytes(self) -> int:
        return 4 * (self.dim + self.state) + SLOT_BYTES


def share(tables: list[Table], budget: int) -> dict[str, int]:
    """Slots of each table: small ones whole, what they leave goes to the others by how much they look up."""
    slots = {}
    left, weight = float(budget), sum(table.pooling for table in tables)
    for table in sorted(tables, key=lambda each: each.rows * each.slot_bytes / each.pooling):
        given = left * table.pooling / weight
        slots[table.name] = max(1, min(table.rows, int(given // table.slot_bytes)))
        left -= slots[table.name] * table.slot_bytes
        weight -= table.pooling
    return slots


class Tier:
    """One table of this rank: its file, and the rows of it that fbgemm sees."""

    def __init__(
        self, table: Table, store: RowStore, weights: torch.Tensor, state: torch.Tensor | None
    ) -> None:
        self.table, self.store = table, store
        self.cache = RowCache(len(weights))
        self.weights = weights.detach().numpy()
        self.state = None if state is None else state.detach().numpy().reshape(len(weights), -1)
        self.sound = store.clean  # else a killed job left rows of different moments

    def admit(self, ids: np.ndarray, change: bool) -> np.ndarray:
        """The slots of these rows, which are then filled."""
        try:
            slots, missing, into, leaving, places = self.cache.admit(ids, change)
        except Full as full:
            needed = full.args[0] * self.table.slot_bytes
            raise UserError(
                f"{self.table.name}: a batch touches {full.args[0]} rows, its cache holds "
                f"{self.cache.slots}: this table needs {needed / 1e6:.1f} MB of "
                "--cache_memory_budget_mb; raise it or lower --batch_size"
            ) from None
        if change:
            self.store.soil()
        if len(missing):
            self._write(leaving, places)
            order = np.argsort(missing)
            values = self.store.read(missing[order])
            self.weights[into[order]] = values[:, : self.table.dim]
            if self.state is not None:
                self.state[into[order]] = values[:, self.table.dim :]
        return slots

    def _write(self, rows: np.ndarray, slots: np.ndarray) -> None:
        order = np.argsort(rows)
        values = np.empty((len(rows), self.store.width), np.float32)
        values[:, : self.table.dim] = self.weights[slots[order]]
        if self.state is not None:
            values[:, self.table.dim :] = self.state[slots[order]]
        self.store.write(rows[order], values)

    def flush(self) -> None:
        """Every changed row into the file; all stay in the cache."""
        slots = self.cache.changed()
        self._write(self.cache.row[slots], slots)
        self.cache.dirty.fill(0)

    def counts(self) -> np.ndarray:
        cache, store = self.cache, self.store
        return np.array(
            [cache.lookups, cache.misses, cache.evictions, store.bytes_read, store.bytes_written], np.int64
        )

    def close(self) -> None:
        self.flush()
        self.store.close()


@dataclass(frozen=True)
class Whole:
    """All rows of a table, weights or optimizer state, for a checkpoint. On its owner `tier` is there."""

    table: Table
    tier: Tier | None
    state: bool

    def size(self) -> torch.Size:
        width = self.table.state if self.state else self.table.dim
        flat = self.state and width == 1
        return torch.Size([self.table.rows] if flat else [self.table.rows, width])

    @property
    def _columns(self) -> slice:
        return slice(self.table.dim, None) if self.state else slice(0, self.table.dim)

    def copy(self) -> Iterator[torch.Tensor]:
        """As it is now, in a file without a name that is mapped; its space is free again with the tensor."""
        if self.tier is None:
            return
        self.tier.flush()
        store, size = self.tier.store, self.size()
        path = store.path.with_suffix(".copy")
        try:
            with open(path, "wb", buffering=0) as out:
                for block in range(len(store.blocks)):
                    data = raw(store.block(block)[:, self._columns])
                    while len(data):
                        data = data[out.write(data) :]
            yield torch.from_file(str(path), shared=False, size=size.numel(), dtype=torch.float32).view(size)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: a checkpoint needs room for a copy there") from None
        finally:
            path.unlink(missing_ok=True)

    def fill(self, read: Callable[[tuple[int, ...], torch.Tensor], int]) -> int:
        """Each block by `read(offset, tensor)`; what the cache held is forgotten."""
        if self.tier is None:
            return 0
        tier, store, done = self.tier, self.tier.store, 0
        tier.cache.clear()
        for block in range(len(store.blocks)):
            low, high = store.span(block)
            shape = (high - low, *self.size()[1:])
            values = torch.empty(shape)
            done += read((low, *[0] * (len(shape) - 1)), values)
            rows = store.block(block)
            if not self.state:
                rows[:, store.dim :] = 0  # the optimizer's state comes next, or begins anew
            rows[:, self._columns] = values.reshape(high - low, -1).numpy()
            store.put_block(block, rows)
        tier.sound = True
        return done


class Tiers:
    """The tables in files: of all ranks by name, this rank's open."""

    def __init__(
        self, tables: Sequence[Table] = (), folder: Path = Path(), budget: int = 0, optimizer: str = "",
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.tables = {table.name: table for table in tables}
        self.folder, self.budget, self.optimizer, self.seed = folder, budget, optimizer, seed
        self.slots: dict[str, int] = {}
        self.mine: dict[str, Tier] = {}
        self._before, self._step = np.zeros(len(COUNTS), np.int64), 0

    def narrow(self, sparse: Sparse, plan: ShardingPlan) -> Sparse:
        """Tables of as many rows as there are slots, in the model and in the plan."""
        shardings: Any = next(iter(plan.plan.values()))
        owners: dict[int, list[Table]] = {}
        for name, table in self.tables.items():
            rank = shardings[name].sharding_spec.shards[0].placement.rank()
            owners.setdefault(rank, []).append(table)
        for tables in owners.values():
            self.slots |= share(tables, self.budget)
        configs: list[EmbeddingBagConfig] = sparse.embedding_bag_collection.embedding_bag_configs()
        for config in configs:
            if config.name in self.slots:
                config.num_embeddings = self.slots[config.name]
                shards = shardings[config.name].sharding_spec.shards
                assert len(shards) == 1, f"{config.name} is split"
                shards[0].shard_sizes[0] = config.num_embeddings
        return Sparse(configs, torch.device("meta"))

    def attach(self, model: Any) -> None:
        """Open the files of this rank's tables and stand before their lookups."""
        model.tiers = self
        for part in model.modules():
            for lookup in getattr(part, "_lookups", []):  # not among the modules that torch knows of
                for kernel in lookup.modules():
                    if isinstance(kernel, BatchedFusedEmbeddingBag):
                        self._attach(kernel)

    def _attach(self, kernel: BatchedFusedEmbeddingBag) -> None:
        module: Any = kernel.emb_module
        names = [table.name for table in kernel.config.embedding_tables]
        states = module.split_optimizer_states() or [[]] * len(names)
        for name, weights, state in zip(names, module.split_embedding_weights(), states, strict=True):
            if name in self.tables:
                table = self.tables[name]
                store = RowStore(
                    self.folder, name, table.rows, table.dim, table.state, self.optimizer, self.seed
                )
                self.mine[name] = Tier(table, store, weights, state[0] if table.state else None)
        tiers = [self.mine.get(name) for name in names]
        if any(tiers):

            def remap(_: Any, args: Any, named: dict[str, Any]) -> Any:
                return args, named | {"indices": self._slots(tiers, named["indices"], named["offsets"])}

            module.register_forward_pre_hook(remap, with_kwargs=True)

    def _slots(self, tiers: list[Tier | None], ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        change = torch.is_grad_enabled()
        before = self.counts() if trace.on() else None
        bags = (len(offsets) - 1) // len(tiers)
        ends = offsets[::bags].tolist() if bags else [0] * (len(tiers) + 1)
        made = ids.to(torch.int64, copy=True)
        values = made.numpy()
        with trace.span("tiers", "fetch"):
            for tier, (begin, end) in zip(tiers, pairwise(ends), strict=True):
                if tier is not None and end > begin:
                    values[begin:end] = tier.admit(values[begin:end], change)
        if before is not None:
            for name, value in _rates(self.counts() - before).items():
                trace.counter(name, value)
        return made.to(ids.dtype)

    def counts(self) -> np.ndarray:
        return sum((tier.counts() for tier in self.mine.values()), np.zeros(len(COUNTS), np.int64))

    def readings(self, step: int) -> dict[str, float]:
        """Of all ranks since the last call, per step. A collective, but where all tables are in memory."""
        if not self.tables:
            return {}
        steps, self._step, now = step - self._step, step, self.counts()
        delta = torch.from_numpy(now - self._before)
        self._before = now
        dist.all_reduce(delta)
        return _rates(delta.numpy(), max(1, steps))

    def whole(self, name: str, value: Any) -> Any:
        """What a checkpoint is to see in place of a cache."""
        found = ENTRY.search(name)
        if found is None or found[1] not in self.tables:
            return value
        return Whole(self.tables[found[1]], self.mine.get(found[1]), found[2] is not None)

    def ready(self) -> None:
        """Before the first step, once a checkpoint had its chance."""
        for tier in self.mine.values():
            if not tier.sound:
                raise UserError(
                    f"{tier.store.path}: a job ended before it closed this, its rows are of different "
                    "moments: go on from a checkpoint, or remove it and its .json for a new start"
                )

    def bytes_read(self) -> dict[str, int]:
        return {str(tier.store.path): tier.store.bytes_read for tier in self.mine.values()}

    def close(self) -> None:
        for tier in self.mine.values():
            tier.close()


def _rates(counts: np.ndarray, steps: int = 1) -> dict[str, float]:
    values: Mapping[str, int] = dict(zip(COUNTS, counts.tolist(), strict=True))
    return {
        "cache_hit_rate": 1 - values["misses"] / max(1, values["lookups"]),
        "cache_evictions": values["evictions"] / steps,
        "store_bytes_read": values["bytes_read"] / steps,
        "store_bytes_written": values["bytes_written"] / steps,
    }
