"""Who liked what, when: rating files and made ratings as four columns.

ml-1m has lines `user::item::rating::time`, ml-20m a CSV with a header, text `user item [timestamp]` lines;
random draws users, items and times; markov makes sequences whose next item has a known best guess.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from common.errors import UserError, printable
from common.inputs import check_regular, read_bytes
from common.memory import refuse_too_large
from dlrm.runtime.trace import span


class Ratings(NamedTuple):
    user: np.ndarray  # int64
    item: np.ndarray  # int64
    rating: np.ndarray  # float32
    time: np.ndarray  # int64; equal times keep the file's order


class RatingsOptions(NamedTuple):
    """How large the generated data sets are."""

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
    refuse_too_large(MADE_BYTES * wanted.size, f"--random_size {wanted.size}", "lower it")
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
    length = max(3, wanted.size // wanted.users)
    refuse_too_large(
        MADE_BYTES * length * wanted.users + 16 * wanted.items,
        f"--random_size {wanted.size} of --random_user_count {wanted.users} and --random_item_count "
        f"{wanted.items}",
        "lower them",
    )
    generator = np.random.default_rng(wanted.seed)
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
MADE_BYTES = 64  # of memory for a made rating, until it is part of a history
SETS: dict[str, Callable[[Path, RatingsOptions], Ratings]] = {
    "ml-1m": read_movielens_1m,
    "ml-20m": read_movielens_20m,
    "text": read_text,
    "random": make_random,
    "markov": make_markov,
}
LONGEST_LINE = 1 << 16
MOST_COLUMNS = 100
BYTES_PER_BYTE = 4  # of memory for one of the file: its text twice, and the numbers


def read_ratings(name: str, path: Path | None, wanted: RatingsOptions) -> Ratings:
    """`path`: what `dataset_files.find_ratings_file` says."""
    with span("prep", "ratings", bytes=path.stat().st_size if path else 0):
        return SETS[name](path or Path(), wanted)


def _read_table(path: Path, separator: bytes | None, header: bool, rated: bool) -> Ratings:
    """user, item[, rating][, timestamp] of every line."""
    size = check_regular(path).st_size
    refuse_too_large(BYTES_PER_BYTE * size, printable(path), "give --dataset_path a smaller file")
    try:
        content = read_bytes(path, limit=size)
    except UserError as error:
        raise UserError(f"{error}; give a readable --dataset_path") from None
    if separator is None:
        content = re.sub(rb"[ \t,;]+", b"\t", content)
    elif separator != b"\t":
        content = content.replace(separator, b"\t")
    columns = _parse_columns(content, path, header)
    least = 3 if rated else 2
    if len(columns) < least or not len(columns[0]):
        between = (separator or b"blanks").decode()
        raise UserError(
            f"{printable(path)}: {len(columns)} columns, at least {least} expected, separated by {between}"
        )
    for number, column in enumerate(columns[: least + 1], 1):
        if not column.dtype.is_numeric() or column.null_count():
            line = int(column.cast(pl.Float64, strict=False).is_null().arg_max() or 0)
            held = f"{printable(column[line])[:60] or 'nothing'} in column {number}"
            raise UserError(
                f"{printable(path)}, line {line + 1 + header}: {held} is not a number; repair the line"
            )
        if number != least or not rated:
            _refuse_beyond_int64(column, path, number, header)
    after = columns[least] if len(columns) > least else None
    return Ratings(
        columns[0].cast(pl.Int64).to_numpy(),
        columns[1].cast(pl.Int64).to_numpy(),
        columns[2].cast(pl.Float32).to_numpy() if rated else np.ones(len(columns[0]), np.float32),
        after.cast(pl.Int64).to_numpy() if after is not None else np.arange(len(columns[0])),
    )


def _parse_columns(content: bytes, path: Path, header: bool) -> list[pl.Series]:
    """The columns of tab-separated text. Whatever the bytes are, UserError is all that comes of them."""
    expected = "expected user, item[, ...] lines"
    lines = content[:LONGEST_LINE].split(b"\n", 2)
    if len(lines) == 1 and len(content) > LONGEST_LINE:
        raise UserError(f"{printable(path)}: its first line is longer than {LONGEST_LINE} bytes; {expected}")
    if max(line.count(b"\t") for line in lines[:2]) >= MOST_COLUMNS:
        raise UserError(f"{printable(path)}: more than {MOST_COLUMNS} columns; {expected}")
    try:
        return pl.read_csv(
            content,
            separator="\t",
            has_header=header,
            infer_schema_length=10_000,
            truncate_ragged_lines=False,
        ).get_columns()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, MemoryError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{printable(path)}: {printable(first_line)[:200]}; {expected}") from None


def _refuse_beyond_int64(column: pl.Series, path: Path, number: int, header: bool) -> None:
    """Users, items and times are whole numbers of 64 bits; ratings may be anything."""
    if column.dtype.is_integer() and column.dtype not in (pl.UInt64, pl.Int128):
        return
    values = column.cast(pl.Float64, strict=False)
    bad = (~(values.abs() < 2.0**63)).fill_null(True)  # infinite and not-a-number, too
    if bad.any():
        line = int(bad.arg_max() or 0)
        raise UserError(
            f"{printable(path)}, line {line + 1 + header}: {printable(column[line])[:60]} in column {number} "
            "is not a 64-bit number; repair the line"
        )
