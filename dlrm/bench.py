"""Inference benchmark: throughput and latency of the model at several batch sizes.

Weights are random or a checkpoint's; rows are random or a dataset's test set. Runs on any number of ranks; a
batch size is that of all ranks together. The last line of stdout is one JSON object.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlrm.config.options import CPU_FAST_PATH_HELP
from dlrm.config.parser import check_at_least, option, parse_options
from dlrm.data import criteo
from dlrm.models.dlrm.options import ModelOptions
from dlrm.models.dlrm.presets import PRESETS
from dlrm.runtime import entry, imports
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

PERCENTILES = (50, 90, 95, 99)
POOL = 8  # different batches per batch size, at most


@dataclass(frozen=True)
class BenchmarkOptions:
    batch_sizes: tuple[int, ...] = option((1, 64, 4096), "rows of a batch, all ranks together")
    seconds: float = option(3.0, "time for each batch size")
    iterations: int = option(100, "at least N iterations of each batch size, even after --seconds")
    benchmark_warmup_steps: int = option(10, "iterations before the clock starts")
    load_checkpoint_path: str | None = option(
        None, "a run folder or checkpoint: its weights, and its model's options"
    )
    in_memory_binary_criteo_path: str | None = option(
        None, "a dataset: rows of its test set (default: random rows, ids uniform over the tables)"
    )
    seed: int = option(0, "of random weights and rows")
    amp: str = option("off", "mixed precision; --amp alone: bf16", ("off", "bf16", "fp16"), bare="bf16")
    compile: bool = option(False, "torch.compile the dense part")
    allow_tf32: bool = option(False, "TF32 matrix products on CUDA")
    cpu_fast_path: bool = option(True, CPU_FAST_PATH_HELP)
    timeout: int = option(60, "seconds without a sign of life after which a rank counts as lost")

    def __post_init__(self) -> None:
        check_at_least(1, self, "iterations", "timeout")
        check_at_least(0, self, "seconds", "benchmark_warmup_steps")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--batch_sizes: give sizes of at least 1")


@dataclass(frozen=True)
class BenchmarkPlanOptions:
    sharding_file: str | None = option(None, "JSON: table name -> sharding, kernel; * for all others")


@dataclass(frozen=True)
class BenchConfig:
    bench: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    plan: BenchmarkPlanOptions = field(default_factory=BenchmarkPlanOptions)


MODELS = {name: lambda make=make: keep_model_options(make()) for name, make in PRESETS.items()}


def keep_model_options(options: Any) -> dict[str, Any]:
    """The entries that are fields of ModelOptions, with lists as tuples."""
    known = ModelOptions.__dataclass_fields__
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in known}


def main(here: Ranks) -> None:
    cfg = parse_options(BenchConfig, sys.argv[1:], "python -m dlrm.bench", __doc__ or "", MODELS)
    if mistake := find_usage_error(cfg, here):
        mistake.shared = True
        raise mistake
    results, about = measure(cfg, here)
    if here.first:
        print_table(results)
        print(json.dumps({"results": results, "world_size": here.world_size, **about}))


def find_usage_error(cfg: BenchConfig, here: Ranks) -> UserError | None:
    if cfg.bench.load_checkpoint_path and cfg.model != ModelOptions():
        return UserError("--load_checkpoint_path has its own model: remove --preset and model options")
    for size in cfg.bench.batch_sizes:
        if size % here.world_size:
            return UserError(f"--batch_sizes {size}: not a multiple of the {here.world_size} ranks")
    return None


def measure(cfg: BenchConfig, here: Ranks) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(one dict of results for each batch size, a dict that describes model and data)."""
    bench = cfg.bench
    with imports.import_quickly(bench.cpu_fast_path):
        import torch

        from dlrm.checkpoint import state
        from dlrm.data.readers import count_ids, detect_format, scan_dataset
        from dlrm.embeddings import planner
        from dlrm.models.dlrm.build import assemble_model
        from dlrm.runtime import accelerate, session
        from dlrm.trainer import mixed_precision
        from dlrm.trainer.device import enable_fast_path

    enable_fast_path(session.choose_device(here), bench.cpu_fast_path)
    with session.open_session(here, bench.timeout) as device:
        torch.backends.cuda.matmul.allow_tf32 = bench.allow_tf32
        with session.errors_on_all_ranks():
            stored = open_checkpoint(bench.load_checkpoint_path) if bench.load_checkpoint_path else None
            cfg = replace(cfg, model=read_model_options(stored)) if stored else cfg
            where = bench.in_memory_binary_criteo_path
            kind = detect_format("stream", where) if where else "random"
            layout = scan_dataset(kind, where or "")
            sizes, _ = criteo.choose_table_sizes(
                cfg.model.num_embeddings,
                cfg.model.num_embeddings_per_feature,
                where,
                cfg.model.max_table_size,
                count_ids(layout),
            )
            module = assemble_model(cfg.model, sizes, device, bench.seed, bench.compile)
            constraints = planner.load_constraints(cfg.plan.sharding_file) if cfg.plan.sharding_file else None
            made = planner.make_plan(
                module, device, here, max(bench.batch_sizes) // here.world_size, constraints
            )
            with accelerate.hooks.skip_first_weights():
                model = planner.shard_model(module, made, device, bench.seed)
        with session.errors_on_all_ranks():
            if stored:
                state.restore_state(stored, model, None)
        if bench.amp != "off":
            whole: Any = model.module
            mixed_precision.cast_dense_part(whole.model, device, bench.amp)
        model.eval()
        results = []
        for size in bench.batch_sizes:
            with session.errors_on_all_ranks():
                pool = make_batches(bench, size, kind, layout, sizes, here)
            with torch.no_grad():
                results.append({"batch_size": size, **time_batches(model, pool, bench, device)})
    return results, {"device": device.type, "tables": len(sizes), "table_rows": sum(sizes), **asdict(cfg)}


