"""Prepared histories on the disk: raw arrays and a JSON that says what they are, written last.

Written and read with plain calls that a trace shows. A folder is named after the parameters and the
source file's size and time, so what does not fit is never found. It carries the mark of
`common.owned.WorkFolders`; another folder of that name is not replaced. One process writes at a time.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import check_regular, read_json_object
from common.lock import FolderLock
from common.owned import WorkFolders, write_whole
from dlrm.data.npy import CountingFile
from dlrm.runtime.trace import span

MARKER, VERSION = "prepared.json", 1
ARRAYS = {"items", "starts", "negatives"}
TYPES = {"<i4": np.int32, "<i8": np.int64}
KIND = WorkFolders("bert4rec", re.compile(rf"{re.escape(MARKER)}|{'|'.join(sorted(ARRAYS))}"))


def cache_key(parameters: Mapping[str, Any], source: Path | None) -> str:
    facts: dict[str, Any] = {"version": VERSION, **parameters}
    if source is not None:
        status = source.stat()
        facts["source"] = [str(source.absolute()), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def save_prepared(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write beside, then rename: a folder under its final name is whole."""
    try:
        with os_errors_as_user_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder.parent, "preparing histories for BERT4Rec in it"):
            _save(folder, arrays, facts)
    except UserError as error:
        raise UserError(f"{error}; or give another --cache_dir") from None


def _save(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """`save_prepared` with the lock held. `facts`: what the marker file has besides the arrays' shapes."""
    for old in KIND.find_folders(folder.parent):  # of writers that were killed
        KIND.remove_folder(old)
    if os.path.lexists(folder) and not KIND.holds_only_own_files(folder):
        raise UserError(
            f"{printable(folder)}: is not whole, and was not made by this program or was changed since; "
            "move it away"
        )
    partial = KIND.make_folder(folder.parent, 0o777)
    try:
        described = {}
        for name, array in arrays.items():
            described[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
            writing = span("prep", "write", file=name, bytes=array.nbytes)
            with (
                os_errors_as_user_errors(partial / name), writing,
                open(partial / name, "xb", buffering=0) as out,
            ):  # fmt: skip
                view = _view_bytes(np.ascontiguousarray(array))
                while view:
                    view = view[out.write(view) :]
        text = json.dumps({**facts, "arrays": described}, indent=1) + "\n"
        write_whole(partial / MARKER, text.encode())
        # an older one is there that `load_prepared` refused
        if os.path.lexists(folder) and not KIND.remove_published(folder):
            raise UserError(f"{printable(folder)}: cannot be replaced; move it away")
        KIND.publish_folder(partial, folder)
    except BaseException:
        KIND.remove_folder(partial)
        raise


def load_prepared(
    folder: Path, bytes_read: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and facts, or None where there is nothing whole."""
    try:
        facts = read_json_object(folder / MARKER)
        about = facts["arrays"]
        if not isinstance(about, dict) or set(about) != ARRAYS or type(facts["items"]) is not int:
            return None
        arrays = {name: _read_array(folder / name, each, bytes_read) for name, each in about.items()}
        return (arrays, facts) if _are_in_range(arrays, facts["items"]) else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _are_in_range(arrays: Mapping[str, np.ndarray], items: int) -> bool:
    """Whether every number is in range: they are indices."""
    seen, starts, negatives = arrays["items"], arrays["starts"], arrays["negatives"]
    if seen.ndim != 1 or starts.ndim != 1 or negatives.ndim != 2 or not 0 < items < (1 << 31) - 2:
        return False
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(seen) or len(negatives) != len(starts) - 1:
        return False
    # three items of a user at least, to train, validate and test with, and something to rank them against
    if (starts[1:] - starts[:-1] < 3).any() or not negatives.shape[1]:
        return False
    return all(
        not len(each) or (each.min() >= 1 and each.max() <= items) for each in (seen, negatives.ravel())
    )


def _read_array(path: Path, about: Mapping[str, Any], bytes_read: dict[str, int]) -> np.ndarray:
    """Allocated only once the file is seen to hold it."""
    dtype, shape = np.dtype(TYPES[about["dtype"]]), about["shape"]
    if not 1 <= len(shape) <= 2 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{path}: an impossible shape")
    if check_regular(path).st_size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is not whole")
    array = np.empty(shape, dtype)
    with (
        span("data", "read", file=str(path), bytes=array.nbytes),
        CountingFile(str(path), bytes_read) as file,
    ):
        view = _view_bytes(array)
        while view:
            got = file.readinto(view)
            if not got:
                raise ValueError(f"{path} ends early")
            view = view[got:]
    return array


def _view_bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
