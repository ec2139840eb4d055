"""Parses canonical lines, eight bytes at a time. All other lines are left to `odd_lines.read_line`.

A canonical line has a label and counts of at most 8 digits (or empty), ids of at most 8 hex digits (or
empty), tabs between them and one newline. For such lines both parsers must give the same numbers. The numbers
of columns are constants of the compiled code: `make_parser` compiles it for each dataset's.
"""

import functools
from typing import Any

import numpy as np

from dlrm.data.criteo import Columns
from dlrm.prep.kernels.counts import MOST_COUNTS, parse_label_and_counts
from dlrm.prep.kernels.hex_ids import FIELDS, parse_eight_any, parse_eight_full
from dlrm.prep.kernels.intrinsics import (
    compiled,
    count_trailing_zeros,
    inlined,
    load_byte,
    load_word,
    store32,
)

PAD = 128  # bytes behind the end of the text that may be read, so that vector loads need no bounds check
BLOCK_FULL, NEED_MORE, ODD_LINE = 0, 1, 2

U = np.uint64
EACH_1, EACH_80 = U(0x0101010101010101), U(0x8080808080808080)
TABS, ZEROS = U(0x0909090909090909), U(0x3030303030303030)
LOW_NIBBLES, TO_LOWER = U(0x0F0F0F0F0F0F0F0F), U(0x2020202020202020)
# adding these carries into a byte's top bit where the byte is at least '0', past '9', at least 'a', past 'f'
FROM_0, PAST_9 = U(0x5050505050505050), U(0x4646464646464646)
FROM_A, PAST_F = U(0x1F1F1F1F1F1F1F1F), U(0x1919191919191919)
PAIRS, QUADS = U(0x00FF00FF00FF00FF), U(0x0000FFFF0000FFFF)
TAB, NEWLINE, RETURN, MINUS, ZERO, SMALL_A, SMALL_F = b"\t\n\r-0af"
TO_SMALL = 0x20  # this bit of a letter is set in small ones
FAIL = -1


@inlined
def parse_int(at, empty):
    """(value, address of the next field), or (0, FAIL) when the field is not canonical."""
    sign = 1
    if load_byte(at) == MINUS:
        sign = -1
        at += 1
        if load_byte(at) == TAB:
            return np.int64(0), FAIL
    word = load_word(at)
    gaps = word ^ TABS
    ends = (gaps - EACH_1) & ~gaps & EACH_80
    length = 8
    if ends:
        length = count_trailing_zeros(ends) >> 3
    elif load_byte(at + 8) != TAB:
        return np.int64(0), FAIL
    # the digits move to the top bytes, zeros come before them; two shifts because one by 64 is undefined
    half = U(4 * length)
    word = ((word << (U(32) - half)) << (U(32) - half)) | ((ZEROS >> half) >> half)
    if (word & EACH_80) or ((word + FROM_0) & ~(word + PAST_9) & EACH_80) != EACH_80:
        return np.int64(0), FAIL
    word = word & LOW_NIBBLES
    word = (word * U(10) + (word >> U(8))) & PAIRS
    word = (word * U(100) + (word >> U(16))) & QUADS
    word = (word * U(10000) + (word >> U(32))) & U(0xFFFFFFFF)
    value = sign * np.int64(word)
    if length == 0:
        value = np.int64(empty)
    return value, at + length + 1


@inlined
def parse_hex(at, end_byte):
    """The same for an id that `end_byte` ends; the value is a uint32."""
    if load_byte(at + 8) == end_byte:
        word = load_word(at)
        lower = word | TO_LOWER
        digits = (word + FROM_0) & ~(word + PAST_9)
        letters = (lower + FROM_A) & ~(lower + PAST_F)
        if not (word & EACH_80) and ((digits | letters) & EACH_80) == EACH_80:
            word = (word & LOW_NIBBLES) + U(9) * ((word >> U(6)) & EACH_1)
            word = ((word << U(4)) | (word >> U(8))) & PAIRS
            word = ((word << U(8)) | (word >> U(16))) & QUADS
            return np.uint32(((word << U(16)) | (word >> U(32))) & U(0xFFFFFFFF)), at + 9
    return parse_short_hex(at, end_byte)


