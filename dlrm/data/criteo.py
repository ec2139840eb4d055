"""What a dataset folder looks like: columns, days, file names, and its description `meta.json`.

Rows have a label, numerical columns and categorical ones, as Criteo's: how many is in `Columns`.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, os_errors_as_user_errors, printable, quote_for_shell
from common.inputs import read_json_object
from common.owned import write_whole

DAYS = 24
PARTS = ("dense", "sparse", "labels")  # kinds of files: numerical columns, categorical ones, labels
LABEL = "label"
MOST_COLUMNS = 1024  # numerical ones, and categorical ones
META = "meta.json"
DAY_NUMBER = "(0|[1-9][0-9]{0,17})"  # in the name of a day's file
META_VERSION = 1
LARGEST_META = 16 << 20  # bytes; a real one has a few thousand
MOST_DAYS = 10_000
MOST_ROWS = 1 << 48  # of a day, as in npy_header
MOST_IDS = 1 << 32  # of a column: raw hashes have 32 bits


@dataclass(frozen=True)
class Columns:
    """How many columns the rows of a dataset have, besides the label."""

    numerical: int  # may be 0
    categorical: int  # a table each, at least one

    def __post_init__(self) -> None:
        check_column_counts(self.numerical, self.categorical)

    @property
    def total(self) -> int:
        """Columns of a line of text, the label among them."""
        return 1 + self.numerical + self.categorical

    @property
    def parts(self) -> dict[str, int]:
        """Kind of file -> its columns."""
        return dict(zip(PARTS, (self.numerical, self.categorical, 1), strict=True))

    @property
    def numerical_names(self) -> list[str]:
        """I1, I2 ..: as in Parquet files and messages."""
        return [f"I{number + 1}" for number in range(self.numerical)]

    @property
    def categorical_names(self) -> list[str]:
        return [f"C{number + 1}" for number in range(self.categorical)]

    @property
    def names(self) -> list[str]:
        """The columns of a Parquet file."""
        return [LABEL, *self.numerical_names, *self.categorical_names]

    def __str__(self) -> str:
        return f"{self.numerical} numerical and {self.categorical} categorical columns"


def check_column_counts(numerical: int | None, categorical: int | None) -> None:
    """UserError where a number of columns, if it is given, is not possible."""
    for name, count, least in (("numerical", numerical, 0), ("categorical", categorical, 1)):
        if count is not None and not least <= count <= MOST_COLUMNS:
            raise UserError(f"--num_{name} {count}: must be from {least} to {MOST_COLUMNS}")


CRITEO = Columns(numerical=13, categorical=26)


def name_features(count: int) -> list[str]:
    """The names of the categorical columns, in the model and its checkpoints."""
    return [f"cat_{number}" for number in range(count)]


def name_array_file(day: int, part: str) -> str:
    return f"day_{day}_{part}.npy"


def name_multi_hot_file(day: int) -> str:
    return f"day_{day}_sparse_multi_hot.npz"


@dataclass(frozen=True)
class DatasetMeta:
    """What meta.json says of a dataset, so that options need not repeat it (a size for each table)."""

    rows: list[int]  # per day
    table_sizes: list[int]  # largest id + 1, per sparse column
    dtypes: dict[str, str] = field(
        default_factory=lambda: {"dense": "float32", "sparse": "int32", "labels": "int32"}
    )
    format: str = "npy"
    parameters: dict[str, Any] = field(default_factory=dict)
    made_by: str = ""
    md5: dict[str, str] = field(default_factory=dict)  # file name -> digest
    version: int = META_VERSION
    num_numerical: int = CRITEO.numerical  # not in the folders of earlier versions, which are Criteo's
    num_categorical: int = CRITEO.categorical

    @property
    def columns(self) -> Columns:
        return Columns(self.num_numerical, self.num_categorical)

    @property
    def days(self) -> int:
        return len(self.rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Publish atomically: a dataset with a meta.json is complete."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_whole(Path(folder) / META, text.encode(), durable=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DatasetMeta":
        path = Path(folder) / META
        named, remake = printable(path), "remake it with python -m dlrm.prep run"
        if not os.path.lexists(path):
            raise UserError(f"{named} is missing: make the dataset with python -m dlrm.prep run")
        try:
            values = read_json_object(path, LARGEST_META)
        except UserError as error:
            raise UserError(f"{error}; {remake}") from None
        if type(values.get("version")) is not int or values["version"] != META_VERSION:
            raise UserError(f"{named}: version {META_VERSION} expected; {remake}")
        unknown = [printable(key)[:60] for key in sorted(set(values) - set(SCHEMA))][:5]
        missing = sorted({"rows", "table_sizes"} - set(values))
        if unknown or missing:
            raise UserError(f"{named}: unknown keys {unknown}, missing keys {missing}; {remake}")
        for key, value in values.items():
            is_valid, expected = SCHEMA[key]
            if not is_valid(value):
                shown = printable(json.dumps(value)[:60])
                raise UserError(f"{named}: {key} is {shown}, expected {expected}; {remake}")
        meta = cls(**values)
        if len(meta.table_sizes) != meta.num_categorical:
            raise UserError(
                f"{named}: table_sizes has {len(meta.table_sizes)} numbers, num_categorical is "
                f"{meta.num_categorical}; {remake}"
            )
        return meta


def _are_counts(value: Any, lengths: range, most: int) -> bool:
    """A list of this many whole numbers from 0 to `most`."""
    return (
        isinstance(value, list)
        and len(value) in lengths
        and all(type(number) is int and 0 <= number <= most for number in value)
    )


def _is_relative(name: Any) -> bool:
    """A file of the dataset, in its folder or in a folder of it."""
    return isinstance(name, str) and 0 < len(name) < 1024 and not {"", ".", ".."} & set(name.split("/"))


def _as_list(value: Any) -> list[Any]:
    """The value if it is a list; else a list that fits no check."""
    return value if isinstance(value, list) else [None]


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


# what each key of meta.json must hold: (check, what the message says is expected)
SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rows": (
        lambda value: _are_counts(value, range(1, MOST_DAYS + 1), MOST_ROWS),
        f"a list of 1 to {MOST_DAYS} numbers of rows",
    ),
    "table_sizes": (
        lambda value: _are_counts(value, range(1, MOST_COLUMNS + 1), MOST_IDS),
        f"a table size for each categorical column, numbers from 0 to {MOST_IDS}",
    ),
    "dtypes": (
        lambda value: _are_texts(value) and set(value) == set(PARTS) and set(value.values()) <= DTYPE_NAMES,
        "the types of dense, sparse and labels",
    ),
    "format": (lambda value: value in ("npy", "parquet", "multi_hot"), "npy, parquet or multi_hot"),
    "parameters": (
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(step, str) for step in _as_list(value.get("steps", [])))
        ),
        "an object, its steps a list of names",
    ),
    "made_by": (lambda value: isinstance(value, str), "a text"),
    "md5": (
        lambda value: (
            _are_texts(value)
            and all(map(_is_relative, value))
            and all(re.fullmatch("[0-9a-f]{32}", digest) for digest in value.values())
        ),
        "names of the dataset's files, each with 32 hexadecimal digits",
    ),
    "version": (lambda value: type(value) is int, "a number"),
    "num_numerical": (
        lambda value: type(value) is int and 0 <= value <= MOST_COLUMNS,
        f"a number from 0 to {MOST_COLUMNS}",
    ),
    "num_categorical": (
        lambda value: type(value) is int and 1 <= value <= MOST_COLUMNS,
        f"a number from 1 to {MOST_COLUMNS}",
    ),
}
DTYPE_NAMES = {"float32", "int32", "int64"}


def split_last_day(rows: int) -> tuple[range, range]:
    """The last day's rows: first half (rounded up) validates, second half tests."""
    half = (rows + 1) // 2
    return range(0, half), range(half, rows)


