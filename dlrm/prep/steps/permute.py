"""The step permute: exactly the permutation of np.random.shuffle for a seed, in constant memory for any
number of rows.

numpy goes from the last position i to the first and swaps each with a random position j <= i. Here the
positions are divided into partitions, which are handled from the last to the first. A swap within a partition
is done in memory. A swap with a lower partition becomes a message (i, j, row at i); the lower partition
replays its messages in order before its own swaps.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.owned import discard_file, finish_file
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.kernels.intrinsics import compiled, prefetch

PARTITION_BITS = (
    24  # 64 MB per partition: fewer, larger ones are faster, because a message costs more than a cache miss
)
STAGING_BYTES = 16 << 20
DRAWS = 1 << 14  # random numbers drawn at a time
AHEAD = 24  # swaps whose memory is prefetched
WORDS = 624  # of the state of numpy's generator, a Mersenne Twister
SENT = np.uint32(0xFFFFFFFF)  # marks a position whose row will come from a lower partition
U = np.uint32
UPPER, LOWER, MATRIX = U(0x80000000), U(0x7FFFFFFF), U(0x9908B0DF)


@compiled
def twist_state(state, ready):
    """Advance the generator's state by 624 words, and write the random numbers for them to `ready`."""
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
def draw_numbers(state, ready, at, last, chosen):
    """chosen[k] = a random number from 0 to last - k, drawn as numpy does. Returns where in `ready`."""
    k = 0
    while k < len(chosen):
        mask = last - k
        for shift in (1, 2, 4, 8, 16):
            mask |= mask >> shift
        stop = min(len(chosen), last - (mask >> 1))  # up to here the mask stays the same
        while k < stop:
            if at == WORDS:
                twist_state(state, ready)
                at = 0
            value = np.int64(ready[at]) & mask
            at += 1
            chosen[k] = value
            k += value <= last - k  # no branch: the next one takes its place when it is too large
    return at


@compiled
def swap_items(rows, low, i, chosen, k, bits, staged, filled):
    """Swap position i - k with chosen[k], for each k, until a message buffer is full.

    `rows`: uint32, the rows at positions low, low + 1 ... `staged`: uint32 [partitions, messages, 3], with
    `filled` messages each. Returns (next k, the full buffer or -1); so do the next two kernels.
    """
    base = rows.ctypes.data
    while k < len(chosen):
        soon = np.int64(chosen[min(k + AHEAD, len(chosen) - 1)])
        if soon >= low:
            prefetch(base + 4 * (soon - low))
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
def replay_swaps(rows, low, messages, k, bits, staged, filled):
    """Replay the swaps of higher partitions with this one. For each message (i, j, row): the row at j goes to
    position i, as a pair (row, i), and the message's row takes its place.
    """
    base = rows.ctypes.data
    while k < len(messages):
        soon = np.int64(messages[min(k + AHEAD, len(messages) - 1), 1])
        prefetch(base + 4 * (soon - low))
        at = np.int64(messages[k, 1]) - low
        partition = np.int64(rows[at]) >> bits
        if filled[partition] == staged.shape[1]:
            return k, partition
        pair = staged[partition, filled[partition]]
        pair[0], pair[1] = rows[at], messages[k, 0]
        filled[partition] += 1
        rows[at] = messages[k, 2]
        k += 1
    return k, -1


@compiled
def send_to_partitions(rows, low, k, bits, staged, filled):
    """Send the pairs (row, position) of this partition to the partition that the row number belongs to."""
    while k < len(rows):
        if rows[k] != SENT:
            partition = np.int64(rows[k]) >> bits
            if filled[partition] == staged.shape[1]:
                return k, partition
            pair = staged[partition, filled[partition]]
            pair[0], pair[1] = rows[k], U(low + k)
            filled[partition] += 1
        k += 1
    return k, -1


@compiled
def invert_permutation(pairs, low, places):
    """places[row - low] = position, for each pair (row, position)."""
    base = places.ctypes.data
    for k in range(len(pairs)):
        prefetch(base + 4 * (np.int64(pairs[min(k + AHEAD, len(pairs) - 1), 0]) - low))
        places[np.int64(pairs[k, 0]) - low] = pairs[k, 1]


@compiled
def invert_all(rows, places):
    """places[row] = position, where one partition holds all positions."""
    base = places.ctypes.data
    for k in range(len(rows)):
        prefetch(base + 4 * np.int64(rows[min(k + AHEAD, len(rows) - 1)]))
        places[rows[k]] = k


