"""The names, shapes and headers of a dataset's files, meta.json, and the publication of them all."""

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import os_errors_as_user_errors, printable, quote_for_shell
from common.words import format_number
from dlrm.data.criteo import META, DatasetMeta
from dlrm.prep.io.digests import compute_digests
from dlrm.prep.io.files import OffsetFile, write_atomically
from dlrm.prep.io.folders import DATASET, SUBSETS, Folders, publish_results
from dlrm.prep.io.inputs import FileStamps, InputFile, OutputDay, plan_outputs, select_days
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime.trace import make_named_pool, sync_to_disk

HEADER_BYTES = 128
WITHOUT_MD5 = {"npy": [], "parquet": ["README.md"]}  # published with the results, not listed in meta.json
DTYPES = {"dense": "<f4", "labels": "<i4"}


def make_npy_header(shape: tuple[int, int], dtype: str) -> bytes:
    """The 128 bytes that np.save writes for an array of this shape; its rows can then be written in any
    order.
    """
    text = str({"descr": dtype, "fortran_order": False, "shape": shape})
    body = text[:-1] + ", }"  # np.save's spelling
    length = HEADER_BYTES - 10 - 1  # less magic, version and length before it, and the newline after it
    if len(body) > length:
        raise AssertionError(f"header of {shape} is too long")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length + 1) + body.ljust(length).encode() + b"\n"


def find_sparse_dtype(options: PrepOptions) -> str:
    """dtype of the ids. Raw hashes and OneFlow's ids need int64; numbered ids and ids below --max_ind_range
    fit int32.
    """
    if options.mod_idx:
        return "int64"
    return "int32" if options.contiguous or options.max_ind_range or options.compat else "int64"


def list_arrays(outputs: list[OutputDay], options: PrepOptions) -> dict[str, tuple[tuple[int, int], str]]:
    """All arrays of the finished folder: name -> (shape, dtype).

    With --compat torchrec, ids are int64 where torchrec does not shuffle them: in the last day, and without
    the step shuffle.
    """
    ids, arrays = {"int32": "<i4", "int64": "<i8"}[find_sparse_dtype(options)], {}
    shuffled = {output.name for output in select_days(outputs)[:-1]} if options.shuffle else set()
    for output in outputs:
        wide = options.compat == "torchrec" and output.name not in shuffled
        dtypes = DTYPES | {"sparse": "<i8" if wide else ids}
        for part, columns in options.columns.parts.items():
            arrays[f"{output.name}_{part}.npy"] = (output.rows, columns), dtypes[part]
    return arrays


def list_result_names(options: PrepOptions, found: list[InputFile]) -> list[str]:
    """The names of the results as far as they are known before a row is read."""
    names = [META]
    if options.format == "npy":
        return names + list(list_arrays(plan_outputs(found, [1] * len(found), options.steps), options))
    # foreign parts there must be refused: a reader would take them for the dataset's own
    for subset in SUBSETS:
        names += [f"{subset}/{path.name}" for path in (options.output_dir / subset).glob("part_*.parquet")]
    return [*names, "README.md", *(f"{subset}/part_00000.parquet" for subset in SUBSETS)]


def allocate_arrays(folder: Path, options: PrepOptions, outputs: list[OutputDay]) -> bool:
    """Make the files with their headers and final sizes, so that rows can be written in any order. Returns
    False if all files were there already.
    """
    is_new = False
    for name, (shape, dtype) in list_arrays(outputs, options).items():
        path = folder / name
        size = HEADER_BYTES + shape[0] * shape[1] * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            is_new = True
            with OffsetFile(path, "w") as file:
                file.resize(0)
                file.resize(size)
                file.write(make_npy_header(shape, dtype), 0)
    return is_new


def sync_files(folders: Folders, names: list[str]) -> None:
    """Flush what this node wrote to these results. In threads, because each call waits for the disk."""

    def sync_file(name: str) -> None:
        path = folders.find_result(name)
        with os_errors_as_user_errors(path):
            sync_to_disk(path)

    with make_named_pool(8, "flush") as pool:
        list(pool.map(sync_file, names))


