"""What this machine could do at best: its matrix product peak and its memory, on all ranks at once.

The bound of a training step is the arithmetic of its dense part at the peak, plus the time to gather and to
update the embedding rows that it touches. Nothing can train this model faster with these instructions.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence

import torch

SECONDS = 0.6  # of each measurement


def find_shortest(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of many."""
    work()
    shortest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def measure_matrix_product(device: torch.device, rows: int) -> float:
    """Floating point operations per second of the faster of torch's two fp32 matrix products."""
    left, right = torch.randn(rows, 512, device=device), torch.randn(512, 512, device=device)
    speeds = []
    exact = left.double() @ right.double()
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    usual = settings.fp32_precision
    for precision in (usual, "bf16") if device.type == "cpu" else (usual,):
        settings.fp32_precision = precision
        if float((left @ right - exact).abs().max()) < 1e-3:  # else it is not an fp32 product
            speeds.append(2 * rows * 512 * 512 / find_shortest(lambda: left @ right, device))
    settings.fp32_precision = usual
    return max(speeds)


def measure_gather(device: torch.device, count: int, width: int, table: int) -> float:
    """Seconds to gather so many rows of a large table, and to add as many gradients to it."""
    weights = torch.zeros(table, width, device=device)
    ids = torch.randint(0, table, (count,), device=device)
    gradients = torch.randn(count, width, device=device)
    out = torch.empty(count, width, device=device)
    gather = find_shortest(lambda: torch.index_select(weights, 0, ids, out=out), device)
    return gather + find_shortest(lambda: weights.index_add_(0, ids, gradients), device)


def count_operations(inputs: int, dense: Sequence[int], over: Sequence[int], tables: int, width: int) -> int:
    """Per sample, forward and backward, dot interaction; its symmetry used."""
    entries = tables + 1
    pairs = entries * (entries - 1) // 2
    layers = list(zip([inputs, *dense], dense, strict=False))
    first = 2 * inputs * dense[0]  # the gradient of the inputs is not needed
    layers += list(zip([dense[-1] + pairs, *over], over, strict=False))
    interaction = 2 * pairs * width + 2 * entries * entries * width
    return sum(6 * a * b for a, b in layers) - first + interaction


def measure_rank(shape: tuple[int, ...], results: "multiprocessing.Queue[tuple[float, float]]") -> None:
    batch, width, tables, size = shape
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results.put(
        (measure_matrix_product(device, batch), measure_gather(device, batch * tables, width, tables * size))
    )


def measure_bound(ranks: int, batch: int, width: int, tables: int, size: int, flops: int) -> dict[str, float]:
    """Per rank, all ranks measuring at once."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    shape = (batch, width, tables, size)
    processes = [spawn.Process(target=measure_rank, args=(shape, results)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    peak = sum(each[0] for each in found) / ranks
    memory = sum(each[1] for each in found) / ranks
    seconds = flops * batch / peak + memory
    return {
        "gflops_per_rank": peak / 1e9,
        "embedding_ms": memory * 1e3,
        "step_ms": seconds * 1e3,
        "samples_per_second": ranks * batch / seconds,
    }
