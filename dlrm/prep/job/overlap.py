"""Checks that folders in the options are not the same, and not inside each other."""

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError, printable


def refuse_overlap(option: str, folder: Path | None, inputs: Iterable[tuple[str, Path]]) -> None:
    """UserError if `folder` is one of the inputs, (option, folder) each, or inside or above one of them."""
    if folder is None:
        return
    real = Path(os.path.realpath(folder))
    for input_option, path in inputs:
        other = Path(os.path.realpath(path))
        relation = "the same as" if real == other or same_folder(real, other) else ""
        if not relation and other in real.parents:
            relation = "inside"
        elif not relation and real in other.parents:
            relation = "above"
        if relation:
            raise UserError(
                f"{option} {printable(folder)}: {relation} {input_option} {printable(path)}; "
                "choose another folder"
            )


def same_folder(left: Path, right: Path) -> bool:
    try:
        return os.path.samefile(left, right)
    except OSError:
        return False