def compute_md5(folders: Folders, names: list[str]) -> dict[str, str]:
    paths = [folders.find_result(name) for name in names]
    found = compute_digests(paths)
    return {name: found[path] for name, path in zip(names, paths, strict=True)}


def publish_files(folders: Folders, names: list[str], meta: DatasetMeta, stamps: FileStamps) -> None:
    """Rename the results, which are flushed already, to their final names; meta.json comes last, so that
    after a power failure the dataset is either complete or has no meta.json.
    """
    write_meta(folders, meta)
    publish_results(folders, names, META, DATASET, stamps.refuse_changed)


def write_meta(folders: Folders, meta: DatasetMeta) -> None:
    path = folders.unfinished / META
    write_atomically(path, (json.dumps(asdict(meta), indent=1) + "\n").encode())
    with os_errors_as_user_errors(path):
        sync_to_disk(path)


def describe_dataset(folder: Path, meta: DatasetMeta) -> str:
    """One line for the user, at the very end: the dataset's size, and the command that trains on it."""
    text = (
        f"{printable(folder)}: {format_number(sum(meta.rows), 'row')} in {format_number(meta.days, 'day')}, "
    )
    text += f"{format_number(len(meta.table_sizes), 'table')} of {min(meta.table_sizes):,} to "
    text += f"{format_number(max(meta.table_sizes), 'row')} ({meta.format})"
    parameters = meta.parameters
    if "contiguous" in parameters["steps"] or parameters["max_ind_range"]:
        text += f"; next: DATASET_DIR={quote_for_shell(folder)} {find_train_script()}"
    return text


def find_train_script() -> str:
    """3_train.sh as it has to be typed in the current folder."""
    root = Path(__file__).parents[3]
    return "./3_train.sh" if Path.cwd() == root else quote_for_shell(root / "3_train.sh")


def make_meta(
    options: PrepOptions, rows: list[int], last_ids: list[int], made_by: str = "dlrm.prep", **more: Any
) -> DatasetMeta:
    """The contents of meta.json. `more`: values to add to its parameters, such as the stamps of the input.

    `rows`: of each day. `last_ids`: the largest id of each column.
    """
    return DatasetMeta(
        rows=rows,
        table_sizes=compute_table_sizes(last_ids, options),
        dtypes={
            "dense": "float32",
            "sparse": find_sparse_dtype(options),
            "labels": "float32" if options.mod_idx else "int32",
        },
        parameters=json.loads(json.dumps(options.list_parameters() | more)),
        made_by=made_by,
        format=options.format,
        num_numerical=options.columns.numerical,
        num_categorical=options.columns.categorical,
    )


def publish_dataset(
    names: list[str],
    options: PrepOptions,
    folders: Folders,
    outputs: list[OutputDay],
    last_ids: list[int],
    made_by: str,
    stamps: FileStamps,
) -> DatasetMeta:
    """Flush, digest and publish results that are complete, for the engines that cannot resume.

    names     the results' files, relative to the unfinished folder; with arrays those of `list_arrays`
    last_ids  the largest id of each categorical column
    made_by   what meta.json says of the engine
    stamps    of the input files: UserError where one was changed since
    """
    rows = [output.rows for output in select_days(outputs)]
    meta = make_meta(options, rows, last_ids, made_by, inputs=stamps.list_recorded())
    sync_files(folders, names)
    if options.md5:
        meta.md5.update(compute_md5(folders, names))
    publish_files(folders, names + WITHOUT_MD5[options.format], meta, stamps)
    return meta


def round_through_float(ids: np.ndarray) -> np.ndarray:
    """int32 [...]: integers as they are after torchrec's shuffle, which stores them in a float32 array."""
    with np.errstate(invalid="ignore"):
        return ids.astype(np.float32).astype(np.int32)


def compute_table_sizes(last_ids: list[int], options: PrepOptions) -> list[int]:
    """Largest id + 1 of each column. With --compat the shuffle rounds ids to float32, which may increase
    them.
    """
    if options.compat and options.shuffle:
        last_ids = [max(last, int(np.float32(last))) for last in last_ids]
    return [last + 1 for last in last_ids]