@compiled
def parse_short_hex(at, end_byte):
    value = np.uint32(0)
    for place in range(8):
        byte = load_byte(at + place)
        if byte == end_byte:
            return value, at + place + 1
        if ZERO <= byte <= ZERO + 9:
            digit = byte - ZERO
        elif SMALL_A <= (byte | TO_SMALL) <= SMALL_F:
            digit = (byte | TO_SMALL) - SMALL_A + 10
        else:
            break
        value = np.uint32((value << np.uint32(4)) | np.uint32(digit))
    return value, FAIL


@compiled
def parse_counts(at, labelled, empty, dense, label_at, numerical):
    """Parse a label, if there is one, and `numerical` counts one by one. Returns the first id's address, or
    FAIL.
    """
    label = np.int64(-1)
    if labelled:
        label, at = parse_int(at, 0)
        if at == FAIL:
            return at
    store32(label_at, 0, np.uint32(label))
    for column in range(numerical):
        value, at = parse_int(at, empty)
        if at == FAIL:
            return at
        store32(dense, column, np.uint32(value))
    return at


@inlined
def parse_ids(at, sparse, id_step, categorical):
    """Parse the ids of a line, the last of which ends it, to every id_step-th word from `sparse`. Returns the
    address of the next line, or FAIL.
    """
    column = 0
    while column < categorical - 1:
        # the last id is read alone, because it ends the line; so is each of an odd group
        if column + FIELDS < categorical:
            target = sparse + 4 * column * id_step
            following = parse_eight_full(at, target, id_step)
            if following == FAIL:
                following = parse_eight_any(at, target, id_step)
            if following != FAIL:
                at = following
                column += FIELDS
                continue
        for _ in range(min(FIELDS, categorical - 1 - column)):
            key, at = parse_hex(at, TAB)
            if at == FAIL:
                return at
            store32(sparse, column * id_step, key)
            column += 1
    key, at = parse_hex(at, NEWLINE)
    store32(sparse, (categorical - 1) * id_step, key)
    return at


@functools.cache
def make_parser(columns: Columns) -> Any:
    """`parse_lines`, compiled for lines of these columns."""
    numerical, categorical = columns.numerical, columns.categorical
    vectored = min(numerical, MOST_COUNTS)  # what `parse_label_and_counts` is compiled for
    fits = numerical == vectored

    @compiled
    def parse_lines(at, end, labelled, empty, addresses, row, capacity):
        """Parse text from address `at` to `end` into a block, from its row `row` on, until the block has
        `capacity` rows (BLOCK_FULL), a line is not canonical (ODD_LINE), or no whole line is left
        (NEED_MORE).

        `addresses` is the block's (see `blocks.TextBlock`). `empty`: the value of an empty count. Returns
        (rows in the block, address where it stopped, why).
        """
        dense, dense_step, ids, ids_step = addresses[0], 4 * addresses[1], addresses[2], 4 * addresses[3]
        id_step, labels, label_step = addresses[4], addresses[5], 4 * addresses[6]
        while row < capacity:
            # a row that ends behind `end` was parsed from stale bytes in the buffer: it is not counted
            following = FAIL
            if at < end:
                counts_at, label_at = dense + dense_step * row, labels + label_step * row
                if labelled and fits:
                    following = parse_label_and_counts(at, label_at, counts_at, np.int64(empty), vectored)
                if following == FAIL:
                    following = parse_counts(at, labelled, empty, counts_at, label_at, numerical)
                if following != FAIL:
                    following = parse_ids(following, ids + ids_step * row, id_step, categorical)
            if following == FAIL or following > end:
                for place in range(at, end):
                    if load_byte(place) == NEWLINE:
                        return row, at, ODD_LINE
                return row, at, NEED_MORE
            at = following
            row += 1
        return row, at, BLOCK_FULL

    return parse_lines


@compiled
def count_ends(text, count):
    """(newlines, carriage returns) among the first `count` bytes."""
    lines = returns = np.int32(0)
    for at in range(count):
        lines = np.int32(lines + np.int32(text[at] == NEWLINE))
        returns = np.int32(returns + np.int32(text[at] == RETURN))
    return lines, returns
