"""Importing torch and torchrec in less time, with the one setting that torch reads while it is imported."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# torch's own variable: huge pages for large tensors in the host's memory, a few thousand page faults fewer in
# each step. torch reads it at the first allocation, which is while it is imported, so the device is not known
# yet; memory of a GPU is not affected.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@contextmanager
def import_quickly(huge_pages: bool) -> Iterator[None]:
    """Import torch, torchrec and what builds on them within this context, without garbage collections.

    huge_pages: whether large CPU tensors get huge pages (--cpu_fast_path); the user's own value wins.
    """
    if huge_pages:
        os.environ.setdefault(HUGE_PAGES, "1")
    gc.disable()  # nothing that is imported is garbage
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # what has been imported stays: later collections need not look at it
