"""Prepared histories on the disk: raw arrays and a JSON that says what they are, written last.

Written and read with plain calls that a trace shows. A folder is named after the parameters and the
source file's size and time, so what does not fit is never found.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.npy import Counted
from dlrm.errors import UserError
from dlrm.trace import span

MARKER, VERSION = "prepared.json", 1


def key_of(parameters: Mapping[str, Any], source: Path | None) -> str:
    facts: dict[str, Any] = {"version": VERSION, **parameters}
    if source is not None:
        status = source.stat()
        facts["source"] = [str(source.absolute()), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def save(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write beside, then rename: a folder under its final name is whole."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        described = {}
        for name, array in arrays.items():
            described[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
            writing = span("prep", "write", file=name, bytes=array.nbytes)
            with writing, open(partial / name, "wb", buffering=0) as out:
                view = _bytes(np.ascontiguousarray(array))
                while view:
                    view = view[out.write(view) :]
        (partial / MARKER).write_text(json.dumps({**facts, "arrays": described}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # an older one that `load` refused
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; give a writable --cache_dir"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path, bytes_read: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and facts, or None where there is nothing whole."""
    try:
        facts = json.loads((folder / MARKER).read_text())
        arrays = {name: _array(folder / name, about, bytes_read) for name, about in facts["arrays"].items()}
    except (OSError, ValueError, KeyError):
        return None
    return arrays, facts


def _array(path: Path, about: Mapping[str, Any], bytes_read: dict[str, int]) -> np.ndarray:
    array = np.empty(about["shape"], np.dtype(about["dtype"]))
    with span("data", "read", file=str(path), bytes=array.nbytes), Counted(str(path), bytes_read) as file:
        if os.fstat(file.fileno()).st_size != array.nbytes:
            raise ValueError(f"{path} is not whole")
        view = _bytes(array)
        while view:
            got = file.readinto(view)
            if not got:
                raise ValueError(f"{path} ends early")
            view = view[got:]
    return array


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
