"""When a training saves a checkpoint and when it stops: every N steps or minutes, after an epoch, on a
signal.

In: a Trainer, and its options for checkpoints. Out: checkpoints in their folder; and for a training that is
stopped, an exception that says where it was saved.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from dlrm.checkpoint import state
from dlrm.checkpoint.shards import TensorPiece
from dlrm.runtime import entry, session, trace
from dlrm.runtime.errors import NotSaved, Stopped, UserError
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.stop import SAVE, STOP, CollectiveStop
from dlrm.runtime.walltime import find_deadline
from dlrm.trainer import loop
from dlrm.trainer.checkpoint_schedule import CheckpointSchedule
from dlrm.trainer.meter import ThroughputMeter
from dlrm.trainer.run_folder import RunFolder


def locate_checkpoints(options: Any) -> Path | None:
    """The run's own folder of checkpoints."""
    if options.checkpoint.checkpoint_dir:
        return Path(options.checkpoint.checkpoint_dir)
    return Path(options.run.output_dir) / "checkpoints" if options.run.output_dir else None


class CheckpointedTraining(Protocol):
    """What a checkpoint stores of a Trainer."""

    options: Any
    model: Any
    optimizer: Any
    datasets: Any
    run_folder: RunFolder
    progress: loop.Progress
    meter: ThroughputMeter
    results: dict[str, dict[str, Any]]
    score_metric: str  # in the validation's result: the checkpoint with the highest is the best
    evaluate_seconds: float


