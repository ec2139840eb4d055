"""Folders that a user named, held against each other: the same, inside, above."""

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError, printable


def refuse_overlap(option: str, folder: Path | None, inputs: Iterable[tuple[str, Path]]) -> None:
    """UserError where `folder` is an input folder, or lies in one, or around one."""
    if folder is None:
        return
    real = Path(os.path.realpath(folder))
    for name, given in inputs:
        other = Path(os.path.realpath(given))
        how = "the same as" if real == other or same_folder(real, other) else ""
        how = how or ("inside" if other in real.parents else "above" if real in other.parents else "")
        if how:
            raise UserError(
                f"{option} {printable(folder)}: {how} {name} {printable(given)}; name a folder apart from it"
            )


def same_folder(left: Path, right: Path) -> bool:
    try:
        return os.path.samefile(left, right)
    except OSError:
        return False
