"""Criteo-like TSV that a DLRM can learn: skewed hashed ids, counts, gaps, and labels that follow from both.

The label's log-odds is a sum of one effect per id in the small columns and a slope per dense column, so
a model that learns those tables reaches an AUROC near 0.85; the big columns are noise, as many are in life.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.memory import format_size
from dlrm.data.criteo import MOST_DAYS, NUM_DENSE, NUM_SPARSE
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import Output, publish_results

# ids per sparse column: a few big tables, many small ones, in the order of Criteo's own 26
CARDINALITIES = (
    100_000, 8_000, 4_000, 2_000, 5_000, 3, 3_000, 400, 63, 200_000, 30_000, 20_000, 10,
    1_000, 3_000, 155, 4, 500, 14, 150_000, 50_000, 120_000, 25_000, 3_000, 108, 36,
)  # fmt: skip
TELLING = [column for column, ids in enumerate(CARDINALITIES) if ids <= 200]
ROW_BYTES = 150  # of text, at least
BLOCK = 50_000  # rows made at a time: memory stays small however long the file is
DENSE_WIDTH, HEX_WIDTH = 7, 8
TAB, NEWLINE = 9, 10


def write_days(out: str | os.PathLike[str], days: int, rows: int, seed: int, one_file: bool = False) -> None:
    """`out/day_0` ... with `rows` rows each, or one `day_0` with all the days' rows after each other. All get
    their names at the end; day files that an earlier call has left there and nobody has changed go.
    """
    if days < 1 or rows < 1:
        raise UserError(f"--days {days} --rows {rows}: both must be at least 1")
    if days > MOST_DAYS or not 0 <= seed < 1 << 63:
        raise UserError(f"--days {days} --seed {seed}: at most {MOST_DAYS} days, and a seed of 63 bits")
    need = days * rows * ROW_BYTES
    if need > (free := free_bytes(Path(out))):
        raise UserError(
            f"{printable(out)}: --days {days} of --rows {rows} need {format_size(need)}, {format_size(free)} "
            "are free: make fewer"
        )
    names = ["day_0"] if one_file else [f"day_{day}" for day in range(days)]
    with Output("toy", Path(out)) as output:
        folders = output.open([], names, restart=True)
        for day in range(days):
            with OffsetFile(folders.unfinished / names[0 if one_file else day], "a") as file:
                for begin in range(0, rows, BLOCK):
                    rng = np.random.default_rng([seed, day, begin])
                    file.append(format_tsv(min(BLOCK, rows - begin), rng, seed))
        publish_results(folders, names, names[0], r"day_\d+", lambda: None)
        output.clear()


def free_bytes(folder: Path) -> int:
    """On the disk where this folder is, or is going to be made."""
    above = folder.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    with os_errors_as_user_errors(above):
        return shutil.disk_usage(above).free


def format_tsv(rows: int, rng: np.random.Generator, seed: int) -> bytes:
    """Rows as text: every field at full width in a byte matrix, then what is not used is cut out."""
    ids = draw_skewed(rows, rng)
    dense = np.floor(rng.lognormal(1.5, 1.3, (rows, NUM_DENSE))).astype(np.int64).clip(max=999_999)
    dense[:, 1] -= 2  # Criteo's second count goes below zero
    labels = rng.random(rows) < 1 / (1 + np.exp(-draw_log_odds(ids, dense, seed)))
    dense_gone = rng.random((rows, NUM_DENSE)) < np.linspace(0, 0.2, NUM_DENSE)
    sparse_gone = ids < 0
    values = hash_ids(ids)

    width = 2 + NUM_DENSE * (DENSE_WIDTH + 1) + NUM_SPARSE * (HEX_WIDTH + 1)
    text = np.full((rows, width), TAB, np.uint8)
    used = np.ones((rows, width), bool)
    text[:, 0] = labels + ord("0")
    at = 2
    for column in range(NUM_DENSE):
        put_decimal(dense[:, column], text[:, at : at + DENSE_WIDTH], used[:, at : at + DENSE_WIDTH])
        used[dense_gone[:, column], at : at + DENSE_WIDTH] = False
        at += DENSE_WIDTH + 1
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    for column in range(NUM_SPARSE):
        for place in range(HEX_WIDTH):
            text[:, at + place] = digits[(values[:, column] >> np.uint32(28 - 4 * place)) & np.uint32(15)]
        used[sparse_gone[:, column], at : at + HEX_WIDTH] = False
        at += HEX_WIDTH + 1
    text[:, -1] = NEWLINE
    return text[used].tobytes()


def draw_skewed(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Few ids common, most rare, as in a zipf law with a steep head; -1 where the field is empty."""
    ends = np.log(np.array(CARDINALITIES) + 1.0)
    ids = np.floor(np.exp(rng.random((rows, NUM_SPARSE)) ** 3 * ends)).astype(np.int64) - 1
    ids[rng.random((rows, NUM_SPARSE)) < np.linspace(0.05, 0, NUM_SPARSE)] = -1
    return ids


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """Spread ids over 32 bits, differently in each column, as Criteo's anonymised hashes are."""
    mixed = (ids + 1).astype(np.uint32) * np.uint32(0x9E3779B1) + np.arange(
        1, NUM_SPARSE + 1, dtype=np.uint32
    )
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x85EBCA77)
    return mixed ^ (mixed >> np.uint32(13))


def draw_log_odds(ids: np.ndarray, dense: np.ndarray, seed: int) -> np.ndarray:
    """The truth that the labels are drawn from; it depends on the seed only, not on the day."""
    rng = np.random.default_rng([seed, 0x70E])
    total = np.full(len(ids), -2.6)
    for column in TELLING:
        effects = rng.normal(0, 1.0, CARDINALITIES[column] + 1)
        total += effects[ids[:, column]]  # -1, the empty field, takes the last one
    slopes = rng.normal(0, 0.35, NUM_DENSE)
    return total + (np.log(dense + 3.0) - 1.8) @ slopes


def put_decimal(values: np.ndarray, text: np.ndarray, used: np.ndarray) -> None:
    """Right-aligned decimal digits with a sign; `used` marks what belongs to the number."""
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
