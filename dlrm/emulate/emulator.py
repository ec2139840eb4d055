"""One emulated training, from resolved options to results.json, step by step as in `dlrm/trainer/trainer.py`.

In: an `EmulateConfig`, this rank. Out: a run folder. Reading, prefetching, the loop, checkpoint writing and
the run folder are the trainer's own code; a step waits as long as the run's step computed.
"""

import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from dlrm.checkpoint import blocks
from dlrm.checkpoint.saver import CheckpointWriter
from dlrm.emulate import dataset
from dlrm.emulate.checkpoints import EmulatedCheckpoints, write_made_up_file
from dlrm.emulate.options import EmulateConfig, list_unused_options, read_config
from dlrm.emulate.pipeline import RowCounter, RowMeter, WaitingPipeline, draw_steps
from dlrm.emulate.tables import TableFiles, unpack_part
from dlrm.emulate.workload import RankWorkload, measure_run
from dlrm.models.dlrm.dataloaders import DLRMDatasets, open_datasets
from dlrm.runtime import mpi, trace
from dlrm.runtime.environment import describe_command, list_versions
from dlrm.runtime.mpi import RankGroup
from dlrm.runtime.new_run_folder import update_environment
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.shared_values import open_shared_values
from dlrm.trainer import loop
from dlrm.trainer.live_progress import report_while_training
from dlrm.trainer.results import describe_results
from dlrm.trainer.run_folder import RunFolder
from dlrm.trainer.spec import ModelSpec


def emulate(spec: ModelSpec, options: EmulateConfig, here: Ranks) -> None:
    """Emulate the run of --from; a mistake or failure ends all ranks."""
    started = time.perf_counter()
    with mpi.open_group(here) as group:
        group.mark_clock("start")
        try:
            with group.errors_on_all_ranks():
                run_folder = RunFolder(options.run.output_dir, here.first, model=spec.title)
        except UserError:
            trace.discard_tracing()  # nothing of a refused run stays in the folder
            raise
        try:
            try:
                with trace.span("startup", "workload"), group.errors_on_all_ranks():
                    found, losses = prepare_workload(options) if here.first else (None, [])
            except UserError:
                trace.discard_tracing()
                raise
            with group.errors_on_all_ranks():
                if run_folder.folder:
                    record_launch(run_folder, spec.title, options, here)
            workload = group.scatter_from_first(found and share_workload(found, here.world_size))
            for line in [*losses, *list_unused_options(options.run.given_options)]:
                run_folder.print_warning(line)
            emulator = Emulator(options, here, group, run_folder, workload)
            emulator.run(started)
        finally:
            run_folder.close()


def prepare_workload(options: EmulateConfig) -> tuple[list[RankWorkload], list[str]]:
    """On rank 0: make the dataset if --make_data says so; `measure_run`."""
    if options.run.mode != "train":
        raise UserError(f"--mode {options.run.mode}: the emulator does what training does; leave it out")
    options.check_folder()
    folder, run = options.data.folder, options.emulate.run
    if options.emulate.make_data:
        if folder is None:
            raise UserError("--make_data: name a folder with --in_memory_binary_criteo_path")
        dataset.make_dataset(run, Path(folder), options.emulate.make_data, options.emulate.data_scale)
    return measure_run(run)


def share_workload(found: list[RankWorkload], ranks: int) -> list[RankWorkload]:
    """The workload of each rank; with more ranks than the run had, its own come again and again."""
    return list(itertools.islice(itertools.cycle(found), ranks))


def record_launch(run_folder: RunFolder, model: str, options: EmulateConfig, here: Ranks) -> None:
    """config.json and env.txt, on rank 0."""
    run_folder.launch = {
        "model": model,
        "emulated": str(options.emulate.run),
        "world_size": here.world_size,
        "local_world_size": here.local_world_size,
        "nodes": here.nodes,
        "device": "none",
        "command": describe_command(),
        "directory": os.getcwd(),
        "versions": list_versions(),
    }
    run_folder.write_config(options)
    assert run_folder.folder is not None
    update_environment(run_folder.folder)
    before = read_config(options.emulate.run)["launch"].get("world_size")
    if before != here.world_size:
        run_folder.print_warning(f"the run had {before} ranks, this one has {here.world_size}")