def find_rank_rows(rows: int, rank: int, world_size: int) -> range:
    """This rank's contiguous share; the first `rows % world_size` ranks take one row more."""
    each, extra = divmod(rows, world_size)
    start = rank * each + min(rank, extra)
    return range(start, start + each + (rank < extra))


MOST_NAMED = 10  # files in one message


def join_flaws(folder: Path, bad: Sequence[str]) -> str:
    """The flaws of a dataset's files, which begin with their paths, as one line: the folder is named once."""
    root, more = f"{printable(folder)}/", len(bad) - MOST_NAMED
    named = [flaw.removeprefix(root) for flaw in bad[:MOST_NAMED]]
    text = root + named[0] if len(bad) == 1 else f"{root}: {'; '.join(named)}"
    return text + (f"; and {more} more" if more > 0 else "")


TEXT_FILE = re.compile(r"(day_\d+|train|test)(\.txt|\.tsv)?(\.gz)?", re.ASCII)


def refuse_without_dataset(folder: str | os.PathLike[str]) -> None:
    """UserError where a folder holds no file of a dataset at all; with what to do where it holds the text."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{printable(root)} is not a folder: give the folder of a dataset")
    with os_errors_as_user_errors(root):
        names = os.listdir(root)
    if any(name == META or name.endswith((".npy", ".npz", ".parquet")) for name in names):
        return
    if any(any((root / name).glob("*.parquet")) for name in ("train", "val", "test")):
        return
    if any(TEXT_FILE.fullmatch(name) for name in names):
        raise UserError(
            f"{printable(root)} holds Criteo's text, not a dataset: DATASET_DIR={quote_for_shell(root)} "
            "./2_preprocess_dataset.sh makes one of it (python -m dlrm.prep run)"
        )
    raise UserError(
        f"{printable(root)} is not a dataset: it has no {META} and no files like "
        f"{name_array_file(0, 'dense')}; 2_preprocess_dataset.sh (python -m dlrm.prep run) makes one"
    )


def count_days(numbers: set[int], folder: Path, meta: DatasetMeta | None) -> int:
    """The days of a folder, from those that its files' names give and from meta.json, if there is one."""
    last = max(numbers, default=-1)
    if meta is not None and last >= meta.days:
        raise UserError(
            f"{printable(folder)}: has files of day {last}, but its {META} says that there are {meta.days} "
            "days: move the files of the other days away, or make the dataset again"
        )
    if last >= MOST_DAYS:
        raise UserError(
            f"{printable(folder)}: has a file of day {last}, at most {MOST_DAYS} days are read: rename it"
        )
    return meta.days if meta is not None else last + 1


