"""From options to this rank's batches of the three sets: the source of rows, and how they are batched.

Needs no torch: what makes a batch of rows is passed in.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, printable
from common.memory import refuse_too_large
from dlrm.data import criteo
from dlrm.data.arrays import ArrayCollator
from dlrm.data.batches import BatchLoader
from dlrm.data.multihot import MultiHotMaker
from dlrm.data.npy import NpyLayout
from dlrm.data.prefetch import Prefetcher
from dlrm.data.readers import count_ids, detect_format, open_source, scan_dataset
from dlrm.data.rows import RowSource
from dlrm.models.dlrm.id_frequencies import IdFrequencies, ObservedLoader
from dlrm.models.dlrm.options import INFERENCE_POOL, Config
from dlrm.runtime.ranks import Ranks

KAGGLE, KAGGLE_DAYS = "criteo_kaggle", (1, 7)
RANDOM_BATCHES = 10  # batches of random data per set, if there is no limit


@dataclass
class DLRMDatasets:
    """The three sets as this rank's batches."""

    numerical: int  # columns of counts
    sizes: list[int]  # rows per table
    poolings: list[float] | None  # ids per row of each table; None: one
    sources: list[RowSource]
    train: Prefetcher
    val: Prefetcher
    test: Prefetcher
    frequencies: IdFrequencies | None = None
    description: dict[str, Any] | None = None  # of .npy files, see `describe_files`

    def bytes_read(self) -> dict[str, int]:
        return {path: count for source in self.sources for path, count in source.bytes_read.items()}

    def close(self) -> None:
        for source in self.sources:
            source.close()
        if self.frequencies:
            self.frequencies.save()


def check_dataset_name(name: str, folder: str | None, layout: Any) -> None:
    """UserError where --dataset_name does not fit the files."""
    parts: dict[str, Any] = getattr(layout, "parts", {})  # a Parquet layout has no `parts`
    days = len(parts.get("dense", [])) if folder else 0
    if name == KAGGLE and days not in (0, *KAGGLE_DAYS):
        raise UserError(
            f"--dataset_name {KAGGLE}: {folder} has {days} days, Kaggle's set has 7, or is one file: leave "
            "the option out, or give the other folder"
        )


