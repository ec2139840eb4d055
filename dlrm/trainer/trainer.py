"""One training, from resolved options to results.json, the same way for every model.

In: a ModelSpec, its options, this rank. Out: a run folder. What belongs to the model (data, architecture,
sharding, learning rate, metrics) comes from the spec's parts; nothing here names a model.

Read it from top to bottom: `train` opens the ranks and the run folder, `make_trainer` builds data, model,
sharding and optimizer, `Trainer` has the pipelines, the loop and the evaluation, `run_trainer` resumes,
trains, tests and writes the results.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.checkpoint import blocks
from dlrm.checkpoint.folder import Checkpoint
from dlrm.config.options import list_deprecated
from dlrm.embeddings.tables import WEIGHT, NoSsdTables
from dlrm.runtime import session, trace
from dlrm.runtime.busy_cores import describe_busy_cores
from dlrm.runtime.environment import describe_command, list_versions
from dlrm.runtime.errors import Stopped, UserError
from dlrm.runtime.new_run_folder import update_environment
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop, mixed_precision
from dlrm.trainer.checkpointing import CheckpointManager
from dlrm.trainer.device import enable_fast_path
from dlrm.trainer.live_progress import report_while_training
from dlrm.trainer.loss_watch import LossWatch
from dlrm.trainer.lr_schedule import set_lr
from dlrm.trainer.meter import ThroughputMeter
from dlrm.trainer.mlcommons_log import MLCommonsLog
from dlrm.trainer.mlperf_log import MLPerfLog
from dlrm.trainer.results import describe_results
from dlrm.trainer.resume import find_stored_model, resume_training
from dlrm.trainer.run_folder import RunFolder
from dlrm.trainer.spec import ModelParts, ModelSpec


def train(spec: ModelSpec, options: Any, here: Ranks) -> None:
    """Train the model of this spec, evaluate it, write the run folder.

    `options` is an instance of `spec.options`. A UserError, Stopped or lost rank ends all ranks.
    """
    parts = spec.load_parts()
    started = time.perf_counter()

    # ranks: choose the device, then find each other (NCCL on CUDA, gloo or shared memory on CPUs)
    tuned = enable_fast_path(session.choose_device(here), options.run.cpu_fast_path)
    with session.open_session(here, options.run.timeout) as device:
        session.mark_clock("start")
        torch.backends.cuda.matmul.allow_tf32 = options.run.allow_tf32

        # run folder: locked before anything slow, so that a second run into it ends at once
        try:
            with session.errors_on_all_ranks():
                run_folder = open_run_folder(options, here, spec.title)
        except UserError:
            trace.discard_tracing()  # nothing of a refused run stays in the folder
            raise
        try:
            stored = find_stored_model(options, here)
            if options.run.mode != "train" and stored:
                with session.errors_on_all_ranks():
                    options = parts.adopt_model(options, stored)
            options, chosen = choose_options(parts, options, here, device, run_folder, stored)
            record_launch(run_folder, spec.title, options, here, device, tuned, chosen)
            trainer = make_trainer(parts, options, here, device, run_folder)
            run_trainer(trainer, here, started)
        finally:
            run_folder.close()


def open_run_folder(options: Any, here: Ranks, model: str = "") -> RunFolder:
    """The run folder, locked for this run. UserError on rank 0 where another run has the lock, or where a
    file in it would be overwritten that is not this program's, or is of another model (its spec's title).
    """
    more = ["mlperf.log"] if options.run.mllog else []
    return RunFolder(options.run.output_dir, here.first, options.run.tensorboard, more, model)


def choose_options(
    parts: ModelParts, options: Any, here: Ranks, device: torch.device, run_folder: RunFolder,
    stored: Checkpoint | None,
) -> tuple[Any, str]:  # fmt: skip
    """(the options with what the user left open filled in, what was chosen in one line). A collective.

    stored  the checkpoint that the run starts from
    """
    chosen = None
    with session.errors_on_all_ranks():
        if here.first:  # the others need not read the dataset's description too
            chosen = parts.choose_options(options, here, device, stored)
    chosen = session.broadcast_from_first(chosen)
    assert chosen is not None
    if chosen.summary:
        run_folder.print_line(chosen.summary)
    for line in chosen.warnings:
        run_folder.print_warning(line)
    return chosen.options, chosen.summary


def record_launch(
    run_folder: RunFolder, model: str, options: Any, here: Ranks, device: torch.device, tuned: list[str],
    chosen: str,
) -> None:  # fmt: skip
    """Record where the run was started; warn of hosts that are busy already. A collective.

    model   the title of the model's spec
    tuned   what `enable_fast_path` returned
    chosen  what `choose_options` says
    """
    asked = device.type == "cpu" and here.local_rank == 0  # one rank of each host
    found = session.gather_from_all((here.host, describe_busy_cores(here) if asked else None))
    hosts = [host for host, _ in found]
    for busy in [line for _, line in found if line][:3]:
        run_folder.print_warning(busy)
    run_folder.launch = {
        "model": model,
        "world_size": here.world_size,
        "local_world_size": here.local_world_size,
        "nodes": len(set(hosts)),
        "hosts": hosts,
        "device": str(device.type),
        "tuned": tuned,
        "chosen": chosen,
        "command": describe_command(),
        "directory": os.getcwd(),  # what relative paths among the options count from
        "versions": list_versions() if run_folder.folder else {},
    }
    # An earlier run's config.json stays until this run is known to resume it; a run that ends before that
    # must not have changed it.
    with session.errors_on_all_ranks():
        if run_folder.folder and not os.path.lexists(run_folder.folder / "config.json"):
            run_folder.write_config(options)
        if run_folder.folder and here.first:
            update_environment(run_folder.folder)


def make_trainer(
    parts: ModelParts, options: Any, here: Ranks, device: torch.device, run_folder: RunFolder
) -> "Trainer":
    """Build data, model, sharding and optimizer, in this order. A UserError on one rank is raised on all."""
    for line in [*list_deprecated(options.run), *parts.list_unused_options(options, device.type)]:
        run_folder.print_warning(line)
    if options.run.mllog:
        run_folder.register_growing_file("mlperf.log")
    mlperf_log = MLPerfLog(options.run.mllog and here.first, run_folder.folder)
    mlperf_log.log_init_start(parts.mlperf_settings(options, here.world_size))

    # data: this rank's rows of the splits train, val and test
    with session.errors_on_all_ranks(), trace.span("startup", "data"):
        datasets = parts.open_data(options, here)
    # model: dense layers on the device, tables on the meta device, without memory yet
    with session.errors_on_all_ranks(), trace.span("startup", "build"):
        module = parts.build_model(options, datasets, device)
    # sharding and optimizer: one step, because the tables' optimizer runs inside their backward pass
    with session.errors_on_all_ranks(), trace.span("startup", "plan"):
        model, optimizer = parts.shard_model(options, module, datasets, here, device, run_folder)

    trainer = parts.trainer(options, datasets, model, optimizer, run_folder, device)
    trainer.mlperf_log = mlperf_log
    return trainer


class Datasets(Protocol):
    """This rank's batches of the three splits (`loop.BatchIterable`)."""

    train: Any
    val: Any
    test: Any

    def bytes_read(self) -> dict[str, int]:
        """By file, what this rank read of it; the report compares it with the traces."""
        ...

    def close(self) -> None: ...


