"""The way back: a training goes on from the newest good checkpoint of its run folder, or from a given one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dlrm.checkpoint import folder, state
from dlrm.checkpoint.folder import Checkpoint
from dlrm.checkpoint.shards import CorruptCheckpoint, TensorPiece, read_into
from dlrm.runtime import session, trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.trainer import loop


def resume_training(job: Any, here: Ranks, root: Path | None) -> None:
    """Bring model, optimizers and progress of `job` to where a checkpoint stands, if there is one."""
    wishes, run = job.cfg.checkpoint, job.cfg.run
    with session.errors_on_all_ranks():
        mine = (
            folder.list_checkpoints(root)
            if here.first and root is not None and wishes.resume != "never"
            else []
        )
    own = session.broadcast_from_first(mine)
    given = Path(wishes.load_checkpoint_path) if wishes.load_checkpoint_path else None
    if own:
        found, old = _load_newest(job, here, own, whole=run.mode == "train")
    elif given:
        with session.errors_on_all_ranks():
            mine = list(folder.find_checkpoints(given)) if here.first else []
        paths = session.broadcast_from_first(mine)
        if not paths:
            raise _on_all_ranks(UserError(f"--load_checkpoint_path {given}: no checkpoint there"))
        found, old = _load_newest(job, here, paths, whole=run.mode == "train" and not wishes.load_model_only)
    else:
        if run.mode == "test":
            raise _on_all_ranks(UserError("there is no checkpoint to test: give --load_checkpoint_path"))
        with session.errors_on_all_ranks():
            job.records.start_anew()
        return
    job.records.say(f"from {found.path}: step {found.state['step']}, epoch {found.state['epoch']}")
    with session.errors_on_all_ranks():
        if old is not None:
            _restore_progress(job, here, found, old)
        state = found.state
        if run.mode == "test":
            job.records.append()
        elif own:
            job.records.go_on(state["step"], state.get("metrics_bytes"), state.get("metrics_crc32"))
        else:
            job.records.start_anew()


def _on_all_ranks(error: UserError) -> UserError:
    error.shared = True
    return error


def _load_newest(
    job: Any, here: Ranks, paths: list[Path], whole: bool
) -> tuple[Checkpoint, tuple[loop.Progress, "Own"] | None]:
    """The newest that can be read, on all ranks, and (`whole`) what else it knows about the training."""
    for path in paths:
        problem = mistake = ""
        found, old = None, None
        try:
            with trace.span("checkpoint", "load") as loading:
                found = folder.read_description(path)
                old = check_state(found, whole)
                loading.update(bytes=state.restore_state(found, job.model, job.optimizer if whole else None))
                own = _restore_rank_state(job, here, found) if whole else None
        except (CorruptCheckpoint, OSError) as error:
            problem = str(error)
        except UserError as error:
            mistake = str(error)
        told = session.gather_from_all((problem, mistake))
        for _, text in told:
            if text:
                raise _on_all_ranks(UserError(text))
        problem = next((text for text, _ in told if text), "")
        if not problem and found is not None:
            return found, None if old is None or own is None else (old, own)
        job.records.warn(f"checkpoint skipped: {problem}")
    raise _on_all_ranks(
        UserError(f"{paths[0].parent}: no checkpoint of {len(paths)} is good; --resume never begins anew")
    )


COUNT = (int,)
NUMBER = (int, float)
MOST = 1 << 53  # steps, rows: what a double still counts
STATE: dict[str, tuple[type, ...]] = {
    "step": COUNT, "epoch": COUNT, "world_size": COUNT, "meter_steps": COUNT, "evaluating": NUMBER,
    "progress": (dict,), "results": (dict,),
}  # fmt: skip
PROGRESS: dict[str, tuple[type, ...]] = {
    "step": COUNT, "epoch": COUNT, "lr": NUMBER, "samples": COUNT, "seconds": NUMBER, "timed_samples": COUNT,
    "val_aurocs": (list,), "position": (dict, type(None)), "judging": (str, type(None)), "good": (bool,),
    "loss_scale": NUMBER, "good_steps": COUNT, "skipped_steps": COUNT,
}  # fmt: skip
POSITION: dict[str, tuple[type, ...]] = {
    "epoch": COUNT, "step": COUNT, "rows": COUNT, "segments": (list,), "seed": COUNT,
    "window": (int, type(None)),
}  # fmt: skip


def check_state(found: Checkpoint, whole: bool) -> loop.Progress | None:
    """How far the training had come, `whole`; Corrupt where a value is missing, of another kind or out of
    range.
    """
    kinds = STATE if whole else {key: STATE[key] for key in ("step", "epoch")}
    _check_values(found, "", found.state, kinds)
    if not whole:
        return None
    values = found.state["progress"]
    _check_values(found, "progress/", values, PROGRESS)
    if not 1 <= found.state["world_size"] <= len(found.files):  # every rank writes a file
        raise CorruptCheckpoint(
            f"{found.path / folder.MARKER}: world_size {found.state['world_size']} is impossible"
        )
    if values["judging"] not in (None, "epoch", "step"):
        raise CorruptCheckpoint(f"{found.path / folder.MARKER}: progress/judging is impossible")
    scores = [each for each in values["val_aurocs"] if each is not None]
    if not all(type(each) in NUMBER for each in scores) or set(values) != set(PROGRESS):
        raise CorruptCheckpoint(f"{found.path / folder.MARKER}: progress is impossible")
    if not all(isinstance(each, dict) for each in found.state["results"].values()):
        raise CorruptCheckpoint(f"{found.path / folder.MARKER}: results are impossible")
    position = values["position"]
    if position is not None:
        _check_values(found, "position/", position, POSITION)
        end = 0
        for each in position["segments"]:
            pair = isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each)
            if not pair or not end <= each[0] <= each[1] <= position["rows"]:
                raise CorruptCheckpoint(f"{found.path / folder.MARKER}: position/segments are impossible")
            end = each[1]
    return loop.Progress(**values)


def _check_values(
    found: Checkpoint, where: str, values: dict[str, Any], kinds: dict[str, tuple[type, ...]]
) -> None:
    for key, kind in kinds.items():
        value = values.get(key, ...)
        good = type(value) in kind and (not isinstance(value, int | float) or 0 <= value <= MOST)
        if not good:
            raise CorruptCheckpoint(f"{found.path / folder.MARKER}: {where}{key} is missing or impossible")


def _restore_progress(job: Any, here: Ranks, found: Checkpoint, old: tuple[loop.Progress, "Own"]) -> None:
    progress, own = old
    vars(job.progress).update(vars(progress))
    job.results.update(found.state["results"])
    job.evaluating = found.state["evaluating"]
    if progress.position is not None:
        job.datasets.train.set_epoch(progress.epoch)
        job.datasets.train.load_state_dict(progress.position)
    job.meter.state()[0].copy_(own.sums)
    job.meter.steps = int(found.state["meter_steps"])
    if own.random is not None:
        torch.set_rng_state(own.random)
    if own.cuda_random is not None:
        torch.cuda.set_rng_state(own.cuda_random)


@dataclass
class Own:
    """What a rank had for itself: the sums of its report, the states of its random numbers."""

    sums: torch.Tensor
    random: torch.Tensor | None = None
    cuda_random: torch.Tensor | None = None


def _restore_rank_state(job: Any, here: Ranks, found: Checkpoint) -> Own:
    """With other ranks than before, the sums of a report go to the first."""
    sums = job.meter.state()[0]
    before = int(found.state["world_size"])
    ranks = [here.rank] if before == here.world_size else range(before) if here.first else []
    own = Own(torch.zeros_like(sums))
    for rank in ranks:
        own.sums += _read_vector(found, f"meter/{rank}", sums)
    if before == here.world_size:
        own.random = _read_vector(found, f"rng/cpu/{here.rank}", torch.get_rng_state())
        try:
            torch.Generator().set_state(own.random)
        except RuntimeError as error:
            raise CorruptCheckpoint(
                f"{found.path}: rng/cpu/{here.rank}: {str(error).splitlines()[0][:100]}"
            ) from None
        name = f"rng/cuda/{here.rank}"
        if torch.cuda.is_available() and any(each.name == name for each in found.tensors):
            own.cuda_random = _read_vector(found, name, torch.cuda.get_rng_state())
    return own


def _read_vector(found: Checkpoint, name: str, like: torch.Tensor) -> torch.Tensor:
    made, count = torch.zeros(like.shape, dtype=like.dtype), 0
    piece = TensorPiece(name, tuple(like.shape), (0,) * like.dim(), made)
    for stored in found.tensors:
        if stored.name == name:
            if stored.shape != piece.shape:
                raise CorruptCheckpoint(f"{found.path}: {name} has another shape")
            count += read_into(found.path, found.files, stored, piece, found.blocks)
    if count != made.numel():
        raise CorruptCheckpoint(f"{found.path}: {name} is not whole")
    return made.to(like.device)
