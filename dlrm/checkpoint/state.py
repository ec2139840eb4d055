"""A sharded model and its optimizers as named rectangles, and back, under any world size and sharding plan.

Names: model/NAME for a weight or buffer, optim/NAME/KEY for the optimizer's state of a weight (KEY:
momentum1, step, ...). A rectangle's offset is in the whole table, so names and offsets do not depend on the
sharding.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dlrm.checkpoint.blocks import CorruptCheckpoint, StoredPiece
from dlrm.checkpoint.folder import Checkpoint
from dlrm.checkpoint.saver import CheckpointWriter, WritePieces
from dlrm.checkpoint.shards import TensorPiece, read_into, write_pieces
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.trace import span

# The same state under two names: torch's optimizers (for data-parallel tables), fbgemm's fused ones.
EQUIVALENT_KEYS = {"sum": "momentum1", "exp_avg": "momentum1", "exp_avg_sq": "momentum2"}
STEP = "step"  # torch's optimizers count steps in their state, the fused ones outside of it


@runtime_checkable
class FileBackedTable(Protocol):
    """All rows of a table in files: `ssd.cached_table.WholeTable`, imported only if there are any."""

    def size(self) -> torch.Size: ...

    def copy(self) -> Iterator[Any]: ...

    def fill(self, read: Callable[[tuple[int, ...], torch.Tensor], int]) -> int: ...


def _list_local_pieces(name: str, value: Any) -> Iterator[TensorPiece]:
    """This rank's rectangles of a tensor; one that is not sharded is a single rectangle on every rank."""
    if isinstance(value, FileBackedTable):
        for tensor in value.copy():
            yield TensorPiece(name, tuple(value.size()), tensor.place, tensor, kept=True)
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            place = tuple(shard.metadata.shard_offsets)
            yield TensorPiece(name, tuple(value.size()), place, shard.tensor)
    else:
        yield TensorPiece(name, tuple(value.shape), (0,) * value.dim(), value)


def _list_optimizer_values(optimizer: Any) -> Iterator[tuple[str, Any]]:
    for parameter, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            # the fused optimizers' keys are TABLE.momentum1
            if isinstance(value, torch.Tensor | ShardedTensor):
                yield f"optim/{_without_compile_prefix(parameter)}/{key.rsplit('.', 1)[-1]}", value


def _without_compile_prefix(name: str) -> str:
    return name.replace("_orig_mod.", "")  # torch.compile adds it; the weights are the same


