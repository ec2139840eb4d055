"""Checkpoints without tensors: the same writes, at the same steps, by the same writer.

In: what the run wrote. Out: folders that look like checkpoints on the disk, whose bytes mean nothing: a
training refuses them, because their description lists no tensor.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, os_errors_as_user_errors
from dlrm.checkpoint.blocks import ChecksummedFile
from dlrm.checkpoint.saver import CheckpointWriter
from dlrm.config.options import CheckpointOptions
from dlrm.emulate.tables import CHECKPOINT, TableFiles
from dlrm.emulate.workload import RankWorkload
from dlrm.runtime.trace import span
from dlrm.trainer import loop
from dlrm.trainer.checkpoint_schedule import CheckpointSchedule


@dataclass(frozen=True)
class MadeUpFile:
    """This rank's file of a checkpoint: bytes of each write."""

    writes: Sequence[int]

    @property
    def nbytes(self) -> int:
        return sum(self.writes)


def write_made_up_file(folder: Path, file: str, pieces: list[MadeUpFile]) -> dict[str, Any]:
    """As `shards.write_pieces`: write FOLDER/FILE and fsync it; its description has no tensors."""
    (made,) = pieces
    noise = memoryview(np.random.default_rng(0).bytes(max(made.writes, default=0)))
    with os_errors_as_user_errors(folder / file):
        output = ChecksummedFile(folder / file)
        try:
            with span("checkpoint", "write", file=file, bytes=made.nbytes):
                for size in made.writes:
                    output.write_now(noise[:size])
            output.finish_file()
        finally:
            output.close()
    return {"tensors": [], "file": {file: output.describe()}}


class EmulatedCheckpoints(CheckpointSchedule):
    """Saves when the training would. `writer`: None where nothing is saved."""

    def __init__(
        self, options: CheckpointOptions, progress: loop.Progress, workload: RankWorkload, meter: loop.Meter,
        tables: TableFiles | None,
    ) -> None:  # fmt: skip
        super().__init__(options, progress)
        self.writer: CheckpointWriter | None = None
        self.meter, self.workload, self.tables = meter, workload, tables
        self.saved = 0

    def save(self) -> None:
        self.note_save()
        if self.writer is None:
            return
        started = time.perf_counter()
        values = {"step": self.progress.step, "emulated": True, "score": None}
        written, described = self.workload.checkpoint_writes, self.workload.description_bytes or [0]
        made = [MadeUpFile(written[self.saved % len(written)])]
        self.writer.wait_for_save()
        self.end_if_failed(on_all_ranks=True)
        if self.tables:
            with span("checkpoint", "collect"):
                self.tables.do_at_once(CHECKPOINT)
        self.writer.save(made, values, self.progress.step, described[self.saved % len(described)])
        self.saved += 1
        self.meter.exclude_time(time.perf_counter() - started)

    def describe_missing(self) -> str:
        """Why nothing can be saved, or an empty text."""
        if self.workload.checkpoint_writes:
            return ""
        return "the run's trace has no checkpoint: none is written here; --from a run that saved one"

    def copy_pieces(self, pieces: list[MadeUpFile], _before: dict[Any, Any]) -> list[MadeUpFile]:
        """Takes as long as collecting and copying the tensors took in the run."""
        if seconds := self.workload.saves:
            time.sleep(seconds[self.saved % len(seconds)])
        return pieces

    def after_step(self) -> None:
        self.end_if_failed(on_all_ranks=False)
        super().after_step()

    def end_if_failed(self, on_all_ranks: bool) -> None:
        """A checkpoint that cannot be written ends the emulation: what would follow is not what the run did.

        on_all_ranks: all ranks call this after the same save, so that all of them know of its error.
        """
        if self.writer is None or self.writer.error is None:
            return
        error = UserError(f"a checkpoint cannot be written: {self.writer.error}; free space, or name another "
                          "--output_dir or --checkpoint_dir")  # fmt: skip
        error.shared = on_all_ranks
        raise error

    def finish(self) -> None:
        """Save the last state, if it is not saved, and wait for the disk."""
        self.save_last()
        if self.writer is not None:
            self.writer.wait_for_save()
            self.end_if_failed(on_all_ranks=True)
