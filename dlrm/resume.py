"""The way back: a training goes on from the newest good checkpoint of its run folder, or from a given one."""

import os
from pathlib import Path
from typing import Any

import torch

from dlrm import dist, loop, trace
from dlrm.checkpoint import folder, state
from dlrm.checkpoint.folder import Checkpoint
from dlrm.checkpoint.shards import Corrupt, Piece, read_into
from dlrm.errors import UserError
from dlrm.ranks import Ranks


def resume(job: Any, here: Ranks, root: Path | None) -> None:
    """Bring model, optimizers and progress of `job` to where a checkpoint stands, if there is one."""
    wishes, run = job.cfg.checkpoint, job.cfg.run
    own = [] if root is None or wishes.resume == "never" else dist.from_first(folder.published(root))
    given = Path(wishes.load_checkpoint_path) if wishes.load_checkpoint_path else None
    if own:
        found = _load_any(job, own, whole=run.mode == "train")
    elif given:
        paths = dist.from_first(list(folder.candidates(given)))
        if not paths:
            raise _for_all(UserError(f"--load_checkpoint_path {given}: no checkpoint there"))
        found = _load_any(job, paths, whole=run.mode == "train" and not wishes.load_model_only)
    else:
        if run.mode == "test":
            raise _for_all(UserError("there is no checkpoint to test: give --load_checkpoint_path"))
        return
    job.records.say(f"from {found.path}: step {found.state['step']}, epoch {found.state['epoch']}")
    if run.mode == "train" and (own or not wishes.load_model_only):
        with dist.together():
            _continue(job, here, found, clip_metrics=bool(own))


def _for_all(error: UserError) -> UserError:
    error.shared = True
    return error


def _load_any(job: Any, paths: list[Path], whole: bool) -> Checkpoint:
    """The newest that can be read, on all ranks."""
    for path in paths:
        problem = mistake = ""
        found = None
        try:
            with trace.span("checkpoint", "load") as loading:
                found = folder.describe(path)
                loading.update(bytes=state.restore(found, job.model, job.optimizer if whole else None))
        except (Corrupt, OSError) as error:
            problem = str(error)
        except UserError as error:
            mistake = str(error)
        told = dist.everyone((problem, mistake))
        for _, text in told:
            if text:
                raise _for_all(UserError(text))
        problem = next((text for text, _ in told if text), "")
        if not problem and found is not None:
            return found
        job.records.warn(f"checkpoint skipped: {problem}")
    raise _for_all(
        UserError(f"{paths[0].parent}: no checkpoint of {len(paths)} is good; --resume never begins anew")
    )


def _continue(job: Any, here: Ranks, found: Checkpoint, clip_metrics: bool) -> None:
    values = found.state
    progress = loop.Progress(**values["progress"])
    vars(job.progress).update(vars(progress))
    job.results.update(values["results"])
    job.evaluating = values["evaluating"]
    if progress.position is not None:
        job.sets.train.set_epoch(progress.epoch)
        job.sets.train.load_state_dict(progress.position)
    _own_state(job, here, found)
    size = values["metrics_bytes"]
    if clip_metrics and job.records.folder and size is not None:  # what came after is going to come again
        path = job.records.folder / "metrics.jsonl"
        if path.stat().st_size > size:
            os.truncate(path, size)


def _own_state(job: Any, here: Ranks, found: Checkpoint) -> None:
    """What each rank had for itself; with other ranks, the sums of a report go to the first."""
    sums = job.meter.state()[0]
    before = int(found.state["world_size"])
    ranks = [here.rank] if before == here.world_size else range(before) if here.first else []
    total = torch.zeros_like(sums)
    for rank in ranks:
        total += _vector(found, f"meter/{rank}", sums)
    sums.copy_(total)
    job.meter.steps = int(found.state["meter_steps"])
    if before == here.world_size:
        torch.set_rng_state(_vector(found, f"rng/cpu/{here.rank}", torch.get_rng_state()))
        if torch.cuda.is_available() and any(each.name == f"rng/cuda/{here.rank}" for each in found.tensors):
            torch.cuda.set_rng_state(_vector(found, f"rng/cuda/{here.rank}", torch.cuda.get_rng_state()))


def _vector(found: Checkpoint, name: str, like: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(like.shape, dtype=like.dtype)
    for stored in found.tensors:
        if stored.name == name:
            read_into(found.path, found.files, stored, Piece(name, tuple(like.shape), (0,), made))
    return made.to(like.device)
