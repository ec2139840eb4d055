"""Nobody waits for the dead: each rank shows a sign of life through the store, and ends when another fails.

A rank counts as lost when it gives no sign for `timeout` seconds, whatever the reason: killed, stopped, its
machine gone. When a collective breaks, the others need not wait so long to name the one that is missing.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dlrm import trace
from dlrm.entry import complain
from dlrm.errors import LostRank, UserError
from dlrm.ranks import Ranks

SIGN_SECONDS = 1.0
PATIENCE = timedelta(seconds=300)  # of the store's users, among ranks that are alive
MISSING_SECONDS = 3.5  # without a sign, once a collective has broken
FAILURE = "dlrm/failure"
BROKEN = (
    "connection reset", "connection closed", "timed out", "broken pipe", "socket", "connectfullmesh",
    "connection was likely closed", "nccl error", "connection refused", "has ended while", "has sent nothing",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """A rank as a process of a machine."""

    host: str
    pid: int
    born: str  # pids are used again

    @classmethod
    def here(cls, host: str) -> "Person":
        return cls(host, os.getpid(), _birth(os.getpid()))

    def end(self) -> None:
        """Kill it, if it is on this machine: a process that stands still holds up the launcher."""
        if self.host == socket.gethostname() and self.born and _birth(self.pid) == self.born:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Note:
    """Why all ranks end; what is left in the store is what counts, the first wins."""

    reason: str
    lost: Sequence[int] = ()  # ranks to be killed, should they only stand still
    code: int = 1  # what all exit with
    speaker: int | None = None  # of the others: one is enough where the one that failed has told why


def _birth(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_broken_contact(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in BROKEN)


def meet(here: Ranks, seconds: int) -> tuple[Any, list[Person]]:
    """The store that all ranks share, and who they are; LostRank names those that do not come."""
    if here.world_size == 1:
        return dist.HashStore(), [Person.here(here.host)]
    store = _open_store(here, seconds)
    store.set(f"dlrm/here/{here.rank}", json.dumps(asdict(Person.here(here.host))))
    store.set(_sign(here.rank), "0")
    if here.first:
        given_up = time.monotonic() + seconds
        missing = set(range(here.world_size))
        while missing := {rank for rank in missing if not store.check([f"dlrm/here/{rank}"])}:
            if time.monotonic() > given_up:
                raise LostRank(f"{_ranks(missing)} did not come within {seconds} s (--timeout)")
            time.sleep(0.01)
        people = [json.loads(store.get(f"dlrm/here/{rank}")) for rank in range(here.world_size)]
        store.set("dlrm/people", json.dumps(people))
    try:
        store.wait(["dlrm/people"], timedelta(seconds=seconds + 5))
        store.set_timeout(PATIENCE)
        return store, [Person(**each) for each in json.loads(store.get("dlrm/people"))]
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
    """Gives this rank's signs of life, looks for those of the others (rank 0 for all, all for rank 0)."""

    def __init__(self, store: Any, here: Ranks, people: list[Person], timeout: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._here, self._people, self._timeout = here, people, timeout
        self._done = threading.Event()
        self._told = False  # the main thread has its own reason to end
        self._store = store
        self._answered = time.monotonic()  # when the store last did
        if here.world_size > 1:
            self._store = store.clone()
            self.start()
            self._guardian = threading.Thread(target=self._guard, name="guard", daemon=True)
            self._guardian.start()

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
                if now - before > 5 * SIGN_SECONDS:  # this process itself was stopped: judge nobody yet
                    signs.forgive()
                silent = signs.silent(self._timeout)
                if silent:
                    self._leave(Note(self._silence(silent), sorted(silent)))
                note = self._note()
            except RuntimeError:  # the store went with the process that keeps it
                note = Note(f"{self._named({0})} is gone")
            self._answered = before = now
            if note and not self._told:
                self._end(note)

    def _guard(self) -> None:
        """A store that does not answer holds up whoever asks it: its process stands still."""
        before = time.monotonic()
        while not self._done.wait(SIGN_SECONDS):
            now = time.monotonic()
            if now - before > 5 * SIGN_SECONDS:
                self._answered = now
            before = now
            if now - self._answered > self._timeout + SIGN_SECONDS:
                self._told = False
                self._end(Note(self._silence({0}), [0]))

    def _silence(self, ranks: set[int]) -> str:
        return f"{self._named(ranks)} gave no sign for {self._timeout} s (--timeout)"

    def _named(self, ranks: set[int]) -> str:
        return _ranks(ranks, [person.host for person in self._people])

    def _end(self, note: "Note") -> None:
        time.sleep(SIGN_SECONDS)  # let this rank's own error come first, if it has one
        if not self._told and not self._done.is_set():
            if note.speaker in (None, self._here.rank):
                complain(self._here, f"ends because {note.reason}")
            for rank in set(note.lost) - {self._here.rank}:
                self._people[rank].end()
            os._exit(note.code)

    def _note(self) -> "Note | None":
        return Note(**json.loads(self._store.get(FAILURE))) if self._store.check([FAILURE]) else None

    def _leave(self, note: "Note") -> None:
        self._store.compare_set(FAILURE, "", json.dumps(asdict(note)))

    def tell(self, code: int = 1) -> None:
        """This rank ends with an error of its own: the others shall know why they end, and end likewise."""
        self._told = True
        if self._here.world_size > 1:
            with contextlib.suppress(RuntimeError):
                why = f"{self._named({self._here.rank})} failed"
                self._leave(Note(why, code=code, speaker=1 if self._here.first else 0))
                self._linger()

    def _linger(self) -> None:
        """The store may go with this rank: the others read the note first."""
        if self._here.first:
            time.sleep(2 * SIGN_SECONDS)

    def find(self) -> LostRank:
        """A collective broke: who is missing? This rank goes on giving signs meanwhile."""
        self._told = True
        others = set(range(self._here.world_size)) - {self._here.rank}
        try:
            signs = _Signs(self._store, others)
            given_up = time.monotonic() + MISSING_SECONDS
            while not (note := self._note()) and time.monotonic() < given_up:
                time.sleep(0.2)
                signs.look()
            silent = signs.silent(MISSING_SECONDS - 1)
            if not note:
                self._leave(Note(f"{self._named(silent)} is gone" if silent else "a connection broke"))
                note = self._note()
            self._linger()
        except RuntimeError:
            note = None
        note = note or Note(f"{self._named({0})} is gone")
        error = LostRank(f"ends because {note.reason}")
        error.code, error.told = note.code, note.speaker not in (None, self._here.rank)
        return error

    def close(self) -> None:
        self._done.set()
        if self._here.world_size > 1:
            self.join(2 * SIGN_SECONDS)
            self._guardian.join(SIGN_SECONDS)


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
