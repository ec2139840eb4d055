"""One training job, from resolved options to results.json: data, model, plan, training, evaluation."""

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
from dlrm.config import unused
from dlrm.config.options import Config
from dlrm.cpu import blas, startup
from dlrm.embeddings.tables import WEIGHT
from dlrm.models.dlrm.build import NoSsdTables, build_model, shard_dlrm
from dlrm.models.dlrm.dataloaders import open_datasets
from dlrm.runtime import session, trace
from dlrm.runtime.errors import Stopped
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop, mixed_precision
from dlrm.trainer.checkpointing import CheckpointManager
from dlrm.trainer.lr_schedule import Schedule, learning_rate, set_lr
from dlrm.trainer.metrics import AurocCollector
from dlrm.trainer.mlperf_log import MLPerfLog
from dlrm.trainer.resume import resume_training
from dlrm.trainer.run_folder import RunFolder


def train(cfg: Config, here: Ranks) -> None:
    run(cfg, here, make)


def make(cfg: Config, here: Ranks, device: torch.device, records: RunFolder) -> "Trainer":
    """Everything that a DLRM's training needs."""
    for line in unused.list_unused_options(cfg, device.type):
        records.warn(line)
    if cfg.run.mllog:
        records.grow("mlperf.log")
    log = MLPerfLog(cfg.run.mllog and here.first, records.folder)
    log.begin(cfg, here.world_size)
    with session.errors_on_all_ranks(), trace.span("startup", "data"):
        sets = open_datasets(cfg, here)
    with session.errors_on_all_ranks(), trace.span("startup", "build"):
        module = build_model(cfg, sets.sizes, device)
    with session.errors_on_all_ranks(), trace.span("startup", "plan"):
        model, optimizer = shard_dlrm(cfg, module, here, device, records, sets.poolings)
    job = Trainer(cfg, sets, model, optimizer, records, device)
    job.log = log
    return job


def run(cfg: Any, here: Ranks, make: Callable[[Any, Ranks, torch.device, RunFolder], "Trainer"]) -> None:
    """Train what `make` makes: the same course for every model."""
    startup.import_optimizers()
    begun = time.perf_counter()
    with session.open_session(here, cfg.run.timeout, cfg.run.exchange) as device:
        session.mark_clock("start")
        torch.backends.cuda.matmul.allow_tf32 = cfg.run.allow_tf32
        with session.errors_on_all_ranks():
            records = open_run_folder(cfg, here)
        try:
            _run(cfg, here, make, device, records, begun)
        finally:
            records.close()


def _run(
    cfg: Any,
    here: Ranks,
    make: Callable[..., "Trainer"],
    device: torch.device,
    records: RunFolder,
    begun: float,
) -> None:
    describe_launch(records, cfg, here, device)
    job = make(cfg, here, device, records)
    keeper = CheckpointManager(job, here)
    job.hooks = keeper
    with session.errors_on_all_ranks():
        keeper.claim()
    resume_training(job, here, keeper.root)
    with session.errors_on_all_ranks():
        records.describe(cfg)
        job.tiers.ready()
    ready = time.perf_counter() - begun
    try:
        keeper.begin()
        if cfg.run.mode == "train":
            job.fit()
            keeper.finish()
        if cfg.run.evaluate_on_training_end or cfg.run.mode == "test":
            job.evaluate("test")
    except Stopped as stop:
        keeper.stop(stop)
        job.tiers.close()
        raise
    finally:
        keeper.close()
    session.mark_clock("end")
    job.save_results(ready)
    job.tiers.close()
    job.sets.close()
    keeper.check()


def open_run_folder(cfg: Any, here: Ranks) -> RunFolder:
    """The run folder, for this run alone. On the first rank; a UserError says who else writes into it, or
    what lies there that is not ours.
    """
    more = ["mlperf.log"] if getattr(cfg.run, "mllog", False) else []
    return RunFolder(cfg.run.output_dir, here.first, cfg.run.tensorboard, more)


def describe_launch(records: RunFolder, cfg: Any, here: Ranks, device: torch.device) -> None:
    """What was asked for and where it runs."""
    hosts = session.gather_from_all(here.host)
    launch = {
        "world_size": here.world_size,
        "local_world_size": here.local_world_size,
        "nodes": len(set(hosts)),
        "hosts": hosts,
        "device": str(device.type),
        "tuned": blas.tune_processor(device),
    }
    records.launch = launch
    with session.errors_on_all_ranks():
        if records.folder and not os.path.lexists(records.folder / "config.json"):
            records.describe(cfg)


