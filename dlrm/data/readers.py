"""Opens the rows of any format: `open_source(kind, folder, stage).read(start, stop)`.

Stages: train = all days but the last; val and test = the halves of the last day. A folder of one day (or
Kaggle's single train file) uses its last seventh instead of a last day.
`scan_dataset` checks all files of a folder once. To open several stages, pass its result instead of the
folder: then their `bytes_read` is also one.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from dlrm.data.criteo import CRITEO
from dlrm.data.registry import find_source
from dlrm.data.rows import RANDOM_ROWS, STAGES, AnyLayout, RowSource, SourceOptions
from dlrm.runtime.errors import UserError


def scan_dataset(kind: str, folder: str | os.PathLike[str]) -> AnyLayout:
    """Check every file of the folder; the UserError names all bad ones."""
    return find_source(kind).scan(folder)


def detect_format(kind: str, folder: str | None) -> str:
    """`kind`, a default; or "parquet" where the folder has Parquet files and no .npy files."""
    root = Path(folder) if folder else None
    if kind not in ("stream", "memory") or root is None or any(root.glob("*.npy")):
        return kind
    return "parquet" if any(root.glob("*.parquet")) or any(root.glob("*/*.parquet")) else kind


def count_ids(layout: AnyLayout) -> list[int] | None:
    """The number of different ids in each column, where ids are not rows of tables; else None."""
    numbering = layout.number_ids() if getattr(layout, "shared_ids", False) else None
    return numbering.table_sizes if numbering else None


def open_source(
    kind: str,
    folder: str | os.PathLike[str] | AnyLayout,
    stage: str,
    *,
    read_chunk_mb: float = 16,
    rows: int = RANDOM_ROWS,
    table_sizes: Sequence[int] | None = None,
    seed: int = 0,
    numerical: int = CRITEO.numerical,
) -> RowSource:
    """The rows of one stage. `rows`, `table_sizes`, `seed` and `numerical` are for random data only."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage}: choose from {', '.join(STAGES)}")
    layout = scan_dataset(kind, folder) if isinstance(folder, str | os.PathLike) else folder
    options = SourceOptions(stage, read_chunk_mb, rows, table_sizes, seed, numerical)
    source = find_source(kind).open(layout, options)
    if source.rows < 1:
        raise UserError(f"{layout.folder}: no rows for {stage}: use a dataset with more rows")
    return source
