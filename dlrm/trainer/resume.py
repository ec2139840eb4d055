"""Resume a training: from the newest readable checkpoint of its run folder, or from one that the user named.

In: a Trainer as built from its options. Out: the same with the checkpoint's weights, optimizer state,
progress, position in the data and random numbers, so that the next step is the one that would have come
without a stop.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlrm.checkpoint import folder, state
from dlrm.checkpoint.blocks import CorruptCheckpoint
from dlrm.checkpoint.folder import Checkpoint
from dlrm.checkpoint.shards import TensorPiece
from dlrm.runtime import session, trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop
from dlrm.trainer.checkpointing import locate_checkpoints


def resume_training(trainer: Any, here: Ranks, root: Path | None) -> None:
    """Bring `trainer` to the state of a checkpoint, if there is one; and metrics.jsonl with it. A collective.

    root  the run's own folder of checkpoints. One in it comes before --load_checkpoint_path: a run that was
          started from another run's checkpoint, and then stopped, resumes from its own
    """
    options, run = trainer.options.checkpoint, trainer.options.run
    paths, own = _list_sources(trainer.options, here, root)
    if not paths:
        if run.mode == "test":
            raise _mark_shared(UserError("there is no checkpoint to test: give --load_checkpoint_path"))
        with session.errors_on_all_ranks():
            if run.mode == "train":
                trainer.run_folder.start_metrics()
        return
    with_progress = run.mode == "train" and (own or not options.load_model_only)
    found, restored = _load_newest(trainer, here, paths, with_progress)
    trainer.run_folder.print_line(
        f"from {found.path}: step {found.state['step']}, epoch {found.state['epoch']}"
    )
    with session.errors_on_all_ranks():
        if restored is not None:
            _restore_progress(trainer, found, *restored)
        stored = found.state
        if run.mode != "train":
            trainer.run_folder.append_metrics()
        elif own:
            trainer.run_folder.resume_metrics(
                stored["step"], stored.get("metrics_bytes"), stored.get("metrics_crc32")
            )
        else:
            trainer.run_folder.start_metrics()


def _list_sources(options: Any, here: Ranks, root: Path | None) -> tuple[list[Path], bool]:
    """(the checkpoints that this run can start from, newest first; whether they are its own). A collective:
    rank 0 lists the folders for all, because on a shared file system another rank may not see a new name yet.
    """
    asked = options.checkpoint
    given = Path(asked.load_checkpoint_path) if asked.load_checkpoint_path else None
    with session.errors_on_all_ranks():
        listed: list[Path] = []
        if here.first and root is not None and asked.resume != "never":
            listed = folder.list_checkpoints(root)
        own = bool(listed)
        if here.first and given and not own:
            listed = list(folder.find_checkpoints(given))
            if not listed:
                raise UserError(f"--load_checkpoint_path {given}: {folder.NONE_FOUND}")
    return session.broadcast_from_first((listed, own))


def find_stored_model(options: Any, here: Ranks) -> Checkpoint | None:
    """The description of the newest readable checkpoint that this run can start from. A collective."""
    for path in _list_sources(options, here, locate_checkpoints(options))[0]:
        with contextlib.suppress(CorruptCheckpoint, OSError):  # skipped with a warning when it is loaded
            return folder.read_trained(path)
    return None


def _mark_shared(error: UserError) -> UserError:
    """An error that all ranks raise alike: only rank 0 prints it."""
    error.shared = True
    return error


def _load_newest(
    trainer: Any, here: Ranks, paths: list[Path], with_progress: bool
) -> tuple[Checkpoint, tuple[loop.Progress, "RankState"] | None]:
    """Load the first of `paths` (newest first) that all ranks can read; a damaged one is skipped with a
    warning.

    `with_progress`: load the optimizers' state too, and return the progress and this rank's own state; else
    only the weights. A checkpoint that does not fit the model is a UserError and not skipped: an older one
    would not fit either.
    """
    for path in paths:
        damage = mistake = ""
        found = progress = rank_state = None
        try:
            with trace.span("checkpoint", "load") as loading:
                found = folder.read_trained(path)
                progress, old_keys = check_state(found, with_progress)
                if old_keys:
                    trainer.run_folder.print_warning(
                        f"{path}: has old names ({', '.join(old_keys)}); they are read in this release only"
                    )
                optimizer = trainer.optimizer if with_progress else None
                own = StoredRankState(trainer, here, found) if with_progress else None
                others = own.pieces if own else []
                loading.update(bytes=state.restore_state(found, trainer.model, optimizer, others))
                rank_state = own.join() if own else None
        except (CorruptCheckpoint, OSError) as error:
            damage = str(error)
        except UserError as error:
            mistake = str(error)
        # all ranks take the same checkpoint: what one cannot read, none uses
        outcomes = session.gather_from_all((damage, mistake))
        for _, text in outcomes:
            if text:
                raise _mark_shared(UserError(text))
        damage = next((text for text, _ in outcomes if text), "")
        if not damage and found is not None:
            return found, None if progress is None or rank_state is None else (progress, rank_state)
        trainer.run_folder.print_warning(f"checkpoint skipped: {damage}")
    raise _mark_shared(
        UserError(
            f"{paths[0].parent}: none of {len(paths)} checkpoints can be read; "
            "give --resume never to start at step 0"
        )
    )


COUNT = (int,)
NUMBER = (int, float)
MAX_COUNT = 1 << 53  # steps, rows: the largest range that a double holds exactly
STATE: dict[str, tuple[type, ...]] = {
    "step": COUNT, "epoch": COUNT, "world_size": COUNT, "meter_steps": COUNT, "evaluate_seconds": NUMBER,
    "progress": (dict,), "results": (dict,),
}  # fmt: skip
PROGRESS: dict[str, tuple[type, ...]] = {
    "step": COUNT, "epoch": COUNT, "lr": NUMBER, "samples": COUNT, "seconds": NUMBER, "timed_samples": COUNT,
    "val_scores": (list,), "position": (dict, type(None)), "validating_at": (str, type(None)),
    "target_reached": (bool,), "best_score": (*NUMBER, type(None)), "best_epoch": (*NUMBER, type(None)),
    "loss_scale": NUMBER, "steps_since_overflow": COUNT, "skipped_steps": COUNT,
}  # fmt: skip
POSITION: dict[str, tuple[type, ...]] = {
    "epoch": COUNT, "step": COUNT, "rows": COUNT, "segments": (list,), "seed": COUNT,
    "window": (int, type(None)), "block": (int, type(None)),
}  # fmt: skip
# Names that checkpoints had at first; still read, with a warning, for one release.
OLD_STATE_KEYS = {"evaluating": "evaluate_seconds"}
OLD_PROGRESS_KEYS = {
    "val_aurocs": "val_scores", "judging": "validating_at", "good": "target_reached",
    "good_steps": "steps_since_overflow",
}  # fmt: skip
ADDED_PROGRESS_KEYS = ("best_score", "best_epoch")  # which earlier checkpoints lack


def check_state(found: Checkpoint, with_progress: bool) -> tuple[loop.Progress | None, list[str]]:
    """(how far the training had come, names of an earlier release in it); no progress unless `with_progress`.

    Raises CorruptCheckpoint where a value is missing, of another type or out of range: nothing of a damaged
    checkpoint reaches the training. Old names in `found.state` are replaced by the new ones.
    """
    kinds = STATE if with_progress else {key: STATE[key] for key in ("step", "epoch")}
    old_keys = _rename_keys(found.state, OLD_STATE_KEYS)
    _check_values(found, "", found.state, kinds)
    if not with_progress:
        return None, []
    values = found.state["progress"]
    old_keys += _rename_keys(values, OLD_PROGRESS_KEYS)
    for key in ADDED_PROGRESS_KEYS:
        values.setdefault(key, None)
    _check_values(found, "progress/", values, PROGRESS)
    marker = found.path / folder.MARKER
    if not 1 <= found.state["world_size"] <= len(found.files):  # every rank writes a file
        raise CorruptCheckpoint(f"{marker}: world_size {found.state['world_size']} is impossible")
    if values["validating_at"] not in (None, "epoch", "step"):
        raise CorruptCheckpoint(f"{marker}: progress/validating_at is impossible")
    scores = [each for each in values["val_scores"] if each is not None]
    if not all(type(each) in NUMBER for each in scores) or set(values) != set(PROGRESS):
        raise CorruptCheckpoint(f"{marker}: progress is impossible")
    if not all(isinstance(each, dict) for each in found.state["results"].values()):
        raise CorruptCheckpoint(f"{marker}: results are impossible")
    position = values["position"]
    if position is not None:
        position.setdefault("block", None)  # which earlier checkpoints lack
        _check_values(found, "position/", position, POSITION)
        end = 0
        for each in position["segments"]:  # [begin, end) of rows, in rising order
            pair = isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each)
            if not pair or not end <= each[0] <= each[1] <= position["rows"]:
                raise CorruptCheckpoint(f"{marker}: position/segments are impossible")
            end = each[1]
    return loop.Progress(**values), old_keys


def _rename_keys(values: dict[str, Any], new_names: dict[str, str]) -> list[str]:
    """Replace old keys by new ones in place; returns the old ones that were there."""
    old_keys = [old for old, new in new_names.items() if old in values and new not in values]
    for old in old_keys:
        values[new_names[old]] = values.pop(old)
    return old_keys


def _check_values(
    found: Checkpoint, where: str, values: dict[str, Any], kinds: dict[str, tuple[type, ...]]
) -> None:
    """Each key is there, of one of its types; numbers are from 0 to MAX_COUNT, not NaN."""
    for key, kind in kinds.items():
        value = values.get(key, ...)
        possible = type(value) in kind and (not isinstance(value, int | float) or 0 <= value <= MAX_COUNT)
        if not possible:
            raise CorruptCheckpoint(f"{found.path / folder.MARKER}: {where}{key} is missing or impossible")


@dataclass
class RankState:
    """What one rank has for itself: the sums of its next report, the states of its random numbers."""

    sums: torch.Tensor  # [4] float64, as meter.ThroughputMeter has them
    random: torch.Tensor | None = None  # uint8, as torch.get_rng_state gives it
    cuda_random: torch.Tensor | None = None


def _restore_progress(
    trainer: Any, found: Checkpoint, progress: loop.Progress, rank_state: RankState
) -> None:
    """Put the trainer where the checkpoint was written: progress, results, random numbers, and the position
    in the training set.
    """
    # in place: the loss scale of mixed precision has a reference to it
    vars(trainer.progress).update(vars(progress))
    trainer.results.update(found.state["results"])
    trainer.evaluate_seconds = found.state["evaluate_seconds"]
    if progress.position is not None:
        trainer.datasets.train.set_epoch(progress.epoch)
        trainer.datasets.train.load_state_dict(progress.position)
    trainer.meter.sums.copy_(rank_state.sums)
    trainer.meter.steps = int(found.state["meter_steps"])
    if rank_state.random is not None:
        torch.set_rng_state(rank_state.random)
    if rank_state.cuda_random is not None:
        torch.cuda.set_rng_state(rank_state.cuda_random)


class StoredRankState:
    """This rank's own state in a checkpoint: `pieces` are to be filled, `join` makes a RankState of them.

    With another number of ranks than before, rank 0 takes the sums of all old ranks (the report adds them
    over the ranks anyway), and no rank takes random numbers.
    """

    def __init__(self, trainer: Any, here: Ranks, found: Checkpoint) -> None:
        """found: the description of a checkpoint, of which nothing is read yet."""
        self.path, self.rank = found.path, here.rank
        self.sums = torch.zeros_like(trainer.meter.sums)
        shapes = {each.name: each.shape for each in found.tensors}
        old_world_size = int(found.state["world_size"])
        same_ranks = old_world_size == here.world_size
        sources = [here.rank] if same_ranks else range(old_world_size) if here.first else []
        # the first checkpoints had no clicks
        self._meters = [
            _make_piece(name, self.sums[:2] if shapes.get(name) == (2,) else self.sums)
            for name in (f"meter/{rank}" for rank in sources)
        ]
        self._random = _make_piece(f"rng/cpu/{here.rank}", torch.get_rng_state()) if same_ranks else None
        name = f"rng/cuda/{here.rank}"
        with_cuda = same_ranks and torch.cuda.is_available() and name in shapes
        self._cuda_random = _make_piece(name, torch.cuda.get_rng_state()) if with_cuda else None
        self.pieces = [each for each in (*self._meters, self._random, self._cuda_random) if each]

    def join(self) -> RankState:
        for piece in self._meters:
            self.sums[: len(piece.tensor)] += piece.tensor.to(self.sums.device)
        found = RankState(self.sums)
        if self._random:
            found.random = self._random.tensor
            try:
                torch.Generator().set_state(found.random)  # refuses bytes that are not a state
            except RuntimeError as error:
                raise CorruptCheckpoint(
                    f"{self.path}: rng/cpu/{self.rank}: {str(error).splitlines()[0][:100]}"
                ) from None
        if self._cuda_random:
            found.cuda_random = self._cuda_random.tensor
        return found


def _make_piece(name: str, like: torch.Tensor) -> TensorPiece:
    """A whole tensor to be filled, of the shape and dtype of `like`."""
    return TensorPiece(name, tuple(like.shape), (0,) * like.dim(), torch.zeros(like.shape, dtype=like.dtype))
