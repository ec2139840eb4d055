"""The embedding tables: one config per sparse feature, and their first weights.

The weights depend on the seed, the table and the row alone, so that any number of ranks, under any sharding,
starts with the same model.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from dlrm.data.criteo import name_features
from dlrm.runtime.errors import UserError

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
BLOCK = 1 << 20  # weights from one random generator; a shard draws all blocks that it overlaps
# (float32 tensor to fill, generator): the distribution of a table's first weights
FirstWeights = Callable[[torch.Tensor, torch.Generator], object]
WEIGHT = re.compile(r"embedding(?:_bag)?s\.([^.]+)\.weight$")


def make_table_configs(
    sizes: Sequence[int],
    dim: int | Sequence[int],
    names: Sequence[str] | None = None,
    dtype: str = "fp32",
) -> list[EmbeddingBagConfig]:
    """One sum-pooled table `t_<feature>` per feature; `dim` is one width for all, or one each. `names`: of
    the features, by default cat_0, cat_1 ...
    """
    names = name_features(len(sizes)) if names is None else names
    dims = [dim] * len(sizes) if isinstance(dim, int) else list(dim)
    for option, values in (("--num_embeddings_per_feature", sizes), ("--embedding_dim", dims)):
        if len(values) != len(names):
            raise UserError(f"{option}: {len(values)} values for {len(names)} tables; give one for each")
        if min(values) < 1:
            raise UserError(f"{option}: {min(values)} is not a size; give positive numbers")
    if any(width % 4 for width in dims):
        raise UserError(f"--embedding_dim: {dims} must be multiples of 4, the width of fbgemm's vectors")
    if dtype not in DTYPES:
        raise UserError(f"table dtype {dtype} is unknown; choose from {', '.join(DTYPES)}")
    return [
        EmbeddingBagConfig(
            name=f"t_{name}",
            feature_names=[name],
            num_embeddings=rows,
            embedding_dim=width,
            data_type=DTYPES[dtype],
            init_fn=_leave_unfilled,
        )
        for name, rows, width in zip(names, sizes, dims, strict=True)
    ]


def _leave_unfilled(weight: torch.Tensor) -> torch.Tensor:
    """torchrec's hook sees a shard without its offset in the table, so `initialize_tables` fills instead."""
    return weight


def list_table_weights(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor | ShardedTensor]]:
    """(state name, table, weight) of every table in `module`, sharded or whole."""
    for key, weight in module.state_dict(keep_vars=False).items():
        match = WEIGHT.search(key)
        if match:
            yield key, match[1], weight


def draw_uniform(bound: float) -> FirstWeights:
    """Uniform in +-`bound`."""
    return lambda weights, generator: weights.uniform_(-bound, bound, generator=generator)


def draw_truncated_normal(deviation: float) -> FirstWeights:
    """Normal around 0; what is more than two deviations away is drawn again."""

    def draw(weights: torch.Tensor, generator: torch.Generator) -> object:
        return nn.init.trunc_normal_(
            weights, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator
        )

    return draw


@torch.no_grad()
def initialize_tables(module: nn.Module, seed: int = 0, first_weights: FirstWeights | None = None) -> None:
    """Fill this rank's shards; by default uniform in +-sqrt(1 / rows), as in the DLRM paper."""
    for _, table, weight in list_table_weights(module):
        if isinstance(weight, ShardedTensor):
            rows, width = weight.metadata().size
            for shard in weight.local_shards():
                first_row, first_column = shard.metadata.shard_offsets
                fill_shard(shard.tensor, first_row, first_column, rows, width, table, seed, first_weights)
        elif not weight.is_meta:
            fill_shard(weight, 0, 0, weight.size(0), weight.size(1), table, seed, first_weights)


def fill_shard(
    shard: torch.Tensor, first_row: int, first_column: int, rows: int, width: int, table: str, seed: int,
    first_weights: FirstWeights | None,
) -> None:  # fmt: skip
    """Fill a shard of a table of `rows` x `width` with its first weights, in place.

    shard: [rows, columns] of any float type; its first element is at (first_row, first_column) of the table.
    """
    first_weights = first_weights or draw_uniform(math.sqrt(1 / rows))
    step = max(1, BLOCK // width)
    last_row = first_row + shard.size(0)
    whole = shard.dtype == torch.float32 and shard.size(1) == width and shard.is_contiguous()

    @torch.no_grad()  # a setting of each thread
    def draw(block: int) -> None:
        begin, end = block * step, min((block + 1) * step, rows)
        generator = torch.Generator(shard.device)
        generator.manual_seed(zlib.crc32(f"{seed} {table} {block}".encode()))
        if whole and begin >= first_row and end <= last_row:
            first_weights(shard[begin - first_row : end - first_row], generator)
            return
        drawn = torch.empty(end - begin, width, device=shard.device)
        first_weights(drawn, generator)
        low, high = max(begin, first_row), min(end, last_row)
        columns = slice(first_column, first_column + shard.size(1))
        shard[low - first_row : high - first_row] = drawn[low - begin : high - begin, columns].to(shard.dtype)

    blocks = range(first_row // step, -(-last_row // step))
    threads = min(len(blocks), torch.get_num_threads() if shard.device.type == "cpu" else 1)
    if threads < 2:
        for block in blocks:
            draw(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, blocks))


class NoSsdTables:
    """Stands in for `ssd.ssd_tables.SsdTables` where all tables are in memory."""

    def check_row_files(self) -> None: ...

    def install_prefetch(self, pipeline: Any) -> None: ...

    def bytes_read(self) -> dict[str, int]:
        return {}

    def bytes_written(self) -> dict[str, int]:
        return {}

    def cache_metrics(self, step: int) -> dict[str, float]:
        return {}

    def close(self) -> None: ...
