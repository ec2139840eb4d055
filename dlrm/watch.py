"""Nobody waits for the dead: each rank shows a sign of life through the store, and ends when another fails.

A rank counts as lost when it gives no sign for `timeout` seconds, whatever the reason: killed, stopped, its
machine gone. When a collective breaks, the others need not wait so long to name the one that is missing.
"""

import contextlib
import json
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dlrm import trace
from dlrm.entry import complain
from dlrm.errors import LostRank, UserError
from dlrm.ranks import Ranks

SIGN_SECONDS = 1.0
MISSING_SECONDS = 3.5  # without a sign, once a collective has broken
FAILURE = "dlrm/failure"
BROKEN = (
    "connection reset", "connection closed", "timed out", "broken pipe", "socket", "connectfullmesh",
    "connection was likely closed", "nccl error", "connection refused", "has ended while", "has sent nothing",
)  # fmt: skip


def is_broken_contact(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in BROKEN)


def meet(here: Ranks, seconds: int) -> tuple[Any, list[str]]:
    """The store that all ranks share, and their hosts; LostRank names those that do not come."""
    if here.world_size == 1:
        return dist.HashStore(), [here.host]
    store = _open_store(here, seconds)
    store.set(f"dlrm/here/{here.rank}", here.host)
    store.set(_sign(here.rank), "0")
    if here.first:
        given_up = time.monotonic() + seconds
        missing = set(range(here.world_size))
        while missing := {rank for rank in missing if not store.check([f"dlrm/here/{rank}"])}:
            if time.monotonic() > given_up:
                raise LostRank(f"{_ranks(missing)} did not come within {seconds} s (--timeout)")
            time.sleep(0.05)
        hosts = [store.get(f"dlrm/here/{rank}").decode() for rank in range(here.world_size)]
        store.set("dlrm/hosts", json.dumps(hosts))
    try:
        store.wait(["dlrm/hosts"], timedelta(seconds=seconds + 5))
        return store, json.loads(store.get("dlrm/hosts"))
    except RuntimeError:
        raise LostRank(f"not all ranks came within {seconds} s (--timeout)") from None


def _open_store(here: Ranks, seconds: int) -> Any:
    limit = timedelta(seconds=seconds)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start the ranks with launcher.sh or torchrun"
        ) from None
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.TCPStore(address, port, None, False, limit, wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"dlrm/{attempt}", store)
        listener = _listen(address, port, here) if here.first else None
        return dist.TCPStore(
            address, port, here.world_size, here.first, limit, wait_for_workers=False,
            master_listen_fd=listener,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} on {address}: {error.strerror}; give another port") from None
    except RuntimeError as error:
        if here.first:
            raise UserError(f"MASTER_PORT {port} on {address}: {str(error).splitlines()[0]}") from None
        raise LostRank(f"rank 0 at {address}, port {port}, did not answer within {seconds} s") from None


def _listen(address: str, port: int, here: Ranks) -> int:
    """Only where the other ranks come from. A name may mean the loopback here and not elsewhere."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if place[0].startswith(("127.", "::1")) and here.local_world_size < here.world_size:  # type: ignore[union-attr]
        family, place = socket.AF_INET, ("", port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(place)
    listener.listen(4096)
    return listener.detach()


def _sign(rank: int) -> str:
    return f"dlrm/sign/{rank}"


def _ranks(ranks: set[int], hosts: list[str] | None = None) -> str:
    some = sorted(ranks)[:8]
    named = [f"{rank} on {hosts[rank]}" if hosts else str(rank) for rank in some]
    more = f" and {len(ranks) - len(some)} more" if len(ranks) > len(some) else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"


class Watch(threading.Thread):
    def __init__(self, store: Any, here: Ranks, hosts: list[str], timeout: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._here, self._hosts, self._timeout = here, hosts, timeout
        self._done = threading.Event()
        self._told = False  # the main thread has its own reason to end
        self._store = store
        if here.world_size > 1:
            self._store = store.clone()
            self._store.set_timeout(timedelta(seconds=timeout))
            self.start()

    def run(self) -> None:
        trace.name_thread("watch")
        watched = set(range(self._here.world_size)) if self._here.first else {0}
        watched.discard(self._here.rank)
        signs = _Signs(self._store, watched)
        count, before = 0, time.monotonic()
        while not self._done.wait(SIGN_SECONDS):
            count += 1
            now = time.monotonic()
            try:
                self._store.set(_sign(self._here.rank), str(count))
                reason = self._note()
                if now - before > 5 * SIGN_SECONDS:  # this process itself was stopped: judge nobody yet
                    signs.forgive()
                silent = signs.silent(self._timeout)
                if silent and not reason:
                    reason = f"{_ranks(silent, self._hosts)} gave no sign for {self._timeout} s (--timeout)"
                    self._leave_note(reason)
            except RuntimeError:  # the store went with the process that keeps it
                reason = f"{_ranks({0}, self._hosts)} is gone"
            before = now
            if reason and not self._told:
                self._end(reason)

    def _end(self, reason: str) -> None:
        time.sleep(SIGN_SECONDS)  # let this rank's own error come first, if it has one
        if not self._told and not self._done.is_set():
            complain(self._here, f"ends because {reason}")
            os._exit(1)

    def _note(self) -> str:
        return self._store.get(FAILURE).decode() if self._store.check([FAILURE]) else ""

    def _leave_note(self, reason: str) -> None:
        self._store.compare_set(FAILURE, "", reason)

    def tell(self) -> None:
        """This rank ends with an error of its own: the others shall know why they end."""
        self._told = True
        if self._here.world_size > 1:
            with contextlib.suppress(RuntimeError):
                self._leave_note(f"{_ranks({self._here.rank}, self._hosts)} failed")
                self._linger()

    def _linger(self) -> None:
        """The store may go with this rank: the others read the note first."""
        if self._here.first:
            time.sleep(2 * SIGN_SECONDS)

    def find(self) -> LostRank:
        """A collective broke: who is missing? This rank goes on giving signs meanwhile."""
        self._told = True
        others = set(range(self._here.world_size)) - {self._here.rank}
        store = self._store
        try:
            signs = _Signs(store, others)
            given_up = time.monotonic() + MISSING_SECONDS
            while not (reason := self._note()) and time.monotonic() < given_up:
                time.sleep(0.2)
                signs.look()
            silent = signs.silent(MISSING_SECONDS - 1)
            if not reason:
                reason = f"{_ranks(silent, self._hosts)} is gone" if silent else "a connection broke"
                self._leave_note(reason)
                reason = self._note()
            self._linger()
        except RuntimeError:
            reason = f"{_ranks({0}, self._hosts)} is gone"
        return LostRank(f"ends because {reason}")

    def close(self) -> None:
        self._done.set()


class _Signs:
    """When each of some ranks last gave a new sign."""

    def __init__(self, store: Any, ranks: set[int]) -> None:
        self._store, self._ranks = store, sorted(ranks)
        self._last: dict[int, tuple[bytes, float]] = {}

    def look(self) -> None:
        now = time.monotonic()
        values = self._store.multi_get([_sign(rank) for rank in self._ranks])
        for rank, value in zip(self._ranks, values, strict=True):
            if rank not in self._last or self._last[rank][0] != value:
                self._last[rank] = value, now

    def silent(self, seconds: float) -> set[int]:
        self.look()
        now = time.monotonic()
        return {rank for rank, (_, since) in self._last.items() if now - since > seconds}

    def forgive(self) -> None:
        self._last.clear()
