"""A command on a real terminal (a pseudo-terminal), for what is shown only there."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_on_terminal(*words: object) -> str:
    """Everything that `python WORDS` shows on its terminal; it must end with exit code 0."""
    shown, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    text, end = b"", time.monotonic() + 120
    try:
        while time.monotonic() < end:
            if select.select([shown], [], [], 0.2)[0]:
                try:
                    piece = os.read(shown, 65536)
                except OSError:  # the other side is closed
                    break
                if not piece:
                    break
                text += piece
        assert process.wait(30) == 0, text.decode()
    finally:
        process.kill()
        os.close(shown)
    return text.decode()
