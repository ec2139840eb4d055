"""The whole pipeline in plain numpy, in memory: the reference that the other engines are tested against."""

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular
from dlrm.data.criteo import PARTS, DatasetMeta
from dlrm.prep.io import inputs, odd_lines, publish
from dlrm.prep.io.columns import choose_columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.folders import Folders, Output
from dlrm.prep.job.options import MISSING, PrepOptions

Table = tuple[np.ndarray, np.ndarray, np.ndarray]  # dense int32, sparse int64, labels int32


def run(options: PrepOptions) -> None:
    input_files = inputs.find_inputs(options.input_dir, options.dataset)
    options = choose_columns(options, input_files)
    stamps = inputs.FileStamps(source.path for source in input_files)
    with Output("run", options.output_dir, options.tmp_dir) as output:
        folders = output.open([], publish.list_result_names(options, input_files), restart=True)
        meta = make_dataset(options, input_files, folders, stamps)
        if not options.keep_tmp:
            output.clear()
    print(publish.describe_dataset(options.output_dir, meta))


def make_dataset(
    options: PrepOptions, input_files: list[inputs.InputFile], folders: Folders, stamps: inputs.FileStamps
) -> DatasetMeta:
    """Write and publish the dataset of the whole input, which is in memory meanwhile."""
    tables = [read_rows(source, options) for source in input_files]
    outputs = inputs.plan_outputs(input_files, [len(table[2]) for table in tables], options.steps)
    dense = np.concatenate([take_logarithm(table[0], options) for table in tables])
    sparse = np.concatenate([table[1] for table in tables])
    labels = np.concatenate([table[2] for table in tables])[:, None]
    if options.contiguous:
        for column in range(options.columns.categorical):
            sparse[:, column] = number_ids(sparse[:, column], options)
    last_ids = sparse.max(axis=0).tolist()
    order = np.arange(len(labels))
    shuffled = inputs.count_shuffled_rows(outputs, options.shuffle)
    np.random.RandomState(options.random_seed).shuffle(order[:shuffled])
    whole = {"dense": dense[order], "sparse": sparse[order], "labels": labels[order]}
    if options.compat:
        for part in ("sparse", "labels"):
            whole[part][:shuffled] = publish.round_through_float(whole[part][:shuffled])
    write_arrays(whole, outputs, options, folders.unfinished)
    names = list(publish.list_arrays(outputs, options))
    return publish.publish_dataset(names, options, folders, outputs, last_ids, "dlrm.prep", stamps)


def read_rows(source: inputs.InputFile, options: PrepOptions) -> Table:
    """All rows of a file, parsed line by line; UserError for a bad line, unless bad lines are skipped."""
    rules = odd_lines.LineRules(
        options.lenient, source.labelled, options.max_ind_range, options.empty_dense, options.columns
    )
    rows: list[odd_lines.Row] = []
    for number, line in enumerate(read_lines(source), 1):
        try:
            if len(line) > odd_lines.LONGEST_LINE:
                raise odd_lines.BadRow(f"a line of more than {odd_lines.LONGEST_LINE >> 20} MB")
            rows += odd_lines.read_line(line, rules)
        except odd_lines.BadRow as error:
            if not options.skip_bad_rows:
                raise UserError(f"{printable(source.path)}:{number}: {error}") from None
    if not rows:
        raise UserError(f"{printable(source.path)}: no rows in it")
    dense, sparse, labels = zip(*rows, strict=True)
    counts = [count for row in dense for count in row if count != MISSING or not options.frequency_limit]
    if counts:
        options.check_counts(source.path, min(counts), max(counts))
    return np.array(dense, np.int32), np.array(sparse, np.int64), np.array(labels, np.int32)


def take_logarithm(dense: np.ndarray, options: PrepOptions) -> np.ndarray:
    """log(x - min + 2), with the minimum of the whole file; by NVIDIA's rules log(x + 3), and 0 for a gap."""
    if not dense.size:
        return dense.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if options.frequency_limit:
            return np.where(dense == MISSING, np.float32(0), np.log(dense + np.int32(3), dtype=np.float32))
        return np.log(dense - (dense.min() - np.int32(2)), dtype=np.float32)


def number_ids(ids: np.ndarray, options: PrepOptions) -> np.ndarray:
    """Replace one column's ids, int64 [rows], by 2, 3, 4 ... in order of first appearance, and by 1 if they
    are rare. By NVIDIA's rules, 0 stays 0.
    """
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


def read_lines(source: inputs.InputFile) -> Iterator[bytes]:
    """The lines of an input file; of a line that is too long, only the beginning."""
    with os_errors_as_user_errors(source.path), os.fdopen(open_regular(source.path), "rb") as raw:
        try:
            file = gzip.GzipFile(fileobj=raw) if source.compressed else raw
            while line := file.readline(odd_lines.LONGEST_LINE + 1):
                yield line
                while len(line) > odd_lines.LONGEST_LINE and not line.endswith(b"\n"):
                    if not (rest := file.readline(1 << 20)) or rest.endswith(b"\n"):
                        break
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{printable(source.path)}: {error}: truncated or damaged gzip") from None


def write_arrays(
    whole: dict[str, np.ndarray], outputs: list[inputs.OutputDay], options: PrepOptions, folder: Path
) -> None:
    """`whole`: part -> [rows of all days, columns], in the order of the output. The days' arrays go to
    `folder`.
    """
    begin = 0
    for output in outputs:
        for part in PARTS:
            name = f"{output.name}_{part}.npy"
            shape, dtype = publish.list_arrays(outputs, options)[name]
            with OffsetFile(folder / name, "w") as file:
                at = file.write(publish.make_npy_header(shape, dtype), 0)
                file.write(whole[part][begin : begin + output.rows].astype(dtype).tobytes(), at)
        begin += output.rows
