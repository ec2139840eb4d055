"""md5 of finished files by hashlib. The files are read with calls that the tracer records."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dlrm.prep.io.files import OffsetFile

CHUNK = 1 << 20  # bytes of one read


def compute_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> md5 of the file, as 32 hexadecimal digits."""
    buffer = np.empty(CHUNK, np.uint8).data
    return {path: _digest_file(path, buffer) for path in paths}


def _digest_file(path: Path, buffer: memoryview) -> str:
    md5, at = hashlib.md5(usedforsecurity=False), 0
    with OffsetFile(path) as file:
        while got := file.read_into(buffer, at):
            md5.update(buffer[:got])
            at += got
    return md5.hexdigest()