class CheckpointManager(CheckpointSchedule):
    """Saves a training's checkpoints and stops it; the loop calls it between its steps.

    Every rank has one, and all ranks must save and stop at the same step, because saving gathers the state of
    all ranks. Step counts are the same on all ranks anyway. Clocks and signals are not: `collective_stop`
    makes the ranks agree on a step.
    """

    def __init__(self, trainer: CheckpointedTraining, here: Ranks) -> None:
        super().__init__(trainer.options.checkpoint, trainer.progress)
        self.trainer, self.here = trainer, here
        run = trainer.options.run
        self.root = locate_checkpoints(trainer.options)
        # The slowest rank's disk may take long, and a rank that ended is noticed by its heartbeat, not here.
        timeout = max(3600, 10 * run.timeout)
        self.writer = self.root and state.open_writer(
            self.root, here, session.clone_store(), self.options.keep_checkpoints, timeout,
            self._lock_folder,
        )  # fmt: skip
        self.save_error: str | None = None  # why the state at the end of the training is in no checkpoint
        self._last_save = time.monotonic()
        # rank 0's clock decides for all
        self._deadline = (
            find_deadline(self.options.stop_before_walltime, self.options.walltime) if here.first else None
        )
        self.collective_stop = CollectiveStop(session.clone_store(), here, self._check_clock, run.timeout)

    # --- when to save and when to stop

    def lock_known_folder(self) -> None:
        """Become the only writer of the folder of checkpoints, before training starts.

        Only where it is known that there will be checkpoints, or there are some to resume from. Otherwise the
        first save locks it: a signal may ask for one, and a run without checkpoints makes no folder.
        """
        known = self.options.asked or (self.root is not None and self.root.is_dir())
        if known and self.trainer.options.run.mode == "train":
            self._lock_folder()

    def start(self) -> None:
        super().start()
        self._last_save = time.monotonic()
        self.collective_stop.start_listening()

    def _check_clock(self) -> str | None:
        """What is due now by rank 0's clock; called by `collective_stop`'s thread."""
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            return f"{STOP}: walltime"
        minutes = self.options.checkpoint_every_minutes
        if minutes and now - self._last_save >= 60 * minutes:
            self._last_save = now
            return SAVE
        return None

    def before_batch(self) -> None:
        """Raises Stopped, on all ranks before the same batch."""
        while request := self.collective_stop.before_batch():
            if request == SAVE:
                self._save_requested = True
                continue
            stopped = Stopped(request.partition(": ")[2])
            stopped.shared = True
            raise stopped

    def finish_training(self) -> None:
        """Save the last state, unless it is saved already, and wait until it is on the disk."""
        self.save_last()
        self.save_error = self._wait_for_save()

    def save_when_stopped(self, stopped: Stopped) -> None:
        """Save the state at which the training was stopped. Changes the exception's text to say where it is;
        raises NotSaved if it could not be saved.
        """
        step = self.progress.step
        text = f"stopped at step {step} ({stopped})"
        if self.writer is None:
            stopped.args = (f"{text}, nothing saved: give --output_dir or --checkpoint_dir",)
            return
        if self.has_news:
            self.save()
        error = self._wait_for_save()
        if error:
            raise NotSaved(f"{text}, but the checkpoint failed: {error}")
        where = f"saved in {self.writer.last_path}" if self.writer.last_path else "no new checkpoint needed"
        resume = "to resume, run the same command again, with this run folder"
        stopped.args = (f"{text}, {where}: {resume}",)

    def raise_if_not_saved(self) -> None:
        """At the very end: raises NotSaved if the state at the end of the training is in no checkpoint."""
        if self.save_error:
            last = self.writer and self.writer.last_path
            where = f"the newest one is {last}" if last else "there is none"
            raise NotSaved(
                f"trained to step {self.progress.step}, but the checkpoint of step "
                f"{self._saved_position[0]} was not written ({where}): {self.save_error}"
            )

    def close(self) -> None:
        self.collective_stop.close()

    def _lock_folder(self) -> None:
        if self.root is not None:
            self.trainer.run_folder.lock_folder(self.root, "saving checkpoints in it")

    # --- what is saved

    def save(self) -> None:
        """Copy the state now; a thread writes it meanwhile. All ranks call it at the same step."""
        if self.writer is None:
            raise UserError("checkpoints need a folder: give --checkpoint_dir or --output_dir")
        self._wait_for_save()
        self.note_save()
        self._last_save = time.monotonic()
        started = time.perf_counter()
        trainer = self.trainer
        with trace.span("checkpoint", "collect"):  # tables in files write their changed rows
            pieces = state.list_rank_pieces(trainer.model, trainer.optimizer, self.here.rank)
        self.writer.save(pieces + self._list_rank_state(), self._describe_training(), trainer.progress.step)
        trainer.meter.exclude_time(time.perf_counter() - started)

    def _wait_for_save(self) -> str | None:
        """Wait for the checkpoint that is being written. One that failed is reported, and training continues:
        the next one may succeed, and the one before is still there.
        """
        if self.writer is None:
            return None
        failures = self.writer.failure_count
        error = self.writer.wait_for_save()
        if error and self.writer.failure_count > failures and self.here.first:
            entry.print_error(Ranks(), f"checkpoint not written, the one before it is kept: {error}")
        return error

    def _list_rank_state(self) -> list[TensorPiece]:
        """What this rank alone has: the sums of its next report, and the states of its random numbers."""
        rank = self.here.rank
        tensors = {f"meter/{rank}": self.trainer.meter.sums, f"rng/cpu/{rank}": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors[f"rng/cuda/{rank}"] = torch.cuda.get_rng_state()
        return [TensorPiece(name, tuple(value.shape), (0,), value) for name, value in tensors.items()]

    def _describe_training(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON values; `resume.check_state` says what must be there."""
        trainer = self.trainer
        val = trainer.results.get(trainer.options.run.validation_split)
        just_validated = val and self._validated_step == trainer.progress.step
        return {
            "step": trainer.progress.step,
            "epoch": trainer.progress.epoch,
            "score": val.get(trainer.score_metric) if val and just_validated else None,
            "progress": asdict(trainer.progress),
            "results": trainer.results,
            "evaluate_seconds": trainer.evaluate_seconds,
            "meter_steps": trainer.meter.steps,
            **trainer.run_folder.find_metrics_position(),
            "world_size": self.here.world_size,
            "config": asdict(trainer.options),
            "time": time.time(),
        }
