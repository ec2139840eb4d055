"""When a rank fails, all others end and name it.

The end of a process on this host is noticed at once. Besides, each rank gives signs of life through the
store: a rank counts as lost when it gives none for `timeout` seconds, whatever the reason: stopped, its host
gone. When a collective breaks, the others need not wait so long to name the one that is missing.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dlrm.runtime import trace
from dlrm.runtime.entry import print_error
from dlrm.runtime.errors import LostRank, UserError
from dlrm.runtime.peers import ENDED_WELL, LocalPeers, Process
from dlrm.runtime.ranks import Ranks
from dlrm.runtime.rendezvous import POLL_SECONDS, TOKEN, SignedStore, job_key

SIGN_SECONDS = 1.0
PATIENCE = 300  # seconds: of the store's users, among ranks that are alive
LEAVE_SECONDS = 5  # rank 0 keeps the store for the others so long, at the end
END_SECONDS = 3  # a process of this host whose connections are closed counts as ended by then
MISSING_SECONDS = 3.5  # without a sign, once a collective has broken
FAILURE = "dlrm/failure"
BROKEN = (
    "connection reset", "connection closed", "timed out", "broken pipe", "socket", "connectfullmesh",
    "connection was likely closed", "nccl error", "connection refused", "has ended while", "has sent nothing",
)  # fmt: skip


@dataclass(frozen=True)
class FailureNotice:
    """Why all ranks end; what is left in the store is what counts, the first wins."""

    reason: str
    lost: Sequence[int] = ()  # ranks to be killed, should they only stand still
    code: int = 1  # what all exit with
    speaker: int | None = None  # of the others: one is enough where the one that failed has told why

    @classmethod
    def read(cls, data: bytes) -> "FailureNotice":
        """From the store; whatever it says, it is a failure: never code 0."""
        values = json.loads(data)
        reason, lost, code, speaker = (values[name] for name in ("reason", "lost", "code", "speaker"))
        if not isinstance(reason, str) or not all(type(rank) is int for rank in [*lost, code, speaker or 0]):
            raise ValueError("not a note")
        return cls(" ".join(reason.split())[:1000], lost, min(max(code, 1), 255), speaker)


def is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in BROKEN)


def rendezvous(here: Ranks, seconds: int) -> tuple[SignedStore, list[Process]]:
    """The store that all ranks share, and who they are; LostRank names those that do not come."""
    myself = Process.here(here.host)
    if here.world_size == 1:
        return SignedStore(dist.HashStore(), job_key(), PATIENCE), [myself]
    store = SignedStore(_open_store(here, seconds), job_key(), seconds)
    peers = LocalPeers()
    found = {here.rank: myself}  # by rank: who has come so far
    try:
        processes = _gather(store, here, found, peers, seconds)
    except RuntimeError:  # the store is gone, and with it the process that keeps it
        raise LostRank(f"ends because {_reason_for_lost_store(found, peers)}") from None
    except LostRank as error:
        if here.first:
            with contextlib.suppress(RuntimeError):
                note = FailureNotice(str(error).removeprefix("ends because "))
                store.set_first(FAILURE, json.dumps(asdict(note)))
                time.sleep(SIGN_SECONDS)  # the store goes with this rank: the others read the note first
        raise
    finally:
        peers.close()
    return SignedStore(store.store, job_key(), PATIENCE), processes


def _gather(
    store: SignedStore, here: Ranks, found: dict[int, Process], peers: LocalPeers, seconds: int
) -> list[Process]:
    """Wait until all ranks have come. `found` is filled meanwhile: an error names ranks and hosts by it.

    The others come after they have read who rank 0 is: whenever rank 0 ends after that, they can name it.
    A value that cannot be read counts as not there.
    """
    myself = found[here.rank]
    wanted = set(range(here.world_size)) if here.first else {0}
    given_up = time.monotonic() + seconds + (0 if here.first else 5)
    pause = 0.01
    while True:
        for rank in sorted(wanted - set(found)):
            if came := _read_processes(store.find(f"dlrm/here/{rank}"), alone=True):
                found[rank] = came[0]
                peers.add(rank, came[0])
        if here.first or 0 in found:
            store.set(f"dlrm/here/{here.rank}", json.dumps(asdict(myself)))
            store.set(_heartbeat_key(here.rank), "0")
        if here.first and len(found) == here.world_size:
            processes = [found[rank] for rank in range(here.world_size)]
            store.set("dlrm/people", json.dumps([asdict(each) for each in processes]))
            return processes
        if not here.first and (processes := _read_processes(store.find("dlrm/people"))):
            if len(processes) != here.world_size:
                raise LostRank(
                    f"rank 0 has {len(processes)} ranks, this one {here.world_size}: of another job?"
                )
            return processes
        if note := _read_failure(store):
            raise LostRank(f"ends because {note.reason}")
        for rank, cause in peers.wait(pause).items():
            raise LostRank(f"ends because {_reason(rank, cause, found)}")
        pause = min(2 * pause, 0.2)
        if time.monotonic() > given_up:
            missing = _name_ranks(wanted - set(found)) if here.first else "not all ranks"
            came = "did not come" if here.first else "came"
            raise LostRank(f"{missing} {came} within {seconds} s (--timeout), or with another {TOKEN}")


def _read_processes(value: bytes | None, alone: bool = False) -> list[Process]:
    """From the store: of all ranks, or of one alone; empty where there is nothing that can be read."""
    try:
        values = json.loads(value) if value else []
        return [Process.read(each) for each in ([values] if value and alone else values)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_failure(store: SignedStore) -> FailureNotice | None:
    found = store.find(FAILURE)
    try:
        return FailureNotice.read(found) if found else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return FailureNotice("a rank failed")


def _reason_for_lost_store(found: Mapping[int, Process], peers: LocalPeers) -> str:
    """A process closes its connections first, and counts as ended a little later."""
    given_up = time.monotonic() + (END_SECONDS if 0 in found and found[0].is_local else 0)
    while not (ended := peers.wait(0.05)) and time.monotonic() < given_up:
        pass
    if not ended and _launcher_keeps_store():
        return "torchrun's store is gone"
    return _reason(*next(iter(ended.items()), (0, "")), found)


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _reason(rank: int, cause: str, processes: Mapping[int, Process]) -> str:
    named = f"rank {rank} on {processes[rank].host}" if rank in processes else f"rank {rank}"
    return f"{named} {cause.replace('killed', 'was killed') or 'is gone'}"


def _open_store(here: Ranks, seconds: int) -> Any:
    limit = timedelta(seconds=seconds)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set: start the ranks with launcher.sh or torchrun"
        ) from None
    try:
        if _launcher_keeps_store() or not here.first:
            _await_listener(address, port, seconds)
        if _launcher_keeps_store():
            store = dist.TCPStore(address, port, None, False, limit, wait_for_workers=False)
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
        raise LostRank(f"rank 0 at {address}, port {port}, did not answer within {seconds} s") from None


def _await_listener(address: str, port: int, seconds: float) -> None:
    """Until somebody listens there; RuntimeError if nobody does. torch would wait, too, and then write pages
    of its own on stderr.
    """
    given_up = time.monotonic() + seconds
    pause = POLL_SECONDS
    while True:
        try:
            socket.create_connection((address, port), max(1, given_up - time.monotonic())).close()
            return
        except OSError:  # a name that is not known yet, too
            if time.monotonic() > given_up:
                raise RuntimeError(f"nobody listens on {address}, port {port}") from None
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _open_listener(address: str, port: int, here: Ranks) -> int:
    """Only where the other ranks come from. A name may mean the loopback here and not elsewhere."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if place[0].startswith(("127.", "::1")) and here.local_world_size < here.world_size:  # type: ignore[union-attr]
        family, place = socket.AF_INET, ("", port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(place)
    listener.listen(4096)
    return listener.detach()


def _heartbeat_key(rank: int) -> str:
    return f"dlrm/sign/{rank}"


def _name_ranks(ranks: set[int], hosts: list[str] | None = None) -> str:
    some = sorted(ranks)[:8]
    named = [f"{rank} on {hosts[rank]}" if hosts else str(rank) for rank in some]
    more = f" and {len(ranks) - len(some)} more" if len(ranks) > len(some) else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"


class Heartbeat(threading.Thread):
    """Gives this rank's signs of life, looks for those of the others (rank 0 for all, all for rank 0), and
    for the ends of processes on this host: the latter in a second thread, which never waits for the store.
    """

    def __init__(self, store: SignedStore, here: Ranks, people: list[Process], timeout: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._here, self._people, self._timeout = here, people, timeout
        self._done = threading.Event()
        self._wake = threading.Event()  # the watch thread looks now
        self._ending = threading.Lock()  # held by the thread that ends the process
        self._told = False  # the main thread has its own reason to end
        self._finishing = False  # the work is done: that others leave is no failure
        self._forming = time.monotonic() + timeout  # so long may the process group take to form
        self._ended: dict[int, str] = {}  # ranks of this host whose process ended, and why
        self._store = store
        self._answered = time.monotonic()  # when the store last did
        if here.world_size > 1:
            self._peers = LocalPeers()
            for rank, process in enumerate(people):
                if rank != here.rank:
                    self._peers.add(rank, process)
            self._guardian = threading.Thread(target=self._guard, name="guard", daemon=True)
            self._guardian.start()  # before the store is asked, which may not answer any more
            try:
                self._store = SignedStore(store.clone().store, job_key(), timeout)
            except RuntimeError:
                note = self._await_end_of_first() or FailureNotice(f"{self._named({0})} is gone")
                self._done.set()
                raise LostRank(f"ends because {note.reason}") from None
            self.start()

    def run(self) -> None:
        trace.name_thread("watch")
        watched = set(range(self._here.world_size)) if self._here.first else {0}
        watched.discard(self._here.rank)
        signs = _PeerHeartbeats(self._store, watched)
        count, before = 0, time.monotonic()
        while not self._done.is_set():
            self._wake.wait(SIGN_SECONDS)
            self._wake.clear()
            if self._done.is_set():
                return
            count += 1
            now = time.monotonic()
            note = None
            try:
                self._store.set(_heartbeat_key(self._here.rank), str(count))
                if now - before > 5 * SIGN_SECONDS:  # this process itself was stopped: judge nobody yet
                    signs.forgive()
                note = self._note()
                silent = signs.silent(self._timeout) if note is None and not self._ended else set()
                if silent:
                    self._leave(FailureNotice(self._silence(silent), sorted(silent)))
                    note = self._note()
            except RuntimeError:  # the store went with the process that keeps it
                self._end(self._await_end_of_first() or FailureNotice(f"{self._named({0})} is gone"))
            self._answered = before = time.monotonic()
            if note:
                self._end_for(note)
            elif found := self._ends():
                self._leave_quietly(found)
                self._end(found)

    def _guard(self) -> None:
        """A store that does not answer holds up whoever asks it: its process stands still."""
        before = time.monotonic()
        while not self._done.is_set():
            ended = self._peers.wait(SIGN_SECONDS)
            if self._done.is_set():
                return
            now = time.monotonic()
            if ended:
                self._ended |= ended
                self._wake.set()  # one that failed by itself has left a note: the watch thread looks for it
                if self._done.wait(1.5 * SIGN_SECONDS):
                    return
                if found := self._ends(ask=False):  # it has not ended this process: the store does not answer
                    self._end(found)
            if now - before > 5 * SIGN_SECONDS:
                self._answered = now
            before = now
            if now - self._answered > self._timeout + SIGN_SECONDS:
                self._told = False
                self._end_for(FailureNotice(self._silence({0}), [0]))
            if now > self._forming:
                self._end(FailureNotice(f"the ranks did not connect within {self._timeout} s (--timeout)"))

    def _ends(self, ask: bool = True) -> "FailureNotice | None":
        """That a process of this host has ended, as far as it is a failure."""
        for rank, cause in dict(self._ended).items():
            if self._finishing and cause in ("", ENDED_WELL):
                if cause == ENDED_WELL or not ask:
                    continue
                with contextlib.suppress(RuntimeError):
                    if self._store.check([_finished(rank)]):
                        continue
            return FailureNotice(_reason(rank, cause, dict(enumerate(self._people))))
        return None

    def _silence(self, ranks: set[int]) -> str:
        return f"{self._named(ranks)} gave no sign for {self._timeout} s (--timeout)"

    def _named(self, ranks: set[int]) -> str:
        return _name_ranks(ranks, [person.host for person in self._people])

    def _await_end_of_first(self) -> "FailureNotice | None":
        """A process closes its connections first, and counts as ended a little later."""
        given_up = time.monotonic() + (END_SECONDS if self._people[0].is_local else SIGN_SECONDS)
        while not (note := self._ends(ask=False)) and time.monotonic() < given_up:
            time.sleep(0.02)
        return note

    def _end_for(self, note: "FailureNotice") -> None:
        """End, but let this rank's own error come first, if it has one."""
        self._done.wait(SIGN_SECONDS)
        self._end(note)

    def _end(self, note: "FailureNotice") -> None:
        with self._ending:
            if self._told or self._done.is_set():
                return
            if note.speaker in (None, self._here.rank):
                print_error(self._here, f"ends because {note.reason}")
            for rank in set(note.lost) & set(range(len(self._people))) - {self._here.rank}:
                self._people[rank].end()
            os._exit(note.code)

    def _note(self) -> "FailureNotice | None":
        return _read_failure(self._store)

    def _leave(self, note: "FailureNotice") -> None:
        self._store.set_first(FAILURE, json.dumps(asdict(note)))

    def _leave_quietly(self, note: "FailureNotice") -> None:
        with contextlib.suppress(RuntimeError):
            self._leave(note)

    def formed(self) -> None:
        """The process group is there."""
        self._forming = float("inf")

    def quieten(self) -> None:
        """All ranks end for a reason that the main thread tells."""
        with self._ending:
            self._told = True

    def finish(self) -> None:
        """The work of this rank is done; it still waits for the others."""
        if self._here.world_size > 1:
            self._store.set(_finished(self._here.rank), "")
            self._finishing = True

    def leave(self) -> None:
        """The work of all ranks is done. The store goes with rank 0, which leaves last."""
        if self._here.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            if not self._here.first:
                self._store.set(f"dlrm/left/{self._here.rank}", "")
                self._done.set()
                return
            missing = set(range(1, self._here.world_size))
            given_up = time.monotonic() + LEAVE_SECONDS
            while missing and time.monotonic() < given_up and not self._ended.keys() >= missing:
                missing = {rank for rank in missing if not self._store.check([f"dlrm/left/{rank}"])}
                time.sleep(0.002)

    def tell(self, code: int = 1) -> None:
        """This rank ends with an error of its own: the others shall know why they end, and end likewise."""
        self.quieten()
        if self._here.world_size > 1:
            with contextlib.suppress(RuntimeError):
                why = f"{self._named({self._here.rank})} failed"
                self._leave(FailureNotice(why, code=code, speaker=1 if self._here.first else 0))
                self._linger()

    def _linger(self) -> None:
        """The store may go with this rank: the others read the note first."""
        if self._here.first:
            time.sleep(2 * SIGN_SECONDS)

    def find(self) -> LostRank:
        """A collective broke: who is missing? This rank goes on giving signs meanwhile."""
        self.quieten()
        others = set(range(self._here.world_size)) - {self._here.rank}
        try:
            signs = _PeerHeartbeats(self._store, others)
            given_up = time.monotonic() + MISSING_SECONDS
            while not (note := self._note()) and not self._ends() and time.monotonic() < given_up:
                time.sleep(0.05)
                signs.look()
            if not note:
                silent = signs.silent(MISSING_SECONDS - 1)
                other = FailureNotice(f"{self._named(silent)} is gone" if silent else "a connection broke")
                self._leave(self._ends() or other)
                note = self._note()
            self._linger()
        except RuntimeError:
            note = self._await_end_of_first()
        note = note or FailureNotice(f"{self._named({0})} is gone")
        error = LostRank(f"ends because {note.reason}")
        error.code, error.told = note.code, note.speaker not in (None, self._here.rank)
        return error

    def close(self) -> None:
        self._done.set()
        self._wake.set()
        if self._here.world_size > 1:
            self._peers.wake()
            self.join(2 * SIGN_SECONDS)
            self._guardian.join(SIGN_SECONDS)
            if not self._guardian.is_alive():
                self._peers.close()


def _finished(rank: int) -> str:
    return f"dlrm/finished/{rank}"


class _PeerHeartbeats:
    """When each of some ranks last gave a new sign."""

    def __init__(self, store: Any, ranks: set[int]) -> None:
        self._store, self._ranks = store, sorted(ranks)
        self._last: dict[int, tuple[bytes, float]] = {}

    def look(self) -> None:
        now = time.monotonic()
        values = self._store.multi_get([_heartbeat_key(rank) for rank in self._ranks])
        for rank, value in zip(self._ranks, values, strict=True):
            if value is None:  # not written by it
                self._last.setdefault(rank, (b"", now))
            elif rank not in self._last or self._last[rank][0] != value:
                self._last[rank] = value, now

    def silent(self, seconds: float) -> set[int]:
        self.look()
        now = time.monotonic()
        return {rank for rank, (_, since) in self._last.items() if now - since > seconds}

    def forgive(self) -> None:
        self._last.clear()
