"""Where numba keeps compiled code: in a folder that only this user can write to.

What numba loads from its cache is run as it is, so a cache beside the sources (numba's default) would let
whoever can write to a shared checkout run code as its users; and a checkout that cannot be written to has no
place for one. Called from the packages' __init__, before numba is imported.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def use_private_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Name the folder in NUMBA_CACHE_DIR, which ranks and forks inherit; a value of the user's stays."""
    if environ.get(VARIABLE):
        return
    for folder in _candidates(environ):
        if _is_private(folder):
            environ[VARIABLE] = str(folder)
            return
    environ[VARIABLE] = tempfile.mkdtemp(prefix="dlrm-io-numba-")  # of this process and its children


def _candidates(environ: MutableMapping[str, str]) -> Iterator[Path]:
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        yield Path(home, "dlrm-io", "numba")
    yield Path(tempfile.gettempdir(), f".dlrm-io-numba-{os.geteuid()}")  # no home that can be written to


def _is_private(folder: Path) -> bool:
    """Make the folder where it is missing; it must be this user's own, no link, and closed to all others."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
    except OSError:
        return False
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return ours and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)
