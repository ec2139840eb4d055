"""The permutation of np.random.shuffle for a seed, exactly, in constant memory, however many rows there are.

numpy walks i from the last row down and swaps it with a random j <= i. Here the positions are cut into
partitions, worked from the top. A swap inside the partition is done; one with a lower partition becomes a
message (i, j, value at i), which that one replays, in the same order, before its own swaps begin.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.errors import UserError
from dlrm.prep.files import File
from dlrm.prep.native import compiled

PARTITION_BITS = 22
STAGING_BYTES = 16 << 20
DRAWS = 4096
WORDS = 624
SENT = np.uint32(0xFFFFFFFF)  # this position's row comes from a lower partition
U = np.uint32
UPPER, LOWER, MATRIX = U(0x80000000), U(0x7FFFFFFF), U(0x9908B0DF)


@compiled
def twist(state, ready):
    """The next 624 words of the generator, and what it gives out for them."""
    for word in range(WORDS - 397):
        mixed = (state[word] & UPPER) | (state[word + 1] & LOWER)
        state[word] = state[word + 397] ^ (mixed >> U(1)) ^ ((mixed & U(1)) * MATRIX)
    for word in range(WORDS - 397, WORDS - 1):
        mixed = (state[word] & UPPER) | (state[word + 1] & LOWER)
        state[word] = state[word + 397 - WORDS] ^ (mixed >> U(1)) ^ ((mixed & U(1)) * MATRIX)
    mixed = (state[WORDS - 1] & UPPER) | (state[0] & LOWER)
    state[WORDS - 1] = state[396] ^ (mixed >> U(1)) ^ ((mixed & U(1)) * MATRIX)
    for word in range(WORDS):
        value = state[word]
        value ^= value >> U(11)
        value ^= (value << U(7)) & U(0x9D2C5680)
        value ^= (value << U(15)) & U(0xEFC60000)
        ready[word] = value ^ (value >> U(18))


@compiled
def draw(state, ready, at, last, chosen):
    """chosen[k] = a random number of 0..last-k, as numpy draws them; returns the state's position."""
    for k in range(len(chosen)):
        limit = U(last - k)
        mask = limit
        for shift in (1, 2, 4, 8, 16):
            mask |= mask >> U(shift)
        while True:
            if at == WORDS:
                twist(state, ready)
                at = 0
            value = ready[at] & mask
            at += 1
            if value <= limit:
                break
        chosen[k] = value
    return at


@compiled
def swap(rows, low, i, chosen, k, bits, staged, filled):
    """Swaps for i, i - 1, ...; stops where a message buffer is full. Returns (next k, the full one or -1)."""
    while k < len(chosen):
        here, there = i - k - low, np.int64(chosen[k])
        if there >= low:
            rows[here], rows[there - low] = rows[there - low], rows[here]
        else:
            partition = there >> bits
            if filled[partition] == staged.shape[1]:
                return k, partition
            message = staged[partition, filled[partition]]
            message[0], message[1], message[2] = U(i - k), U(there), rows[here]
            filled[partition] += 1
            rows[here] = SENT
        k += 1
    return k, -1


@compiled
def replay(rows, low, messages, sources, places):
    """What higher partitions did to this one: each message learns its row, and leaves one behind."""
    for k in range(len(messages)):
        at = np.int64(messages[k, 1]) - low
        sources[k], places[k] = rows[at], messages[k, 0]
        rows[at] = messages[k, 2]


@compiled
def deal(sources, places, k, bits, staged, filled):
    """Pairs (source row, its place) to the buffer of their source's partition."""
    while k < len(sources):
        if sources[k] != SENT:
            partition = np.int64(sources[k] >> U(bits))
            if filled[partition] == staged.shape[1]:
                return k, partition
            staged[partition, filled[partition], 0] = sources[k]
            staged[partition, filled[partition], 1] = places[k]
            filled[partition] += 1
        k += 1
    return k, -1


