"""At which steps a training saves, by its count of steps: every N, after an epoch, after a validation.

In: the options, and a training's progress, between its steps. Out: calls of `save`, the same on all ranks.
Needs no torch; `checkpointing.CheckpointManager` adds clocks and signals, the emulator nothing.
"""

from typing import Any

from dlrm.config.options import CheckpointOptions
from dlrm.trainer import loop


class CheckpointSchedule(loop.Hooks):
    """The loop calls it between its steps; a subclass says what `save` does."""

    def __init__(self, options: CheckpointOptions, progress: loop.Progress) -> None:
        """`progress`: of the training; it is changed in place, and never another one."""
        self.options, self.progress = options, progress
        self._save_requested = False  # save after the step that is under way
        self._validated_step: int | None = None  # step of the last validation
        self._saved_position: Any = None  # `_describe_position` of the newest save

    def save(self) -> None:
        """Save the state now. All ranks call it at the same step."""
        raise NotImplementedError

    def note_save(self) -> None:
        """What is to be saved is being saved: called by `save`."""
        self._save_requested = False
        self._saved_position = self._describe_position()

    def start(self) -> None:
        """Call it on all ranks, once the training is where it starts or resumes."""
        self._saved_position = self._describe_position()
        if self.options.save_initial_model and self.progress.step == 0:
            self.save()

    def after_step(self) -> None:
        every = self.options.checkpoint_every_steps
        if self._save_requested or (every and self.progress.step % every == 0):
            self.save()

    def after_epoch(self) -> None:
        if self._save_requested or (self.options.asked and self.options.checkpoint_epochs):
            self.save()

    def after_validation(self) -> None:
        # not saved at once: the loop has not yet recorded the validation's score in `progress`
        self._save_requested = self._save_requested or self.options.save_model_after_each_eval
        self._validated_step = self.progress.step

    def save_last(self) -> None:
        """Save the last state of a training that is over, unless it is saved already."""
        if self.options.asked and self.has_news:
            self.save()

    @property
    def has_news(self) -> bool:
        """Whether there is something that the newest save does not have."""
        return self._describe_position() != self._saved_position

    def _describe_position(self) -> Any:
        """Changes whenever there is something new to save: a step, an epoch, the start or end of a
        validation.
        """
        progress = self.progress
        return (
            progress.step, progress.epoch, progress.validating_at, progress.target_reached,
            len(progress.val_scores),
        )  # fmt: skip