class Emulator:
    """Data, pipelines, checkpoints and progress of an emulated training: what `Trainer` is to a real one."""

    def __init__(
        self, options: EmulateConfig, here: Ranks, group: RankGroup, run_folder: RunFolder,
        workload: RankWorkload,
    ) -> None:  # fmt: skip
        self.options, self.here, self.group = options, here, group
        self.run_folder, self.workload = run_folder, workload
        with group.errors_on_all_ranks(), trace.span("startup", "data"):
            self.datasets: DLRMDatasets = open_datasets(options, here)
        self.progress = loop.Progress()
        self.results: dict[str, dict[str, Any]] = {}
        self.evaluate_seconds = 0.0
        with group.errors_on_all_ranks():
            self.tables = self.open_tables()
        self.pipeline = self.make_pipeline("train")
        self.meter = RowMeter(group, self.pipeline.exclude_time)
        self.metrics_seconds = itertools.cycle(workload.metrics or [0.0])
        self.eval_pipelines = {split: self.make_pipeline(split) for split in ("val", "test")}
        self.checkpoints = EmulatedCheckpoints(
            options.checkpoint, self.progress, workload, self.meter, self.tables
        )
        self.checkpoints.writer = self.open_writer()

    def make_pipeline(self, split: str) -> WaitingPipeline:
        data, communication = self.options.data, self.options.emulate.communication
        # pooled embeddings to all ranks, and their gradients back
        exchanged = 8 * data.batch_size * len(self.datasets.sizes) * self.options.model.embedding_dim
        steps = draw_steps(self.workload, split, self.options.emulate, exchanged)
        return WaitingPipeline(split, steps, self.group, communication != "none", self.tables)

    def open_tables(self) -> TableFiles | None:
        """The files of this rank's tables, where the run had tables in files."""
        steps, output_dir = self.workload.table_steps, self.options.run.output_dir
        folder = self.options.plan.persistent_path or (output_dir and os.path.join(output_dir, "store"))
        if not steps:
            return None
        if not folder:
            raise UserError("the run had tables in files: give --output_dir, or a folder: --persistent_path")
        # ranks that the run did not have make the calls of those that it had, on files of their own
        copy = self.here.rank // self.workload.ranks
        return TableFiles(
            Path(f"{folder}-{copy}" if copy else folder),
            {split: [[*map(unpack_part, step)] for step in each] for split, each in steps.items()},
        )

    def open_writer(self) -> CheckpointWriter | None:
        checkpoint, output_dir = self.options.checkpoint, self.options.run.output_dir
        folder = checkpoint.checkpoint_dir or (output_dir and os.path.join(output_dir, "checkpoints"))
        if not folder or not checkpoint.asked:
            return None
        if self.checkpoints.describe_missing():
            self.run_folder.print_warning(self.checkpoints.describe_missing())
            return None
        root = Path(folder)
        with self.group.errors_on_all_ranks():
            self.run_folder.lock_folder(root, "saving checkpoints in it")
        return CheckpointWriter(
            root, self.here, open_shared_values(self.group), checkpoint.keep_checkpoints,
            max(3600, 10 * self.options.run.timeout),
            copy_pieces=self.checkpoints.copy_pieces, write_pieces=write_made_up_file,
        )  # fmt: skip

    def run(self, started: float) -> None:
        """Train, test, write the results. `started`: time.perf_counter() at the start of the program."""
        run, epoch_steps = self.options.run, len(self.datasets.train)
        with self.group.errors_on_all_ranks():
            self.run_folder.start_metrics()
        startup_seconds = time.perf_counter() - started
        self.run_folder.start_progress(
            min(run.epochs * epoch_steps, run.max_steps or sys.maxsize), 0, run.print_progress
        )
        limits = loop.Limits(
            epochs=run.epochs,
            max_steps=run.max_steps,
            report_every=run.report_every,
            warmup_steps=run.benchmark_warmup_steps,
            validation_freq=run.validation_freq_within_epoch,
            first_validation=math.ceil(run.test_after * epoch_steps),
            evaluate_on_epoch_end=run.evaluate_on_epoch_end,
        )
        self.checkpoints.start()
        # The ranks begin as far apart as the run's did. Where loading is too slow they stay so, which decides
        # who waits for data and who for another rank.
        self.group.barrier()
        time.sleep(self.workload.begins_after)
        with report_while_training(self.run_folder, self.progress, self.datasets, lambda _: {}):
            loop.run_training(
                self.pipeline, self.datasets.train, self.progress, limits, lambda: 0.0, self.validate,
                self.log_metrics, self.meter, self.checkpoints,
            )  # fmt: skip
        self.checkpoints.finish()
        if run.evaluate_on_training_end:
            self.evaluate("test")
        if self.tables:
            self.tables.finish()
        self.group.mark_clock("end")
        self.save_results(startup_seconds)
        self.datasets.close()
        if self.tables:
            self.tables.close()

    def validate(self) -> dict[str, Any]:
        result = self.evaluate(self.options.run.validation_split)
        self.checkpoints.after_validation()
        return result

    def evaluate(self, split: str) -> dict[str, Any]:
        counter = RowCounter(self.group, next(self.metrics_seconds))
        batches: Any = getattr(self.datasets, split)
        result = loop.evaluate(self.eval_pipelines[split], batches, split, counter)
        self.log_metrics(step=self.progress.step, epoch=self.progress.epoch, **result)
        self.results[split] = result
        self.evaluate_seconds += result["seconds"]
        return result

    def log_metrics(self, **values: Any) -> None:
        """One line of metrics.jsonl: speed, and nothing of what was not computed."""
        kept = {name: value for name, value in values.items() if name not in ("loss", "lr", "auroc")}
        self.run_folder.log_metrics(**kept)

    def save_results(self, startup_seconds: float) -> None:
        """results.json, with the keys that a training's has. A collective."""
        tables = self.tables
        read = self.group.gather_from_all(self.datasets.bytes_read() | (tables.bytes_read if tables else {}))
        written = self.group.gather_from_all(blocks.bytes_written | (tables.bytes_written if tables else {}))
        self.run_folder.write_json(
            "results.json",
            {
                "emulated": str(self.options.emulate.run),
                **describe_results(self.progress, self.results, read, written),
                "seconds": {
                    "startup": startup_seconds,
                    "train": self.progress.seconds,
                    "evaluate": self.evaluate_seconds,
                },
            },
        )
