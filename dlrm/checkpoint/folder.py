"""The folder of checkpoints: names, publishing, reading descriptions, removing old ones.

checkpoints/00003-step-1200/            rank00000.safetensors, ..., and checkpoint.json, written last
checkpoints/.dlrm-io-checkpoint-TOKEN/  being written; renamed once every byte is on the disk

So a folder with a final name is complete, whenever the job was killed. The folder of checkpoints may contain
other things. Each checkpoint has the mark of `common.owned.WorkFolders`: only a folder with that mark, and
with no other files in it than a checkpoint's, is ever removed.
"""

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.inputs import check_regular, read_json_object
from common.owned import MARK, WorkFolders
from dlrm.checkpoint.blocks import ITEM_BYTES, BlockReader, CorruptCheckpoint, StoredPiece, write_synced
from dlrm.runtime.trace import sync_to_disk

MARKER = "checkpoint.json"
VERSION = 1
NAME = re.compile(r"(\d{5,12})-step-(\d{1,18})", re.ASCII)
FILE = re.compile(r"rank\d{5,7}\.safetensors", re.ASCII)
KIND = WorkFolders("checkpoint", re.compile(rf"{FILE.pattern}|{re.escape(MARKER)}", re.ASCII))
MAX_DESCRIPTION_BYTES = 1 << 30
MAX_BLOCK_BYTES = 64 << 20  # bytes under one checksum


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as its description says."""

    path: Path
    state: dict[str, Any]  # everything that is not a tensor
    tensors: list[StoredPiece]
    files: dict[str, dict[str, Any]]  # name -> bytes, block (size), crc32 of each block
    reader: BlockReader = field(default_factory=BlockReader, compare=False)

    @property
    def score(self) -> float | None:
        """Of the validation at its step; None where there was none."""
        score = self.state.get("score")
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def read_description(path: Path) -> Checkpoint:
    """Read a checkpoint's description and compare it with the files that are there.

    Raises CorruptCheckpoint, with one line, for anything but a complete checkpoint: a description is data
    from a file that may be damaged or forged, and nothing in it is used unchecked. The files' contents are
    compared with their checksums later, when they are read.
    """
    marker = path / MARKER
    try:
        values = read_json_object(marker, MAX_DESCRIPTION_BYTES, nan=True)
        if values.pop("crc32", None) != _compute_checksum(values):
            raise CorruptCheckpoint(f"{marker}: wrong checksum")
        if values.get("version") != VERSION:
            raise CorruptCheckpoint(
                f"{path}: version {str(values.get('version'))[:20]}, {VERSION} is expected"
            )
        state, tensors, files = values["state"], values["tensors"], values["files"]
        if not (isinstance(state, dict) and isinstance(tensors, list) and isinstance(files, dict)):
            raise CorruptCheckpoint(f"{marker}: not a checkpoint")
        found = Checkpoint(path, state, [StoredPiece.parse(each) for each in tensors], files)
        for name, facts in files.items():
            _check_file(path, name, facts)
        _check_tensors(found)
    except CorruptCheckpoint:
        raise
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{error.filename} is missing: half-written") from None
    except UserError as error:
        missing = not os.path.lexists(marker)
        raise CorruptCheckpoint(f"{marker} is missing: half-written" if missing else str(error)) from None
    except OSError as error:
        raise CorruptCheckpoint(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{marker}: not a checkpoint ({type(error).__name__}: {str(error)[:100]})"
        ) from None
    return found


def read_trained(path: Path) -> Checkpoint:
    """As `read_description`, for those who want the tensors; UserError for one of the emulator's, which has
    none.
    """
    found = read_description(path)
    if found.state.get("emulated"):
        raise UserError(
            f"{path}: was made by the emulator, its bytes have no meaning: give one of a training"
        )
    return found


def _check_file(folder: Path, name: str, facts: Any) -> None:
    """The file is there and has the described size, and one checksum for each block."""
    if not FILE.fullmatch(name) or not isinstance(facts, dict):
        raise CorruptCheckpoint(f"{folder / MARKER}: not a checkpoint, impossible file name")
    size, block, sums = facts["bytes"], facts["block"], facts["crc32"]
    if not (_is_count(size) and _is_count(block) and 0 < block <= MAX_BLOCK_BYTES and isinstance(sums, list)):
        raise CorruptCheckpoint(f"{folder / MARKER}: not a checkpoint, impossible sizes of {name}")
    if not os.path.lexists(folder / name):
        raise CorruptCheckpoint(f"{folder / name} is missing: half-written")
    found = check_regular(folder / name).st_size
    if found != size or len(sums) != -(-size // block):
        raise CorruptCheckpoint(f"{folder / name}: has {found} bytes, {size} are expected")


def _check_tensors(found: Checkpoint) -> None:
    """Every rectangle is inside its file, and all rectangles of a tensor agree on its shape and dtype. So
    what is read or allocated later is never larger than the files.
    """
    first: dict[str, StoredPiece] = {}
    for stored in found.tensors:
        if stored.file not in found.files:
            raise CorruptCheckpoint(f"{found.path}: a tensor is in a file that is not listed")
        whole = first.setdefault(stored.name, stored)
        if (stored.shape, stored.dtype) != (whole.shape, whole.dtype):
            raise CorruptCheckpoint(f"{found.path}: {stored.name[:100]} has two shapes or types")
        end = stored.at + math.prod(stored.size) * ITEM_BYTES[stored.dtype]
        if end > found.files[stored.file]["bytes"]:
            raise CorruptCheckpoint(
                f"{found.path / stored.file}: a tensor ends at byte {end}, after the end of the file"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoints under their final names, newest first; damaged ones too, but no other folder of such a
    name: a checkpoint has its description, or at least this program's mark.
    """
    try:
        found = [
            path
            for path in root.iterdir()
            if NAME.fullmatch(path.name) and any(os.path.lexists(path / name) for name in (MARKER, MARK))
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; give another folder of checkpoints") from None
    return sorted(found, key=_read_number, reverse=True)


def _read_number(path: Path) -> int:
    return int(path.name.split("-")[0])


NONE_FOUND = "no checkpoint in it: give a run folder, its folder checkpoints, or one NNNNN-step-N in that"


def find_checkpoints(path: Path) -> Iterator[Path]:
    """The checkpoints, newest first, at a path that the user gave: a checkpoint itself, a folder of
    checkpoints, or a run folder.
    """
    if (path / MARKER).exists() or NAME.fullmatch(path.name):
        yield path
        return
    yield from list_checkpoints(path) or list_checkpoints(path / "checkpoints")


def begin_checkpoint(root: Path, step: int) -> tuple[Path, Path]:
    """(folder to write into, its final name). Removes what killed writers left; the caller holds the lock of
    `root`, so no other writer is at work there.
    """
    for old in KIND.find_folders(root):
        KIND.remove_folder(old)
    partial = KIND.make_folder(root, 0o777, step)
    taken = [int(name.split("-")[0]) for name in os.listdir(root) if NAME.fullmatch(name)]
    return partial, root / f"{max(taken, default=0) + 1:05d}-step-{step}"


def publish_checkpoint(partial: Path, final: Path, description: dict[str, Any], least_bytes: int = 0) -> None:
    """Write the description and give the folder its final name. The ranks' files are synced to disk before,
    and each step here is synced before the next: after a crash of the host the name implies the contents.

    least_bytes: a shorter description is filled up with blanks (the emulator's, which lists no tensors)
    """
    values = {"version": VERSION, **description}
    text = json.dumps({**values, "crc32": _compute_checksum(values)}).ljust(least_bytes - 1) + "\n"
    write_synced(partial / MARKER, text.encode())
    sync_to_disk(partial)
    KIND.publish_folder(partial, final)
    sync_to_disk(final.parent)


def _compute_checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def discard_partial(partial: Path) -> None:
    """Remove a folder that is not going to be published."""
    with contextlib.suppress(OSError, UserError):
        KIND.remove_folder(partial)


def remove_old_checkpoints(root: Path, keep: int) -> None:
    """Remove this program's checkpoints except the newest `keep` and the best one.

    A folder without this program's mark, a damaged checkpoint, or one with other files inside, is neither
    counted nor removed.
    """
    found = []
    for path in list_checkpoints(root):
        with contextlib.suppress(CorruptCheckpoint, OSError):
            if KIND.holds_only_own_files(path):
                found.append((path, read_description(path).score))
    rated = [(score, path) for path, score in found if score is not None]
    best = max(rated, key=lambda each: each[0], default=(None, None))[1]
    for path, _ in found[keep:]:
        if path != best:
            with contextlib.suppress(OSError, UserError):
                KIND.remove_published(path)
