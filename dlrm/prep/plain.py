"""The whole pipeline in plain numpy, in memory: the definition that the fast engines are tested against."""

import gzip
from pathlib import Path

import numpy as np

from dlrm.criteo import NUM_SPARSE, PARTS, Meta
from dlrm.errors import UserError
from dlrm.prep import publish, rows, sources
from dlrm.prep.options import MISSING, Options

Table = tuple[np.ndarray, np.ndarray, np.ndarray]  # dense int32, sparse int64, labels int32


def run(options: Options) -> Meta:
    found = sources.find(options.input_dir, options.dataset)
    tables = [read(source, options) for source in found]
    made = sources.outputs(found, [len(table[2]) for table in tables], options.steps)
    dense = np.concatenate([logged(table[0], options) for table in tables])
    sparse = np.concatenate([table[1] for table in tables])
    labels = np.concatenate([table[2] for table in tables])[:, None]
    if options.contiguous:
        for column in range(NUM_SPARSE):
            sparse[:, column] = contiguous(sparse[:, column], options)
    last_ids = sparse.max(axis=0).tolist()
    order = np.arange(len(labels))
    moved = sources.shuffled_rows(made, options.shuffle)
    np.random.RandomState(options.random_seed).shuffle(order[:moved])
    whole = {"dense": dense[order], "sparse": sparse[order], "labels": labels[order]}
    if options.compat:
        for part in ("sparse", "labels"):
            whole[part][:moved] = publish.rounded(whole[part][:moved])
    write(whole, made, options)
    return publish.publish_arrays(options, made, last_ids, "dlrm.prep")


def read(source: sources.Source, options: Options) -> Table:
    rules = rows.Rules(options.lenient, source.labelled, options.max_ind_range, options.empty_dense)
    found: list[rows.Row] = []
    opened = gzip.open if source.packed else open
    with opened(source.path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found += rows.read_line(line, rules)
            except rows.BadRow as error:
                if not options.skip_bad_rows:
                    raise UserError(f"{source.path}:{number}: {error}") from None
    if not found:
        raise UserError(f"{source.path} has no rows")
    dense, sparse, labels = zip(*found, strict=True)
    counts = [count for row in dense for count in row if count != MISSING or not options.frequency_limit]
    if counts:
        options.check_counts(source.path, min(counts), max(counts))
    return np.array(dense, np.int32), np.array(sparse, np.int64), np.array(labels, np.int32)


def logged(dense: np.ndarray, options: Options) -> np.ndarray:
    """log(x - min + 2), the minimum over the whole file; in NVIDIA's recipe log(x + 3), and 0 for a gap."""
    with np.errstate(over="ignore", invalid="ignore"):
        if options.frequency_limit:
            return np.where(dense == MISSING, np.float32(0), np.log(dense + np.int32(3), dtype=np.float32))
        return np.log(dense - (dense.min() - np.int32(2)), dtype=np.float32)


def contiguous(ids: np.ndarray, options: Options) -> np.ndarray:
    """2, 3, 4 ... in order of first appearance; 1 for the rare ones; 0 for a gap in NVIDIA's recipe."""
    values, first, inverse, counts = np.unique(
        ids, return_index=True, return_inverse=True, return_counts=True
    )
    kept = counts >= options.min_count if options.min_count > 1 else np.ones(len(values), bool)
    if options.frequency_limit:
        kept &= values != 0
    new = np.ones(len(values), np.int64)
    order = np.flatnonzero(kept)[np.argsort(first[kept])]
    new[order] = np.arange(2, 2 + len(order))
    if options.frequency_limit:
        new[values == 0] = 0
    return new[inverse]


def write(whole: dict[str, np.ndarray], made: list[sources.Output], options: Options) -> None:
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    publish.unpublish(folder)
    begin = 0
    for output in made:
        for part in PARTS:
            name = f"{output.name}_{part}.npy"
            shape, dtype = publish.files(made, options)[name]
            with open(folder / (name + publish.PARTIAL), "wb") as file:
                file.write(publish.header(shape, dtype))
                file.write(whole[part][begin : begin + output.rows].astype(dtype).tobytes())
        begin += output.rows
