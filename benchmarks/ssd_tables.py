"""Tables in files against tables in memory and mapped files: samples/s, hit rate, the disk's random reads.

Lookups and fused updates of one table by fbgemm, ids by Zipf(1.05) or uniform. Table and adagrad's state in
files, memory for a share of their bytes, the same bytes for both (`pages`): the row cache with its index, its
buffers and some pages; or the mapped file's pages. The last line is JSON.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as plotly
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.pages import fetch_memory, random_reads  # noqa: E402
from benchmarks.ssd_sides import Batches, Cached, Case, Mapped, Memory, open_filled  # noqa: E402
from dlrm.embeddings.ssd.cached_table import TableShare  # noqa: E402

TURN = 5  # steps


def draw_lookups(rows: int, batch: int, count: int, kind: str, seed: int = 0) -> Batches:
    """Ids of each batch; the popular ones are anywhere in the table, as hashed ids are."""
    random = np.random.default_rng(seed)
    if kind == "uniform":
        return [random.integers(0, rows, batch) for _ in range(count)]
    weights = 1 / np.arange(1, rows + 1) ** float(kind.removeprefix("zipf"))
    limits = np.cumsum(weights / weights.sum())
    places = np.random.default_rng(9).permutation(rows)
    return [places[np.minimum(np.searchsorted(limits, random.random(batch)), rows - 1)] for _ in range(count)]


def run_by_turns(batch: int, sides: Sequence[Iterator[float]]) -> list[float]:
    """Samples per second of both: medians of some steps of one, then of the other, in turns."""
    found: list[list[float]] = [[] for _ in sides]
    while True:
        for side, rates in zip(sides, found, strict=True):
            seconds = list(islice(side, TURN))
            if seconds:
                rates.append(batch * len(seconds) / sum(seconds))
        if len(found[0]) == len(found[-1]) and not seconds:
            return [float(np.median(rates)) for rates in found]


def measure_case(options: argparse.Namespace, folder: Path, kind: str, part: float) -> dict[str, Any]:
    """Lookups per second of one table in a file. kind: how ids are drawn. part: of the rows that memory
    holds.
    """
    table, batch = TableShare("t_bench", options.rows, options.dim, options.dim), options.batch
    count = options.warm if kind != "uniform" else options.warm // 4
    warm = np.concatenate(draw_lookups(options.rows, 1 << 16, -(-count // (1 << 16)), kind))
    batches = list(
        draw_lookups(options.rows, 2 * options.steps * batch, 1, kind, seed=1)[0].reshape(-1, batch)
    )
    layers = torch.nn.Sequential(torch.nn.Linear(options.dim, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    dense_in = torch.randn(batch, options.dim)

    def run_dense_part() -> None:
        if options.dense:
            layers(dense_in).sum().backward()

    budget = part * options.rows * options.dim * 8
    parts = np.array_split(warm[:count], max(1, count // (8 * batch)))
    case = Case(folder, table, budget, parts, run_dense_part, options.limit)
    found: dict[str, Any] = {"access": kind, "cache": part, "without_ahead": {}, "cached_ssd": {}, "mmap": {}}
    first, second = batches[: options.steps], batches[options.steps :]
    memory, cached = Memory(case), Cached(case, batches[:10])

    def compare_with_memory(name: str, batches: Batches, side: Any) -> None:
        """Both by turns; what memory does in the same minute is what counts."""
        fetch_memory()
        sides = [memory.time_steps(batches), side.time_steps(batches, found[name])]
        there, here = run_by_turns(batch, sides)
        found[name] |= {"samples_per_second": here, "device_mem": there, "of_device_mem": here / there}

    compare_with_memory("without_ahead", first, cached)
    cached.start_io_thread()
    compare_with_memory("cached_ssd", second, cached)
    cached.cached_table.close()
    compare_with_memory("mmap", first, Mapped(case))
    ours, other = found["cached_ssd"], found["mmap"]
    found["device_mem"] = ours["device_mem"]
    found["of_device_mem"] = ours["of_device_mem"]
    found["of_mmap"] = ours["samples_per_second"] / other["samples_per_second"]
    print(
        f"{kind:<9} memory {part:4.0%}  hits {ours['hit_rate']:6.1%}  samples/s: cached_ssd "
        f"{ours['samples_per_second']:9,.0f} ({found['without_ahead']['samples_per_second']:9,.0f} without "
        f"looking ahead)  mmap {other['samples_per_second']:9,.0f}"
        f"  device_mem {found['device_mem']:9,.0f}  {found['of_device_mem']:.0%} of it"
        f"  reads of the disk per second {ours['pages_read_per_second']:9,.0f}",
        flush=True,
    )
    return found


def plot_results(results: dict[str, Any], path: Path) -> None:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--warm", type=int, default=16_000_000, help="lookups that fill the memory, not timed"
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True, help="also an MLP")
    parser.add_argument(
        "--limit", action=argparse.BooleanOptionalAction, default=True,
        help="off: the page cache is not limited",
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
        plot_results(json.loads(options.old.read_text().splitlines()[-1]), options.plot)
        return
    results = {key: getattr(options, key) for key in ("rows", "dim", "batch", "steps", "dense", "limit")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        open_filled(folder, TableShare("t_bench", options.rows, options.dim, options.dim)).close()
        path = folder / "t_bench.rows"
        results["disk_reads_per_second"] = {str(n): random_reads(path, n) for n in (1, 32)}
        print("disk: random reads of 4 KiB per second, 1 and 32 at once:", results["disk_reads_per_second"])
        cases = [case.split(":") for case in options.cases.split(",")]
        results["cases"] = [measure_case(options, folder, kind, float(part)) for kind, part in cases]
    results |= {"target": 0.7, "of_device_mem": results["cases"][0]["of_device_mem"]}
    results["of_mmap"] = min(case["of_mmap"] for case in results["cases"])
    if options.plot:
        plot_results(results, options.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
