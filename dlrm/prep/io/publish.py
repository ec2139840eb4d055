"""What a dataset's files are called and hold; they get their names together, and meta.json comes last."""

import json
import shlex
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import os_errors_as_user_errors, printable
from dlrm.data.criteo import META, PARTS, DatasetMeta
from dlrm.prep.io.digests import compute_digests
from dlrm.prep.io.files import OffsetFile, write_atomically
from dlrm.prep.io.folders import DATASET, SUBSETS, Folders, publish_results
from dlrm.prep.io.inputs import FileStamps, InputFile, OutputDay, plan_outputs, select_days
from dlrm.prep.job.options import PrepOptions
from dlrm.runtime.trace import sync_to_disk

HEADER_BYTES = 128
DTYPES = {"dense": "<f4", "labels": "<i4"}


def make_npy_header(shape: tuple[int, int], dtype: str) -> bytes:
    """The 128 bytes that np.save writes for such an array: rows can follow in any order."""
    text = str({"descr": dtype, "fortran_order": False, "shape": shape})
    body = text[:-1] + ", }"  # np.save's spelling
    room = HEADER_BYTES - 10 - 1
    if len(body) > room:
        raise AssertionError(f"header of {shape} is too long")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room + 1) + body.ljust(room).encode() + b"\n"


def find_sparse_dtype(options: PrepOptions) -> str:
    """Raw hashes need more than int32; numbered ids and ids under --max_ind_range do not."""
    return "int32" if options.contiguous or options.max_ind_range or options.compat else "int64"


def list_arrays(made: list[OutputDay], options: PrepOptions) -> dict[str, tuple[tuple[int, int], str]]:
    """Every array of the finished folder: name -> shape, dtype.

    Ids are int32, but int64 where torchrec writes that: before its shuffle, and the day that it only copies.
    """
    ids, found = {"int32": "<i4", "int64": "<i8"}[find_sparse_dtype(options)], {}
    shuffled = {output.name for output in select_days(made)[:-1]} if options.shuffle else set()
    for output in made:
        wide = options.compat == "torchrec" and output.name not in shuffled
        dtypes = DTYPES | {"sparse": "<i8" if wide else ids}
        for part, columns in PARTS.items():
            found[f"{output.name}_{part}.npy"] = (output.rows, columns), dtypes[part]
    return found


def list_result_names(options: PrepOptions, found: list[InputFile]) -> list[str]:
    """What a run will write, before a row is read."""
    names = [META]
    if options.format == "npy":
        return names + list(list_arrays(plan_outputs(found, [1] * len(found), options.steps), options))
    for subset in SUBSETS:  # a part of somebody else's would be read with the dataset's own
        names += [f"{subset}/{path.name}" for path in (options.output_dir / subset).glob("part_*.parquet")]
    return [*names, "README.md", *(f"{subset}/part_00000.parquet" for subset in SUBSETS)]


def allocate_arrays(folder: Path, options: PrepOptions, made: list[OutputDay]) -> bool:
    """Files of the right size with their headers, for rows to go anywhere in them; False: all were there."""
    fresh = False
    for name, (shape, dtype) in list_arrays(made, options).items():
        path = folder / name
        size = HEADER_BYTES + shape[0] * shape[1] * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            fresh = True
            with OffsetFile(path, "w") as file:
                file.resize(0)
                file.resize(size)
                file.write(make_npy_header(shape, dtype), 0)
    return fresh


def sync_files(folders: Folders, names: list[str]) -> None:
    """What this machine wrote, on the disk; side by side, because each one waits for the disk."""

    def one(name: str) -> None:
        path = folders.find_result(name)
        with os_errors_as_user_errors(path):
            sync_to_disk(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, names))


def compute_md5(folders: Folders, names: list[str]) -> dict[str, str]:
    paths = [folders.find_result(name) for name in names]
    found = compute_digests(paths)
    return {name: found[path] for name, path in zip(names, paths, strict=True)}


def publish_files(folders: Folders, names: list[str], meta: DatasetMeta, stamps: FileStamps) -> None:
    """What is on the disk gets its real name; meta.json last: a power cut finds all or nothing."""
    write_meta(folders, meta)
    publish_results(folders, names, META, DATASET, stamps.check)


def write_meta(folders: Folders, meta: DatasetMeta) -> None:
    path = folders.unfinished / META
    write_atomically(path, (json.dumps(asdict(meta), indent=1) + "\n").encode())
    with os_errors_as_user_errors(path):
        sync_to_disk(path)


def describe_dataset(folder: Path, meta: DatasetMeta) -> str:
    """What there is now, and what to do with it."""
    text = f"{printable(folder)}: {sum(meta.rows):,} rows in {meta.days} days, "
    text += f"{len(meta.table_sizes)} tables of {min(meta.table_sizes):,} to "
    text += f"{max(meta.table_sizes):,} rows ({meta.format})"
    made = meta.parameters
    if ("contiguous" in made["steps"] or made["max_ind_range"]) and not made["mod_idx"]:
        text += f"; next: DATASET_DIR={shlex.quote(printable(folder))} ./3_train.sh"
    return text


def make_meta(
    options: PrepOptions, rows: list[int], last_ids: list[int], made_by: str = "dlrm.prep", **more: Any
) -> DatasetMeta:
    """The dataset's meta.json. `more`: what was read, for the engine that can go on where it was."""
    return DatasetMeta(
        rows=rows,
        table_sizes=compute_table_sizes(last_ids, options),
        dtypes={"dense": "float32", "sparse": find_sparse_dtype(options), "labels": "int32"},
        parameters=json.loads(json.dumps(options.parameters() | more)),
        made_by=made_by,
        format=options.format,
    )


def publish_arrays(
    options: PrepOptions,
    folders: Folders,
    made: list[OutputDay],
    last_ids: list[int],
    made_by: str,
    stamps: FileStamps,
) -> None:
    """The end of an engine that has the whole dataset in its files at once."""
    rows = [output.rows for output in select_days(made)]
    meta = make_meta(options, rows, last_ids, made_by, inputs=stamps.list_recorded())
    names = list(list_arrays(made, options))
    sync_files(folders, names)
    if options.md5:
        meta.md5.update(compute_md5(folders, names))
    publish_files(folders, names, meta, stamps)
    print(describe_dataset(options.output_dir, meta))


def round_through_float(ids: np.ndarray) -> np.ndarray:
    """What torchrec's shuffle leaves of an integer that went through its float32 array."""
    with np.errstate(invalid="ignore"):
        return ids.astype(np.float32).astype(np.int32)


def compute_table_sizes(last_ids: list[int], options: PrepOptions) -> list[int]:
    """Largest id + 1; rounding through float32 can carry the largest id upwards."""
    if options.compat and options.shuffle:
        last_ids = [max(last, int(np.float32(last))) for last in last_ids]
    return [last + 1 for last in last_ids]
