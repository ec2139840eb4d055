"""Tables larger than memory: torchrec holds as many rows as the budget allows, the rest lies in files.

torchrec's table is the cache: it has one row per slot, and ids become slots just before fbgemm looks them up.
The rows of a batch stay until its backward pass has updated them; changed rows are written when they leave.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.sharding.rw_sharding import BaseRwEmbeddingSharding
from torchrec.distributed.types import NoWait, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from common.inputs import read_json_object
from dlrm.embeddings.ssd.cached_table import COUNTS, CachedTable, TableShare, WholeTable, share_budget
from dlrm.embeddings.ssd.row_file import RowFile
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError

STATE: dict[str, Callable[[int], int]] = {  # floats of optimizer state per row
    "sgd": lambda dim: 0,
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
}
ENTRY = re.compile(r"embedding_bags\.([^.]+)\.weight(/momentum1)?$")


class SsdTables:
    """The tables in files: of all ranks by name, this rank's open."""

    def __init__(
        self, tables: Sequence[TableShare] = (), folder: Path = Path(), budget: int = 0, optimizer: str = "",
        seed: int = 0, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self._say = say  # on the first rank
        self.tables = {table.name: table for table in tables}
        self.folder, self.budget, self.optimizer, self.seed = folder, budget, optimizer, seed
        self.parts: dict[str, TableShare] = {}  # this rank's: whole tables, or some rows of them
        self.mine: dict[str, CachedTable] = {}
        self.others: dict[str, list[Path]] = {}  # of another sharding
        self._of_feature: dict[str, CachedTable] = {}
        self._beside: ThreadPoolExecutor | None = None
        self._before, self._counted, self._step = *np.zeros((2, len(COUNTS)), np.int64), 0

    def narrow(self, collection: EmbeddingBagCollection, plan: ShardingPlan) -> Sequence[EmbeddingBagConfig]:
        """The collection's configs with as many rows as there are slots; the plan is changed to match."""
        shardings: Any = next(iter(plan.plan.values()))
        owners: dict[int, dict[str, TableShare]] = {}
        for name, table in self.tables.items():
            shards = shardings[name].sharding_spec.shards
            for shard in shards:
                part = replace(
                    table, rows=shard.shard_sizes[0], first=shard.shard_offsets[0],
                    pooling=table.pooling / len(shards),
                )  # fmt: skip
                owners.setdefault(shard.placement.rank(), {})[name] = part
        slots = {rank: share_budget(list(parts.values()), self.budget) for rank, parts in owners.items()}
        self.parts = owners.get(dist.get_rank(), {})
        configs: list[EmbeddingBagConfig] = collection.embedding_bag_configs()
        for config in configs:
            if config.name in self.tables:
                config.num_embeddings = 0
                for shard in shardings[config.name].sharding_spec.shards:
                    shard.shard_offsets[0] = config.num_embeddings
                    shard.shard_sizes[0] = slots[shard.placement.rank()][config.name]
                    config.num_embeddings += shard.shard_sizes[0]
        return configs

    def attach(self, model: Any) -> None:
        """Open the files of this rank's tables and stand before their lookups."""
        model.ssd_tables = self
        for part in model.modules():
            for sharding in getattr(part, "_embedding_shardings", []):
                if isinstance(sharding, BaseRwEmbeddingSharding):  # which rank has a row is said by all rows
                    sharding._get_feature_hash_sizes = partial(self._rows, sharding)
            for lookup in getattr(part, "_lookups", []):  # not among the modules that torch knows of
                for kernel in lookup.modules():
                    if isinstance(kernel, BatchedFusedEmbeddingBag):
                        self._attach(kernel)

    def _rows(self, sharding: Any) -> list[int]:
        configs = [
            config for group in sharding._grouped_embedding_configs for config in group.embedding_tables
        ]
        return [
            self.tables[config.name].rows if config.name in self.tables else config.num_embeddings
            for config in configs
            for _ in config.feature_names
        ]

    def _attach(self, kernel: BatchedFusedEmbeddingBag) -> None:
        module: Any = kernel.emb_module
        configs = kernel.config.embedding_tables
        names = [config.name for config in configs]
        states = module.split_optimizer_states() or [[]] * len(names)
        for name, weights, state in zip(names, module.split_embedding_weights(), states, strict=True):
            if name in self.parts and self.parts[name].rows:
                table = self.parts[name]
                store = RowFile(
                    self.folder, name, table.rows, table.dim, table.state, self.optimizer, self.seed,
                    table.first, self.tables[name].rows,
                )  # fmt: skip
                self.others[name] = find_other_row_files(store)
                self._beside = self._beside or ThreadPoolExecutor(
                    1, initializer=trace.name_thread, initargs=("tables",)
                )
                self.mine[name] = CachedTable(
                    table, store, weights, state[0] if table.state else None, self._beside
                )
        tiers = [self.mine.get(name) for name in names]
        for config, tier in zip(configs, tiers, strict=True):
            self._of_feature |= {} if tier is None else dict.fromkeys(config.feature_names, tier)
        if any(tiers):

            def remap(_: Any, args: Any, named: dict[str, Any]) -> Any:
                return args, named | {"indices": self._slots(tiers, named["indices"], named["offsets"])}

            module.register_forward_pre_hook(remap, with_kwargs=True)

    def _slots(
        self, tiers: list[CachedTable | None], ids: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        change = torch.is_grad_enabled()
        bags = (len(offsets) - 1) // len(tiers)
        ends = offsets[::bags].tolist() if bags else [0] * (len(tiers) + 1)
        made = ids.to(torch.int64, copy=True)
        values = made.numpy()
        with trace.span("ssd", "fetch"):
            for tier, (begin, end) in zip(tiers, pairwise(ends), strict=True):
                if tier is not None and end > begin:
                    values[begin:end] = tier.admit(values[begin:end], change)
        if trace.is_tracing():
            now = self.counts()
            for name, value in _hit_rates(now - self._counted).items():
                trace.counter(name, value)
            self._counted = now
        return made.to(ids.dtype)

    def watch(self, pipeline: Any) -> None:
        """What each batch needs from the disk is on its way while the one before is computed."""
        if not self.mine:
            return
        wait = pipeline.wait_sparse_data_dist

        def waited(context: Any) -> None:
            wait(context)
            requests = context.input_dist_tensors_requests
            for name, request in requests.items():
                requests[name] = NoWait(request.wait())  # the ids, after their exchange
                with trace.span("ssd", "prefetch"):
                    for features in requests[name].wait():
                        self._expect(features)

        pipeline.wait_sparse_data_dist = waited

    def _expect(self, features: Any) -> None:
        ids, ends = features.values().numpy(), features.offset_per_key()
        for key, (begin, end) in zip(features.keys(), pairwise(ends), strict=True):
            if key in self._of_feature and end > begin:
                self._of_feature[key].expect(ids[begin:end])

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
        return _hit_rates(delta.numpy(), max(1, steps))

    def whole(self, name: str, value: Any) -> Any:
        """What a checkpoint is to see in place of a cache."""
        found = ENTRY.search(name)
        if found is None or found[1] not in self.tables:
            return value
        return WholeTable(self.tables[found[1]], self.mine.get(found[1]), found[2] is not None)

    def ready(self) -> None:
        """Before the first step, once a checkpoint had its chance. A collective."""
        tiers = list(self.mine.values())
        unsound = [tier for tier in tiers if not tier.sound]
        other = [name for name, tier in self.mine.items() if self.others[name] and not tier.filled]
        found = torch.tensor(
            [len(unsound) + len(other), sum(not (tier.store.new or tier.filled) for tier in tiers)]
        )
        dist.all_reduce(found)
        if found.tolist()[0] == 0 < found.tolist()[1]:
            self._say(
                f"tables: stores in {self.folder} are there already: going on with the rows of "
                f"{found.tolist()[1]} tables; another --persistent_path begins anew"
            )
        for name in other:
            raise UserError(
                f"{self.others[name][0]}: rows of {name} for another sharding or number of ranks: remove "
                "the stores of one, go on from a checkpoint, or give another --persistent_path"
            )
        for tier in unsound:
            raise UserError(
                f"{tier.store.path}: a job ended before it closed this, its rows are of different "
                "moments: go on from a checkpoint, or remove it and its .json for a new start"
            )

    def bytes_read(self) -> dict[str, int]:
        return {str(tier.store.path): tier.store.bytes_read for tier in self.mine.values()}

    def bytes_written(self) -> dict[str, int]:
        """After this `close` writes no more rows."""
        for tier in self.mine.values():
            tier.flush()
        return {str(tier.store.path): tier.store.bytes_written for tier in self.mine.values()}

    def close(self) -> None:
        for tier in self.mine.values():
            tier.close()
        if self._beside:
            self._beside.shutdown()


def find_other_row_files(store: RowFile) -> list[Path]:
    """Descriptions of stores beside this one that hold some of its rows, too."""
    found = []
    for path in store.about.parent.glob(f"{store.table}.*json"):
        if path != store.about:
            with contextlib.suppress(UserError, KeyError):
                facts = read_json_object(path)
                first, rows = facts.get("first", 0), facts["rows"]
                if type(first) is int and type(rows) is int and facts["table"] == store.table:
                    overlap = first < store.first + store.rows and store.first < first + rows
                    found += [path] if overlap else []
    return found


def _hit_rates(counts: np.ndarray, steps: int = 1) -> dict[str, float]:
    values: Mapping[str, int] = dict(zip(COUNTS, counts.tolist(), strict=True))
    return {
        "cache_hit_rate": 1 - values["misses"] / max(1, values["lookups"]),
        "cache_evictions": values["evictions"] / steps,
        "store_bytes_read": values["bytes_read"] / steps,
        "store_bytes_written": values["bytes_written"] / steps,
    }
