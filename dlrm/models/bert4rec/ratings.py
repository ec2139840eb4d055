"""Who liked what, when: rating files and made ratings as four columns.

ml-1m reads FOLDER/ratings.dat, ml-20m FOLDER/ratings.csv, text any file of `user item [timestamp]` lines;
random draws users, items and times; markov makes sequences whose next item has a known best guess.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from dlrm.runtime.errors import UserError
from dlrm.runtime.trace import span


class Ratings(NamedTuple):
    user: np.ndarray  # int64
    item: np.ndarray  # int64
    rating: np.ndarray  # float32
    time: np.ndarray  # int64; equal times keep the file's order


class RatingsOptions(NamedTuple):
    """What the made data sets need to know."""

    users: int = 10
    items: int = 30
    size: int = 300
    seed: int = 0


def read_movielens_1m(path: Path, _: RatingsOptions) -> Ratings:
    return _read_table(path, b"::", header=False, rated=True)


def read_movielens_20m(path: Path, _: RatingsOptions) -> Ratings:
    return _read_table(path, b",", header=True, rated=True)


def read_text(path: Path, _: RatingsOptions) -> Ratings:
    return _read_table(path, None, header=False, rated=False)


def make_random(_: Path, wanted: RatingsOptions) -> Ratings:
    """Each of `size` ratings by any user on any item at any time."""
    generator = np.random.default_rng(wanted.seed)
    size = wanted.size
    return Ratings(
        generator.integers(0, wanted.users, size),
        generator.integers(0, wanted.items, size),
        generator.integers(0, 6, size).astype(np.float32),
        generator.integers(0, 1 << 31, size),
    )


def make_markov(_: Path, wanted: RatingsOptions) -> Ratings:
    """Each user walks over the items: from each item on to a fixed other one in MARKOV_SURE of all steps."""
    generator = np.random.default_rng(wanted.seed)
    length = max(3, wanted.size // wanted.users)
    follower = np.roll(generator.permutation(wanted.items), 1)
    item = np.empty((length, wanted.users), np.int64)
    item[0] = generator.integers(0, wanted.items, wanted.users)
    for step in range(1, length):
        stray = generator.random(wanted.users) >= MARKOV_SURE
        item[step] = np.where(
            stray, generator.integers(0, wanted.items, wanted.users), follower[item[step - 1]]
        )
    user = np.tile(np.arange(wanted.users), length)
    return Ratings(
        user, item.reshape(-1), np.full(user.size, 5, np.float32), np.repeat(np.arange(length), wanted.users)
    )


MARKOV_SURE = 0.8
SETS: dict[str, Callable[[Path, RatingsOptions], Ratings]] = {
    "ml-1m": read_movielens_1m,
    "ml-20m": read_movielens_20m,
    "text": read_text,
    "random": make_random,
    "markov": make_markov,
}
MADE = ("random", "markov")
FILES = {"ml-1m": "ratings.dat", "ml-20m": "ratings.csv"}


def read_ratings(name: str, path: Path | None, wanted: RatingsOptions) -> Ratings:
    """`path`: what `find_ratings_file` says."""
    with span("prep", "ratings", bytes=path.stat().st_size if path else 0):
        return SETS[name](path or Path(), wanted)


def find_ratings_file(name: str, path: str | None) -> Path | None:
    """The file with the ratings; None where they are made."""
    if name in MADE:
        return None
    if path is None:
        raise UserError(f"--dataset_name {name} needs --dataset_path (without files: {' or '.join(MADE)})")
    found, expected = Path(path), FILES.get(name)
    if expected and found.is_dir():
        found = found / expected
    if found.is_dir():
        raise UserError(f"{path} is a folder: give the file of `user item [timestamp]` lines")
    if not found.is_file():
        wanted = f"the {expected} or its folder" if expected else "the file with the lines"
        raise UserError(f"{found} is missing: give --dataset_path {wanted}")
    return found


def _read_table(path: Path, separator: bytes | None, header: bool, rated: bool) -> Ratings:
    """user, item[, rating][, timestamp] of every line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a readable --dataset_path") from None
    if separator is None:
        content = re.sub(rb"[ \t,;]+", b"\t", content)
    elif separator != b"\t":
        content = content.replace(separator, b"\t")
    try:
        table = pl.read_csv(
            content,
            separator="\t",
            has_header=header,
            infer_schema_length=10_000,
            truncate_ragged_lines=False,
        )
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; expected user, item[, ...] lines") from None
    columns = table.get_columns()
    least = 3 if rated else 2
    if len(columns) < least or not table.height:
        between = (separator or b"blanks").decode()
        raise UserError(f"{path}: {len(columns)} columns, at least {least} expected, separated by {between}")
    for number, column in enumerate(columns[: least + 1], 1):
        if not column.dtype.is_numeric() or column.null_count():
            line = int(column.cast(pl.Float64, strict=False).is_null().arg_max() or 0)
            held = f"{column[line] or 'nothing'} in column {number}"
            raise UserError(f"{path}, line {line + 1 + header}: {held} is no number; repair the line")
    after = columns[least] if len(columns) > least else None
    return Ratings(
        columns[0].cast(pl.Int64).to_numpy(),
        columns[1].cast(pl.Int64).to_numpy(),
        columns[2].cast(pl.Float32).to_numpy() if rated else np.ones(table.height, np.float32),
        after.cast(pl.Int64).to_numpy() if after is not None else np.arange(table.height),
    )
