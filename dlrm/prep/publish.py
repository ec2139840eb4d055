"""The output folder: files grow as `.partial`, get their real names together, and meta.json comes last."""

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dlrm.criteo import META, PARTS, Meta
from dlrm.errors import UserError
from dlrm.prep.files import File
from dlrm.prep.options import Options
from dlrm.prep.sources import Output, days_of

HEADER_BYTES = 128
PARTIAL = ".partial"
DTYPES = {"dense": "<f4", "sparse": "<i4", "labels": "<i4"}


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


def sparse_dtype(output: Output, made: list[Output], options: Options) -> str:
    """int32, but int64 where torchrec writes that: before its shuffle, and the day that it only copies."""
    if options.compat == "torchrec":
        return "<i8" if not options.shuffle or output not in days_of(made)[:-1] else "<i4"
    return {"int32": "<i4", "int64": "<i8"}[raw_dtype(options)]


def files(made: list[Output], options: Options) -> dict[str, tuple[tuple[int, int], str]]:
    """Every array of the finished folder: name -> shape, dtype."""
    return {
        f"{output.name}_{part}.npy": (
            (output.rows, columns),
            sparse_dtype(output, made, options) if part == "sparse" else DTYPES[part],
        )
        for output in made
        for part, columns in PARTS.items()
    }


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


def unpublish(folder: Path) -> None:
    """From here on the folder is not a dataset any more, whatever happens next."""
    (folder / META).unlink(missing_ok=True)


def publish(folder: Path, names: list[str], meta: Meta, md5: bool, workers: int) -> None:
    """On the disk, under their real names; meta.json last: a power cut finds all or nothing."""
    for name in names:
        partial = folder / (name + PARTIAL)
        if partial.exists():
            sync(partial)
            os.replace(partial, folder / name)
        elif not (folder / name).exists():
            raise UserError(f"{folder / name} is gone: start again with --restart")
    if md5:
        with ThreadPoolExecutor(workers) as pool:
            meta.md5.update(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))
    sync(folder)
    meta.save(folder)
    sync(folder)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    state, block, at = hashlib.md5(usedforsecurity=False), memoryview(bytearray(1 << 20)), 0
    with File(path) as file:
        while count := file.read_into(block, at):
            state.update(block[:count])
            at += count
    return state.hexdigest()


def rounded(ids: np.ndarray) -> np.ndarray:
    """What torchrec's shuffle leaves of an integer that went through its float32 array."""
    with np.errstate(invalid="ignore"):
        return ids.astype(np.float32).astype(np.int32)


def table_sizes(last_ids: list[int], options: Options) -> list[int]:
    """Largest id + 1; rounding through float32 can carry the largest id upwards."""
    if options.compat and options.shuffle:
        last_ids = [max(last, int(np.float32(last))) for last in last_ids]
    return [last + 1 for last in last_ids]
