"""How much memory this process may take; sizes that cannot fit are refused before anything is allocated.

Sizes that a command line or a file's header asks for are compared with it. Without that a size with some
digits too many would be allocated lazily, and the kernel would kill the process, or another, much later.
"""

import contextlib
import os
import resource
from pathlib import Path

from common.errors import UserError

CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def find_host_memory() -> int:
    """Bytes that all processes here share: the host's, or those of their control group where that is less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit = min(limit, int(CONTROL_GROUP.read_text()))
    return limit


def find_memory_limit() -> int:
    """Bytes that this process can have at most: the host's, or what `ulimit -v` leaves it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return find_host_memory() if soft == resource.RLIM_INFINITY else min(find_host_memory(), soft)


def refuse_too_large(size: int, what: str, remedy: str) -> None:
    """UserError where `size` bytes for `what` (file, or option with its value) are more than there can be."""
    limit = find_memory_limit()
    if size > limit:
        raise UserError(
            f"{what} needs {format_size(size)} of memory, this process can have {format_size(limit)}: "
            f"{remedy}"
        )


def format_size(number: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a RuntimeError like any other."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text or "Storage size calculation" in text
    )
