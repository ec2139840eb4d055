"""The folder of checkpoints: names, publishing as a whole, finding the newest good one, clearing away.

checkpoints/00003-step-1200/    rank00000.safetensors, ..., and checkpoint.json, written last
checkpoints/.00004-step-1600/   being written: renamed once every byte is on the disk
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlrm.checkpoint.shards import Corrupt, Stored, write_small
from dlrm.trace import sync

MARKER = "checkpoint.json"
VERSION = 1
NAME = re.compile(r"(\d{5,})-step-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, as its description says."""

    path: Path
    state: dict[str, Any]  # everything that is not a tensor
    tensors: list[Stored]
    files: dict[str, dict[str, Any]]  # name -> bytes, block, crc32 of each block

    @property
    def score(self) -> float | None:
        return self.state.get("score")


def describe(path: Path) -> Checkpoint:
    """Read a checkpoint's description and hold it against what is there. Raises Corrupt."""
    try:
        values = json.loads((path / MARKER).read_text())
        if values.pop("crc32") != _sum(values):
            raise Corrupt(f"{path / MARKER}: wrong checksum")
        if values["version"] != VERSION:
            raise Corrupt(f"{path}: version {values['version']}, {VERSION} expected")
        found = Checkpoint(
            path, values["state"], [Stored.parse(each) for each in values["tensors"]], values["files"]
        )
        for name, facts in found.files.items():
            size = (path / os.path.basename(name)).stat().st_size
            if size != facts["bytes"] or len(facts["crc32"]) != -(-size // facts["block"]):
                raise Corrupt(f"{path / name}: {size} bytes, {facts['bytes']} expected")
        if not {stored.file for stored in found.tensors} <= set(found.files):
            raise Corrupt(f"{path}: a tensor in an unknown file")
    except FileNotFoundError as error:
        raise Corrupt(f"{error.filename} is missing: half-written") from None
    except OSError as error:
        raise Corrupt(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise Corrupt(f"{path / MARKER}: not a checkpoint ({type(error).__name__}: {error})") from None
    return found


def published(root: Path) -> list[Path]:
    """Checkpoints under their final names, newest first."""
    with contextlib.suppress(FileNotFoundError):
        found = [path for path in root.iterdir() if NAME.match(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.split("-")[0]), reverse=True)
    return []


def candidates(path: Path) -> Iterator[Path]:
    """What a path given by the user may mean: a checkpoint itself, a folder of them, a run folder."""
    if (path / MARKER).exists() or NAME.match(path.name):
        yield path
        return
    yield from published(path) or published(path / "checkpoints")


def begin(root: Path, step: int) -> tuple[Path, Path]:
    """(where to write, the final name). Leftovers of writers that were killed go."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".[0-9]*-step-*"):
        shutil.rmtree(old, ignore_errors=True)
    newest = next(iter(published(root)), None)
    number = int(newest.name.split("-")[0]) + 1 if newest else 1
    name = f"{number:05d}-step-{step}"
    partial = root / f".{name}"
    partial.mkdir()
    return partial, root / name


def publish(partial: Path, final: Path, description: dict[str, Any]) -> None:
    """The description last, everything on the disk, then the final name."""
    values = {"version": VERSION, **description}
    text = json.dumps({**values, "crc32": _sum(values)}) + "\n"
    write_small(partial / MARKER, text.encode())
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def _sum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def discard(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Leave the newest `keep` and the best. A checkpoint on its way out loses its final name first."""
    found = published(root)
    if len(found) <= keep:
        return
    scores = {}
    for path in found:
        with contextlib.suppress(Corrupt):
            scores[path] = describe(path).score
    rated = [path for path in found if scores.get(path) is not None]
    best = max(rated, key=lambda path: scores[path], default=None)
    for path in found[keep:]:
        if path != best:
            leaving = path.with_name("." + path.name)
            os.rename(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)
