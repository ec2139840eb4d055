"""Where below the root a file of the trace lies: /data/day_0.npy is ROOT/data/day_0.npy."""

import hashlib
import os
from pathlib import Path

from common.errors import UserError, printable

MAX_NAME = 255  # bytes of one name, which Linux's file systems take
KEPT_NAME = 150  # bytes that are kept of a longer one


class MappedPaths:
    """Whole, normalized names of a trace -> paths below the root. No name leads out of it: `..` is resolved
    in the text, before any file system sees it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mapped: dict[str, str] = {}

    def find(self, path: str) -> str:
        mapped = self._mapped.get(path)
        if mapped is None:
            if "\0" in path:
                raise UserError(f"{printable(path)}: a file of the trace has a NUL in its name")
            names = [_shorten_name(name) for name in os.path.normpath("/" + path).split("/") if name]
            mapped = self._mapped[path] = os.path.join(self.root, *names)
        return mapped

    def list_all(self) -> dict[str, str]:
        """Path below the root -> name in the trace."""
        return {mapped: path for path, mapped in self._mapped.items()}


def _shorten_name(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) <= MAX_NAME:
        return name
    kept = raw[:KEPT_NAME].decode(errors="ignore")
    return f"{kept}~{hashlib.sha256(raw).hexdigest()[:16]}"
