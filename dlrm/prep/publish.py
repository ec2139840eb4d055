"""The output folder: files grow as `.partial`, get their real names together, and meta.json comes last."""

import json
import os
import re
import shlex
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.criteo import META, PARTS, Meta
from dlrm.errors import UserError
from dlrm.prep.digests import digests
from dlrm.prep.files import File
from dlrm.prep.options import Options
from dlrm.prep.sources import Output, days_of
from dlrm.trace import sync

HEADER_BYTES = 128
PARTIAL = ".partial"
OURS = rf"((day_\d+|train|test)_({'|'.join(PARTS)})\.npy|meta\.json){re.escape(PARTIAL)}"
DTYPES = {"dense": "<f4", "labels": "<i4"}


def header(shape: tuple[int, int], dtype: str) -> bytes:
    """The 128 bytes that np.save writes for such an array: rows can follow in any order."""
    text = str({"descr": dtype, "fortran_order": False, "shape": shape})
    body = text[:-1] + ", }"  # np.save's spelling
    room = HEADER_BYTES - 10 - 1
    if len(body) > room:
        raise AssertionError(f"header of {shape} is too long")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room + 1) + body.ljust(room).encode() + b"\n"


def raw_dtype(options: Options) -> str:
    """Raw hashes need more than int32; numbered ids and ids under --max_ind_range do not."""
    return "int32" if options.contiguous or options.max_ind_range or options.compat else "int64"


def files(made: list[Output], options: Options) -> dict[str, tuple[tuple[int, int], str]]:
    """Every array of the finished folder: name -> shape, dtype.

    Ids are int32, but int64 where torchrec writes that: before its shuffle, and the day that it only copies.
    """
    ids, found = {"int32": "<i4", "int64": "<i8"}[raw_dtype(options)], {}
    shuffled = {output.name for output in days_of(made)[:-1]} if options.shuffle else set()
    for output in made:
        wide = options.compat == "torchrec" and output.name not in shuffled
        dtypes = DTYPES | {"sparse": "<i8" if wide else ids}
        for part, columns in PARTS.items():
            found[f"{output.name}_{part}.npy"] = (output.rows, columns), dtypes[part]
    return found


def allocate(options: Options, made: list[Output]) -> bool:
    """Files of the right size with their headers, for rows to go anywhere in them; False: all were there."""
    fresh = False
    for name, (shape, dtype) in files(made, options).items():
        path = options.output_dir / (name + PARTIAL)
        size = HEADER_BYTES + shape[0] * shape[1] * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            fresh = True
            with File(path, "w") as file:
                file.resize(0)
                file.resize(size)
                file.write(header(shape, dtype), 0)
    return fresh


def partials(folder: Path) -> list[Path]:
    """What an earlier run left half-written; a stranger's .partial files are not ours to touch."""
    found = [path for path in folder.glob(f"*{PARTIAL}") if re.fullmatch(OURS, path.name)]
    parts = (folder.glob(f"{name}/part_*.parquet{PARTIAL}") for name in ("train", "val", "test"))
    return found + [path for each in parts for path in each]


def unpublish(folder: Path) -> None:
    """From here on the folder is not a dataset any more, whatever happens next."""
    (folder / META).unlink(missing_ok=True)


def grown(folder: Path, name: str) -> Path:
    """A complete file, before or after it got its name."""
    partial = folder / (name + PARTIAL)
    if not partial.exists() and not (folder / name).exists():
        raise UserError(f"{folder / name} is gone: start again with --restart")
    return partial if partial.exists() else folder / name


def sync_all(folder: Path, names: list[str]) -> None:
    """What this machine wrote, on the disk; side by side, because each one waits for the disk."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: sync(grown(folder, name)), names))


def md5_of(folder: Path, names: list[str]) -> dict[str, str]:
    paths = [grown(folder, name) for name in names]
    found = digests(paths)
    return {name: found[path] for name, path in zip(names, paths, strict=True)}


def publish(folder: Path, names: list[str], meta: Meta) -> None:
    """What is on the disk gets its real name; meta.json last: a power cut finds all or nothing."""
    for name in names:
        path = grown(folder, name)
        if path != folder / name:
            os.replace(path, folder / name)
    sync(folder)
    meta.save(folder)
    sync(folder)
    print(summary(folder, meta))


def summary(folder: Path, meta: Meta) -> str:
    """What there is now, and what to do with it."""
    text = f"{folder}: {sum(meta.rows):,} rows in {meta.days} days, {len(meta.table_sizes)} tables of "
    text += f"{min(meta.table_sizes):,} to {max(meta.table_sizes):,} rows ({meta.format})"
    made = meta.parameters
    if ("contiguous" in made["steps"] or made["max_ind_range"]) and not made["mod_idx"]:
        text += f"; next: DATASET_DIR={shlex.quote(str(folder))} ./3_train.sh"
    return text


def describe(
    options: Options, rows: list[int], last_ids: list[int], made_by: str = "dlrm.prep", **more: Any
) -> Meta:
    """The dataset's meta.json. `more`: what was read, for the engine that can go on where it was."""
    return Meta(
        rows=rows,
        table_sizes=table_sizes(last_ids, options),
        dtypes={"dense": "float32", "sparse": raw_dtype(options), "labels": "int32"},
        parameters=json.loads(json.dumps(options.parameters() | more)),
        made_by=made_by,
        format=options.format,
    )


def publish_arrays(options: Options, made: list[Output], last_ids: list[int], made_by: str) -> Meta:
    """The end of an engine that has the whole dataset in its files at once."""
    meta = describe(options, [output.rows for output in days_of(made)], last_ids, made_by)
    names = list(files(made, options))
    sync_all(options.output_dir, names)
    if options.md5:
        meta.md5.update(md5_of(options.output_dir, names))
    publish(options.output_dir, names, meta)
    return meta


def rounded(ids: np.ndarray) -> np.ndarray:
    """What torchrec's shuffle leaves of an integer that went through its float32 array."""
    with np.errstate(invalid="ignore"):
        return ids.astype(np.float32).astype(np.int32)


def table_sizes(last_ids: list[int], options: Options) -> list[int]:
    """Largest id + 1; rounding through float32 can carry the largest id upwards."""
    if options.compat and options.shuffle:
        last_ids = [max(last, int(np.float32(last))) for last in last_ids]
    return [last + 1 for last in last_ids]
