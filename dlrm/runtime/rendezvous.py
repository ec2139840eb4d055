"""The rendezvous: all ranks connect to one store and learn each other's host and process.

In: MASTER_ADDR and MASTER_PORT. Out: a store, and a RankProcess for each rank. Rank 0 keeps the store
(torchrun: its agent does), so the store is gone when rank 0 ends. A rank that does not connect within
--timeout, or ends meanwhile, is named by all others.

Keys in the store:
    dlrm/process/RANK     this rank's RankProcess, as JSON
    dlrm/processes        all of them, from rank 0
    dlrm/heartbeat/RANK   a counter, see `heartbeat`
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dlrm.runtime.errors import LostRank, UserError
from dlrm.runtime.failure_notice import (
    FailureNotice,
    describe_end,
    name_ranks,
    read_notice,
    try_post_notice,
)
from dlrm.runtime.peers import LocalPeers, RankProcess
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.signed_store import POLL_SECONDS, TOKEN, SignedStore, read_job_key

STORE_SECONDS = 300  # how long a value may be waited for, among ranks that are alive
READ_SECONDS = 1.0  # rank 0 keeps the store so long after a notice: the others read it first
# A process closes its connections first, and the kernel reports its end a little later.
END_SECONDS = 3


def name_heartbeat(rank: int) -> str:
    return f"dlrm/heartbeat/{rank}"


def rendezvous(here: Ranks, timeout: int) -> tuple[SignedStore, list[RankProcess]]:
    """The store that all ranks share, and the ranks' processes in rank order.

    Raises LostRank, which names the ranks that did not connect within `timeout` seconds or ended before.
    """
    myself = RankProcess.of_this_process(here.host)
    if here.world_size == 1:
        return SignedStore(dist.HashStore(), read_job_key(), STORE_SECONDS), [myself]
    store = SignedStore(_open_store(here, timeout), read_job_key(), timeout)
    peers = LocalPeers()
    connected = {here.rank: myself}  # by rank: those that this rank knows so far
    try:
        processes = _exchange_processes(store, here, connected, peers, timeout)
    except RuntimeError:  # the store is gone, and with it the process that keeps it
        raise LostRank(f"ends because {_explain_lost_store(connected, peers)}") from None
    except LostRank as error:
        if here.first:
            try_post_notice(store, FailureNotice(str(error).removeprefix("ends because ")))
            time.sleep(READ_SECONDS)
        raise
    finally:
        peers.close()
    return SignedStore(store.store, read_job_key(), STORE_SECONDS), processes


def _exchange_processes(
    store: SignedStore, here: Ranks, connected: dict[int, RankProcess], peers: LocalPeers, timeout: int
) -> list[RankProcess]:
    """Wait until all ranks are connected; returns their processes in rank order.

    `connected` and `peers` are filled meanwhile, so that an error can name hosts. The other ranks announce
    themselves only after they have read rank 0's process: whenever rank 0 ends after that, they can name it.
    Values are read and written again in every turn. One that cannot be read, or that another program has
    deleted, counts as not there.
    """
    myself = connected[here.rank]
    expected = set(range(here.world_size)) if here.first else {0}
    # the other ranks wait longer than rank 0: its message says which ranks are missing, theirs cannot
    deadline = time.monotonic() + timeout + (0 if here.first else 5)
    pause = 0.01
    while True:
        for rank in sorted(expected - set(connected)):
            if read := _read_processes(store.find_value(f"dlrm/process/{rank}"), single=True):
                connected[rank] = read[0]
                peers.add(rank, read[0])
        if here.first or 0 in connected:
            store.set(f"dlrm/process/{here.rank}", json.dumps(asdict(myself)))
            store.set(name_heartbeat(here.rank), "0")
        if here.first and len(connected) == here.world_size:
            processes = [connected[rank] for rank in range(here.world_size)]
            store.set("dlrm/processes", json.dumps([asdict(each) for each in processes]))
            return processes
        if not here.first and (processes := _read_processes(store.find_value("dlrm/processes"))):
            if len(processes) != here.world_size:
                raise LostRank(
                    f"rank 0 has {len(processes)} ranks, this one {here.world_size}: another job uses the "
                    "same MASTER_PORT; give another one"
                )
            return processes
        if notice := read_notice(store):
            raise LostRank(f"ends because {notice.reason}")
        for rank, cause in peers.wait(pause).items():
            raise LostRank(f"ends because {describe_end(rank, cause, connected)}")
        pause = min(2 * pause, 0.2)
        if time.monotonic() > deadline:
            if here.first:
                text = (
                    f"{name_ranks(expected - set(connected))} did not connect within {timeout} s (--timeout)"
                )
            else:
                text = f"not all ranks connected within {timeout} s (--timeout)"
            raise LostRank(f"{text}; all ranks need the same MASTER_PORT and {TOKEN}")


def _read_processes(value: bytes | None, single: bool = False) -> list[RankProcess]:
    """From the store: a list of processes, or (`single`) one; empty where nothing can be read."""
    try:
        values = json.loads(value) if value else []
        return [RankProcess.from_json(each) for each in ([values] if value and single else values)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _explain_lost_store(connected: Mapping[int, RankProcess], peers: LocalPeers) -> str:
    """Which process ended, now that the store is gone."""
    deadline = time.monotonic() + (END_SECONDS if 0 in connected and connected[0].is_local else 0)
    while not (ended := peers.wait(0.05)) and time.monotonic() < deadline:
        pass
    if not ended and _launcher_keeps_store():
        return "torchrun's store is gone"
    return describe_end(*next(iter(ended.items()), (0, "")), connected)


def _launcher_keeps_store() -> bool:
    """torchrun's agent, and not rank 0, keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(here: Ranks, timeout: int) -> Any:
    """A TCPStore at MASTER_ADDR and MASTER_PORT: rank 0 serves it, the others connect to it."""
    limit = timedelta(seconds=timeout)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start the ranks with launcher.sh or torchrun"
        ) from None
    try:
        if _launcher_keeps_store() or not here.first:
            _wait_for_listener(address, port, timeout)
        if _launcher_keeps_store():
            store = dist.TCPStore(address, port, None, False, limit, wait_for_workers=False)
            # the agent's store outlives a restart of the ranks: keys of an earlier attempt must not be seen
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"dlrm/{attempt}", store)
        listener = _open_listener(address, port, here) if here.first else None
        return dist.TCPStore(
            address, port, here.world_size, here.first, limit, wait_for_workers=False,
            master_listen_fd=listener,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} on {address}: {error.strerror}; give another port") from None
    except RuntimeError as error:
        if here.first:
            raise UserError(f"MASTER_PORT {port} on {address}: {str(error).splitlines()[0]}") from None
        raise LostRank(
            f"rank 0 at {address}, port {port}, did not answer within {timeout} s (--timeout)"
        ) from None


def _wait_for_listener(address: str, port: int, timeout: float) -> None:
    """Wait until a process listens there; RuntimeError after `timeout` seconds.

    torch would wait too, but it writes pages of its own to stderr when the time is over.
    """
    deadline = time.monotonic() + timeout
    pause = POLL_SECONDS
    while True:
        try:
            socket.create_connection((address, port), max(1, deadline - time.monotonic())).close()
            return
        except OSError:  # also a host name that is not known yet
            if time.monotonic() > deadline:
                raise RuntimeError(f"no process listens on {address}, port {port}") from None
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _open_listener(address: str, port: int, here: Ranks) -> int:
    """A listening socket on the address that the other ranks connect to, and on no other network.

    On some hosts their own name resolves to the loopback address, which ranks of other hosts cannot reach:
    then the socket listens on all networks.
    """
    family, _, _, _, socket_address = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    loopback = socket_address[0].startswith(("127.", "::1"))  # type: ignore[union-attr]
    if loopback and here.local_world_size < here.world_size:
        family, socket_address = socket.AF_INET, ("", port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(socket_address)
    listener.listen(4096)  # all ranks of a large job may connect at once
    return listener.detach()