def list_named_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything that a checkpoint stores: torch.Tensor, ShardedTensor or FileBackedTable.

    `optimizer`: None for the weights alone.
    """
    ssd_tables = getattr(model, "ssd_tables", None)  # tables in files
    whole: Callable[[str, Any], Any] = ssd_tables.read_whole_table if ssd_tables else lambda _, value: value
    for name, value in model.state_dict().items():
        yield f"model/{_without_compile_prefix(name)}", whole(name, value)
    if optimizer is not None:
        for name, value in _list_optimizer_values(optimizer):
            yield name, whole(name, value)


def list_rank_pieces(model: nn.Module, optimizer: Any, rank: int) -> list[TensorPiece]:
    """What this rank writes: its shards; and on rank 0 the tensors that are the same on every rank."""
    return [
        piece
        for name, value in list_named_tensors(model, optimizer)
        for piece in _list_local_pieces(name, value)
        if isinstance(value, ShardedTensor | FileBackedTable) or rank == 0
    ]


@torch.no_grad()
def restore_state(
    found: Checkpoint, model: nn.Module, optimizer: Any | None, others: Sequence[TensorPiece] = ()
) -> int:
    """Fill the model, its optimizers' state unless `optimizer` is None, and `others`, in the order in which
    the files have them: so each block of a file is read once. Returns the bytes that were filled.

    Raises UserError where the checkpoint is of another model or optimizer, CorruptCheckpoint where it is
    damaged.
    """
    stored: dict[str, list[StoredPiece]] = {}
    for each in found.tensors:
        stored.setdefault(each.name, []).append(each)
    if optimizer is not None:
        _create_optimizer_state(optimizer, stored)
    filling = _Filling(found)
    for name, value in list_named_tensors(model, optimizer):
        source = _find_source(name, tuple(value.size()), stored, found)
        if source is None:  # a step counter that the fused optimizers do not have
            value.fill_(float(found.state.get("step", 0)))
        elif isinstance(value, FileBackedTable):
            filling.add_table(name, value, source)
        else:
            for piece in _list_local_pieces(name, value):
                filling.add_piece(piece, source)
    for piece in others:
        source = stored.get(piece.name, [])
        if any(each.shape != piece.shape for each in source):
            raise CorruptCheckpoint(f"{found.path}: {piece.name} has another shape")
        filling.add_piece(piece, source)
    try:
        read = filling.run()
    finally:
        found.reader.close()
    for module in model.modules():  # tables with a cache (UVM, SSD): its rows are outdated now
        reset = getattr(module, "reset_cache_states", None)
        if callable(reset):
            reset()
    if hasattr(optimizer, "set_optimizer_step"):
        optimizer.set_optimizer_step(int(found.state.get("step", 0)))  # type: ignore[union-attr]
    return read


Place = tuple[str, int]  # in the files: (file, byte)


class _Filling:
    """The tensors to be filled from a checkpoint, and where its files have them."""

    def __init__(self, found: Checkpoint) -> None:
        self.found = found
        self._pieces: list[TensorPiece] = []
        self._wanting: dict[StoredPiece, list[int]] = {}  # rectangle -> numbers of the pieces that need it
        self._tables: dict[str, tuple[Place, FileBackedTable, Sequence[StoredPiece]]] = {}

    def add_piece(self, piece: TensorPiece, source: Sequence[StoredPiece]) -> None:
        for each in source:
            self._wanting.setdefault(each, []).append(len(self._pieces))
        self._pieces.append(piece)

    def add_table(self, name: str, table: FileBackedTable, source: Sequence[StoredPiece]) -> None:
        """Fill a table in files from `source`, the stored rectangles of `name`."""
        place = min(_place_of(each) for each in source)
        if name.startswith("optim/"):  # not before the table's weights: filling those sets its state to 0
            weights = "model/" + name.removeprefix("optim/").rpartition("/")[0]
            place = max([place, *(self._tables[each][0] for each in [weights] if each in self._tables)])
        self._tables[name] = place, table, source

    def run(self) -> int:
        """Fill everything; returns the bytes that were filled."""
        counts = [0] * len(self._pieces)
        jobs: list[tuple[Place, StoredPiece | str]] = [(_place_of(each), each) for each in self._wanting]
        jobs += [(place, name) for name, (place, _, _) in self._tables.items()]
        done = 0
        for _, job in sorted(jobs, key=lambda each: each[0]):  # tables at one place stay in their order
            if isinstance(job, str):
                done += self._fill_table(job)
            else:
                self._read(job, self._wanting[job], counts)
        for piece, count in zip(self._pieces, counts, strict=True):
            self._check_count(piece, count)
            done += count * piece.tensor.element_size()
        return done

    def _read(self, stored: StoredPiece, numbers: list[int], counts: list[int]) -> None:
        """Copy a stored rectangle to the pieces of these numbers that overlap it; adds the elements that each
        got to `counts` [all pieces].
        """
        pieces = [self._pieces[number] for number in numbers]
        copied = read_into(self.found.path, self.found.files, stored, pieces, self.found.reader)
        for number, count in zip(numbers, copied, strict=True):
            counts[number] += count

    def _fill_table(self, name: str) -> int:
        _, table, source = self._tables[name]

        def fill_part(offset: tuple[int, ...], part: torch.Tensor) -> int:
            piece, count = TensorPiece(name, tuple(table.size()), offset, part), 0
            for each in source:
                (copied,) = read_into(self.found.path, self.found.files, each, [piece], self.found.reader)
                count += copied
            self._check_count(piece, count)
            return count * part.element_size()

        return table.fill(fill_part)

    def _check_count(self, piece: TensorPiece, count: int) -> None:
        if count != piece.tensor.numel():
            raise CorruptCheckpoint(
                f"{self.found.path}: has {count} of {piece.tensor.numel()} elements of {piece.name}: "
                "give another checkpoint"
            )


def _place_of(stored: StoredPiece) -> Place:
    return stored.file, stored.at


def _find_source(name: str, shape: tuple[int, ...], stored: dict[str, Any], found: Checkpoint) -> Any:
    """The stored rectangles of a tensor, also under the other name of the same optimizer state; None for a
    step counter that the checkpoint does not have.
    """
    head, _, key = name.rpartition("/")
    names = [name]
    if head.startswith("optim/"):
        names += [
            f"{head}/{a}"
            for a in (EQUIVALENT_KEYS.get(key), *(k for k, v in EQUIVALENT_KEYS.items() if v == key))
            if a
        ]
    for each in names:
        if each in stored:
            if stored[each][0].shape == shape:
                return stored[each]
            raise UserError(
                f"{found.path}: {each} is {list(stored[each][0].shape)}, this model has {list(shape)}: give "
                "the model options that it was made with, or --resume never to start at step 0"
            )
    if key == STEP and head.startswith("optim/"):
        return None
    what = "another optimizer" if head.startswith("optim/") else "another model"
    raise UserError(
        f"{found.path}: has no {name}, it was made with {what}: give the options that it was made with, "
        "or --resume never to start at step 0"
    )


def _create_optimizer_state(optimizer: Any, stored: dict[str, Any]) -> None:
    """Allocate the state of optimizers that create it in their first step (adam), to be filled."""
    for _, part in getattr(optimizer, "_optims", []):
        for name, parameter in part.params.items():
            if isinstance(parameter, ShardedTensor) or parameter in part.state:
                continue
            prefix = f"optim/{_without_compile_prefix(name)}/"
            made = {}
            for key, rectangles in stored.items():
                if key.startswith(prefix):
                    shape = parameter.shape if rectangles[0].shape else ()  # of this rank's shard
                    device = parameter.device if shape else "cpu"
                    made[key.removeprefix(prefix)] = torch.zeros(shape, device=device)
            if made:
                part.state[parameter] = made


def open_writer(
    root: Path, here: Ranks, store: Any, keep: int | None, timeout: float,
    lock_root: Callable[[], None] = lambda: None, write_pieces: WritePieces = write_pieces,
) -> CheckpointWriter:  # fmt: skip
    """A writer of tensors; the arguments are those of `CheckpointWriter`."""
    return CheckpointWriter(
        root, here, store, keep, timeout, lock_root, copy_pieces=copy_pieces, write_pieces=write_pieces
    )


def copy_pieces(
    parts: Sequence[TensorPiece], before: dict[tuple[str, tuple[int, ...]], torch.Tensor]
) -> list[TensorPiece]:
    """Copies of the pieces in CPU memory, so that training may change the originals while they are written.

    `before`: the copies of the last save, by (name, offset). They are overwritten and added to: allocating
    memory of the model's size anew for each checkpoint would take longer than the copy.
    """
    total = sum(piece.tensor.nbytes for piece in parts if not piece.kept)
    with span("checkpoint", "copy", bytes=total):
        made = []
        for piece in parts:
            if piece.kept:
                made.append(piece)
                continue
            key = (piece.name, piece.offset)
            kept = before.get(key)
            if kept is None or kept.shape != piece.tensor.shape or kept.dtype != piece.tensor.dtype:
                kept = before[key] = torch.empty_like(
                    piece.tensor, device="cpu", memory_format=torch.contiguous_format
                )
            kept.copy_(piece.tensor.detach())
            made.append(TensorPiece(piece.name, piece.shape, piece.offset, kept))
    return made
