"""The session of all ranks: process group, heartbeat, shared errors, exchange of values, clock marks.

In: this rank. Out: a device, and a process group in which every rank is watched. All functions here are
collectives: every rank calls them, in the same order.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.memory import is_out_of_memory
from dlrm.runtime import accelerate, trace
from dlrm.runtime.clock_offset import ROUND_TRIPS, answer_host, measure_offset
from dlrm.runtime.entry import print_error
from dlrm.runtime.errors import STOPPED, USAGE, LostRank, Stopped, UserError, share_user_errors
from dlrm.runtime.heartbeat import Heartbeat, is_broken_connection
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.rendezvous import rendezvous
from dlrm.runtime.signed_store import SignedStore

T = TypeVar("T")
_store: Any = None  # of the open session
_here = Ranks()  # this rank in the open session
_heartbeat: Heartbeat | None = None  # of the open session
# A collective may take this many times --timeout: a rank that is slow (a full file system, a long
# compilation) but sends its heartbeat is not lost.
COLLECTIVE_TIMEOUT_FACTOR = 10


def choose_device(here: Ranks) -> torch.device:
    """This rank's GPU, by its local rank; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def open_session(here: Ranks, timeout: int) -> Iterator[torch.device]:
    """The process group of all ranks: NCCL on CUDA, gloo on CPUs (or what a fast path has in its place).
    Yields this rank's device.

    here        this rank
    timeout     --timeout: seconds without a heartbeat after which a rank counts as lost

    When the block raises, all ranks exit: those whose own code raised nothing raise LostRank, or are ended by
    their heartbeat. The error's attribute `shared` says that all ranks raise it alike.
    """
    global _store, _here, _heartbeat
    _here = here
    with trace.span("startup", "process_group"):
        device = choose_device(here)
        _store, processes = rendezvous(here, timeout)
        heartbeat = _heartbeat = Heartbeat(_store, here, processes, timeout)
        try:
            dist.init_process_group(
                accelerate.hooks.choose_backend(device),
                store=dist.PrefixStore(_store.name_group("group"), _store.store), rank=here.rank,
                world_size=here.world_size, timeout=COLLECTIVE_TIMEOUT_FACTOR * timedelta(seconds=timeout),
            )  # fmt: skip
            heartbeat.mark_group_formed()
        except (UserError, Stopped, KeyboardInterrupt) as error:
            heartbeat.announce_failure(_exit_code_of(error))
            heartbeat.close()
            raise
        except Exception as error:
            # torch raises whatever a lost rank, or another program's bytes in the store, lead to
            found = heartbeat.find_lost_rank() if here.world_size > 1 else None
            heartbeat.close()
            if found is None or found.is_printed or "a connection broke" not in str(found):
                raise found or error from None
            first_line = (str(error).splitlines() or [""])[0][:200]
            raise LostRank(f"the ranks cannot connect: {type(error).__name__}: {first_line}") from None
    try:
        with _set_rank_variables(here):
            yield device
        heartbeat.mark_finished()
        dist.barrier()  # no rank leaves while another still works: the store ends with rank 0
        heartbeat.leave_store()
    except BaseException as error:
        if getattr(error, "shared", False):
            heartbeat.let_main_thread_exit()
            _end_together(error, here)
        elif here.world_size > 1 and is_broken_connection(error):
            raise heartbeat.find_lost_rank() from None
        else:
            heartbeat.announce_failure(_exit_code_of(error))
        raise
    finally:
        heartbeat.close()
    dist.destroy_process_group()


@contextmanager
def _set_rank_variables(here: Ranks) -> Iterator[None]:
    """The variables that torchrec reads its rank from, set for the block only: a process that is started
    afterwards must not take them for its own.
    """
    values = {
        "RANK": here.rank, "WORLD_SIZE": here.world_size,
        "LOCAL_RANK": here.local_rank, "LOCAL_WORLD_SIZE": here.local_world_size,
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _exit_code_of(error: BaseException) -> int:
    if is_out_of_memory(error):
        return USAGE
    return {UserError: USAGE, Stopped: STOPPED}.get(type(error), 1)


def list_silent_ranks(seconds: float) -> dict[int, tuple[str, float]]:
    """On rank 0: host, and seconds, of the ranks without a heartbeat for so long. Not a collective."""
    return _heartbeat.list_silent(seconds) if _heartbeat else {}


def clone_store() -> SignedStore:
    """Another connection to the ranks' store, for a thread of its own."""
    return _store.clone()


def _end_together(error: BaseException, here: Ranks) -> None:
    """All ranks raise the same error. Print it and close all traces before the first rank exits: a launcher
    may kill the others as soon as one is gone.
    """
    if here.first:
        print_error(Ranks(), str(error))
    error.is_printed = True  # type: ignore[attr-defined]
    trace.stop_tracing()
    with contextlib.suppress(RuntimeError):
        dist.barrier()


def errors_on_all_ranks() -> AbstractContextManager[None]:
    """`errors.share_user_errors` between the ranks of the open session."""
    return share_user_errors(gather_from_all)


def gather_from_all(value: T) -> list[T]:
    """The values of all ranks, in rank order. They must be picklable."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_first(value: T) -> T:
    """Rank 0's value, on all ranks; what the others pass is ignored."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def mark_clock(when: str) -> None:
    """Mark in the trace how the clocks of the ranks' hosts compare: once at the start, once at the end.

    The first rank of each host records its clock's offset from that of rank 0's host; every rank records the
    end of one barrier, which all leave at nearly the same time. The analysis puts all hosts on one clock.

    when    "start" or "end"
    """
    if trace.is_tracing():
        _mark_offset(when)
    dist.barrier()
    trace.instant("clock", "barrier", when=when)


def _mark_offset(when: str) -> None:
    """Measure and record the offset of each host's clock; nothing where all ranks are on one host."""
    hosts = gather_from_all(_here.host)
    asking = [hosts.index(host) for host in dict.fromkeys(hosts) if host != hosts[0]]
    if not asking or _here.rank not in (0, *asking):
        return
    store = clone_store()  # the heartbeat's thread waits on the other connection
    group = store.name_group(f"clock-{when}")
    if _here.first:
        for rank in asking:
            answer_host(store, group, rank)
    else:
        offset = measure_offset(store, group, _here.rank)
        trace.instant(
            "clock", "offset", when=when, ahead_us=offset.ahead_us, error_us=offset.error_us,
            round_trips=ROUND_TRIPS,
        )  # fmt: skip
