"""Criteo-like TSV that a DLRM can learn: skewed hashed ids, counts, empty fields, and labels drawn from both.

The label's log-odds is a sum of one effect per id in the small columns and a slope per dense column, so
a model that learns those tables reaches an AUROC near 0.85, with Criteo's columns and with any others. The
large columns are noise.
"""

import os
import shutil
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.memory import format_size
from common.progress import show_progress
from dlrm.data.criteo import CRITEO, MOST_DAYS, Columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import Output, publish_results

# ids per sparse column: a few big tables, many small ones, in the order of Criteo's own 26
CARDINALITIES = (
    100_000, 8_000, 4_000, 2_000, 5_000, 3, 3_000, 400, 63, 200_000, 30_000, 20_000, 10,
    1_000, 3_000, 155, 4, 500, 14, 150_000, 50_000, 120_000, 25_000, 3_000, 108, 36,
)  # fmt: skip
OTHER_CARDINALITIES = (36, 100_000, 500, 108, 20_000, 10, 3_000)  # repeated, where there are not 26 columns
MOST_PREDICTIVE = 200  # ids of a column that the label depends on
PREDICTIVE = sum(ids <= MOST_PREDICTIVE for ids in CARDINALITIES)  # columns of Criteo's shape
FIELD_BYTES = 3.75  # of text, at least, with the tab
BLOCK = 50_000  # rows made at a time: memory stays small however long the file is
DENSE_WIDTH, HEX_WIDTH = 7, 8
TAB, NEWLINE = 9, 10


def choose_cardinalities(columns: Columns) -> list[int]:
    """Ids of each categorical column."""
    if columns.categorical == CRITEO.categorical:
        return list(CARDINALITIES)
    return list(islice(cycle(OTHER_CARDINALITIES), columns.categorical))


def write_days(
    out: str | os.PathLike[str],
    days: int,
    rows: int,
    seed: int,
    one_file: bool = False,
    columns: Columns = CRITEO,
) -> None:
    """Write `out/day_0` ... with `rows` rows each, or with `one_file` a single day_0 with the rows of all
    days.

    They get their names together at the end. Day files of an earlier call are removed if they are unchanged.
    """
    if days < 1 or rows < 1:
        raise UserError(f"--days {days} --rows {rows}: both must be at least 1")
    if days > MOST_DAYS or not 0 <= seed < 1 << 63:
        raise UserError(f"--days {days} --seed {seed}: at most {MOST_DAYS} days, and a seed of 63 bits")
    need = int(days * rows * FIELD_BYTES * columns.total)
    if need > (free := count_free_bytes(Path(out))):
        raise UserError(
            f"{printable(out)}: --days {days} of --rows {rows} need {format_size(need)}, {format_size(free)} "
            "are free: give fewer"
        )
    names = ["day_0"] if one_file else [f"day_{day}" for day in range(days)]
    with Output("toy", Path(out)) as output:
        folders = output.open([], names, restart=True)
        with show_progress("toy", " rows", days * rows, line_seconds=5.0) as bar:
            for day in range(days):
                with OffsetFile(folders.unfinished / names[0 if one_file else day], "a") as file:
                    for begin in range(0, rows, BLOCK):
                        rng = np.random.default_rng([seed, day, begin])
                        file.append(format_tsv(min(BLOCK, rows - begin), rng, seed, columns))
                        bar.add(min(BLOCK, rows - begin))
        publish_results(folders, names, names[0], r"day_\d+", lambda: None)
        output.clear()


def count_free_bytes(folder: Path) -> int:
    """Free space on the disk of this folder, which may not exist yet."""
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    with os_errors_as_user_errors(above):
        return shutil.disk_usage(above).free


