"""How fast a model scores: latencies and throughput of its forward pass at several batch sizes.

In: a sharded model, batches in host memory. Out: a dict of numbers for each batch size, and their table.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch

from dlrm.data.batches import BatchLoader
from dlrm.data.collate import BatchCollator
from dlrm.data.rows import RowSource
from dlrm.models.dlrm.options import INFERENCE_POOL
from dlrm.runtime.errors import UserError

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Repetitions:
    """How often a batch size is timed."""

    warmup: int  # iterations before the clock starts
    iterations: int  # at least
    seconds: float  # as many more as fit into this time


def select_sizes(option: str, sizes: Sequence[int], rows: int) -> tuple[list[int], str]:
    """(the batch sizes that these rows can fill, a line about those left out, or nothing).

    option: the flag that gives the sizes, for messages.
    """
    fitting, larger = [size for size in sizes if size <= rows], [size for size in sizes if size > rows]
    if not larger:
        return fitting, ""
    note = f"--{option} {','.join(map(str, larger))}: the test set has {rows:,} rows"
    if not fitting:
        raise UserError(f"{note}: give smaller sizes")
    return fitting, f"{note}; left out"


def take_batches(
    source: RowSource, to_batch: BatchCollator, size: int, rank: int, world_size: int
) -> list[Batch]:
    """This rank's share of up to INFERENCE_POOL batches of `size` rows, from the start of the source."""
    each = size // world_size
    return list(
        BatchLoader(source, each, rank, world_size, to_batch=to_batch, drop_last=True, limit=INFERENCE_POOL)
    )


@torch.no_grad()
def time_batches(
    model: Any, pool: list[Batch], repetitions: Repetitions, device: torch.device
) -> dict[str, Any]:
    """Latencies and throughput, from a batch in host memory to its logits in host memory. A collective."""

    def time_batch(number: int) -> float:
        begun = time.perf_counter()
        _, (_, logits, _) = model(pool[number % len(pool)].to(device))
        logits.cpu()
        return time.perf_counter() - begun

    for number in range(repetitions.warmup):
        time_batch(number)
    each = torch.tensor([time_batch(number) for number in range(3)], device=device).mean()
    dist.all_reduce(each, dist.ReduceOp.MAX)  # so that all ranks do the same number of iterations
    count = max(repetitions.iterations, int(repetitions.seconds / float(each)))
    dist.barrier()
    begun = time.perf_counter()
    seconds = [time_batch(number) for number in range(count)]
    whole = time.perf_counter() - begun
    scored = sum(len(pool[number % len(pool)].labels) for number in range(count))
    percent = dict(zip(PERCENTILES, np.percentile(seconds, PERCENTILES) * 1e3, strict=True))
    return {
        "samples_per_second": scored * dist.get_world_size() / whole,
        "latency_ms": {"mean": whole / count * 1e3, **{f"p{p}": float(v) for p, v in percent.items()}},
        "iterations": count,
        "mean_prediction": compute_mean_prediction(model, pool, device),
    }


def compute_mean_prediction(model: Any, pool: list[Batch], device: torch.device) -> float:
    """Mean click probability over the batches of all ranks: shows whether the right weights were loaded."""
    logits = torch.cat([model(batch.to(device))[1][1].flatten() for batch in pool])
    mean = torch.sigmoid(logits.double()).mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def format_table(results: list[dict[str, Any]]) -> str:
    """A line for each batch size, below a head."""
    heads = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
    lines = [f"{'batch':>8} {'samples/s':>14} " + " ".join(f"{head + ' ms':>10}" for head in heads)]
    for each in results:
        latencies = " ".join(f"{each['latency_ms'][head]:10.3f}" for head in heads)
        lines.append(f"{each['batch_size']:8} {each['samples_per_second']:14,.0f} {latencies}")
    return "\n".join(lines)