class Datasets(Protocol):
    """What is trained on, validated and tested with."""

    train: Any
    val: Any
    test: Any

    def bytes_read(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class Trainer:
    """What is being trained, and how far it has come. Another model changes what is said to be DLRM's."""

    score = "auroc"
    predictions: Callable[[], loop.MetricCollector] = AurocCollector
    log = MLPerfLog(False)

    def __init__(
        self,
        cfg: Any,
        sets: Datasets,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        records: RunFolder,
        device: torch.device,
    ) -> None:
        self.cfg, self.sets, self.model, self.optimizer = cfg, sets, model, optimizer
        self.records, self.device = records, device
        self.tiers: Any = getattr(model, "tiers", None) or NoSsdTables()  # tables in files
        self.progress = loop.Progress(loss_scale=cfg.optim.loss_scale if cfg.optim.amp == "fp16" else 1.0)
        self.epoch_steps = len(sets.train)
        self.meter = loop.ThroughputMeter(device)
        self.hooks = loop.Hooks()
        self.results: dict[str, dict[str, Any]] = {}  # the last evaluation of each split
        self.evaluating = 0.0  # seconds
        # two pipelines: evaluating in the middle of an epoch must not drop the batches in flight
        self.pipeline = TrainPipelineSparseDist(model, self.careful(), device)
        self.tiers.watch(self.pipeline)
        self.judge = TrainPipelineSparseDist(model, optimizer, device)
        self.schedule = self.make_schedule()

    def make_schedule(self) -> Any:
        """DLRM's learning rates."""
        optimizing = self.cfg.optim
        return Schedule(
            "change" if optimizing.change_lr else optimizing.lr_schedule,
            optimizing.lr_warmup_steps,
            optimizing.lr_decay_start,
            optimizing.lr_decay_steps,
            change_step=int(optimizing.lr_change_point * self.epoch_steps),
            change_to=optimizing.lr_after_change_point,
        )

    def cast(self, kind: str, scale: mixed_precision.LossScale | None) -> None:
        """DLRM's dense part in mixed precision."""
        whole: Any = self.model.module
        mixed_precision.cast_dense_part(whole.model, self.device, kind, scale)

    def careful(self) -> Any:
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
            self.pipeline, self.sets.train, self.progress, limits, self.next_lr,
            lambda: self.evaluate("val"), self.report, self.meter, self.hooks, self.log.epoch,
        )  # fmt: skip
        self.log.finish(good, self.epochs_done())

    def epochs_done(self) -> float:
        """With the share of the current one."""
        within = self.progress.step - self.progress.epoch * self.epoch_steps
        return self.progress.epoch + max(0, within) / max(1, self.epoch_steps)

    def rate(self) -> float:
        """DLRM's, of the coming step."""
        return learning_rate(self.progress.step, self.cfg.optim.learning_rate, self.schedule)

    def next_lr(self) -> float:
        lr = self.rate()
        set_lr(self.optimizer, lr)
        if self.cfg.run.print_lr:
            self.records.say(f"lr: {self.progress.step} {lr:.6f}")
        return lr

    def evaluate(self, split: str) -> dict[str, Any]:
        batches, before = getattr(self.sets, split), self.hooks.before_batch
        with self.log.evaluation(self.epochs_done()) as logged:
            result = loop.evaluate(self.judge, self.model, batches, split, self.predictions(), before)
            logged.update(result)
        self.report(step=self.progress.step, epoch=self.progress.epoch, **result)
        self.results[split] = result
        self.evaluating += result["seconds"]
        if split == "val":
            self.hooks.after_validation()
        return result

    def report(self, **values: Any) -> None:
        self.records.report(**values, **self.tiers.readings(self.progress.step))

    def outcome(self) -> Mapping[str, Any]:
        """DLRM's lines of results.json."""
        test = self.results.get("test", {})
        return {"val_aurocs": self.progress.val_aurocs, "test_auroc": test.get("auroc")}

    def save_results(self, startup: float) -> None:
        """results.json: what came out, and the bytes that each rank says it read and wrote."""
        progress = self.progress
        val, test = self.results.get("val", {}), self.results.get("test", {})
        read = session.gather_from_all(self.sets.bytes_read() | self.tiers.bytes_read() | shards.bytes_read)
        written = session.gather_from_all(self.tiers.bytes_written() | shards.bytes_written)
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