def format_tsv(rows: int, rng: np.random.Generator, seed: int, columns: Columns = CRITEO) -> bytes:
    """Rows as text: all fields at full width in a byte matrix, of which the used bytes are then taken."""
    numerical, cardinalities = columns.numerical, choose_cardinalities(columns)
    ids = draw_skewed(rows, rng, cardinalities)
    dense = np.floor(rng.lognormal(1.5, 1.3, (rows, numerical))).astype(np.int64).clip(max=999_999)
    dense[:, 1:2] -= 2  # Criteo's second count goes below zero
    labels = rng.random(rows) < 1 / (1 + np.exp(-draw_log_odds(ids, dense, seed, cardinalities)))
    dense_gone = rng.random((rows, numerical)) < np.linspace(0, 0.2, numerical)
    sparse_gone = ids < 0
    values = hash_ids(ids)

    width = 2 + numerical * (DENSE_WIDTH + 1) + columns.categorical * (HEX_WIDTH + 1)
    text = np.full((rows, width), TAB, np.uint8)
    used = np.ones((rows, width), bool)
    text[:, 0] = labels + ord("0")
    at = 2
    for column in range(numerical):
        put_decimal(dense[:, column], text[:, at : at + DENSE_WIDTH], used[:, at : at + DENSE_WIDTH])
        used[dense_gone[:, column], at : at + DENSE_WIDTH] = False
        at += DENSE_WIDTH + 1
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    for column in range(columns.categorical):
        for place in range(HEX_WIDTH):
            text[:, at + place] = digits[(values[:, column] >> np.uint32(28 - 4 * place)) & np.uint32(15)]
        used[sparse_gone[:, column], at : at + HEX_WIDTH] = False
        at += HEX_WIDTH + 1
    text[:, -1] = NEWLINE
    return text[used].tobytes()


def draw_skewed(
    rows: int, rng: np.random.Generator, cardinalities: Sequence[int] = CARDINALITIES
) -> np.ndarray:
    """int64 [rows, columns]: a few ids are common and most rare, as in a Zipf law with a steep head; -1 for
    an empty field.
    """
    ends, columns = np.log(np.array(cardinalities) + 1.0), len(cardinalities)
    ids = np.floor(np.exp(rng.random((rows, columns)) ** 3 * ends)).astype(np.int64) - 1
    ids[rng.random((rows, columns)) < np.linspace(0.05, 0, columns)] = -1
    return ids


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """Spread ids over 32 bits, differently in each column, as Criteo's anonymised hashes are."""
    mixed = (ids + 1).astype(np.uint32) * np.uint32(0x9E3779B1) + np.arange(
        1, ids.shape[1] + 1, dtype=np.uint32
    )
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x85EBCA77)
    return mixed ^ (mixed >> np.uint32(13))


def draw_log_odds(
    ids: np.ndarray, dense: np.ndarray, seed: int, cardinalities: Sequence[int] = CARDINALITIES
) -> np.ndarray:
    """float64 [rows]: log-odds of each label. The effects depend on the seed only, so that they are the same
    in all days; their sum varies as much with many columns as with Criteo's.
    """
    rng = np.random.default_rng([seed, 0x70E])
    total = np.full(len(ids), -2.6)
    predictive = [column for column, count in enumerate(cardinalities) if count <= MOST_PREDICTIVE]
    for column in predictive:
        effects = rng.normal(0, (PREDICTIVE / len(predictive)) ** 0.5, cardinalities[column] + 1)
        total += effects[ids[:, column]]  # -1, the empty field, takes the last one
    numerical = dense.shape[1]
    slopes = rng.normal(0, 0.35 * (CRITEO.numerical / max(numerical, 1)) ** 0.5, numerical)
    return total + (np.log(dense + 3.0) - 1.8) @ slopes


def put_decimal(values: np.ndarray, text: np.ndarray, used: np.ndarray) -> None:
    """Write right-aligned decimal numbers to `text`, uint8 [rows, DENSE_WIDTH], and set `used` for their
    bytes.
    """
    rest = np.abs(values)
    sign_at = np.full(len(values), DENSE_WIDTH - 2)
    for place in range(DENSE_WIDTH - 1, -1, -1):
        text[:, place] = rest % 10 + ord("0")
        used[:, place] = (rest > 0) | (place == DENSE_WIDTH - 1)
        sign_at[used[:, place]] = place - 1
        rest //= 10
    below = np.flatnonzero(values < 0)
    text[below, sign_at[below]] = ord("-")
    used[below, sign_at[below]] = True
