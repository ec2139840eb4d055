"""Open and close files so that a tracer in this process loses none of their bytes.

DFTracer has a table: descriptor -> file. It forgets a descriptor only after the kernel has closed it, and
the kernel may by then have given the same number to a file that another thread opens: the tracer forgets
that file, and the trace has none of its reads and writes. So threads take turns: whoever opens or closes a
file in a folder that may be traced does it with `opening` held, or by the functions here.
"""

import os
import threading

opening = threading.RLock()
# a fork while another thread holds the lock would leave it locked in the child forever
os.register_at_fork(before=opening.acquire, after_in_parent=opening.release, after_in_child=opening.release)


def open_descriptor(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
    """os.open, with `opening` held."""
    with opening:
        return os.open(path, flags, mode)


def close_descriptor(descriptor: int) -> None:
    """os.close, with `opening` held."""
    with opening:
        os.close(descriptor)
