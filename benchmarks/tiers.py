"""Tables in files against tables in memory and mapped files: samples/s, hit rate, the disk's random reads.

Lookups and fused updates of one table by fbgemm, ids by Zipf(1.05) or uniform. Table and adagrad's state in
files, memory for a share of their bytes, the same bytes for both (`pages`): the row cache with its index, its
buffers and the page cache for the coming batch; or the mapped file's pages. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as plotly
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.pages import PAGE, Bounded, drop, random_reads, resident  # noqa: E402
from dlrm.model.store import RowStore  # noqa: E402
from dlrm.model.tier import Table, Tier, share  # noqa: E402

Batches = list[np.ndarray]
RATE = 0.01  # of learning


def lookups(rows: int, batch: int, count: int, kind: str, seed: int = 0) -> Batches:
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
        specs, optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=RATE
    )


def in_memory(rows: int, dim: int, batches: Batches, dense: Callable[[], None], warm: int) -> float:
    """Samples per second without files."""
    module, seconds = kernel(rows, dim), 0.0
    for number, ids in enumerate(batches[warm // 2 :]):
        begun = time.perf_counter()
        out = module(torch.from_numpy(ids), torch.arange(len(ids) + 1))
        dense()
        out.backward(torch.full_like(out, 1e-3))
        seconds += (time.perf_counter() - begun) * (number >= warm - warm // 2)
    return sum(map(len, batches[warm:])) / seconds


def opened(folder: Path, rows: int, dim: int) -> RowStore:
    store = RowStore(folder, "t_bench", rows, dim, dim, "adagrad", 0)
    for block in np.flatnonzero(~store.blocks):
        store.make(int(block))
    os.fsync(store._file)
    return store


def cached(
    folder: Path, table: Table, budget: float, batches: Batches, dense: Callable[[], None], warm: int,
    limited: bool, ahead: bool,
) -> dict[str, float]:  # fmt: skip
    """Rows in a cache; with `ahead`, the disk is told of the next batch before this one is computed."""
    store = opened(folder, table.rows, table.dim)
    module = kernel(share([table], int(budget))[table.name], table.dim)
    weights, state = module.split_embedding_weights()[0], module.split_optimizer_states()[0][0]
    beside = ThreadPoolExecutor(1) if ahead else None
    tier = Tier(table, store, weights, state, beside)
    for ids in batches[:warm]:
        tier.admit(ids, True)
    if limited:
        drop(store._file)
    before, seconds, most = tier.counts(), 0.0, 0
    for number in range(warm, len(batches)):
        ids = batches[number]
        begun = time.perf_counter()
        slots = tier.admit(ids, True)
        seconds += time.perf_counter() - begun
        if limited:
            seconds += drop(store._file)
        begun = time.perf_counter()
        out = module(torch.from_numpy(slots), torch.arange(len(ids) + 1))
        if ahead and number + 1 < len(batches):
            tier.expect(batches[number + 1])
        dense()
        out.backward(torch.full_like(out, 1e-3))
        seconds += time.perf_counter() - begun
        if limited and number % 4 == 0:
            most = max(most, resident(store.path))
    counts = tier.counts() - before
    tier.close()
    steps = len(batches) - warm
    return {
        "samples_per_second": sum(map(len, batches[warm:])) / seconds,
        "hit_rate": 1 - counts[1] / counts[0],
        "bytes_per_step": int(counts[3] + counts[4]) // steps,
        "page_cache_mb": most / 1e6,
        "slots": tier.cache.slots,
    }


def mapped(
    path: Path, table: Table, budget: float, batches: Batches, dense: Callable[[], None], warm: int,
    limited: bool,
) -> dict[str, float]:  # fmt: skip
    """The obvious alternative: the file as an array, rows gathered, adagrad by numpy's own vectors."""
    dim, bounded = table.dim, Bounded(path, budget)
    rows = np.frombuffer(bounded.map, np.float32).reshape(table.rows, 2 * dim)

    def pages(ids: np.ndarray) -> np.ndarray:
        begin = np.unique(ids) * rows.shape[1] * 4
        return np.unique(np.concatenate((begin // PAGE, (begin + rows.shape[1] * 4 - 1) // PAGE)))

    for ids in batches[:warm]:
        bounded.use(pages(ids))
    if limited:
        bounded.settle()
    seconds, most, missed = 0.0, 0, 0
    for number, ids in enumerate(batches[warm:]):
        missed += int((bounded.used[pages(ids)] == 0).sum())
        begun = time.perf_counter()
        unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        values = rows[unique]
        _ = values[inverse, :dim]
        dense()
        gradient = np.repeat(1e-3 * counts[:, None].astype(np.float32), dim, 1)
        values[:, dim:] += gradient**2
        values[:, :dim] -= RATE * gradient / (np.sqrt(values[:, dim:]) + 1e-8)
        rows[unique] = values
        seconds += time.perf_counter() - begun
        if limited:
            seconds += bounded.trim(pages(ids))
            most = max(most, resident(path)) if number % 4 == 0 else most
    return {
        "samples_per_second": sum(map(len, batches[warm:])) / seconds,
        "faults_per_step": missed / (len(batches) - warm),
        "page_cache_mb": most / 1e6,
    }


def measure(options: argparse.Namespace, folder: Path, kind: str, part: float) -> dict[str, Any]:
    table = Table("t_bench", options.rows, options.dim, options.dim)
    batches = lookups(options.rows, options.batch, options.warm + options.steps, kind)
    layers = torch.nn.Sequential(torch.nn.Linear(options.dim, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    dense_in = torch.randn(options.batch, options.dim)

    def dense() -> None:
        if options.dense:
            layers(dense_in).sum().backward()

    budget = part * options.rows * options.dim * 8
    ahead = options.batch * PAGE if options.limit else 0  # what the page cache may hold of the coming batch
    found: dict[str, Any] = {"access": kind, "cache": part}
    found["device_mem"] = in_memory(options.rows, options.dim, batches, dense, options.warm)
    for name, look in (("cached_ssd", True), ("without_ahead", False)):
        found[name] = cached(folder, table, budget - ahead, batches, dense, options.warm, options.limit, look)
    path = folder / "t_bench.rows"
    found["mmap"] = mapped(path, table, budget, batches, dense, options.warm, options.limit)
    ours = found["cached_ssd"]
    found["of_device_mem"] = ours["samples_per_second"] / found["device_mem"]
    found["of_mmap"] = ours["samples_per_second"] / found["mmap"]["samples_per_second"]
    print(
        f"{kind:<9} memory {part:4.0%}  hits {ours['hit_rate']:6.1%}  samples/s: cached_ssd "
        f"{ours['samples_per_second']:9,.0f} ({found['without_ahead']['samples_per_second']:9,.0f} without "
        f"looking ahead)  mmap {found['mmap']['samples_per_second']:9,.0f}"
        f"  device_mem {found['device_mem']:9,.0f}",
        flush=True,
    )
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Samples per second over hit rate, with what the disk's random reads allow."""
    figure, hits = plotly.Figure(), np.linspace(0.02, 0.97, 60)
    for count, dash in (("1", "dot"), ("32", "dash")):
        allowed = results["disk_reads_per_second"][count] / (1 - hits)
        name = f"disk's random reads, {count} at once"
        figure.add_scatter(x=hits, y=allowed, name=name, line={"dash": dash, "color": "#999"})
    colours = iter(("#1565c0", "#90caf9", "#c62828", "#ef9a9a"))
    for side in ("cached_ssd", "mmap"):
        for kind in dict.fromkeys(case["access"] for case in results["cases"]):
            cases = [case for case in results["cases"] if case["access"] == kind]
            cases.sort(key=lambda case: case["cached_ssd"]["hit_rate"])
            figure.add_scatter(
                x=[case["cached_ssd"]["hit_rate"] for case in cases],
                y=[case[side]["samples_per_second"] for case in cases],
                text=[f"{case['cache']:.0%}" for case in cases],
                name=f"{side}, {kind}", mode="lines+markers+text", textposition="top center",
                line={"color": next(colours)},
            )  # fmt: skip
    memory = float(np.median([case["device_mem"] for case in results["cases"]]))
    figure.add_scatter(x=[0, 1], y=[memory] * 2, name="device_mem", line={"color": "#2e7d32"})
    figure.update_layout(
        template="plotly_white", width=900, height=520, margin={"l": 70, "r": 20, "t": 40, "b": 50},
        title="One table in a file, memory for the given share of its bytes",
    )  # fmt: skip
    figure.update_xaxes(title="hit rate of the row cache", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="samples per second", type="log")
    page = path.with_suffix(".html")
    figure.write_html(page)
    if path.suffix == ".png":
        program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        subprocess.run(
            [
                program, "--headless=new", "--no-sandbox", "--disable-gpu", f"--screenshot={path.absolute()}",
                "--window-size=930,560", "--virtual-time-budget=5000", page.absolute().as_uri(),
            ],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        page.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--warm", type=int, default=600, help="batches that fill the memory, not timed")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True, help="a small tower")
    parser.add_argument(
        "--limit", action=argparse.BooleanOptionalAction, default=True,
        help="without: the page cache takes what it finds",
    )  # fmt: skip
    parser.add_argument(
        "--cases",
        default="zipf1.05:0.1,zipf1.05:0.05,zipf1.05:0.2,zipf1.05:0.4,uniform:0.1,uniform:0.3,uniform:0.6",
        help="access:share of the table's bytes",
    )
    parser.add_argument("--folder", help="where the files go (default: the temporary folder)")
    parser.add_argument("--plot", type=Path, help="a picture, .png or .html")
    parser.add_argument("--from", dest="old", type=Path, help="plot these results instead of measuring")
    options = parser.parse_args()
    if options.old:
        plot(json.loads(options.old.read_text().splitlines()[-1]), options.plot)
        return
    results = {key: getattr(options, key) for key in ("rows", "dim", "batch", "steps", "dense", "limit")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        opened(folder, options.rows, options.dim).close()
        path = folder / "t_bench.rows"
        results["disk_reads_per_second"] = {str(n): random_reads(path, n) for n in (1, 32)}
        print("disk: random reads of 4 KiB per second, 1 and 32 at once:", results["disk_reads_per_second"])
        cases = [case.split(":") for case in options.cases.split(",")]
        results["cases"] = [measure(options, folder, kind, float(part)) for kind, part in cases]
    results |= {"target": 0.7, "of_device_mem": results["cases"][0]["of_device_mem"]}
    results["of_mmap"] = min(case["of_mmap"] for case in results["cases"])
    if options.plot:
        plot(results, options.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
