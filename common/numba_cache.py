"""Set numba's cache of compiled code to a folder that only this user can write to.

numba runs what it loads from its cache unchecked. With a cache beside the sources (numba's default),
everybody who can write to a shared checkout could run code as its users; and in a read-only checkout there
could be none. Called from the packages' __init__, before numba is imported.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def use_private_cache(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set NUMBA_CACHE_DIR, which child processes inherit, unless the user has set it."""
    if environ.get(VARIABLE):
        return
    for folder in _list_candidates(environ):
        if _is_private(folder):
            environ[VARIABLE] = str(folder)
            return
    environ[VARIABLE] = tempfile.mkdtemp(prefix="dlrm-io-numba-")  # for this process and its children


def _list_candidates(environ: MutableMapping[str, str]) -> Iterator[Path]:
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        yield Path(home, "dlrm-io", "numba")
    yield Path(tempfile.gettempdir(), f".dlrm-io-numba-{os.geteuid()}")  # where the home cannot be written to


def _is_private(folder: Path) -> bool:
    """Make the folder if it is missing. It must be this user's, no link, and not writable for others."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
    except OSError:
        return False
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return ours and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)
