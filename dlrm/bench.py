"""Inference benchmark: throughput and latency of the model at several batch sizes.

Weights are random or a checkpoint's; rows are random or a dataset's test set. Runs on any number of ranks; a
batch size is that of all ranks together. The last line of stdout is one JSON object.
"""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlrm.config.options import CPU_FAST_PATH_HELP
from dlrm.config.parser import check_at_least, option, parse_options, path_option
from dlrm.data import criteo
from dlrm.models.dlrm.options import ModelOptions, check_shared_sizes, keep_model_options
from dlrm.models.dlrm.presets import PRESETS
from dlrm.runtime import entry, imports, trace
from dlrm.runtime.device_io import list_folders
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks


@dataclass(frozen=True)
class BenchmarkOptions:
    batch_sizes: tuple[int, ...] = option((1, 64, 4096), "rows of a batch, all ranks together")
    seconds: float = option(3.0, "time for each batch size")
    iterations: int = option(100, "at least N iterations of each batch size, even after --seconds")
    benchmark_warmup_steps: int = option(10, "iterations before the clock starts")
    load_checkpoint_path: str | None = path_option(
        "a run folder or checkpoint: its weights, and its model's options"
    )
    in_memory_binary_criteo_path: str | None = path_option(
        "a dataset: rows of its test set (default: random rows, ids uniform over the tables)"
    )
    num_numerical: int | None = option(
        None, f"numerical columns of random rows (default: {criteo.CRITEO.numerical})"
    )
    num_categorical: int | None = option(
        None, "categorical columns of random rows (default: one for each of --num_embeddings_per_feature, "
        f"else {criteo.CRITEO.categorical})",
    )  # fmt: skip
    seed: int = option(0, "of random weights and rows")
    amp: str = option("off", "mixed precision; --amp alone: bf16", ("off", "bf16", "fp16"), bare="bf16")
    compile: bool = option(False, "torch.compile the dense part")
    allow_tf32: bool = option(False, "TF32 matrix products on CUDA")
    cpu_fast_path: bool = option(True, CPU_FAST_PATH_HELP)
    trace_dir: str | None = path_option("run folder for a DFTracer trace of this benchmark")
    timeout: int = option(60, "seconds without a heartbeat after which a rank counts as lost")

    def __post_init__(self) -> None:
        criteo.check_column_counts(self.num_numerical, self.num_categorical)
        check_at_least(1, self, "iterations", "timeout")
        check_at_least(0, self, "seconds", "benchmark_warmup_steps")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError("--batch_sizes: give sizes of at least 1")


@dataclass(frozen=True)
class BenchmarkPlanOptions:
    sharding_file: str | None = path_option("JSON: table name -> sharding, kernel; * for all others")


@dataclass(frozen=True)
class BenchConfig:
    bench: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    plan: BenchmarkPlanOptions = field(default_factory=BenchmarkPlanOptions)


MODELS = {name: lambda make=make: keep_model_options(make()) for name, make in PRESETS.items()}


def main(here: Ranks) -> None:
    cfg = parse_options(BenchConfig, sys.argv[1:], "python -m dlrm.bench", __doc__ or "", MODELS)
    check_usage(cfg, here)
    if cfg.bench.trace_dir:
        trace.start_tracing(cfg.bench.trace_dir, here, "bench", folders=list_folders(cfg))
    try:
        results, about = measure_batch_sizes(cfg, here)
    finally:
        trace.stop_tracing()
    if here.first:
        from dlrm.models.dlrm.inference import format_table

        print(format_table(results))
        print(json.dumps({"results": results, "world_size": here.world_size, **about}))


def check_usage(cfg: BenchConfig, here: Ranks) -> None:
    try:
        if cfg.bench.load_checkpoint_path and cfg.model != ModelOptions():
            raise UserError("--load_checkpoint_path has its own model: remove --preset and model options")
        check_shared_sizes("batch_sizes", cfg.bench.batch_sizes, here.world_size)
    except UserError as error:
        error.shared = True  # every rank has the same options
        raise