class PartitionSpool:
    """A queue of messages or pairs for each partition: a file, and a buffer for its end.

    `words`: uint32 words of a message. `staged`: uint32 [partitions, capacity, words], `filled` of them
    valid.
    """

    def __init__(self, folder: Path, kind: str, partitions: int, words: int) -> None:
        self.folder, self.kind, self.words = folder, kind, words
        capacity = min(1 << 14, STAGING_BYTES // (partitions * words * 4))
        self.staged = np.empty((partitions, max(capacity, 16), words), np.uint32)
        self.filled = np.zeros(partitions, np.int64)
        for partition in range(partitions):
            discard_file(self.partition_path(partition))

    def partition_path(self, partition: int) -> Path:
        return self.folder / f"{self.kind}_{partition}.u32"

    def flush(self, partition: int) -> None:
        with OffsetFile(self.partition_path(partition), "a") as file:
            file.append(self.staged[partition, : self.filled[partition]])
        self.filled[partition] = 0

    def run_kernel(self, kernel: Callable[..., tuple[int, int]], *args: Any, bits: int) -> None:
        """Run a kernel that sends messages, and write each buffer that it fills to its file."""
        k, full = kernel(*args, 0, bits, self.staged, self.filled)
        while full >= 0:
            self.flush(full)
            k, full = kernel(*args, k, bits, self.staged, self.filled)

    def drain_partition(self, partition: int) -> Iterator[np.ndarray]:
        """All messages to a partition, in order, in parts of uint32 [n, words]. They are removed."""
        path, size = self.partition_path(partition), self.words * 4
        if path.exists():
            part = np.empty((1 << 16, self.words), np.uint32)
            with OffsetFile(path) as file:
                for at in range(0, file.size, part.nbytes):
                    count = file.read_into(part.data.cast("B"), at)
                    yield part[: count // size]
            discard_file(path)
        yield self.staged[partition, : self.filled[partition]].copy()
        self.filled[partition] = 0


def write_places(
    path: Path, rows: int, seed: int, report: Callable[[int], None], bits: int = PARTITION_BITS
) -> None:
    """Write a file of uint32 [rows]: the position of each row after np.random.shuffle with this seed.

    `report` is called with the number of rows done since the last call. Partitions have 2^`bits` positions.
    """
    if rows >= SENT:
        raise UserError(f"{rows} rows to shuffle: the reference's permutation is defined below 2^32 - 1")
    state: Any = np.random.RandomState(seed).get_state(legacy=True)
    words, ready, at = np.array(state[1], np.uint32), np.empty(WORDS, np.uint32), WORDS
    partitions = max(1, (rows + (1 << bits) - 1) >> bits)
    messages = PartitionSpool(path.parent, "message", partitions, 3)
    pairs = PartitionSpool(path.parent, "pair", partitions, 2)
    chosen, here = np.empty(DRAWS, np.uint32), np.empty(0, np.uint32)
    for partition in range(partitions - 1, -1, -1):
        low, high = partition << bits, min(rows, (partition + 1) << bits)
        here = np.arange(low, high, dtype=np.uint32)
        for part in messages.drain_partition(partition):
            pairs.run_kernel(replay_swaps, here, low, part, bits=bits)
        for i in range(high - 1, max(low, 1) - 1, -DRAWS):
            drawn = chosen[: i - max(low, 1) + 1]
            at = draw_numbers(words, ready, at, i, drawn)
            messages.run_kernel(swap_items, here, low, i, drawn, bits=bits)
            report(len(drawn))
        if partitions > 1:
            pairs.run_kernel(send_to_partitions, here, low, bits=bits)
    collect_partition(path, rows, here if partitions == 1 else pairs, bits)


def collect_partition(path: Path, rows: int, found: "np.ndarray | PartitionSpool", bits: int) -> None:
    """Write the file of positions from `found`: the row at each position, or a spool of pairs (row,
    position).
    """
    partial = path.with_name(path.name + ".partial")
    with OffsetFile(partial, "w") as file:
        file.resize(0)
        for low in range(0, rows, 1 << bits):
            places = np.empty(min(rows, low + (1 << bits)) - low, np.uint32)
            if isinstance(found, PartitionSpool):
                for part in found.drain_partition(low >> bits):
                    invert_permutation(part, low, places)
            else:
                invert_all(found, places)
            file.write(places, low * 4)
    finish_file(partial, path)
