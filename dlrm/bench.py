"""Inference benchmark: throughput and latency of the model at several batch sizes, on synthetic rows.

Runs on as many ranks as it is started on; a batch is of all ranks together. The last line of stdout is one
JSON object.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from dlrm import config, entry, startup
from dlrm.config import at_least, option, parse
from dlrm.errors import UserError
from dlrm.presets import PRESETS
from dlrm.ranks import Ranks

PERCENTILES = (50, 90, 95, 99)
POOL = 8  # different batches of a size


@dataclass(frozen=True)
class Bench:
    batch_sizes: tuple[int, ...] = option((1, 64, 4096), "rows of a batch, all ranks together")
    seconds: float = option(3.0, "time for each batch size")
    iterations: int = option(100, "of each batch size at least, when the time is over before")
    benchmark_warmup_steps: int = option(10, "iterations before the clock starts")
    seed: int = option(0, "of the weights and the rows")
    amp: str = option("off", "mixed precision; --amp alone: bf16", ("off", "bf16", "fp16"), bare="bf16")
    compile: bool = option(False, "torch.compile the dense part")
    allow_tf32: bool = option(False, "TF32 matrix products on CUDA")
    timeout: int = option(60, "seconds without a sign of life after which a rank counts as lost")

    def __post_init__(self) -> None:
        at_least(1, self, "iterations", "timeout")
        at_least(0, self, "seconds", "benchmark_warmup_steps")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--batch_sizes: give sizes of at least 1")


@dataclass(frozen=True)
class Options:
    bench: Bench = field(default_factory=Bench)
    model: config.Model = field(default_factory=config.Model)
    plan: config.Plan = field(default_factory=config.Plan)


MODELS = {name: lambda make=make: _of_model(make()) for name, make in PRESETS.items()}


def _of_model(preset: Any) -> dict[str, Any]:
    """What a preset says of the model."""
    return {key: value for key, value in preset.items() if key in config.Model.__dataclass_fields__}


def main(here: Ranks) -> None:
    cfg = parse(Options, sys.argv[1:], "python -m dlrm.bench", __doc__ or "", MODELS)
    for size in cfg.bench.batch_sizes:
        if size % here.world_size:
            error = UserError(f"--batch_sizes {size}: not a multiple of the {here.world_size} ranks")
            error.shared = True
            raise error
    results, device = measure(cfg, here)
    if here.first:
        show(results)
        print(
            json.dumps({"results": results, "device": device, "world_size": here.world_size, **asdict(cfg)})
        )


def measure(cfg: Options, here: Ranks) -> tuple[list[dict[str, Any]], str]:
    bench = cfg.bench
    with startup.importing(bench.compile):
        import torch

        from dlrm import amp, criteo, dist
        from dlrm.assembly import assemble
        from dlrm.data.batches import Batches
        from dlrm.data.source import open_source
        from dlrm.model import cpu, plan

    startup.import_optimizers()
    with dist.session(here, bench.timeout) as device:
        cpu.tune(device)
        torch.backends.cuda.matmul.allow_tf32 = bench.allow_tf32
        sizes, _ = criteo.table_sizes(cfg.model.num_embeddings, cfg.model.num_embeddings_per_feature, None)
        with dist.together():
            module = assemble(cfg.model, sizes, device, bench.seed, bench.compile)
            wishes = plan.load_constraints(cfg.plan.sharding_file) if cfg.plan.sharding_file else None
            made = plan.make_plan(module, device, here, max(bench.batch_sizes) // here.world_size, wishes)
            with startup.unfilled():
                model = plan.shard(module, made, device, bench.seed)
        if bench.amp != "off":
            whole: Any = model.module
            amp.cast(whole.model, device, bench.amp)
        model.eval()
        results = []
        for size in bench.batch_sizes:
            source = open_source("random", "", "test", rows=size * POOL, table_sizes=sizes, seed=bench.seed)
            pool = list(Batches(source, size // here.world_size, here.rank, here.world_size, sizes))
            with torch.no_grad():
                results.append({"batch_size": size, **run(model, pool, bench, device)})
    return results, device.type


def run(model: Any, pool: list[Any], bench: Bench, device: Any) -> dict[str, Any]:
    """Times from a batch in the host's memory to its logits there."""
    import numpy as np
    import torch
    import torch.distributed

    def once(number: int) -> float:
        begun = time.perf_counter()
        _, (_, logits, _) = model(pool[number % len(pool)].to(device))
        logits.cpu()
        return time.perf_counter() - begun

    for number in range(bench.benchmark_warmup_steps):
        once(number)
    each = torch.tensor([once(number) for number in range(3)]).mean()
    torch.distributed.all_reduce(each, torch.distributed.ReduceOp.MAX)  # all ranks: as many iterations
    count = max(bench.iterations, int(bench.seconds / float(each)))
    torch.distributed.barrier()
    begun = time.perf_counter()
    seconds = [once(number) for number in range(count)]
    whole = time.perf_counter() - begun
    rows = sum(len(pool[number % len(pool)].labels) for number in range(count))
    percent = dict(zip(PERCENTILES, np.percentile(seconds, PERCENTILES) * 1e3, strict=True))
    return {
        "samples_per_second": rows * torch.distributed.get_world_size() / whole,
        "latency_ms": {"mean": whole / count * 1e3, **{f"p{p}": float(v) for p, v in percent.items()}},
        "iterations": count,
    }


def show(results: list[dict[str, Any]]) -> None:
    heads = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
    print(f"{'batch':>8} {'samples/s':>14} " + " ".join(f"{head + ' ms':>10}" for head in heads))
    for each in results:
        latencies = " ".join(f"{each['latency_ms'][head]:10.3f}" for head in heads)
        print(f"{each['batch_size']:8} {each['samples_per_second']:14,.0f} {latencies}")


if __name__ == "__main__":
    entry.start(main)
