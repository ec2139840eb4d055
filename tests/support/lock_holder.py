"""Another process that holds the lock of a folder."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from common.lock import FolderLock
with FolderLock(sys.argv[1], "testing into it"):
    print("held", flush=True)
    time.sleep(1000)
"""


@contextmanager
def hold_lock(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """The process, which is killed at the end of the block."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