class Trainer:
    """Model, data, pipelines, and how far the training has come.

    Each model has a subclass. It overrides what is the model's own: learning rate, mixed precision, metrics
    and its entries of results.json.
    """

    labels_are_clicks = False  # labels are 0 or 1: then reports have the share of ones
    score_metric = "auroc"  # the metric by which validations are compared, in the results of an evaluation
    make_metrics: Callable[[], loop.MetricCollector]  # called once for each evaluation

    def __init__(
        self,
        options: Any,
        datasets: Datasets,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        run_folder: RunFolder,
        device: torch.device,
    ) -> None:
        """options: of the model's own type. optimizer: of the dense layers, and fbgemm's for the tables.
        device: the same kind on all ranks.
        """
        self.options, self.datasets, self.model, self.optimizer = options, datasets, model, optimizer
        self.run_folder, self.device = run_folder, device
        self.mlperf_log = MLPerfLog(False)
        self.mlcommons_log = MLCommonsLog(options.run.mlcommons_log, run_folder.print_line)
        self.mlcommons_log.log_options(options)
        self.ssd_tables: Any = getattr(model, "ssd_tables", None) or NoSsdTables()
        optim = options.optim
        self.progress = loop.Progress(loss_scale=optim.loss_scale if optim.amp == "fp16" else 1.0)
        self.epoch_steps = len(datasets.train)
        self.meter = ThroughputMeter(device, self.labels_are_clicks)
        self.loss_watch = LossWatch()
        self.hooks = loop.Hooks()  # `run_trainer` puts the CheckpointManager here
        self.profiler: Any = None  # and here a StepProfiler, with --profile_steps
        self.results: dict[str, dict[str, Any]] = {}  # the last evaluation of each split
        self.evaluate_seconds = 0.0
        # Two pipelines: an evaluation in the middle of an epoch must not drop the training batches that the
        # first one has taken ahead.
        self.pipeline = TrainPipelineSparseDist(model, self.wrap_optimizer(), device)
        self.ssd_tables.install_prefetch(self.pipeline)
        self.eval_pipeline = TrainPipelineSparseDist(model, optimizer, device)

    # --- what a model overrides

    def learning_rate(self) -> float:
        """Of the coming step: constant, unless the model's class has a schedule."""
        return self.options.optim.learning_rate

    def enable_mixed_precision(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        """Run the model's dense part in `kind` ("bf16" or "fp16"); `scale` is the loss scale of fp16."""
        raise UserError(f"--amp {kind}: this model has no mixed precision; leave --amp out")

    def advise_on_loss(self) -> str:
        """What to try when the loss does not fall."""
        return f"try a learning rate of {self.options.optim.learning_rate / 10:g}"

    def benchmark_inference(self) -> None:
        """Time the forward pass, print it and keep it for results.json."""
        raise UserError("--mode inference_benchmark: this model has no benchmark; use --mode test")

    def collect_results(self) -> Mapping[str, Any]:
        """The model's own entries of results.json."""
        return {"score": self.score_metric}

    # --- optimizer

    def wrap_optimizer(self) -> Any:
        """The optimizer; where --amp fp16 or --grad_clip ask for it, with unscaling and clipping before its
        step.
        """
        optim, scale = self.options.optim, None
        if optim.amp == "fp16":
            scale = mixed_precision.LossScale(self.progress, optim.loss_scale_policy == "dynamic")
        if optim.amp != "off":
            self.enable_mixed_precision(optim.amp, scale)
        if scale is None and optim.grad_clip is None:
            return self.optimizer
        dense = [weight for name, weight in self.model.named_parameters() if not WEIGHT.search(name)]
        return mixed_precision.ScaledClippedOptimizer(self.optimizer, dense, optim.grad_clip, scale)

    def set_next_lr(self) -> float:
        lr = self.learning_rate()
        set_lr(self.optimizer, lr)
        if self.options.run.print_lr and self.mlcommons_log.enabled:
            of_epoch = self.progress.step - self.progress.epoch * self.epoch_steps
            self.mlcommons_log.log_rates(of_epoch + 1, [lr] * len(self.optimizer.param_groups))
        elif self.options.run.print_lr:
            self.run_folder.print_line(f"lr: {self.progress.step} {lr:.6f}")
        return lr

    # --- loop

    def fit(self) -> None:
        """Train from `progress` to the end of the last epoch, --max_steps, or the target score."""
        run = self.options.run
        limits = loop.Limits(
            epochs=run.epochs,
            max_steps=run.max_steps,
            report_every=run.report_every,
            warmup_steps=run.benchmark_warmup_steps,
            validation_freq=run.validation_freq_within_epoch,
            first_validation=math.ceil(run.test_after * self.epoch_steps),
            target_score=run.validation_auroc,
            score_metric=self.score_metric,
            evaluate_on_epoch_end=run.evaluate_on_epoch_end,
        )
        total_steps = min(run.epochs * self.epoch_steps, run.max_steps or sys.maxsize)
        self.loss_watch = LossWatch(total_steps)
        self.run_folder.start_progress(total_steps, self.progress.step, run.print_progress)
        self.mlperf_log.log_run_start(self.epoch_steps)
        silent = session.list_silent_ranks
        during_step = self.profiler.during_step if self.profiler else nullcontext
        try:
            with (
                report_while_training(self.run_folder, self.progress, self.datasets, silent),
                trace.span("pipeline", "train"),
            ):
                target_reached = loop.run_training(
                    self.pipeline, self.datasets.train, self.progress, limits, self.set_next_lr,
                    self.validate, self.log_metrics, self.meter, self.hooks, self.log_epoch, during_step,
                )  # fmt: skip
        finally:
            if self.profiler:  # where the last of its steps was not reached
                self.profiler.close()
        self.mlperf_log.log_run_stop(target_reached, self.count_epochs())

    @contextmanager
    def log_epoch(self, number: int) -> Iterator[None]:
        """Around the steps of an epoch, for the two logs of MLCommons' form."""
        before = self.progress.step
        with self.mlperf_log.log_epoch(number):
            yield
            self.mlcommons_log.log_epoch_end(self.progress.step - before)

    def count_epochs(self) -> float:
        """Epochs trained so far, with the fraction of the current one."""
        within = self.progress.step - self.progress.epoch * self.epoch_steps
        return self.progress.epoch + max(0, within) / max(1, self.epoch_steps)

    def log_metrics(self, **values: Any) -> None:
        self.run_folder.log_metrics(**values, **self.ssd_tables.cache_metrics(self.progress.step))
        if "split" not in values and (trouble := self.loss_watch.add_report(values)):
            self.run_folder.print_warning(f"{trouble}: {self.advise_on_loss()}")

    # --- evaluation

    def evaluate(self, split: str) -> dict[str, Any]:
        """The metrics over all rows of "val" or "test", logged and kept for results.json."""
        batches, before_batch = getattr(self.datasets, split), self.hooks.before_batch
        with self.mlperf_log.log_evaluation(self.count_epochs()) as logged, self.evaluation_mode():
            result = loop.evaluate(self.eval_pipeline, batches, split, self.make_metrics(), before_batch)
            logged.update(result)
        self.log_metrics(step=self.progress.step, epoch=self.progress.epoch, **result)
        self.mlcommons_log.log_evaluation(result)
        self.results[split] = result
        self.evaluate_seconds += result["seconds"]
        return result

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The model computes no gradients in this block."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(was_training)

    def validate(self) -> dict[str, Any]:
        """The evaluation of --validation_split, during training."""
        result, progress = self.evaluate(self.options.run.validation_split), self.progress
        score = result[self.score_metric]
        if score is not None and (progress.best_score is None or score > progress.best_score):
            progress.best_score, progress.best_epoch = score, self.count_epochs()
        self.hooks.after_validation()
        return result

    # --- results

    def save_results(self, startup_seconds: float) -> None:
        """results.json: the scores, and the bytes that each rank counts as read and written. A collective."""
        progress = self.progress
        val, test = self.results.get("val", {}), self.results.get("test", {})
        read = session.gather_from_all(
            self.datasets.bytes_read() | self.ssd_tables.bytes_read() | blocks.bytes_read
        )
        written = session.gather_from_all(self.ssd_tables.bytes_written() | blocks.bytes_written)
        self.run_folder.write_json(
            "results.json",
            {
                **self.collect_results(),
                "val_scores": progress.val_scores,
                "best_score": progress.best_score,
                "best_epoch": progress.best_epoch,
                "val_samples": val.get("samples"),
                "test_samples": test.get("samples"),
                "skipped_steps": progress.skipped_steps,
                **describe_results(progress, self.results, read, written),
                "seconds": {
                    "startup": startup_seconds,
                    "train": progress.seconds,
                    "evaluate": self.evaluate_seconds,
                },
            },
        )


def run_trainer(trainer: Trainer, here: Ranks, started: float) -> None:
    """Resume from the newest checkpoint, if there is one; train, test, write results.json.

    `started`: time.perf_counter() at the start, for results.json's seconds/startup.
    """
    run = trainer.options.run
    checkpoints = CheckpointManager(trainer, here)
    trainer.hooks = checkpoints
    with session.errors_on_all_ranks():
        checkpoints.lock_known_folder()
    resume_training(trainer, here, checkpoints.root)
    with session.errors_on_all_ranks():
        trainer.run_folder.write_config(trainer.options)
        if description := getattr(trainer.datasets, "description", None):
            trainer.run_folder.write_json("dataset.json", description)
        trainer.ssd_tables.check_row_files()
    if run.profile_steps:
        from dlrm.runtime.step_profiler import StepProfiler, parse_steps

        steps = parse_steps(run.profile_steps)
        trainer.profiler = StepProfiler(run.output_dir, here, steps, trainer.meter.exclude_time)
    startup_seconds = time.perf_counter() - started

    try:
        checkpoints.start()
        if run.mode == "train":
            trainer.fit()
            checkpoints.finish_training()
        if run.mode == "inference_benchmark":
            trainer.benchmark_inference()
        elif run.evaluate_on_training_end or run.mode == "test":
            trainer.evaluate("test")
    except Stopped as stopped:
        # a signal or the walltime: all ranks stop before the same batch, save, and exit with code 75
        checkpoints.save_when_stopped(stopped)
        trainer.ssd_tables.close()
        raise
    finally:
        checkpoints.close()

    session.mark_clock("end")
    trainer.save_results(startup_seconds)
    trainer.ssd_tables.close()
    trainer.datasets.close()
    checkpoints.raise_if_not_saved()  # last: the results of the training are kept in any case
