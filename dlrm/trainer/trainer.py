"""One training, from resolved options to results.json: the same course for every model.

In: a ModelSpec, its options, this rank. Out: a run folder. What is the model's own (data, architecture,
sharding, learning rate, metrics) comes from the spec's parts; nothing here names a model.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.checkpoint import shards
from dlrm.cpu import blas, startup
from dlrm.embeddings.tables import WEIGHT, NoSsdTables
from dlrm.runtime import session, trace
from dlrm.runtime.errors import Stopped, UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop, mixed_precision
from dlrm.trainer.checkpointing import CheckpointManager
from dlrm.trainer.lr_schedule import set_lr
from dlrm.trainer.mlperf_log import MLPerfLog
from dlrm.trainer.resume import resume_training
from dlrm.trainer.run_folder import RunFolder
from dlrm.trainer.spec import ModelParts, ModelSpec


def train(spec: ModelSpec, options: Any, here: Ranks) -> None:
    """Train the model of this spec, evaluate it, write the run folder."""
    parts = spec.load_parts()
    startup.import_optimizers()
    begun = time.perf_counter()
    with session.open_session(here, options.run.timeout, options.run.exchange) as device:
        session.mark_clock("start")
        torch.backends.cuda.matmul.allow_tf32 = options.run.allow_tf32
        try:
            with session.errors_on_all_ranks():
                run_folder = open_run_folder(options, here)
        except UserError:
            trace.discard_tracing()  # nothing of a refused run stays in the folder
            raise
        try:
            record_launch(run_folder, options, here, device)
            trainer = make_trainer(parts, options, here, device, run_folder)
            run_training(trainer, options, here, begun)
        finally:
            run_folder.close()


def run_training(trainer: "Trainer", options: Any, here: Ranks, begun: float) -> None:
    """From the newest checkpoint, if there is one, to results.json."""
    checkpoints = CheckpointManager(trainer, here)
    trainer.hooks = checkpoints
    with session.errors_on_all_ranks():
        checkpoints.claim()
    resume_training(trainer, here, checkpoints.root)
    with session.errors_on_all_ranks():
        trainer.records.describe(options)
        trainer.ssd_tables.ready()
    startup_seconds = time.perf_counter() - begun

    try:
        checkpoints.begin()
        if options.run.mode == "train":
            trainer.fit()
            checkpoints.finish()
        if options.run.evaluate_on_training_end or options.run.mode == "test":
            trainer.evaluate("test")
    except Stopped as stop:
        checkpoints.stop(stop)
        trainer.ssd_tables.close()
        raise
    finally:
        checkpoints.close()

    session.mark_clock("end")
    trainer.save_results(startup_seconds)
    trainer.ssd_tables.close()
    trainer.datasets.close()
    checkpoints.check()


def make_trainer(
    parts: ModelParts, options: Any, here: Ranks, device: torch.device, run_folder: RunFolder
) -> "Trainer":
    """Data, model, sharding and optimizer, in this order; a mistake on one rank ends all with one line."""
    for line in parts.list_unused_options(options, device.type):
        run_folder.warn(line)
    if options.run.mllog:
        run_folder.grow("mlperf.log")
    log = MLPerfLog(options.run.mllog and here.first, run_folder.folder)
    log.begin(parts.mlperf_settings(options, here.world_size))

    with session.errors_on_all_ranks(), trace.span("startup", "data"):
        datasets = parts.open_data(options, here)
    with session.errors_on_all_ranks(), trace.span("startup", "build"):
        module = parts.build_model(options, datasets, device)
    with session.errors_on_all_ranks(), trace.span("startup", "plan"):
        model, optimizer = parts.shard_model(options, module, datasets, here, device, run_folder)

    trainer = parts.trainer(options, datasets, model, optimizer, run_folder, device)
    trainer.log = log
    return trainer


def open_run_folder(options: Any, here: Ranks) -> RunFolder:
    """The run folder, for this run alone. On the first rank; a UserError says who else writes into it, or
    what lies there that is not ours.
    """
    more = ["mlperf.log"] if options.run.mllog else []
    return RunFolder(options.run.output_dir, here.first, options.run.tensorboard, more)


def record_launch(run_folder: RunFolder, options: Any, here: Ranks, device: torch.device) -> None:
    """What was asked for and where it runs."""
    hosts = session.gather_from_all(here.host)
    run_folder.launch = {
        "world_size": here.world_size,
        "local_world_size": here.local_world_size,
        "nodes": len(set(hosts)),
        "hosts": hosts,
        "device": str(device.type),
        "tuned": blas.tune_processor(device),
    }
    with session.errors_on_all_ranks():
        if run_folder.folder and not os.path.lexists(run_folder.folder / "config.json"):
            run_folder.describe(options)


class Datasets(Protocol):
    """What is trained on, validated and tested with."""

    train: Any
    val: Any
    test: Any

    def bytes_read(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class Trainer:
    """What is being trained, and how far it has come. A model's own class overrides what is the model's:
    the learning rate, mixed precision, the metrics, its lines of results.json.
    """

    score = "auroc"  # the metric by which validations are compared
    predictions: Callable[[], loop.MetricCollector]  # gathers an evaluation's outputs into metrics

    def __init__(
        self,
        cfg: Any,
        datasets: Datasets,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        records: RunFolder,
        device: torch.device,
    ) -> None:
        self.cfg, self.datasets, self.model, self.optimizer = cfg, datasets, model, optimizer
        self.records, self.device = records, device
        self.log = MLPerfLog(False)
        self.ssd_tables: Any = getattr(model, "ssd_tables", None) or NoSsdTables()
        self.progress = loop.Progress(loss_scale=cfg.optim.loss_scale if cfg.optim.amp == "fp16" else 1.0)
        self.epoch_steps = len(datasets.train)
        self.meter = loop.ThroughputMeter(device)
        self.hooks = loop.Hooks()
        self.results: dict[str, dict[str, Any]] = {}  # the last evaluation of each split
        self.evaluating = 0.0  # seconds
        # two pipelines: evaluating in the middle of an epoch must not drop the batches in flight
        self.pipeline = TrainPipelineSparseDist(model, self.wrap_optimizer(), device)
        self.ssd_tables.watch(self.pipeline)
        self.eval_pipeline = TrainPipelineSparseDist(model, optimizer, device)

    def learning_rate(self) -> float:
        """Of the coming step: constant, unless the model's class has a schedule."""
        return self.cfg.optim.learning_rate

    def cast(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        """Put the model's dense part into mixed precision."""
        raise UserError(f"--amp {kind}: this model has no mixed precision; leave it out")

    def wrap_optimizer(self) -> Any:
        """The optimizer, with what --amp and --grad_clip put before its step."""
        optimizing, scale = self.cfg.optim, None
        if optimizing.amp == "fp16":
            scale = mixed_precision.LossScale(self.progress, optimizing.loss_scale_policy == "dynamic")
        if optimizing.amp != "off":
            self.cast(optimizing.amp, scale)
        if scale is None and optimizing.grad_clip is None:
            return self.optimizer
        dense = [weight for name, weight in self.model.named_parameters() if not WEIGHT.search(name)]
        return mixed_precision.ScaledClippedOptimizer(self.optimizer, dense, optimizing.grad_clip, scale)

    def fit(self) -> None:
        run = self.cfg.run
        limits = loop.Limits(
            epochs=run.epochs,
            max_steps=run.max_steps,
            report_every=run.report_every,
            validation_freq=run.validation_freq_within_epoch,
            validation_auroc=run.validation_auroc,
            evaluate_on_epoch_end=run.evaluate_on_epoch_end,
            score=self.score,
        )
        steps = min(run.epochs * self.epoch_steps, run.max_steps or sys.maxsize)
        self.records.begin(steps, self.progress.step, run.print_progress)
        self.log.run(self.epoch_steps)
        good = loop.run_training(
            self.pipeline, self.datasets.train, self.progress, limits, self.next_lr,
            lambda: self.evaluate("val"), self.report, self.meter, self.hooks, self.log.epoch,
        )  # fmt: skip
        self.log.finish(good, self.epochs_done())

    def epochs_done(self) -> float:
        """With the share of the current one."""
        within = self.progress.step - self.progress.epoch * self.epoch_steps
        return self.progress.epoch + max(0, within) / max(1, self.epoch_steps)

    def next_lr(self) -> float:
        lr = self.learning_rate()
        set_lr(self.optimizer, lr)
        if self.cfg.run.print_lr:
            self.records.say(f"lr: {self.progress.step} {lr:.6f}")
        return lr

    def evaluate(self, split: str) -> dict[str, Any]:
        batches, before = getattr(self.datasets, split), self.hooks.before_batch
        with self.log.evaluation(self.epochs_done()) as logged:
            result = loop.evaluate(self.eval_pipeline, self.model, batches, split, self.predictions(), before)
            logged.update(result)
        self.report(step=self.progress.step, epoch=self.progress.epoch, **result)
        self.results[split] = result
        self.evaluating += result["seconds"]
        if split == "val":
            self.hooks.after_validation()
        return result

    def report(self, **values: Any) -> None:
        self.records.report(**values, **self.ssd_tables.readings(self.progress.step))

    def outcome(self) -> Mapping[str, Any]:
        """The model's own lines of results.json."""
        return {"score": self.score, "val_scores": self.progress.val_aurocs}

    def save_results(self, startup: float) -> None:
        """results.json: what came out, and the bytes that each rank says it read and wrote."""
        progress = self.progress
        val, test = self.results.get("val", {}), self.results.get("test", {})
        read = session.gather_from_all(
            self.datasets.bytes_read() | self.ssd_tables.bytes_read() | shards.bytes_read
        )
        written = session.gather_from_all(self.ssd_tables.bytes_written() | shards.bytes_written)
        self.records.save(
            "results.json",
            {
                **self.outcome(),
                "val_samples": val.get("samples"),
                "test_samples": test.get("samples"),
                "evaluations": self.results,
                "steps": progress.step,
                "skipped_steps": progress.skipped_steps,
                "samples": progress.samples,
                "samples_per_second": progress.timed_samples / progress.seconds if progress.seconds else None,
                "bytes_read": {str(rank): files for rank, files in enumerate(read)},
                "bytes_written": {str(rank): files for rank, files in enumerate(written)},
                "seconds": {
                    "startup": startup,
                    "train": progress.seconds,
                    "evaluate": self.evaluating,
                },
                "world_size": len(read),
            },
        )
