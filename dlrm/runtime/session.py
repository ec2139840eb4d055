"""Ranks that work together: the process group, agreement on errors, clock marks, one end for all."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.memory import is_out_of_memory
from dlrm.cpu import process_group
from dlrm.runtime import trace
from dlrm.runtime.entry import print_error
from dlrm.runtime.errors import STOPPED, USAGE, LostRank, Stopped, UserError
from dlrm.runtime.heartbeat import Heartbeat, is_broken_connection, rendezvous
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.rendezvous import SignedStore

T = TypeVar("T")
_store: Any = None  # of the session
PATIENCE = 10  # a rank that gives signs of life may keep the others waiting so many times longer


def choose_device(here: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def open_session(here: Ranks, timeout: int, exchanging: str = "auto") -> Iterator[torch.device]:
    """The process group of all ranks: shared memory or gloo on CPU, NCCL on CUDA.

    A rank that fails takes the others along.
    """
    global _store
    with trace.span("startup", "process_group"):
        device = choose_device(here)
        _store, processes = rendezvous(here, timeout)
        watch = Heartbeat(_store, here, processes, timeout)
        try:
            process_group.register_backends()
            on_cpu = {"auto": process_group.NAME, "gloo": process_group.GLOO}[exchanging]
            dist.init_process_group(
                "nccl" if device.type == "cuda" else on_cpu,
                store=dist.PrefixStore(_store.name_group("group"), _store.store), rank=here.rank,
                world_size=here.world_size, timeout=PATIENCE * timedelta(seconds=timeout),
            )  # fmt: skip
            watch.formed()
        except (UserError, Stopped, KeyboardInterrupt) as error:
            watch.tell(_code_of(error))
            watch.close()
            raise
        except Exception as error:
            # whatever a rank that is gone, or a stranger's bytes in the store, make of it
            found = watch.find() if here.world_size > 1 else None
            watch.close()
            if found is None or found.told or "a connection broke" not in str(found):
                raise found or error from None
            first_line = (str(error).splitlines() or [""])[0][:200]
            raise LostRank(f"the ranks cannot connect: {type(error).__name__}: {first_line}") from None
    try:
        with _rank_environment(here):
            yield device
        watch.finish()
        dist.barrier()  # nobody leaves while another still works: its store would die with rank 0
        watch.leave()
    except BaseException as error:
        if getattr(error, "shared", False):
            watch.quieten()
            _leave_together(error, here)
        elif here.world_size > 1 and is_broken_connection(error):
            raise watch.find() from None
        else:
            watch.tell(_code_of(error))
        raise
    finally:
        watch.close()
    dist.destroy_process_group()


@contextmanager
def _rank_environment(here: Ranks) -> Iterator[None]:
    """The names in which torchrec looks for its place; whoever this process starts later has another."""
    mine = {
        "RANK": here.rank, "WORLD_SIZE": here.world_size,
        "LOCAL_RANK": here.local_rank, "LOCAL_WORLD_SIZE": here.local_world_size,
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update({name: str(value) for name, value in mine.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _code_of(error: BaseException) -> int:
    if is_out_of_memory(error):
        return USAGE
    return {UserError: USAGE, Stopped: STOPPED}.get(type(error), 1)


def clone_store() -> SignedStore:
    """Another connection to the ranks' store, for a thread: a call that waits does not hold up the others."""
    return _store.clone()


def _leave_together(error: BaseException, here: Ranks) -> None:
    """All ranks end for the same reason: it is told, and the traces are whole, before the first one leaves
    (a launcher may kill the others as soon as one is gone).
    """
    if here.first:
        print_error(Ranks(), str(error))
    error.told = True  # type: ignore[attr-defined]
    trace.stop_tracing()
    with contextlib.suppress(RuntimeError):
        dist.barrier()


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """What goes wrong on any rank in this block goes wrong on all: the same error, told once."""
    mine = ""
    try:
        yield
    except UserError as error:
        mine = str(error)
    errors = gather_from_all(mine)
    told = next(((rank, text) for rank, text in enumerate(errors) if text), None)
    if told:
        error = UserError(told[1])
        error.shared = True
        raise error


def gather_from_all(value: T) -> list[T]:
    """Each rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_first(value: T) -> T:
    """The first rank's value, on all."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def mark_clock(when: str) -> None:
    """Note one moment in every rank's trace: the converter aligns the nodes' clocks by it."""
    dist.barrier()
    trace.instant("clock", "barrier", when=when)
