"""Opens the rows of any format: `open_source(kind, folder, stage).read(start, stop)`.

Stages: train = all days but the last; val and test = the halves of the last day. A folder of one day (or
Kaggle's single train file) uses its last seventh instead of a last day.
`scan_dataset` checks all files of a folder once. To open several stages, pass its result instead of the
folder: then their `bytes_read` is also one.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dlrm.data.memory import MappedSource, MemorySource
from dlrm.data.multihot import scan_multi_hot_files
from dlrm.data.npy import NpyLayout
from dlrm.data.npy import scan_npy as scan_npy
from dlrm.data.rows import STAGES, RowSource
from dlrm.data.stream import StreamSource
from dlrm.data.synthetic import RandomSource
from dlrm.runtime.errors import UserError

RANDOM_ROWS = 1 << 20


AnyLayout = Any  # NpyLayout or ParquetLayout, what `scan_dataset` returns; both have folder, bytes_read


@dataclass(frozen=True)
class SourceOptions:
    """What a source needs to know besides its files."""

    stage: str
    read_chunk_mb: float = 16
    rows: int = RANDOM_ROWS
    table_sizes: Sequence[int] | None = None
    seed: int = 0


def open_random(_layout: AnyLayout, options: SourceOptions) -> RowSource:
    if options.table_sizes is None:
        raise UserError(
            "random data needs table sizes: give --num_embeddings or --num_embeddings_per_feature"
        )
    return RandomSource(options.stage, options.rows, options.table_sizes, options.seed)


def open_stream(layout: AnyLayout, options: SourceOptions) -> RowSource:
    return StreamSource(layout, options.stage, options.read_chunk_mb)


def open_memory(layout: AnyLayout, options: SourceOptions) -> RowSource:
    return MemorySource(StreamSource(layout, options.stage, options.read_chunk_mb))


def open_mapped(layout: AnyLayout, options: SourceOptions) -> RowSource:
    return MappedSource(layout, options.stage)


def open_parquet_source(layout: AnyLayout, options: SourceOptions) -> RowSource:
    from dlrm.data.parquet import ParquetSource  # pyarrow takes half a second to import

    return ParquetSource(layout, options.stage)


def scan_parquet(folder: str | os.PathLike[str]) -> AnyLayout:
    from dlrm.data.parquet import scan_parquet

    return scan_parquet(folder)


class SourceKind(NamedTuple):
    """One way to keep rows."""

    scan: Callable[[str | os.PathLike[str]], AnyLayout]  # check a folder's files, once
    open: Callable[[AnyLayout, SourceOptions], RowSource]  # the rows of one stage


KINDS: dict[str, SourceKind] = {
    "random": SourceKind(lambda folder: NpyLayout(os.fspath(folder), {}), open_random),
    "stream": SourceKind(scan_npy, open_stream),
    "memory": SourceKind(scan_npy, open_memory),
    "mmap": SourceKind(scan_npy, open_mapped),
    "multi_hot": SourceKind(scan_multi_hot_files, open_stream),
    "parquet": SourceKind(scan_parquet, open_parquet_source),
}


def scan_dataset(kind: str, folder: str | os.PathLike[str]) -> AnyLayout:
    """Check every file of the folder; the UserError names all bad ones."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of data {kind}: choose from {', '.join(KINDS)}")
    return KINDS[kind].scan(folder)


def detect_format(kind: str, folder: str | None) -> str:
    """`kind`, a default; or "parquet" where the folder has Parquet files and no .npy files."""
    root = Path(folder) if folder else None
    if kind not in ("stream", "memory") or root is None or any(root.glob("*.npy")):
        return kind
    return "parquet" if any(root.glob("*.parquet")) or any(root.glob("*/*.parquet")) else kind


def count_ids(layout: AnyLayout) -> list[int] | None:
    """The number of different ids in each column, where ids are no rows of tables; else None."""
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
) -> RowSource:
    """The rows of one stage. `rows`, `table_sizes` and `seed` are for random data only."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage}: choose from {', '.join(STAGES)}")
    layout = scan_dataset(kind, folder) if isinstance(folder, str | os.PathLike) else folder
    source = KINDS[kind].open(layout, SourceOptions(stage, read_chunk_mb, rows, table_sizes, seed))
    if source.rows < 1:
        raise UserError(f"{layout.folder}: no rows for {stage}: use a dataset with more rows")
    return source
