"""What a Criteo dataset folder looks like: columns, days, file names, and its description `meta.json`."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlrm.runtime.errors import UserError

NUM_DENSE = 13
NUM_SPARSE = 26
DAYS = 24
SPARSE_NAMES = [f"cat_{i}" for i in range(NUM_SPARSE)]
PARTS = {"dense": NUM_DENSE, "sparse": NUM_SPARSE, "labels": 1}  # file kind -> columns
META = "meta.json"
META_VERSION = 1


def array_file_name(day: int, part: str) -> str:
    return f"day_{day}_{part}.npy"


def multi_hot_file_name(day: int) -> str:
    return f"day_{day}_sparse_multi_hot.npz"


@dataclass(frozen=True)
class DatasetMeta:
    """The dataset describes itself: nobody types 26 table sizes."""

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

    @property
    def days(self) -> int:
        return len(self.rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Publish atomically: a dataset with a meta.json is complete."""
        path = Path(folder) / META
        partial = path.with_name(META + ".partial")
        with open(partial, "w") as out:
            json.dump(asdict(self), out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DatasetMeta":
        path = Path(folder) / META
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: make the dataset with python -m dlrm.prep run") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; remake it with python -m dlrm.prep run") from None
        if not isinstance(values, dict) or values.get("version") != META_VERSION:
            raise UserError(
                f"{path}: version {META_VERSION} expected; remake it with python -m dlrm.prep run"
            )
        unknown = set(values) - set(cls.__dataclass_fields__)
        missing = {"rows", "table_sizes"} - set(values)
        if unknown or missing:
            raise UserError(f"{path}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
        return cls(**values)


def split_last_day(rows: int) -> tuple[range, range]:
    """The last day's rows: first half (rounded up) validates, second half tests."""
    half = (rows + 1) // 2
    return range(0, half), range(half, rows)


def rows_of_rank(rows: int, rank: int, world_size: int) -> range:
    """This rank's contiguous share; the first `rows % world_size` ranks take one row more."""
    each, extra = divmod(rows, world_size)
    start = rank * each + min(rank, extra)
    return range(start, start + each + (rank < extra))


DEFAULT_TABLE_SIZE = 100_000


def choose_table_sizes(
    every: int | None, each: Sequence[int] | None, folder: str | os.PathLike[str] | None
) -> tuple[list[int], bool]:
    """Rows per table: as asked, else from meta.json; and whether ids must be folded into them."""
    if each is not None:
        if len(each) != NUM_SPARSE:
            raise UserError(f"--num_embeddings_per_feature: {len(each)} sizes, {NUM_SPARSE} expected")
        return list(each), True
    if every is None and folder is not None and (Path(folder) / META).exists():
        return [max(size, 1) for size in DatasetMeta.load(folder).table_sizes], False
    return [every or DEFAULT_TABLE_SIZE] * NUM_SPARSE, True
