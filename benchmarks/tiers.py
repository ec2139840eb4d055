"""Tables in files against tables in memory and mapped files: samples/s, hit rate, the disk's random reads.

Lookups and fused updates of one table by fbgemm, ids by Zipf(1.05) or uniform, a cache of a tenth of the
rows. The page cache is emptied of the files at the start (--cold) or not; there is no limit on memory where
control groups cannot be written, so mapped files then have all of it. The last line is JSON.
"""

import argparse
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from dlrm.model.store import RowStore  # noqa: E402
from dlrm.model.tiers import Table, Tier  # noqa: E402


def lookups(rows: int, batch: int, count: int, kind: str, seed: int = 0) -> list[np.ndarray]:
    """Ids of each batch; the popular ones lie anywhere in the table, as hashed ids do."""
    random = np.random.default_rng(seed)
    if kind == "uniform":
        return [random.integers(0, rows, batch) for _ in range(count)]
    weights = 1 / np.arange(1, rows + 1) ** float(kind.removeprefix("zipf"))
    limits = np.cumsum(weights / weights.sum())
    places = random.permutation(rows)
    return [places[np.minimum(np.searchsorted(limits, random.random(batch)), rows - 1)] for _ in range(count)]


def kernel(slots: int, dim: int) -> Any:
    specs = [(slots, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    return SplitTableBatchedEmbeddingBagsCodegen(
        specs, optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=0.01
    )


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: on a machine that others use, too


def rate(step: Callable[[np.ndarray], None], batches: list[np.ndarray], warm: int, clock: str) -> float:
    """Samples per second after the first `warm` batches."""
    for ids in batches[:warm]:
        step(ids)
    begun = CLOCKS[clock]()
    for ids in batches[warm:]:
        step(ids)
    return sum(map(len, batches[warm:])) / (CLOCKS[clock]() - begun)


def stepper(module: Any, dense: Callable[[], None], slots: Callable[[np.ndarray], np.ndarray]) -> Any:
    def step(ids: np.ndarray) -> None:
        offsets = torch.arange(len(ids) + 1)
        out = module(torch.from_numpy(slots(ids)), offsets)
        dense()
        out.backward(torch.full_like(out, 1e-3))

    return step


def opened(folder: Path, rows: int, dim: int) -> RowStore:
    store = RowStore(folder, "t_bench", rows, dim, dim, "adagrad", 0)
    for block in np.flatnonzero(~store.blocks):
        store.put_block(int(block), store.draw(int(block)))
    os.fsync(store._file)
    return store


def mapped(path: Path, rows: int, dim: int, dense: Callable[[], None]) -> Callable[[np.ndarray], None]:
    """The obvious alternative: the file as an array, rows gathered, adagrad by numpy's own vectors."""
    with open(path, "r+b") as file:
        whole = mmap.mmap(file.fileno(), 0)
    whole.madvise(mmap.MADV_RANDOM)
    table = np.frombuffer(whole, np.float32).reshape(rows, 2 * dim)

    def step(ids: np.ndarray) -> None:
        unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        values = table[unique]
        _ = values[inverse, :dim]
        dense()
        gradient = np.repeat(1e-3 * counts[:, None].astype(np.float32), dim, 1)
        values[:, dim:] += gradient**2
        values[:, :dim] -= 0.01 * gradient / (np.sqrt(values[:, dim:]) + 1e-8)
        table[unique] = values

    return step


def random_reads(path: Path, seconds: float = 1.0) -> float:
    """4 KiB reads per second at random places, past the page cache."""
    size, done, random = path.stat().st_size >> 12, 0, np.random.default_rng(0)
    file, page = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        os.preadv(file, [page], int(random.integers(size)) << 12)
        done += 1
    os.close(file)
    return done / (time.perf_counter() - begun)


def forget(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def measure(options: argparse.Namespace, kind: str, share: float) -> dict[str, Any]:
    rows, dim = options.rows, options.dim
    batches = lookups(rows, options.batch, options.warm + options.steps, kind)
    layers = torch.nn.Sequential(torch.nn.Linear(dim, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    dense_in = torch.randn(options.batch, dim)

    def dense() -> None:
        if options.dense:
            layers(dense_in).sum().backward()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = opened(Path(folder), rows, dim)
        found: dict[str, Any] = {"access": kind, "cache": share}
        found["reads_4k_per_second"] = random_reads(store.path)
        whole = kernel(rows, dim)
        found["device_mem"] = rate(
            stepper(whole, dense, lambda ids: ids), batches, options.warm, options.clock
        )
        del whole
        module = kernel(int(share * rows), dim)
        weights, state = module.split_embedding_weights()[0], module.split_optimizer_states()[0][0]
        tier = Tier(Table("t_bench", rows, dim, dim), store, weights, state)
        if options.cold:
            forget(store.path)
        step = stepper(module, dense, lambda ids: tier.admit(ids, True))
        for ids in batches[: options.warm]:
            step(ids)
        before = tier.counts()
        found["cached_ssd"] = rate(step, batches[options.warm :], 0, options.clock)
        counts = tier.counts() - before
        found["hit_rate"] = 1 - counts[1] / counts[0]
        found["bytes_per_step"] = int(counts[3] + counts[4]) // options.steps
        tier.close()
        if options.cold:
            forget(store.path)
        found["mmap"] = rate(mapped(store.path, rows, dim, dense), batches, options.warm, options.clock)
    found["of_device_mem"] = found["cached_ssd"] / found["device_mem"]
    print(
        f"{kind:<9} cache {share:4.0%}  hits {found['hit_rate']:6.1%}"
        f"  cached_ssd {found['cached_ssd']:11,.0f}"
        f"  device_mem {found['device_mem']:11,.0f}  mmap {found['mmap']:11,.0f} samples/s",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--warm", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True, help="a small tower")
    parser.add_argument(
        "--cases",
        default="zipf1.05:0.1,zipf1.05:0.02,zipf1.05:0.5,uniform:0.1,uniform:0.5",
        help="access:cache",
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--folder", help="where the files go (default: the temporary folder)")
    options = parser.parse_args()
    limited = os.access("/sys/fs/cgroup/memory.max", os.W_OK)
    if not limited:
        print("control groups cannot be written here: memory is not limited, mapped files have all of it")
    cases = [case.split(":") for case in options.cases.split(",")]
    results = [measure(options, kind, float(share)) for kind, share in cases]
    target = results[0]
    print(
        json.dumps(
            {
                "target": 0.7,
                "of_device_mem": target["of_device_mem"],
                "of_mmap": target["cached_ssd"] / target["mmap"],
                "memory_limited": False,
                "clock": options.clock,
                "rows": options.rows,
                "dim": options.dim,
                "batch": options.batch,
                "cases": results,
            }
        )
    )


if __name__ == "__main__":
    main()