def measure_batch_sizes(cfg: BenchConfig, here: Ranks) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(one dict of results for each batch size, a dict that describes model and data)."""
    bench = cfg.bench
    with imports.import_quickly(bench.cpu_fast_path):
        import torch

        from dlrm.checkpoint import state
        from dlrm.embeddings import planner
        from dlrm.models.dlrm.build import assemble_model
        from dlrm.models.dlrm.inference import Repetitions, time_batches
        from dlrm.models.dlrm.stored_model import read_model_options
        from dlrm.runtime import accelerate, session
        from dlrm.trainer import mixed_precision
        from dlrm.trainer.device import enable_fast_path

    enable_fast_path(session.choose_device(here), bench.cpu_fast_path)
    with session.open_session(here, bench.timeout) as device:
        torch.backends.cuda.matmul.allow_tf32 = bench.allow_tf32
        with session.errors_on_all_ranks():
            stored = open_checkpoint(bench.load_checkpoint_path) if bench.load_checkpoint_path else None
            cfg = replace(cfg, model=read_model_options(stored)) if stored else cfg
            dataset = open_dataset(cfg, stored)
            sizes, numerical = dataset.sizes, dataset.columns.numerical
            module = assemble_model(cfg.model, numerical, sizes, device, bench.seed, bench.compile)
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
        results, repetitions = [], Repetitions(bench.benchmark_warmup_steps, bench.iterations, bench.seconds)
        with session.errors_on_all_ranks():
            pools = make_batches(bench, dataset, here)
        for size, pool in pools.items():
            results.append({"batch_size": size, **time_batches(model, pool, repetitions, device)})
    return results, {"device": device.type, "tables": len(sizes), "table_rows": sum(sizes), **asdict(cfg)}


def open_checkpoint(given: str) -> Any:
    """The newest checkpoint of a run folder, or the one given; UserError if there is none."""
    from dlrm.checkpoint import folder
    from dlrm.checkpoint.blocks import CorruptCheckpoint

    try:
        path = next(folder.find_checkpoints(Path(given)), None)
        if path is None:
            raise UserError(f"--load_checkpoint_path {given}: {folder.NONE_FOUND}")
        return folder.read_trained(path)
    except (CorruptCheckpoint, OSError) as error:
        raise UserError(f"--load_checkpoint_path {given}: {error}") from None


@dataclass(frozen=True)
class BenchDataset:
    """The rows that are scored: of a dataset's test set, or random."""

    kind: str  # see dlrm.data.readers
    layout: Any
    columns: criteo.Columns
    sizes: list[int]  # rows of each table


def open_dataset(cfg: BenchConfig, stored: Any) -> BenchDataset:
    """The dataset that an option names, or random rows. stored: the checkpoint of the weights, or None."""
    from dlrm.data.readers import count_ids, detect_format, scan_dataset
    from dlrm.models.dlrm.stored_model import read_numerical

    bench, model, known = cfg.bench, cfg.model, None
    where = bench.in_memory_binary_criteo_path
    kind = detect_format("stream", where) if where else "random"
    layout = scan_dataset(kind, where or "")
    if where:
        columns, known = layout.columns, layout.table_sizes
    else:
        numerical = read_numerical(stored) if stored and bench.num_numerical is None else bench.num_numerical
        each = model.num_embeddings_per_feature
        columns = criteo.choose_random_columns(numerical, bench.num_categorical, each)
    sizes, _ = criteo.choose_table_sizes(
        model.num_embeddings, model.num_embeddings_per_feature, columns.categorical, known,
        model.max_table_size, count_ids(layout),
    )  # fmt: skip
    return BenchDataset(kind, layout, columns, sizes)


def make_batches(bench: BenchmarkOptions, dataset: BenchDataset, here: Ranks) -> dict[int, list[Any]]:
    """This rank's share of the batches that are scored, for each batch size."""
    from dlrm.data.collate import BatchCollator
    from dlrm.data.readers import open_source
    from dlrm.models.dlrm.inference import select_sizes, take_batches
    from dlrm.models.dlrm.options import INFERENCE_POOL

    layout, sizes = dataset.layout, dataset.sizes
    source = open_source(
        dataset.kind, layout, "test", rows=max(bench.batch_sizes) * INFERENCE_POOL, table_sizes=sizes,
        seed=bench.seed, numerical=dataset.columns.numerical,
    )  # fmt: skip
    try:
        chosen, left_out = select_sizes("batch_sizes", bench.batch_sizes, source.rows)
        if left_out and here.first:
            print(f"dlrm: {left_out}", file=sys.stderr, flush=True)
        to_batch = BatchCollator(sizes, True)
        return {size: take_batches(source, to_batch, size, here.rank, here.world_size) for size in chosen}
    finally:
        source.close()


if __name__ == "__main__":
    entry.run_entry(main)