def open_checkpoint(given: str) -> Any:
    """The newest checkpoint of a run folder, or the one given; UserError if there is none."""
    from dlrm.checkpoint import folder
    from dlrm.checkpoint.shards import CorruptCheckpoint

    try:
        path = next(folder.find_checkpoints(Path(given)), None)
        if path is None:
            raise UserError(f"--load_checkpoint_path {given}: no checkpoint there")
        return folder.read_description(path)
    except (CorruptCheckpoint, OSError) as error:
        raise UserError(f"--load_checkpoint_path {given}: {error}") from None


def read_model_options(found: Any) -> ModelOptions:
    """The model options of the checkpoint's run, with its tables' real sizes."""
    options = found.state["config"]["model"]
    table = re.compile(r"model/.*t_cat_(\d+)\.weight")
    lengths = {int(m[1]): s.shape[0] for s in found.tensors if (m := table.fullmatch(s.name))}
    if "embedding_dim" not in options or not lengths:
        raise UserError(f"--load_checkpoint_path {found.path}: not a DLRM's checkpoint")
    each = tuple(length for _, length in sorted(lengths.items()))
    sizes = {"num_embeddings": None, "num_embeddings_per_feature": each, "max_table_size": None}
    return ModelOptions(**keep_model_options({**options, **sizes}))


def make_batches(
    bench: BenchmarkOptions, size: int, kind: str, layout: Any, sizes: list[int], here: Ranks
) -> list[Any]:
    """This rank's share of up to POOL batches."""
    from dlrm.data.batches import BatchLoader
    from dlrm.data.collate import BatchCollator
    from dlrm.data.readers import open_source

    source = open_source(kind, layout, "test", rows=size * POOL, table_sizes=sizes, seed=bench.seed)
    try:
        if source.rows < size:
            raise UserError(f"--batch_sizes {size}: the test set of {layout.folder} has {source.rows} rows")
        batches = BatchLoader(
            source, size // here.world_size, here.rank, here.world_size, to_batch=BatchCollator(sizes, True),
            drop_last=True, limit=POOL,
        )  # fmt: skip
        return list(batches)
    finally:
        source.close()


def time_batches(model: Any, pool: list[Any], bench: BenchmarkOptions, device: Any) -> dict[str, Any]:
    """Latencies and throughput, from a batch in host memory to its logits in host memory."""
    import numpy as np
    import torch
    import torch.distributed

    def time_batch(number: int) -> float:
        begun = time.perf_counter()
        _, (_, logits, _) = model(pool[number % len(pool)].to(device))
        logits.cpu()
        return time.perf_counter() - begun

    for number in range(bench.benchmark_warmup_steps):
        time_batch(number)
    each = torch.tensor([time_batch(number) for number in range(3)]).mean()
    torch.distributed.all_reduce(
        each, torch.distributed.ReduceOp.MAX
    )  # so that all ranks do the same number of iterations
    count = max(bench.iterations, int(bench.seconds / float(each)))
    torch.distributed.barrier()
    begun = time.perf_counter()
    seconds = [time_batch(number) for number in range(count)]
    whole = time.perf_counter() - begun
    scored = sum(len(pool[number % len(pool)].labels) for number in range(count))
    percent = dict(zip(PERCENTILES, np.percentile(seconds, PERCENTILES) * 1e3, strict=True))
    return {
        "samples_per_second": scored * torch.distributed.get_world_size() / whole,
        "latency_ms": {"mean": whole / count * 1e3, **{f"p{p}": float(v) for p, v in percent.items()}},
        "iterations": count,
        "mean_prediction": mean_prediction(model, pool, device),
    }


def mean_prediction(model: Any, pool: list[Any], device: Any) -> float:
    """Mean click probability over the batches of all ranks: shows whether the right weights were loaded."""
    import torch
    import torch.distributed

    logits = torch.cat([model(batch.to(device))[1][1].flatten() for batch in pool])
    mean = torch.sigmoid(logits.double()).mean()
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()


def print_table(results: list[dict[str, Any]]) -> None:
    heads = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
    print(f"{'batch':>8} {'samples/s':>14} " + " ".join(f"{head + ' ms':>10}" for head in heads))
    for each in results:
        latencies = " ".join(f"{each['latency_ms'][head]:10.3f}" for head in heads)
        print(f"{each['batch_size']:8} {each['samples_per_second']:14,.0f} {latencies}")


if __name__ == "__main__":
    entry.run_entry(main)
