"""What a training keeps: checkpoints when they are due, the way back to the newest good one, the stop."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from dlrm.checkpoint import state
from dlrm.checkpoint.saver import CheckpointWriter
from dlrm.checkpoint.shards import TensorPiece
from dlrm.runtime import entry, session
from dlrm.runtime import stop as signals
from dlrm.runtime.errors import NotSaved, Stopped, UserError
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.walltime import find_deadline
from dlrm.trainer import loop
from dlrm.trainer.run_folder import RunFolder


class Training(Protocol):
    """What is kept."""

    cfg: Any
    model: Any
    optimizer: Any
    datasets: Any
    records: RunFolder
    progress: loop.Progress
    meter: loop.ThroughputMeter
    results: dict[str, dict[str, Any]]
    score: str  # the metric of a validation that tells the best checkpoint
    evaluating: float


class CheckpointManager(loop.Hooks):
    def __init__(self, job: Training, here: Ranks) -> None:
        self.job, self.here = job, here
        wishes = job.cfg.checkpoint
        self.wishes = wishes
        root = wishes.checkpoint_dir or (
            os.path.join(job.cfg.run.output_dir, "checkpoints") if job.cfg.run.output_dir else None
        )
        self.root = Path(root) if root else None
        patience = max(3600, 10 * job.cfg.run.timeout)
        self.saver = self.root and CheckpointWriter(
            self.root, here, session.clone_store(), wishes.keep_checkpoints, patience, self._claim
        )
        self.unsaved: str | None = None  # why the training's end is in no checkpoint
        self._due = False  # at the next chance
        self._scored_at: int | None = None  # step of the last validation
        self._saved_at: Any = None
        self._last_save = time.monotonic()
        self._deadline = find_deadline(wishes.stop_before_walltime, wishes.walltime) if here.first else None
        self.accord = signals.CollectiveStop(session.clone_store(), here, self._clock, job.cfg.run.timeout)

    # --- when

    def claim(self) -> None:
        """Be the only writer of checkpoints there, if it is known that there will be any; else the first save
        asks for it.
        """
        known = self.wishes.asked or (self.root is not None and self.root.is_dir())
        if known and self.job.cfg.run.mode == "train":
            self._claim()

    def begin(self) -> None:
        self._saved_at = self._place()
        if self.wishes.save_initial_model and self.job.progress.step == 0:
            self.save()
        self._last_save = time.monotonic()
        self.accord.begin()

    def _clock(self) -> str | None:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            return f"{signals.STOP}: walltime"
        minutes = self.wishes.checkpoint_every_minutes
        if minutes and now - self._last_save >= 60 * minutes:
            self._last_save = now
            return signals.SAVE
        return None

    def before_batch(self) -> None:
        while kind := self.accord.before_batch():
            if kind == signals.SAVE:
                self._due = True
                continue
            stop = Stopped(kind.partition(": ")[2])
            stop.shared = True
            raise stop

    def after_step(self) -> None:
        every = self.wishes.checkpoint_every_steps
        if self._due or (every and self.job.progress.step % every == 0):
            self.save()

    def after_epoch(self) -> None:
        if self._due or (self.wishes.asked and self.wishes.checkpoint_epochs):
            self.save()

    def after_validation(self) -> None:
        self._due = self._due or self.wishes.save_model_after_each_eval
        self._scored_at = self.job.progress.step

    def finish(self) -> None:
        """Training is over."""
        if self.wishes.asked and self._place() != self._saved_at:
            self.save()
        self.unsaved = self._settle()

    def stop(self, stop: Stopped) -> None:
        """Save what there is, and say so in the exception's text."""
        step = self.job.progress.step
        said = f"stopped at step {step} ({stop})"
        if self.saver is None:
            stop.args = (f"{said}, nothing saved: give --output_dir or --checkpoint_dir",)
            return
        if self._place() != self._saved_at:
            self.save()
        error = self._settle()
        if error:
            raise NotSaved(f"{said}, but the checkpoint failed: {error}")
        stop.args = (f"{said}, saved in {self.saver.last or 'nothing new'}: run it again to go on",)

    def check(self) -> None:
        """At the very end: raises NotSaved if the last checkpoint that was asked for does not exist."""
        if self.unsaved:
            last = self.saver and self.saver.last
            where = f"the one before is {last}" if last else "there is none"
            raise NotSaved(
                f"trained to step {self.job.progress.step}, but the checkpoint of step {self._saved_at[0]} "
                f"was not written ({where}): {self.unsaved}"
            )

    def close(self) -> None:
        self.accord.close()

    def _claim(self) -> None:
        if self.root is not None:
            self.job.records.claim(self.root, "saving checkpoints in it")

    # --- out

    def _place(self) -> Any:
        progress = self.job.progress
        return progress.step, progress.epoch, progress.judging, progress.good, len(progress.val_aurocs)

    def save(self) -> None:
        if self.saver is None:
            raise UserError("checkpoints need a place: give --checkpoint_dir or --output_dir")
        self._settle()
        self._due, self._saved_at, self._last_save = False, self._place(), time.monotonic()
        began = time.perf_counter()
        job = self.job
        pieces = state.pieces_of_rank(job.model, job.optimizer, self.here.rank) + self._own_pieces()
        self.saver.save(pieces, self._values(), job.progress.step)
        job.meter.leave_out(time.perf_counter() - began)

    def _settle(self) -> str | None:
        """Wait for the checkpoint that is being written; a failed one is told, and training goes on."""
        if self.saver is None:
            return None
        failures = self.saver.failures
        error = self.saver.wait()
        if error and self.saver.failures > failures and self.here.first:
            entry.print_error(Ranks(), f"checkpoint not written, the one before stays: {error}")
        return error

    def _own_pieces(self) -> list[TensorPiece]:
        """What each rank has for itself."""
        rank, sums = self.here.rank, self.job.meter.state()[0]
        own = {f"meter/{rank}": sums, f"rng/cpu/{rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            own[f"rng/cuda/{rank}"] = torch.cuda.get_rng_state()
        return [TensorPiece(name, tuple(value.shape), (0,), value) for name, value in own.items()]

    def _values(self) -> dict[str, Any]:
        job = self.job
        val = job.results.get("val")
        return {
            "step": job.progress.step,
            "epoch": job.progress.epoch,
            "score": val.get(job.score) if val and self._scored_at == job.progress.step else None,
            "progress": asdict(job.progress),
            "results": job.results,
            "evaluating": job.evaluating,
            "meter_steps": job.meter.steps,
            **job.records.position(),
            "world_size": self.here.world_size,
            "config": asdict(job.cfg),
            "time": time.time(),
        }
