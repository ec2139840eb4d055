"""Marks how the clocks of the ranks' hosts compare, over the store of the script's own process group.

No collective of the group is used: the marks are small messages through its store. Where a rank does not
come, the others go on after a few seconds without the mark.
"""

import functools
import os
import sys
from typing import Any

from dlrm.runtime import trace
from dlrm.runtime.clock_offset import ROUND_TRIPS, answer_host, measure_offset
from dlrm.runtime.ranks import Ranks, find_ranks
from dlrm.runtime.signed_store import SignedStore, read_job_key

SECONDS = {"start": 60, "end": 3}  # how long a rank waits for the others
_marked: set[str] = set()


def wrap_init(torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        with trace.span("startup", "process_group"):
            found = original(*args, **kwargs)
        _mark_quietly(torch, "start")
        return found

    return init_process_group


def wrap_destroy(torch: Any, original: Any) -> Any:
    @functools.wraps(original)
    def destroy_process_group(group: Any = None) -> Any:
        world = torch.distributed.group.WORLD
        if group is None or group is world:
            _mark_quietly(torch, "end")
        return original(group)

    return destroy_process_group


def _mark_quietly(torch: Any, when: str) -> None:
    """The script must not fail where a mark does."""
    dist = torch.distributed
    if not trace.is_tracing() or when in _marked or not dist.is_initialized():
        return
    _marked.add(when)
    here = _find_here(dist)
    try:
        _mark_clock(dist, here, when)
    except Exception as error:
        if here.first:
            print(f"dlrm.traced: the hosts' clocks were not compared at the {when}: {error}", file=sys.stderr)


def _find_here(dist: Any) -> Ranks:
    """This rank as its process group has it, which is another where a script starts its ranks itself."""
    here = find_ranks()
    rank, size = dist.get_rank(), dist.get_world_size()
    if (rank, size) != (here.rank, here.world_size):
        local = os.environ.get("LOCAL_RANK", "")
        here = Ranks(rank, int(local) if local.isdecimal() else rank, size, size, here.host)
        trace.change_identity(here)
    return here


def _mark_clock(dist: Any, here: Ranks, when: str) -> None:
    if here.world_size > 1:
        base = dist.distributed_c10d._get_default_store()
        base = base.clone() if hasattr(base, "clone") else base
        store = dist.PrefixStore(f"dlrm-traced-{when}", base)
        signed = SignedStore(store, read_job_key(), SECONDS[when])
        hosts = _gather_hosts(signed, here)
        asking = [hosts.index(host) for host in dict.fromkeys(hosts) if host != hosts[0]]
        if here.first:
            for rank in asking:
                answer_host(signed, "offset", rank)
        elif here.rank in asking:
            offset = measure_offset(signed, "offset", here.rank)
            trace.instant(
                "clock", "offset", when=when, ahead_us=offset.ahead_us, error_us=offset.error_us,
                round_trips=ROUND_TRIPS,
            )  # fmt: skip
        _wait_for_all(store, here)
    trace.instant("clock", "barrier", when=when)


def _gather_hosts(store: SignedStore, here: Ranks) -> list[str]:
    """The hosts of all ranks, in their order."""
    store.set(f"host/{here.rank}", here.host)
    if here.first:
        hosts = [store.get(f"host/{rank}").decode() for rank in range(here.world_size)]
        store.set("hosts", "\n".join(hosts))
    return store.get("hosts").decode().split("\n")


def _wait_for_all(store: Any, here: Ranks) -> None:
    """A barrier: the last rank to come lets all go."""
    if store.add("came", 1) == here.world_size:
        store.set("go", "1")
    store.wait(["go"])
