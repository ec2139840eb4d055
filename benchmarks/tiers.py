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
from dataclasses import dataclass
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
from benchmarks.pages import PAGE, Bounded, drop, let_go, pages_of, random_reads, resident  # noqa: E402
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
    places = np.random.default_rng(9).permutation(rows)
    return [places[np.minimum(np.searchsorted(limits, random.random(batch)), rows - 1)] for _ in range(count)]


def kernel(slots: int, dim: int) -> Any:
    specs = [(slots, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    return SplitTableBatchedEmbeddingBagsCodegen(
        specs, optimizer=EmbOptimType.EXACT_ADAGRAD, learning_rate=RATE
    )


@dataclass
class Case:
    folder: Path
    table: Table
    budget: float  # bytes
    warm: Batches  # large ones that fill the memory
    batches: Batches
    dense: Callable[[], None]
    limited: bool

    @property
    def path(self) -> Path:
        return self.folder / f"{self.table.name}.rows"


def per_second(batches: Batches, seconds: float) -> float:
    return sum(map(len, batches)) / seconds


def in_memory(case: Case) -> float:
    """Samples per second without files."""
    module, seconds = kernel(case.table.rows, case.table.dim), []
    for ids in (*case.batches, *case.batches):  # the first time the memory is touched, too
        begun = time.perf_counter()
        out = module(torch.from_numpy(ids), torch.arange(len(ids) + 1))
        case.dense()
        out.backward(torch.full_like(out, 1e-3))
        seconds.append(time.perf_counter() - begun)
    return per_second(case.batches, sum(seconds[len(case.batches) :]))


def opened(folder: Path, table: Table) -> RowStore:
    """All of it in the file, and as far as there is room in the page cache."""
    store = RowStore(folder, table.name, table.rows, table.dim, table.state, "adagrad", 0)
    for block in range(len(store.blocks)):
        if store.blocks[block]:
            for _ in store.pieces(block):
                pass
        else:
            store.make(block)
    os.fsync(store._file)
    return store


def cached(case: Case) -> dict[str, dict[str, float]]:
    """Rows in a cache, without and with a thread that tells the disk of the next batch and writes."""
    store = opened(case.folder, case.table)
    # the page cache may hold this batch's pages, those of rows that left, and the next batch's
    pages = 3 * len(case.batches[0]) * PAGE if case.limited else 0
    module = kernel(share([case.table], int(case.budget - pages))[case.table.name], case.table.dim)
    tier = Tier(case.table, store, module.split_embedding_weights()[0], module.split_optimizer_states()[0][0])
    for ids in case.warm:
        tier.admit(ids, True)
    if case.limited:
        drop(store._file)
    half = len(case.batches) // 2
    found = {"without_ahead": timed(case, case.batches[:half], tier, module)}
    tier._beside = ThreadPoolExecutor(1)
    found["cached_ssd"] = timed(case, case.batches[half:], tier, module)
    tier.close()
    return found


def timed(case: Case, batches: Batches, tier: Tier, module: Any) -> dict[str, float]:
    left: list[np.ndarray] = []  # rows that were written
    write = Tier._write
    tier._write = lambda rows, values: (left.append(rows), write(tier, rows, values))  # type: ignore[assignment]
    before, seconds, most, none = tier.counts(), 0.0, 0, np.empty(0, np.int64)
    for number, ids in enumerate(batches):
        coming = batches[number + 1 : number + 2] if tier._beside else []
        missing = tier.cache.absent(ids)
        begun = time.perf_counter()
        out = module(torch.from_numpy(tier.admit(ids, True)), torch.arange(len(ids) + 1))
        for following in coming:
            tier.expect(following)
        case.dense()
        out.backward(torch.full_like(out, 1e-3))
        tier.settle()
        if tier._coming is not None:
            tier._coming.result()  # not while the clock stands still
        seconds += time.perf_counter() - begun
        if case.limited:
            most = max(most, resident(case.path)) if number % 4 == 0 else most
            used = pages_of(np.concatenate([missing, *left]), tier.store.row_bytes)
            soon = pages_of(tier.cache.absent(coming[0]), tier.store.row_bytes) if coming else none
            seconds += let_go(tier.store._file, np.setdiff1d(used, soon))
        left.clear()
    counts = tier.counts() - before
    return {
        "samples_per_second": per_second(batches, seconds),
        "hit_rate": 1 - counts[1] / counts[0],
        "bytes_per_step": int(counts[3] + counts[4]) // len(batches),
        "page_cache_mb": most / 1e6,
        "slots": tier.cache.slots,
        "slots_used": int((tier.cache.row >= 0).sum()),
    }


def mapped(case: Case) -> dict[str, float]:
    """The obvious alternative: the file as an array, rows gathered, adagrad by numpy's own vectors."""
    dim, bounded = case.table.dim, Bounded(case.path, case.budget)
    rows = np.frombuffer(bounded.map, np.float32).reshape(case.table.rows, 2 * dim)

    def pages(ids: np.ndarray) -> np.ndarray:
        return pages_of(np.unique(ids), rows.shape[1] * 4)

    for ids in case.warm:
        bounded.use(pages(ids))
    if case.limited:
        bounded.settle()
    seconds, most, missed = 0.0, 0, 0
    batches = case.batches[: len(case.batches) // 2]
    for number, ids in enumerate(batches):
        missed += int((bounded.used[pages(ids)] == 0).sum())
        begun = time.perf_counter()
        unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        values = rows[unique]
        _ = values[inverse, :dim]
        case.dense()
        gradient = np.repeat(1e-3 * counts[:, None].astype(np.float32), dim, 1)
        values[:, dim:] += gradient**2
        values[:, :dim] -= RATE * gradient / (np.sqrt(values[:, dim:]) + 1e-8)
        rows[unique] = values
        seconds += time.perf_counter() - begun
        if case.limited:
            seconds += bounded.trim(pages(ids))
            most = max(most, resident(case.path)) if number % 4 == 0 else most
    return {
        "samples_per_second": per_second(batches, seconds),
        "faults_per_step": missed / len(batches),
        "page_cache_mb": most / 1e6,
    }


def measure(options: argparse.Namespace, folder: Path, kind: str, part: float) -> dict[str, Any]:
    table = Table("t_bench", options.rows, options.dim, options.dim)
    ids = np.concatenate(lookups(options.rows, 1 << 16, -(-options.warm // (1 << 16)) + 1, kind))
    measured = 2 * options.steps * options.batch
    batches = list(lookups(options.rows, measured, 1, kind, seed=1)[0].reshape(-1, options.batch))
    layers = torch.nn.Sequential(torch.nn.Linear(options.dim, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    dense_in = torch.randn(options.batch, options.dim)

    def dense() -> None:
        if options.dense:
            layers(dense_in).sum().backward()

    budget = part * options.rows * options.dim * 8
    warm = np.array_split(ids[: options.warm], max(1, options.warm // (8 * options.batch)))
    case = Case(folder, table, budget, warm, batches, dense, options.limit)
    found: dict[str, Any] = {"access": kind, "cache": part, "device_mem": in_memory(case)}
    found |= cached(case)
    found["mmap"] = mapped(case)
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
    figure.update_yaxes(title="samples per second", type="log", dtick=1)
    page = path.with_suffix(".html")
    figure.write_html(page, config={"displayModeBar": False})
    if path.suffix == ".png":
        program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        subprocess.run(
            [
                program, "--headless=new", "--no-sandbox", "--disable-gpu", f"--screenshot={path.absolute()}",
                "--window-size=930,540", "--hide-scrollbars", "--virtual-time-budget=5000",
                page.absolute().as_uri(),
            ],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        page.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--warm", type=int, default=4_000_000, help="lookups that fill the memory, not timed")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True, help="a small tower")
    parser.add_argument(
        "--limit", action=argparse.BooleanOptionalAction, default=True,
        help="without: the page cache takes what it finds",
    )  # fmt: skip
    parser.add_argument(
        "--cases",
        default="zipf1.05:0.1,zipf1.05:0.05,zipf1.05:0.3,uniform:0.1,uniform:0.4",
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
        opened(folder, Table("t_bench", options.rows, options.dim, options.dim)).close()
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
