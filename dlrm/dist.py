"""Ranks that work together: the process group, agreement on errors, clock marks, one end for all."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlrm import trace
from dlrm.entry import complain
from dlrm.errors import UserError
from dlrm.ranks import Ranks

T = TypeVar("T")
FAILURE = "dlrm/failure"
_store: Any = None  # of the session
WATCH_SECONDS = 1.0


def device_of(here: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def session(here: Ranks, timeout: int) -> Iterator[torch.device]:
    """The process group of all ranks: gloo on CPU, NCCL on CUDA. A rank that fails takes the others along."""
    device = device_of(here)
    if "MASTER_ADDR" not in os.environ:
        if here.world_size > 1:
            raise UserError("MASTER_ADDR is not set: start the ranks with launcher.sh or torchrun")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(RANK=str(here.rank), WORLD_SIZE=str(here.world_size))
    os.environ.update(LOCAL_RANK=str(here.local_rank), LOCAL_WORLD_SIZE=str(here.local_world_size))
    limit = timedelta(seconds=timeout)
    if here.world_size == 1:
        store: Any = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=here.rank, world_size=here.world_size,
        timeout=limit,
    )  # fmt: skip
    global _store
    _store = store
    watch = _Watch(store, here)
    try:
        yield device
        dist.barrier()  # nobody leaves while another still works: its store would die with rank 0
    except BaseException as error:
        if getattr(error, "shared", False):
            _part(error, here)
        watch.tell(error)
        raise
    finally:
        watch.close()
    dist.destroy_process_group()


def side_store() -> Any:
    """Another connection to the ranks' store, for a thread: a call that waits does not hold up the others."""
    return _store.clone() if hasattr(_store, "clone") else _store


def _part(error: BaseException, here: Ranks) -> None:
    """All ranks end for the same reason: it is told, and the traces are whole, before the first one leaves
    (a launcher may kill the others as soon as one is gone)."""
    if here.first:
        complain(Ranks(), str(error))
    error.told = True  # type: ignore[attr-defined]
    trace.stop()
    with contextlib.suppress(RuntimeError):
        dist.barrier()


class _Watch(threading.Thread):
    """Ends this rank soon after another one has said that it failed: nobody waits for the dead."""

    def __init__(self, store: Any, here: Ranks) -> None:
        super().__init__(name="watch", daemon=True)
        self._here, self._done = here, threading.Event()
        self._store = store
        if here.world_size > 1:
            self._store = store.clone() if hasattr(store, "clone") else store
            self.start()

    def run(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            try:
                if not self._store.check([FAILURE]):
                    continue
                who = self._store.get(FAILURE).decode()
            except RuntimeError:  # the store died with the rank that keeps it
                who = "0"
            time.sleep(WATCH_SECONDS)  # let this rank's own error come first, if it has one
            if self._done.is_set():
                return
            complain(self._here, f"ends because rank {who} failed")
            os._exit(1)

    def tell(self, error: BaseException) -> None:
        """Leave a note for the others, unless the error is everybody's own."""
        if self._here.world_size > 1 and not getattr(error, "shared", False):
            try:
                if not self._store.check([FAILURE]):
                    self._store.set(FAILURE, str(self._here.rank))
            except RuntimeError:
                pass  # nobody left to tell

    def close(self) -> None:
        self._done.set()


@contextmanager
def together() -> Iterator[None]:
    """What goes wrong on any rank in this block goes wrong on all: the same error, told once."""
    mine = ""
    try:
        yield
    except UserError as error:
        mine = str(error)
    errors = everyone(mine)
    told = next(((rank, text) for rank, text in enumerate(errors) if text), None)
    if told:
        error = UserError(told[1])
        error.shared = True
        raise error


def everyone(value: T) -> list[T]:
    """Each rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first rank's value, on all."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def mark_clock(when: str) -> None:
    """Note one moment in every rank's trace: the converter aligns the nodes' clocks by it."""
    dist.barrier()
    trace.instant("clock", "barrier", when=when)