def refuse_large_batches(
    cfg: Config, source: RowSource, stage: str, batch_size: int, columns: criteo.Columns,
    hots: Sequence[int] | None, on_gpu: bool,
) -> None:  # fmt: skip
    """UserError where the batches of a stage cannot fit into memory; one has never more rows than its set."""
    rows = min(batch_size, source.rows)
    option = f"--{'batch_size' if stage == 'train' else 'test_batch_size'} {batch_size}"
    ids = sum(hots or [1] * columns.categorical)
    if rows * ids >= 1 << 31:
        raise UserError(f"{option}: {ids} ids in each row are more than 2^31 in a batch: lower it")
    row_bytes = 4 * (columns.numerical + 1 + ids)
    ahead = max(1, min(cfg.data.prefetch_batches, source.rows // rows))
    refuse_too_large(
        rows * row_bytes * (ahead + 1), f"{option} with --prefetch_batches {cfg.data.prefetch_batches}",
        "lower them",
    )  # fmt: skip
    if not on_gpu:  # there torch says so, at once
        model = cfg.model
        layers = sum(model.dense_arch_layer_sizes) + sum(model.over_arch_layer_sizes)
        width = layers + columns.categorical * model.embedding_dim
        refuse_too_large(4 * rows * width, f"{option}: a batch in this model", "lower it")
    refuse_too_large(
        min(int(cfg.data.read_chunk_mb * (1 << 20)), source.rows * source.row_bytes),
        f"--read_chunk_mb {cfg.data.read_chunk_mb:g}", "lower it",
    )  # fmt: skip


def choose_columns(cfg: Config, layout: Any) -> tuple[criteo.Columns, list[int] | None]:
    """The columns of the dataset or of random data, and meta.json's table sizes, if there is one."""
    data, sizes = cfg.data, cfg.model.num_embeddings_per_feature
    if data.folder is None:
        return criteo.choose_random_columns(data.num_numerical, data.num_categorical, sizes), None
    found: criteo.Columns = layout.columns
    for name, count in (("numerical", found.numerical), ("categorical", found.categorical)):
        if getattr(data, f"num_{name}") not in (None, count):
            raise UserError(
                f"--num_{name} {getattr(data, f'num_{name}')}: {printable(data.folder)} has {count} {name} "
                "columns: leave the option out, it is for random data"
            )
    return found, layout.table_sizes


def size_stage(cfg: Config, kind: str, stage: str, ranks: int) -> tuple[int | None, int, int]:
    """(batches of a rank at most, rows of a batch, rows of the set where they are drawn at random)."""
    limit: int | None = getattr(cfg.data, f"limit_{stage}_batches")
    train_size = cfg.data.batch_size
    batch_size = train_size if stage == "train" else cfg.data.test_batch_size or train_size
    if kind == "random":
        limit = RANDOM_BATCHES if limit is None else limit
    rows = (limit or 1) * batch_size * ranks
    if kind == "random" and stage == "test" and cfg.run.mode == "inference_benchmark":
        rows = INFERENCE_POOL * max(cfg.inference.inference_benchmark_batch_sizes)
    if rows >= 1 << 62:
        raise UserError(f"--limit_{stage}_batches {limit}: too many rows; lower it")
    return limit, batch_size, rows


def make_batch_loader(
    cfg: Config, source: RowSource, stage: str, limit: int | None, batch_size: int, here: Ranks,
    to_batch: ArrayCollator,
) -> BatchLoader:  # fmt: skip
    """This rank's batches of a stage; only the training's are shuffled or cut to a part of the rows."""
    data, training = cfg.data, stage == "train"
    batches = BatchLoader(
        source, batch_size, here.rank, here.world_size, to_batch=to_batch, limit=limit,
        drop_last=training and data.drop_last_training_batch,
        shuffle_batches=training and data.shuffle_batches,
        shuffle_set=training and data.shuffle_training_set,
        shuffle_order=training and data.shuffle_batch_order,
        rows=math.ceil(source.rows * data.dataset_subset) if training and data.dataset_subset else None,
        seed=cfg.run.seed or 0,
    )  # fmt: skip
    if training and not len(batches) and limit != 0:
        raise UserError(
            f"{batches.rows} training rows are fewer than one batch of {batch_size} on each of "
            f"{here.world_size} ranks: lower --batch_size, or leave out --drop_last_training_batch"
        )
    return batches


def open_datasets(
    cfg: Config,
    here: Ranks,
    make_collator: Callable[..., ArrayCollator] = ArrayCollator,
    on_gpu: bool = False,
) -> DLRMDatasets:
    """Open the source of each set and make this rank's loaders.

    make_collator  (table sizes, whether ids are folded, what makes ids multi-hot) -> what makes batches
    on_gpu         whether batches are computed on a GPU: the host needs no memory for the model's layers
    """
    data = cfg.data
    by_name = data.source == "memory"  # asks for .npy files: then Parquet files are not looked for
    kind = data.kind if by_name else detect_format(data.kind, data.folder)
    layout = scan_dataset(kind, data.folder or "")
    check_dataset_name(data.dataset_name, data.folder, layout)
    columns, known = choose_columns(cfg, layout)
    sizes, fold = criteo.choose_table_sizes(
        cfg.model.num_embeddings, cfg.model.num_embeddings_per_feature, columns.categorical, known,
        cfg.model.max_table_size, count_ids(layout),
    )  # fmt: skip
    distribution = data.multi_hot_distribution_type or "uniform"
    hots = data.multi_hot_sizes
    make_multi_hot = MultiHotMaker(sizes, hots, distribution) if hots else None
    to_batch = make_collator(sizes, fold, make_multi_hot)
    if kind == "multi_hot":
        hots = tuple(layout.parts[str(feature)][0].columns for feature in range(len(sizes)))
    sources, loaders = [], {}
    for stage in ("train", "val", "test"):
        limit, batch_size, rows = size_stage(cfg, kind, stage, here.world_size)
        source = open_source(
            kind, layout, stage,
            read_chunk_mb=data.read_chunk_mb, rows=rows, table_sizes=sizes, seed=cfg.run.seed or 0,
            numerical=columns.numerical,
        )  # fmt: skip
        refuse_large_batches(cfg, source, stage, batch_size, columns, hots, on_gpu)
        batches = make_batch_loader(cfg, source, stage, limit, batch_size, here, to_batch)
        sources.append(source)
        loaders[stage] = Prefetcher(batches, data.prefetch_batches, stage)
    frequencies = None
    if data.collect_multi_hot_freqs_stats and hots:
        frequencies = IdFrequencies(sizes, cfg.run.output_dir or ".", f"{here.rank}_{distribution}")
        loaders["train"] = ObservedLoader(loaders["train"], frequencies.count_batch)
    poolings = [float(k) for k in hots] if hots else None
    return DLRMDatasets(
        columns.numerical, sizes, poolings, sources, **loaders, frequencies=frequencies,
        description=describe_files(layout, sizes),
    )  # fmt: skip


def describe_files(layout: Any, sizes: list[int]) -> dict[str, Any] | None:
    """dataset.json: what `dlrm.emulate --make_data` needs to make such a dataset; None for other formats.

    files        name -> [rows, columns, dtype] of each .npy file
    rows         of each day
    table_sizes  of the tables
    meta_bytes   of meta.json
    """
    arrays = getattr(layout, "parts", {}) if isinstance(layout, NpyLayout) else {}
    if set(arrays) != set(criteo.PARTS):
        return None
    meta = os.path.join(layout.folder, criteo.META)
    return {
        "files": {
            os.path.basename(file.path): [file.rows, file.columns, file.dtype.name]
            for files in arrays.values()
            for file in files
        },
        "rows": [file.rows for file in arrays["labels"]],
        "table_sizes": sizes,
        "meta_bytes": os.path.getsize(meta) if os.path.exists(meta) else 0,
    }
