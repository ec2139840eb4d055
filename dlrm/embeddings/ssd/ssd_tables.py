"""Tables larger than memory: torchrec holds as many rows as the budget allows, files hold all of them.

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
from dlrm.embeddings.ssd.cached_table import (
    COUNTS,
    CachedTable,
    ColumnWiseTable,
    TableShare,
    WholeTable,
    share_budget,
)
from dlrm.embeddings.ssd.row_file import RowFile
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError

STATE: dict[str, Callable[[int], int]] = {  # floats of optimizer state per row
    "sgd": lambda dim: 0,
    "adagrad": lambda dim: dim,
    "rowwise_adagrad": lambda dim: 1,
    "adam": lambda dim: 2 * dim,
}
COLUMN_WISE = "column_wise"
ENTRY = re.compile(r"embedding_bags\.([^.]+)\.weight(?:/(momentum1|exp_avg_sq))?$")


class SsdTables:
    """The tables in files: all of them by name, and those of this rank opened.

    In the order of their use: `shrink_configs` before the model is sharded, `attach` after it,
    `check_row_files` once a checkpoint may have been loaded, `install_prefetch` before the first step.
    This file has all hooks into torchrec.
    """

    def __init__(
        self, tables: Sequence[TableShare] = (), folder: Path = Path(), budget: int = 0, optimizer: str = "",
        seed: int = 0, say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """Before any file is opened.

        tables     those that are kept in files, whole
        budget     bytes of memory for this rank's caches
        optimizer  of the tables: a key of STATE
        say        prints a line, on the first rank only
        """
        self._say = say  # prints on the first rank
        self.tables = {table.name: table for table in tables}
        self.folder, self.budget, self.optimizer, self.seed = folder, budget, optimizer, seed
        self.column_wise: set[str] = set()
        # this rank's, by `part_name`: whole tables, or some of their rows or columns
        self.local_shares: dict[str, TableShare] = {}
        self.local_tables: dict[str, CachedTable] = {}
        self.other_row_files: dict[str, list[Path]] = {}  # of another sharding
        self._tables_of_feature: dict[str, list[CachedTable]] = {}  # several where it is column-wise
        self._io_thread: ThreadPoolExecutor | None = None
        self._counts_reported, self._counts_traced = np.zeros((2, len(COUNTS)), np.int64)
        self._step_reported = 0

    def shrink_configs(
        self, collection: EmbeddingBagCollection, plan: ShardingPlan
    ) -> Sequence[EmbeddingBagConfig]:
        """The collection's configs with as many rows as the cache has slots; changes the plan to match.

        The hook that `attach` installs maps ids to slots.
        """
        shardings: Any = next(iter(plan.plan.values()))
        owners: dict[int, dict[str, TableShare]] = {}
        for name, table in self.tables.items():
            shards = shardings[name].sharding_spec.shards
            columns = shardings[name].sharding_type == COLUMN_WISE
            if columns:
                self.column_wise.add(name)
            for shard in shards:
                (rows, dim), (first, column) = shard.shard_sizes, shard.shard_offsets
                part = replace(
                    table, name=part_name(name, column), rows=rows, first=first, dim=dim, first_column=column,
                    state=STATE[self.optimizer](dim),
                    pooling=table.pooling if columns else table.pooling / len(shards),
                )  # fmt: skip
                owners.setdefault(shard.placement.rank(), {})[part.name] = part
        slots = {rank: share_budget(list(parts.values()), self.budget) for rank, parts in owners.items()}
        self.local_shares = owners.get(dist.get_rank(), {})
        configs: list[EmbeddingBagConfig] = collection.embedding_bag_configs()
        for config in configs:
            if config.name in self.tables:
                shards = shardings[config.name].sharding_spec.shards
                sizes = [
                    slots[shard.placement.rank()][part_name(config.name, shard.shard_offsets[1])]
                    for shard in shards
                ]
                if config.name in self.column_wise:  # torchrec gives all shards the same rows
                    config.num_embeddings = min(sizes)
                    for shard in shards:
                        shard.shard_sizes[0] = config.num_embeddings
                    continue
                config.num_embeddings = 0
                for shard, size in zip(shards, sizes, strict=True):
                    shard.shard_offsets[0] = config.num_embeddings
                    shard.shard_sizes[0] = size
                    config.num_embeddings += size
        return configs

    def attach(self, model: Any) -> None:
        """Open the files of this rank's tables and hook into their lookups; sets `model.ssd_tables`."""
        model.ssd_tables = self
        for part in model.modules():
            for sharding in getattr(part, "_embedding_shardings", []):
                # a row-wise sharding finds a row's rank by the size of the whole table
                if isinstance(sharding, BaseRwEmbeddingSharding):
                    sharding._get_feature_hash_sizes = partial(self._find_table_rows, sharding)
            for lookup in getattr(part, "_lookups", []):  # not registered as submodules
                for kernel in lookup.modules():
                    if isinstance(kernel, BatchedFusedEmbeddingBag):
                        self._attach_kernel(kernel)

    def _find_table_rows(self, sharding: Any) -> list[int]:
        """Rows of the whole table behind each feature of a row-wise sharding."""
        configs = [
            config for group in sharding._grouped_embedding_configs for config in group.embedding_tables
        ]
        return [
            self.tables[config.name].rows if config.name in self.tables else config.num_embeddings
            for config in configs
            for _ in config.feature_names
        ]

    def _attach_kernel(self, kernel: BatchedFusedEmbeddingBag) -> None:
        """Open the row files of one fbgemm kernel's tables; its weights become their caches."""
        module: Any = kernel.emb_module
        configs: Any = kernel.config.embedding_tables
        names = [part_name(each.name, each.local_metadata.shard_offsets[1]) for each in configs]
        states = module.split_optimizer_states() or [[]] * len(names)
        for config, name, weights, state in zip(
            configs, names, module.split_embedding_weights(), states, strict=True
        ):
            if name in self.local_shares and self.local_shares[name].rows:
                share, whole = self.local_shares[name], self.tables[config.name]
                row_file = RowFile(
                    self.folder, config.name, share.rows, share.dim, share.state, self.optimizer, self.seed,
                    share.first, whole.rows, share.first_column, whole.dim,
                )  # fmt: skip
                self.other_row_files[name] = find_other_row_files(row_file)
                self._io_thread = self._io_thread or trace.make_named_pool(1, "tables")
                self.local_tables[name] = CachedTable(
                    share, row_file, weights, state if share.state else None, self._io_thread
                )
        tables = [self.local_tables.get(name) for name in names]
        for config, table in zip(configs, tables, strict=True):
            for feature in config.feature_names:
                self._tables_of_feature.setdefault(feature, []).extend([table] if table else [])
        if any(tables):

            def remap_ids(_: Any, args: Any, named: dict[str, Any]) -> Any:
                return args, named | {
                    "indices": self._ids_to_slots(tables, named["indices"], named["offsets"])
                }

            module.register_forward_pre_hook(remap_ids, with_kwargs=True)

    def _ids_to_slots(
        self, tables: list[CachedTable | None], ids: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """ids -> slots of the caches, same shape and dtype; the rows are in their slots afterwards.

        tables: of the kernel, in its order; None: a table in memory, whose ids stay.
        ids: int32 or int64 [all ids of all bags]; offsets: [features x batch + 1], where each bag begins.
        """
        will_update = torch.is_grad_enabled()
        bags = (len(offsets) - 1) // len(tables)
        ends = offsets[::bags].tolist() if bags else [0] * (len(tables) + 1)
        slots = ids.to(torch.int64, copy=True)
        values = slots.numpy()
        with trace.span("ssd", "fetch"):
            for table, (begin, end) in zip(tables, pairwise(ends), strict=True):
                if table is not None and end > begin:
                    values[begin:end] = table.admit_rows(values[begin:end], will_update)
        if trace.is_tracing():
            now = self.sum_counters()
            for name, value in _compute_hit_rates(now - self._counts_traced).items():
                trace.counter(name, value)
            self._counts_traced = now
        return slots.to(ids.dtype)

    def install_prefetch(self, pipeline: Any) -> None:
        """Read the rows of the next batch from the files while the current batch is computed."""
        if not self.local_tables:
            return
        wait = pipeline.wait_sparse_data_dist

        def wait_and_prefetch(context: Any) -> None:
            wait(context)
            requests = context.input_dist_tensors_requests
            for name, request in requests.items():
                requests[name] = NoWait(request.wait())  # the ids, after their exchange
                with trace.span("ssd", "prefetch"):
                    for features in requests[name].wait():
                        self._prefetch_rows(features)

        pipeline.wait_sparse_data_dist = wait_and_prefetch

    def _prefetch_rows(self, features: Any) -> None:
        ids, ends = features.values().numpy(), features.offset_per_key()
        places = dict(zip(features.keys(), pairwise(ends), strict=True))  # a key is there once for each shard
        for key, (begin, end) in places.items():
            for table in self._tables_of_feature.get(key, []) if end > begin else []:
                table.prefetch_rows(ids[begin:end])

    def sum_counters(self) -> np.ndarray:
        return sum(
            (table.read_counters() for table in self.local_tables.values()), np.zeros(len(COUNTS), np.int64)
        )

    def cache_metrics(self, step: int) -> dict[str, float]:
        """Hit rate, evictions and bytes of all ranks since the last call, per step, for metrics.jsonl.

        A collective, unless all tables are in memory."""
        if not self.tables:
            return {}
        steps, self._step_reported, now = step - self._step_reported, step, self.sum_counters()
        delta = torch.from_numpy(now - self._counts_reported)
        self._counts_reported = now
        dist.all_reduce(delta)
        return _compute_hit_rates(delta.numpy(), max(1, steps))

    def read_whole_table(self, name: str, value: Any) -> Any:
        """What a checkpoint saves and loads under this name: the whole table instead of its cache."""
        found = ENTRY.search(name)
        if found is None or found[1] not in self.tables:
            return value
        state, number = found[2] is not None, int(found[2] == "exp_avg_sq")
        if found[1] in self.column_wise:
            parts = [
                WholeTable(each.table, each, state, number)
                for each in self.local_tables.values()
                if each.row_file.table == found[1]
            ]
            return ColumnWiseTable(self.tables[found[1]], parts)
        return WholeTable(self.tables[found[1]], self.local_tables.get(found[1]), state, number)

    def check_row_files(self) -> None:
        """Refuse row files that cannot be continued. A collective.

        Call it before the first step, after a checkpoint was loaded (which replaces all rows) or was not.
        """
        tables = list(self.local_tables.values())
        inconsistent = [table for table in tables if not table.consistent]
        other = [
            name
            for name, table in self.local_tables.items()
            if self.other_row_files[name] and not table.loaded
        ]
        # adam counts steps, and only a checkpoint has the number
        uncounted = [
            table
            for table in tables
            if self.optimizer == "adam" and not (table.row_file.new or table.loaded or not table.consistent)
        ]
        found = torch.tensor(
            [
                len(inconsistent) + len(other) + len(uncounted),
                sum(not (table.row_file.new or table.loaded) for table in tables),
            ]
        )
        dist.all_reduce(found)
        if found.tolist()[0] == 0 < found.tolist()[1]:
            self._say(
                f"tables: {self.folder} already has row files: continuing with the rows of "
                f"{found.tolist()[1]} tables; give another --persistent_path to start with new rows"
            )
        for name in other:
            raise UserError(
                f"{self.other_row_files[name][0]}: rows of {name} for another sharding or number of ranks: "
                "remove these files, resume from a checkpoint, or give another --persistent_path"
            )
        for table in uncounted:
            raise UserError(
                f"{table.row_file.path}: rows of an earlier job with adam, whose number of steps only a "
                "checkpoint has: resume from one, or give another --persistent_path"
            )
        for table in inconsistent:
            raise UserError(
                f"{table.row_file.path}: an earlier job did not close this file, its rows are of different "
                "steps: resume from a checkpoint, or remove it and its .json to start with new rows"
            )

    def bytes_read(self) -> dict[str, int]:
        return {str(table.row_file.path): table.row_file.bytes_read for table in self.local_tables.values()}

    def bytes_written(self) -> dict[str, int]:
        """Writes all changed rows first, so that `close` writes no more."""
        for table in self.local_tables.values():
            table.flush()
        return {
            str(table.row_file.path): table.row_file.bytes_written for table in self.local_tables.values()
        }

    def close(self) -> None:
        for table in self.local_tables.values():
            table.close()
        if self._io_thread:
            self._io_thread.shutdown()


def part_name(table: str, column: int) -> str:
    """How a rank's part of a table is called, which begins with this column."""
    return f"{table}@{column}" if column else table


def find_other_row_files(row_file: RowFile) -> list[Path]:
    """Descriptions of other row files in the same folder that hold some of its numbers."""
    found = []
    for path in row_file.description_path.parent.glob(f"{row_file.table}.*json"):
        if path != row_file.description_path:
            with contextlib.suppress(UserError, KeyError):
                facts = read_json_object(path)
                first, rows = facts.get("first", 0), facts["rows"]
                column, dim = facts.get("first_column", 0), facts["dim"]
                numbers = all(type(each) is int for each in (first, rows, column, dim))
                if numbers and facts["table"] == row_file.table:
                    overlap = first < row_file.first + row_file.rows and row_file.first < first + rows
                    beside = (
                        column >= row_file.first_column + row_file.dim
                        or row_file.first_column >= column + dim
                    )
                    found += [path] if overlap and not beside else []
    return found


def _compute_hit_rates(counts: np.ndarray, steps: int = 1) -> dict[str, float]:
    """What is reported of the caches. counts: int64, in the order of COUNTS, summed over `steps` steps."""
    values: Mapping[str, int] = dict(zip(COUNTS, counts.tolist(), strict=True))
    return {
        "cache_hit_rate": 1 - values["misses"] / max(1, values["lookups"]),
        "cache_evictions": values["evictions"] / steps,
        "store_bytes_read": values["bytes_read"] / steps,
        "store_bytes_written": values["bytes_written"] / steps,
    }