@compiled
def invert(pairs, low, places):
    for k in range(len(pairs)):
        places[np.int64(pairs[k, 0]) - low] = pairs[k, 1]


class Mail:
    """One growing file per partition, written through small buffers."""

    def __init__(self, folder: Path, kind: str, partitions: int, words: int) -> None:
        self.folder, self.kind, self.words = folder, kind, words
        room = min(1 << 14, STAGING_BYTES // (partitions * words * 4))
        self.staged = np.empty((partitions, max(room, 16), words), np.uint32)
        self.filled = np.zeros(partitions, np.int64)
        for partition in range(partitions):
            self.path(partition).unlink(missing_ok=True)

    def path(self, partition: int) -> Path:
        return self.folder / f"{self.kind}_{partition}.u32"

    def flush(self, partition: int) -> None:
        with File(self.path(partition), "a") as file:
            file.append(self.staged[partition, : self.filled[partition]])
        self.filled[partition] = 0

    def take(self, partition: int) -> Iterator[np.ndarray]:
        """All that was sent to a partition, in order, a part at a time; gone afterwards."""
        path, size, step = self.path(partition), self.words * 4, 1 << 18
        if path.exists():
            with File(path) as file:
                for at in range(0, file.size // size, step):
                    count = min(step, file.size // size - at)
                    yield file.read_array(count * self.words, at * size, np.uint32).reshape(-1, self.words)
            path.unlink()
        yield self.staged[partition, : self.filled[partition]].copy()
        self.filled[partition] = 0


def write_places(
    path: Path, rows: int, seed: int, moved: Callable[[int], None], bits: int = PARTITION_BITS
) -> None:
    """A file of uint32: for each of the first `rows` rows, where shuffling with this seed puts it."""
    if rows >= SENT:
        raise UserError(f"{rows} rows to shuffle: the reference's permutation is defined below 2^32 - 1")
    state: Any = np.random.RandomState(seed).get_state(legacy=True)
    words, ready, at = np.array(state[1], np.uint32), np.empty(WORDS, np.uint32), WORDS
    partitions = max(1, (rows + (1 << bits) - 1) >> bits)
    messages = Mail(path.parent, "message", partitions, 3)
    pairs = Mail(path.parent, "pair", partitions, 2)
    chosen = np.empty(DRAWS, np.uint32)
    for partition in range(partitions - 1, -1, -1):
        low, high = partition << bits, min(rows, (partition + 1) << bits)
        here = np.arange(low, high, dtype=np.uint32)
        for part in messages.take(partition):
            sources, places = np.empty(len(part), np.uint32), np.empty(len(part), np.uint32)
            replay(here, low, part, sources, places)
            send(pairs, sources, places, bits)
        for i in range(high - 1, max(low, 1) - 1, -DRAWS):
            drawn = chosen[: i - max(low, 1) + 1]
            at = draw(words, ready, at, i, drawn)
            k, full = swap(here, low, i, drawn, 0, bits, messages.staged, messages.filled)
            while full >= 0:
                messages.flush(full)
                k, full = swap(here, low, i, drawn, k, bits, messages.staged, messages.filled)
            moved(len(drawn))
        send(pairs, here, np.arange(low, high, dtype=np.uint32), bits)
    collect(path, rows, pairs, partitions, bits)


def send(pairs: Mail, sources: np.ndarray, places: np.ndarray, bits: int) -> None:
    k, full = deal(sources, places, 0, bits, pairs.staged, pairs.filled)
    while full >= 0:
        pairs.flush(full)
        k, full = deal(sources, places, k, bits, pairs.staged, pairs.filled)


def collect(path: Path, rows: int, pairs: Mail, partitions: int, bits: int) -> None:
    partial = path.with_name(path.name + ".partial")
    with File(partial, "w") as file:
        file.resize(0)
        for partition in range(partitions):
            low = partition << bits
            places = np.empty(min(rows, low + (1 << bits)) - low, np.uint32)
            for part in pairs.take(partition):
                invert(part, low, places)
            file.write(places, low * 4)
    os.replace(partial, path)
