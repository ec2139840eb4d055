"""Which file has the ratings: by --dataset_name and --dataset_path, or by what lies at the path.

MovieLens is known by its file's name. Without a path a data set is sought in a folder of its own name, as
torchrec's example does. Nothing is read here.
"""

import os
from pathlib import Path

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import check_regular

AUTO, TEXT = "auto", "text"
MADE = ("random", "markov")
FILES = {"ml-1m": "ratings.dat", "ml-20m": "ratings.csv"}
WITHOUT_PATH = "ml-1m"
DATASETS = (AUTO, *FILES, TEXT, *MADE)


def find_default_path(name: str) -> str | None:
    """Where a data set is sought without a --dataset_path; None for one that has no such place."""
    name = WITHOUT_PATH if name == AUTO else name
    return f"{name}/{FILES[name]}" if name in FILES else None


def recognize_dataset(path: str | None) -> str:
    """The --dataset_name of what lies at `path`; without a path ml-1m."""
    if path is None:
        return WITHOUT_PATH
    found = Path(path)
    if not os.path.isdir(found):
        named = {file: name for name, file in FILES.items()}
        return named.get(found.name, TEXT)
    names = [name for name, file in FILES.items() if os.path.lexists(found / file)]
    if len(names) > 1:
        raise UserError(f"{printable(found)} has {' and '.join(FILES.values())}: give --dataset_name")
    return names[0] if names else TEXT


def find_ratings_file(name: str, path: str | None) -> Path | None:
    """The file with the ratings; None where they are made. name: not `auto`."""
    if name in MADE:
        return None
    if path is None and name == TEXT:
        raise UserError(f"--dataset_name {name} needs --dataset_path (without files: {' or '.join(MADE)})")
    expected = FILES.get(name)
    found = Path(name if path is None else path)
    wanted = f"the {expected} or its folder" if expected else "the file with the lines, or its folder"
    if expected and (os.path.isdir(found) or path is None):
        found = found / expected
        other = [each for each, file in FILES.items() if os.path.lexists(found.parent / file)]
        if other and not os.path.lexists(found):
            raise UserError(
                f"{printable(found)} is missing, but {FILES[other[0]]} is there: "
                f"give --dataset_name {other[0]}"
            )
    elif os.path.isdir(found):
        found = _find_only_text_file(found)
    if not os.path.exists(found):
        asked = "give" if path else f"--dataset_name {name} needs"
        raise UserError(f"{printable(found)} is missing: {asked} --dataset_path {wanted}")
    try:
        check_regular(found)
    except UserError as error:
        raise UserError(f"{error}: give --dataset_path {wanted}") from None
    return found


def _find_only_text_file(folder: Path) -> Path:
    """The folder's only file; or among several its only .txt."""
    with os_errors_as_user_errors(folder):
        files = sorted(each for each in folder.iterdir() if each.is_file() and each.name[0] != ".")
    texts = [each for each in files if each.suffix == ".txt"]
    for candidates in (files, texts):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(
        f"{printable(folder)} is a folder with {len(texts) or len(files) or 'no'} such files: "
        "give the file of `user item [timestamp]` lines"
    )