DEFAULT_TABLE_SIZE = 100_000


def choose_random_columns(
    numerical: int | None, categorical: int | None, sizes: Sequence[int] | None
) -> Columns:
    """The columns of random data: as given, else one for each of the table sizes, else Criteo's."""
    tables = len(sizes) if sizes else CRITEO.categorical
    return Columns(
        CRITEO.numerical if numerical is None else numerical, tables if categorical is None else categorical
    )


def choose_table_sizes(
    every: int | None,
    each: Sequence[int] | None,
    tables: int,
    known: Sequence[int] | None,
    most: int | None = None,
    counted: Sequence[int] | None = None,
) -> tuple[list[int], bool]:
    """Rows per table: as asked, else as meta.json says; and whether ids must be folded into them.

    tables: the categorical columns. known: meta.json's sizes, None without one. most: larger tables get this
    many rows, and ids are folded. counted: different ids of each column, where ids are numbered while they
    are read; then they replace meta.json's sizes, and less is refused.
    """
    sizes, fold = _find_table_sizes(every, each, tables, known if counted is None else None)
    if counted is not None:
        if every is None and each is None:
            sizes = list(counted)
        _refuse_small_tables(sizes, counted, "--num_embeddings" + "_per_feature" * (each is not None))
        fold = False
    if most is None or max(sizes) <= most:
        return sizes, fold
    return [min(size, most) for size in sizes], True


def _refuse_small_tables(sizes: Sequence[int], counted: Sequence[int], option: str) -> None:
    """UserError where a table has fewer rows than its column has different ids, `counted`. `option`: the one
    that gave `sizes`.
    """
    for column, (rows, ids) in enumerate(zip(sizes, counted, strict=True), 1):
        if rows < ids:
            raise UserError(
                f"{option}: C{column} has {ids} different ids, its table would have {rows} rows: give at "
                f"least {ids}, or leave the option out"
            )


def _find_table_sizes(
    every: int | None, each: Sequence[int] | None, tables: int, known: Sequence[int] | None
) -> tuple[list[int], bool]:
    """Rows per table, and whether ids must be folded into them; arguments as in `choose_table_sizes`."""
    if each is not None:
        if len(each) != tables:
            raise UserError(f"--num_embeddings_per_feature: {len(each)} sizes, {tables} expected")
        return list(each), True
    if every is None and known is not None:
        return [max(size, 1) for size in known], False
    return [every or DEFAULT_TABLE_SIZE] * tables, True
