"""How far a host's clock is ahead of that of rank 0's host, and the most by which that may be wrong.

The first rank of each other host and rank 0 send each other messages through the ranks' store, one host after
the other. Of `ROUND_TRIPS` the quickest counts: the time at rank 0 was somewhere between sending and
receiving, so half of that round trip is the largest error.

A round trip is six messages (to set a key, to wait for one, the answer; on both sides). So a mark costs
60 messages per host besides rank 0's: 15,000 in a job of 1,000 ranks on 250 hosts, at both ends of it.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dlrm.runtime.signed_store import SignedStore

ROUND_TRIPS = 10


@dataclass(frozen=True)
class ClockOffset:
    ahead_us: int  # this host's clock minus that of rank 0's host
    error_us: int


def answer_host(store: SignedStore, group: str, rank: int) -> None:
    """On rank 0: answer the round trips of `rank`. The store must be one that no other thread waits on."""
    times = []
    for number in range(ROUND_TRIPS):
        store.store.wait([f"{group}/{rank}/ask{number}"])
        received = time.time_ns()
        sent = time.time_ns()
        store.store.set(f"{group}/{rank}/answer{number}", "1")
        times.append((received, sent))
    store.set(f"{group}/{rank}/times", json.dumps(times))


def measure_offset(store: SignedStore, group: str, rank: int) -> ClockOffset:
    """On the first rank of a host; rank 0 calls `answer_host` with the same group and rank."""
    own = []
    for number in range(ROUND_TRIPS):
        sent = time.time_ns()
        store.store.set(f"{group}/{rank}/ask{number}", "1")
        store.store.wait([f"{group}/{rank}/answer{number}"])
        own.append((sent, time.time_ns()))
    return choose_round_trip(own, json.loads(store.get(f"{group}/{rank}/times")))


def choose_round_trip(own: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> ClockOffset:
    """The offset by the quickest round trip.

    own     (sent, received) of each, by this host's clock, in ns
    theirs  (received, sent) of each, by the clock of rank 0's host
    """
    found = []
    for (sent, received), (their_received, their_sent) in zip(own, theirs, strict=True):
        round_trip = (received - sent) - (their_sent - their_received)
        ahead = ((sent - their_received) + (received - their_sent)) / 2
        found.append((max(0, round_trip), ahead))
    round_trip, ahead = min(found)
    return ClockOffset(round(ahead / 1000), round_trip // 2000 + 1)
