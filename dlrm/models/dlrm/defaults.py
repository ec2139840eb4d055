"""Defaults that fit the dataset: batch size, optimizer, learning rate, warm-up, decay and the largest table.

In: options as parsed, and which of them were given; the dataset's rows, the ranks, their memory, and the
checkpoint that the run starts from, whose tables stay as large as they are. Out: the options with the others
filled in, and what to tell the user. `--defaults dataset` asks for it (3_train.sh does); `--defaults
mlcommons` keeps the reference's values and warns where they make no sense.

The rules were measured with benchmarks/defaults.py (BENCHMARKS.md, "Defaults").
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import os_errors_as_user_errors
from dlrm.checkpoint.folder import Checkpoint
from dlrm.data.criteo import META, DatasetMeta, name_array_file
from dlrm.embeddings.planner import find_rank_memory
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.stored_model import read_trained_options
from dlrm.runtime.ranks import Ranks
from dlrm.trainer.spec import ChosenOptions

# rows of a step, of all ranks: 64 of 20,000 rows, 512 of the demo's 460,000, MLPerf's 65,536 of Criteo 1TB;
# smaller steps learn more from few rows, larger ones use the machine better
FEW_ROWS, FEW_BATCH, BATCH_POWER = 20_000, 64, 0.565
SMALLEST_BATCH, LARGEST_BATCH = 32, 65_536
TEST_BATCH = 4096  # rows per rank: evaluation learns nothing, so that larger batches only make it faster

ADAGRAD_RATE, ADAGRAD_BATCH = 0.02, 2048  # up to this batch; then it falls to MLPerf v2's 0.005 at 65,536
ADAM_RATE = 0.001
SGD_RATES, SGD_RATE_PER_ROW = (0.1, 0.5), 1 / 512  # for small batches, from .. to; for large ones MLCommons':
MLCOMMONS_RATE, MLCOMMONS_BATCH = 15.0, 65_536  # with warm-up
WARMUP_SHARE, LONGEST_WARMUP = 0.05, 2750  # of the steps
DECAY_START = 0.6  # share of the steps after which the rate falls, as in MLPerf's DLRM

TABLE_CAPS = (80_000_000, 40_000_000, 10_000_000, 1_000_000, 100_000)  # published runs have the first three
TABLE_SHARE = 0.7  # of the ranks' memory
SCHEDULE = ("lr_schedule", "lr_warmup_steps", "lr_decay_start", "lr_decay_steps", "change_lr")
SIZES = ("num_embeddings", "num_embeddings_per_feature", "max_table_size")

SENSIBLE_BATCH, SENSIBLE_STEPS = 16_384, 1000  # at least: where MLCommons' rate makes sense
KAGGLE_LABELS = "train_labels.npy"  # its data set is one file
NPY_HEADER = 128  # bytes, as np.save writes it
PARQUET_ROW_BYTES = 100  # of a compressed row of 40 columns, roughly


def choose_dlrm_options(
    cfg: Config, here: Ranks, device: torch.device, stored: Checkpoint | None
) -> ChosenOptions:
    """The options of this run, on the ranks that there are."""
    return choose_options(cfg, here.world_size, find_rank_memory(device, here) * here.world_size, stored)


def count_training_rows(folder: str | os.PathLike[str]) -> int:
    """From meta.json, else from the files' sizes; 0 where there is nothing to count."""
    root = Path(folder)
    if os.path.lexists(root / META):
        return sum_training_days(DatasetMeta.load(root).rows)
    with os_errors_as_user_errors(root):
        names: list[str] = []
        while (root / name_array_file(len(names), "labels")).exists():
            names.append(name_array_file(len(names), "labels"))
        if not names and (root / KAGGLE_LABELS).exists():
            names = [KAGGLE_LABELS]
        if names:
            sizes = [(root / name).stat().st_size for name in names]
            return sum_training_days([max(0, size - NPY_HEADER) // 4 for size in sizes])
        parquet = [*root.glob("*.parquet"), *root.glob("*/*.parquet")]
        return sum(path.stat().st_size for path in parquet) // PARQUET_ROW_BYTES


def sum_training_days(rows: list[int]) -> int:
    """All days but the last; of a single one, a seventh is held out."""
    return sum(rows[:-1]) if len(rows) > 1 else rows[0] - rows[0] // 7


def choose_batch(rows: int) -> int:
    """Rows of a step, of all ranks together: a power of two."""
    wanted = FEW_BATCH * (max(rows, 1) / FEW_ROWS) ** BATCH_POWER
    return min(max(2 ** round(math.log2(wanted)), SMALLEST_BATCH), LARGEST_BATCH)


def choose_rate(optimizer: str, batch: int) -> float:
    """The learning rate of an optimizer. batch: rows of a step, of all ranks together."""
    if optimizer == "adam":
        return ADAM_RATE
    if optimizer == "sgd":
        low, high = SGD_RATES
        small = min(max(SGD_RATE_PER_ROW * batch, low), high)
        return float(f"{max(small, MLCOMMONS_RATE * batch / MLCOMMONS_BATCH):.2g}")
    return float(f"{ADAGRAD_RATE * min(1.0, (ADAGRAD_BATCH / batch) ** 0.4):.2g}")


def choose_schedule(steps: int) -> dict[str, int]:
    """Warm-up, a constant rate, and a decay that ends with the training."""
    start = round(DECAY_START * steps)
    warmup = min(max(1, round(WARMUP_SHARE * steps)), LONGEST_WARMUP, start)
    return {"lr_warmup_steps": warmup, "lr_decay_start": start, "lr_decay_steps": steps - start}


def count_steps(cfg: Config, rows: int, batch: int) -> int:
    """Steps of the whole training."""
    epoch = -(-rows // batch)
    if cfg.data.limit_train_batches is not None:
        epoch = min(epoch, cfg.data.limit_train_batches)
    return min(epoch * cfg.run.epochs, cfg.run.max_steps or epoch * cfg.run.epochs)


def choose_cap(sizes: Sequence[int], row_bytes: int, memory: int) -> int | None:
    """The largest published cap with which the tables fit into the ranks' memory; None: without one."""
    for cap in (None, *TABLE_CAPS):
        if sum(min(size, cap or size) for size in sizes) * row_bytes <= TABLE_SHARE * memory:
            return cap
    return TABLE_CAPS[-1]


def count_table_row_bytes(width: int, optimizer: str) -> int:
    """Memory of a table's row with its optimizer state."""
    states = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": width, "adam": 2 * width}
    return 4 * (width + states[optimizer])


def choose_options(cfg: Config, ranks: int, memory: int, stored: Checkpoint | None = None) -> ChosenOptions:
    """The options of this run.

    memory  bytes of all ranks together that tables may use
    stored  the checkpoint that the run starts from
    """
    given = set(cfg.run.given_options)
    adagrad = cfg.optim.name != "sgd" and "learning_rate" not in given
    folder = cfg.data.folder
    if cfg.data.defaults == "dataset" and folder and cfg.run.preset is None and cfg.run.mode == "train":
        rows = int(count_training_rows(folder) * (cfg.data.dataset_subset or 1))
        if rows:
            return choose_for_rows(cfg, given, rows, ranks, memory, stored)
    batch = cfg.data.batch_size * ranks
    if adagrad:
        rate = choose_rate(cfg.optim.name, batch)
        optim = replace(cfg.optim, learning_rate=rate)
        note = f"--optimizer {cfg.optim.name} without --learning_rate: {rate:g} is taken (15 is sgd's)"
        return ChosenOptions(replace(cfg, optim=optim), warnings=(note,))
    if folder and "learning_rate" not in given and cfg.run.mode == "train":
        return ChosenOptions(cfg, warnings=warn_of_rate(cfg, count_training_rows(folder), batch))
    return ChosenOptions(cfg)


def warn_of_rate(cfg: Config, rows: int, batch: int) -> tuple[str, ...]:
    """MLCommons' default rate on data for which it was not made."""
    steps = count_steps(cfg, rows, batch)
    if (
        not rows
        or cfg.optim.learning_rate < MLCOMMONS_RATE
        or (batch >= SENSIBLE_BATCH and steps >= SENSIBLE_STEPS)
    ):
        return ()
    return (
        f"learning rate {cfg.optim.learning_rate:g} is MLCommons' default, for steps of 65,536 rows on "
        f"Criteo 1TB; here are {steps:,} steps of {batch:,} rows, and the loss will not fall: try "
        f"--learning_rate {choose_rate('sgd', batch):g}, --preset kaggle or --defaults dataset",
    )


def choose_for_rows(
    cfg: Config, given: set[str], rows: int, ranks: int, memory: int, stored: Checkpoint | None
) -> ChosenOptions:
    """What was not given, chosen for the training rows and the ranks. `memory`, `stored`: as above."""
    data: dict[str, Any] = {}
    if "batch_size" not in given:
        data["batch_size"] = -(-choose_batch(rows) // ranks)
    if "test_batch_size" not in given:
        data["test_batch_size"] = max(TEST_BATCH, data.get("batch_size", cfg.data.batch_size))
    cfg = replace(cfg, data=replace(cfg.data, **data))
    batch = cfg.data.batch_size * ranks

    optim: dict[str, Any] = {}
    # a rate means nothing without its optimizer: whoever gives only the rate means MLCommons' sgd
    if not given & {"optimizer", "adagrad", "learning_rate"}:
        optim["optimizer"] = "rowwise_adagrad"
    name = optim.get("optimizer", cfg.optim.name)
    if "learning_rate" not in given:
        optim["learning_rate"] = choose_rate(name, batch)
    if not given & set(SCHEDULE):
        optim |= choose_schedule(count_steps(cfg, rows, batch))
    cfg = replace(cfg, optim=replace(cfg.optim, **optim))

    cap = None
    if not given & set(SIZES) and cfg.plan.store_type == "device_mem":
        # the memory of another machine would give another cap, and the checkpoint would not fit
        cap = read_trained_options(stored).max_table_size if stored else cap_tables(cfg, name, memory)
        cfg = replace(cfg, model=replace(cfg.model, max_table_size=cap))
    said = [f"batch {cfg.data.batch_size:,} a rank"] if "batch_size" in data else []
    said += [name] if "optimizer" in optim else []
    said += [f"learning rate {cfg.optim.learning_rate:g}"] if "learning_rate" in optim else []
    if "lr_warmup_steps" in optim:
        warmup, decay = optim["lr_warmup_steps"], optim["lr_decay_start"]
        said.append(f"warm-up {warmup:,} steps, decay from step {decay:,}")
    said += [f"tables of at most {cap:,} rows"] if cap else []
    where = f"{rows:,} rows on {ranks} {'rank' if ranks == 1 else 'ranks'}"
    return ChosenOptions(cfg, f"chosen for {where}: {', '.join(said)} (yours win)" if said else "")


def cap_tables(cfg: Config, optimizer: str, memory: int) -> int | None:
    """--max_table_size for the dataset's tables, where they need one."""
    folder = Path(cfg.data.folder or "")
    if not os.path.lexists(folder / META):
        return None
    sizes = DatasetMeta.load(folder).table_sizes
    return choose_cap(sizes, count_table_row_bytes(cfg.model.embedding_dim, optimizer), memory)
