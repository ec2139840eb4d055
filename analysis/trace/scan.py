"""JSON lines of DFTracer -> columns, at machine speed: one numba loop over a block of text.

The columns hold each string as its number in `StringTable`. The arguments of event i are rows
arg_begin[i] .. arg_begin[i + 1] of the argument columns (key, kind, value, and the place of the text).
A line that is not a JSON event is left out and its place returned, so that the caller can count it. So is a
line with impossible values: times outside of MAX_TS and MAX_DUR, a pid or tid beyond 32 bits, more than
MAX_ARGS arguments, values nested deeper than MAX_DEPTH, more than MAX_LINE bytes. A reader of an EventBlock
may rely on: ts + dur (and a thousand times that, in ns) does not overflow, string numbers exist, arguments
that become columns of whole numbers are within MAX_WHOLE, real numbers are finite.

What keeps the loops inside their arrays: the invariants of analysis.trace.strings for text; a line counts
once, as an event or as bad, and both are compared with the arrays' lengths; MAX_ARGS rows of
arguments are free before a line begins and `_scan_args` stops there.
"""

from dataclasses import dataclass, replace

import numpy as np

from analysis.trace.strings import (
    ID,
    PAD,
    QUOTE,
    StringTable,
    bits_of,
    byte,
    compiled,
    count_free_slots,
    find_end_of_line,
    find_quote,
    grow_array,
    intern_text,
    make_pointers,
    pointer,
    unescape_text,
)

INT, FLOAT, STRING, INLINE, RAW = 0, 1, 2, 3, 4  # INLINE: a string that StringTable is too full for
EVENT, COUNTER, SUM, METADATA = 1, 2, 3, 4
HASH_DIGITS = 16  # of a file's hash: it is never a number, even where it has no letter
_HHASH, _VALUE = ID["hhash"], ID["value"]
_NUMERIC = tuple(ID[key] for key in ("offset", "count", "ret", "size", "bytes", "value"))
# Arguments that are used as whole numbers: counts, places in files, bytes, positions in the training.
_COUNTS = tuple(ID[key] for key in (
    "offset", "count", "ret", "size", "bytes", "epoch", "step", "batch", "num_events",
))  # fmt: skip
_COUNT_BITS = sum(1 << number for number in _COUNTS)  # all below 63
MAX_LINE = 1 << 20  # bytes; DFTracer's lines have hundreds
MAX_ARGS = 4096  # of one event
MAX_DEPTH = 64  # of a value inside an argument
MAX_TS, MAX_DUR = 1 << 54, 1 << 47  # us: hundreds of years, and four years
# with DFTRACER_TIME_METRIC=NS: from 1973 to 2116. No time in us is so large, so an event tells its unit.
MIN_TS_NS, MAX_TS_NS = 10**17, 1 << 62
MAX_WHOLE = 1 << 57  # of an argument that is a count
MAX_BYTES = 1 << 50  # that one call or span moves, where bytes are added up: a petabyte
MAX_BAD = 1000  # bad lines of a block whose places are returned; all are counted
# What the Perfetto converter changes in place
_CHANGEABLE = ("name", "cat", "ts", "dur", "arg_key", "arg_val")
_LEAST_LINE = 9  # bytes of an event: {"ph":1}
_MOST = 1.7976931348623157e308
_DONE, _MORE_ROOM = 0, 1
NAME, CAT, PID, TID, TS, DUR, PH, ARGS = range(8)  # what an event's keys are for; `ints` has the first six
# Bytes of the text, by name
BLANK, PLUS, COMMA, MINUS, POINT, ZERO, NINE, COLON = b" +,-.09:"
OPEN_BRACKET, CLOSE_BRACKET, OPEN_BRACE, CLOSE_BRACE, NEWLINE, SMALL_E, LARGE_E = b"[]{}\neE"
_T, _P, _C, _D, _I, _N, _A = b"tpcdina"
_LARGE_M, _LARGE_X, _LARGE_C = b"MXC"


@dataclass
class EventBlock:
    """Events and metadata records of one stretch of a trace file, in the order of the file."""

    text: np.ndarray
    ph: np.ndarray
    name: np.ndarray
    cat: np.ndarray
    pid: np.ndarray
    tid: np.ndarray
    ts: np.ndarray
    dur: np.ndarray
    arg_begin: np.ndarray
    arg_key: np.ndarray
    arg_kind: np.ndarray
    arg_val: np.ndarray  # int64; the bits of a float64; a string's number; begin << 32 | end in the text
    arg_text: np.ndarray  # begin << 32 | end of `"key":value`
    bad: list[int]  # where the lines that did not parse begin, the first MAX_BAD of them
    n_bad: int = 0  # all of them

    def __len__(self) -> int:
        return len(self.ph)

    def is_event(self) -> np.ndarray:
        """Which rows are events of the program (bool), not records of the tracer about itself."""
        return (self.ph == EVENT) & (self.cat != ID["dftracer"])

    def copy(self) -> "EventBlock":
        """One whose columns can be changed without changing this one; the text is the same."""
        columns = {name: value.copy() for name, value in vars(self).items() if name in _CHANGEABLE}
        return replace(self, **columns)

    def args(self, i: int, strings: StringTable) -> dict[str, int | float | str]:
        """The arguments of one event as Python values: for the few records that are read one by one."""
        found: dict[str, int | float | str] = {}
        for j in range(self.arg_begin[i], self.arg_begin[i + 1]):
            kind, value = self.arg_kind[j], self.arg_val[j]
            key = strings.text(self.arg_key[j])
            if kind == INT:
                found[key] = int(value)
            elif kind == FLOAT:
                found[key] = float(value.view(np.float64))
            elif kind == STRING:
                found[key] = strings.text(value)
            else:
                found[key] = unescape_text(self.text[int(value) >> 32 : int(value) & 0xFFFFFFFF].tobytes())
        return found


def scan_block(text: np.ndarray, size: int, strings: StringTable) -> EventBlock:
    """text[:size] is whole lines; PAD bytes of anything follow."""
    assert len(text) >= size + PAD and text[size - 1] == NEWLINE
    lines = int(np.count_nonzero(text[:size] == NEWLINE))
    most = min(lines, size // _LEAST_LINE + 1)
    ints = np.empty((6, most), np.int64)
    ph = np.empty(most, np.uint8)
    arg_begin = np.zeros(most + 1, np.int64)
    room = 8 * most + MAX_ARGS
    args: tuple[np.ndarray, ...] = (
        np.empty(room, np.int32),
        np.empty(room, np.uint8),
        np.empty(room, np.int64),
        np.empty(room, np.int64),
    )
    bad = np.empty(min(lines, MAX_BAD), np.int64)
    state = np.zeros(4, np.int64)  # position, events, arguments, bad lines
    while _scan_text(text, size, state, ph, ints, arg_begin, args, bad, strings.arrays) == _MORE_ROOM:
        line = int(np.argmax(text[state[0] : size] == NEWLINE)) + 1
        strings.make_room(min(line, MAX_LINE) + (1 << 12))
        if int(state[2]) + MAX_ARGS > len(args[0]):
            args = tuple(grow_array(a, len(a)) for a in args)
    n, m = int(state[1]), int(state[2])
    name, cat, pid, tid, ts, dur = ints[:, :n]
    keys, kinds, values, places = (a[:m] for a in args)
    return EventBlock(
        text, ph[:n], name.astype(np.int32), cat.astype(np.int32), pid, tid, ts, dur,
        arg_begin[: n + 1], keys, kinds, values, places, bad[: int(state[3])].tolist(),
        int(state[3]),
    )  # fmt: skip


@compiled
def _scan_number(text, p):
    """The number at p -> place after it, kind, whole value, real value; place -1 when there is none."""
    negative = byte(text, p) == MINUS
    if negative:
        p += 1
    begin, value, digits, scale, real = p, 0, 0, 0, False
    while True:
        c = byte(text, p)
        if ZERO <= c <= NINE:
            if digits < 18:
                value = value * 10 + (c - ZERO)
                digits += value > 0
                scale -= real
            else:
                scale += not real
        elif c == POINT and not real:
            real = True
        else:
            break
        p += 1
    if p == begin:
        return -1, INT, 0, 0.0
    if c in (SMALL_E, LARGE_E):
        p += 1
        down = byte(text, p) == MINUS
        p += down or byte(text, p) == PLUS
        power = 0
        while ZERO <= byte(text, p) <= NINE:
            power = min(1000, power * 10 + byte(text, p) - ZERO)
            p += 1
        scale += -power if down else power
        real = True
    if real or scale != 0:
        number = 0.0 if value == 0 else value / 10.0**-scale if scale < 0 else value * 10.0**scale
        number = min(number, _MOST)
        return p, FLOAT, 0, -number if negative else number
    return p, INT, -value if negative else value, 0.0


@compiled
def _skip_value(text, p, end):
    """The place after any JSON value; -1 when the line ends first or the value is nested too deeply."""
    depth = 0
    while p < end:
        c = byte(text, p)
        if c == QUOTE:
            p = find_quote(text, p + 1, end)
            if depth == 0:
                return p + 1 if p < end else -1
        elif c in (OPEN_BRACE, OPEN_BRACKET):
            depth += 1
            if depth > MAX_DEPTH:
                break
        elif c in (CLOSE_BRACE, CLOSE_BRACKET):
            if depth <= 1:
                return p + depth
            depth -= 1
        elif c == COMMA and depth == 0:
            return p
        p += 1
    return -1


@compiled
def _scan_value(text, p, end, j, key, args, strings):
    """One argument's value into row j -> the place after it, or -1."""
    _, kinds, values, _ = args
    if byte(text, p) == QUOTE:
        a = p + 1
        q = find_quote(text, a, end)
        kinds[j], values[j] = STRING, intern_text(text, a, q - a, strings, False)
        if values[j] < 0:
            kinds[j], values[j] = INLINE, (a << 32) | q
        for numeric in _NUMERIC:  # DFTracer 1 wrote these between quotes
            if key == numeric and not (key == _VALUE and q - a == HASH_DIGITS):
                after, kind, whole, _ = _scan_number(text, a)
                if after == q and kind == INT and -MAX_WHOLE <= whole <= MAX_WHOLE:
                    kinds[j], values[j] = INT, whole
        return q + 1 if q < end else -1
    q, kind, whole, real = _scan_number(text, p)
    if q >= 0 and 0 <= key < 64 and _COUNT_BITS >> key & 1:  # noqa: SIM102
        if abs(real) > MAX_WHOLE or whole > MAX_WHOLE or whole < -MAX_WHOLE:
            kinds[j], values[j] = RAW, (p << 32) | q  # no number of bytes or steps: stays as text
            return q
    if q >= 0:
        kinds[j], values[j] = kind, whole
        if kind == FLOAT:
            values[j] = bits_of(real)
        return q
    q = _skip_value(text, p, end)
    kinds[j], values[j] = RAW, (p << 32) | q
    return q


@compiled
def _scan_args(text, p, end, j, last, args, strings):
    """The object of arguments that begins at p -> the place after it (or -1) and the next free row, at most
    `last`.
    """
    keys, _, _, places = args
    p += 1
    while p < end:
        c = byte(text, p)
        if c == CLOSE_BRACE:
            return p + 1, j
        if c == QUOTE:
            begin = p
            p = find_quote(text, begin + 1, end)
            if p >= end or j >= last:
                break
            key = intern_text(text, begin + 1, p - begin - 1, strings, True)
            if key < 0:
                break
            p += 1
            while byte(text, p) == BLANK or byte(text, p) == COLON:
                p += 1
            if key == _HHASH:  # every event carries the host's hash: the HH record holds it once
                p = _skip_value(text, p, end)
                if p < 0:
                    break
                continue
            p = _scan_value(text, p, end, j, key, args, strings)
            if p < 0:
                break
            keys[j], places[j] = key, (begin << 32) | p
            j += 1
        elif c in (BLANK, COMMA):
            p += 1
        else:
            break
    return -1, j


@compiled
def _find_column(size, c, d):
    """Which column a key is for, by its length and first two letters c and d; -1: none."""
    if size == 2:
        return TS if c == _T else PH if c == _P else -1
    if size == 3:
        if d == _I:
            return PID if c == _P else TID
        return CAT if c == _C else DUR if c == _D else -1
    if size == 4:
        return NAME if c == _N else ARGS if c == _A else -1
    return -1


@compiled
def _scan_line(text, p, end, j, row, args, strings):
    """The event that begins at p (its brace) -> the place after it (or -1), next free argument row.

    row: int64 [7], filled: what the event has of NAME .. PH; names and categories as numbers of strings.
    """
    for place in range(ARGS):
        row[place] = 0
    last = j + MAX_ARGS
    p += 1
    while 0 <= p < end:
        c = byte(text, p)
        if c == CLOSE_BRACE:
            if row[TS] >= MIN_TS_NS:  # such a time has a digit more than was kept, so round
                row[TS], row[DUR] = (row[TS] + 500) // 1000, (row[DUR] + 500) // 1000
            if row[TS] > MAX_TS or row[DUR] > MAX_DUR:
                break
            return p + 1, j
        if c in (BLANK, COMMA):
            p += 1
            continue
        if c != QUOTE:
            break
        a = p + 1
        p = find_quote(text, a, end)
        if p >= end:
            break
        place = _find_column(p - a, byte(text, a), byte(text, a + 1))
        p += 1
        while byte(text, p) == BLANK or byte(text, p) == COLON:
            p += 1
        quoted = byte(text, p) == QUOTE
        if place < 0 or (place <= CAT and not quoted):  # numbers of strings are assigned here only
            p = _skip_value(text, p, end)
        elif place == ARGS:
            if byte(text, p) != OPEN_BRACE:
                break
            p, j = _scan_args(text, p, end, j, last, args, strings)
        elif place <= CAT:
            a = p + 1
            p = find_quote(text, a, end)
            found = intern_text(text, a, p - a, strings, True)
            if p >= end or found < 0:
                break
            row[place] = found
            p += 1
        elif place == PH and quoted:  # as Chrome writes it: X, M
            c = byte(text, p + 1)
            row[PH] = (
                METADATA if c == _LARGE_M else EVENT if c == _LARGE_X else COUNTER if c == _LARGE_C else 0
            )
            p = _skip_value(text, p, end)
        else:
            p, kind, whole, real = _scan_number(text, p + quoted)
            if quoted and p >= 0:  # as DFTracer 1 wrote some
                p = p + 1 if byte(text, p) == QUOTE else -1
            if kind == FLOAT:
                whole = np.int64(real) if 0.0 <= real <= MAX_TS_NS else -1
            most = 0xFFFFFFFF if place <= TID else MAX_TS_NS if place <= DUR else 255
            if whole < 0 or whole > most:
                break
            row[place] = whole
    return -1, j


@compiled
def _scan_text(text, size, state, ph, ints, arg_begin, arg_arrays, bad, arrays):
    """Scan lines until the text ends (_DONE) or an array may become too small (_MORE_ROOM).

    state: int64 [4], changed: place in the text, events, arguments, and bad lines so far.
    """
    p, i, j, wrong = state
    pool, starts, _, table, count = arrays
    keys, kinds, values, places = arg_arrays
    args_room, events_room, bad_room = len(keys) - MAX_ARGS, len(ph), len(bad)
    args = pointer(keys), pointer(kinds), pointer(values), pointer(places)
    strings = make_pointers(arrays)
    room = count_free_slots(pool, starts, table, count)
    text = pointer(text)
    space = np.zeros(ARGS, np.int64)
    row = pointer(space)
    status, known = _DONE, count[0]
    while p < size:
        end = find_end_of_line(text, p)
        begin = p
        if end - p > MAX_LINE:
            if wrong < bad_room:
                bad[wrong] = begin
            wrong += 1
            p = end + 1
            continue
        if end - p > room or j > args_room:
            status = _MORE_ROOM
            break
        while (
            byte(text, p) == BLANK
            or byte(text, p) == OPEN_BRACKET
            or byte(text, p) == COMMA
            or byte(text, p) == CLOSE_BRACKET
        ):
            p += 1
        if byte(text, p) == OPEN_BRACE:
            q, next_j = _scan_line(text, p, end, j, row, args, strings)
            if q < 0 or row[PH] == 0 or i >= events_room:
                if wrong < bad_room:
                    bad[wrong] = begin
                wrong += 1
            else:
                ph[i] = row[PH]
                for k in range(PH):
                    ints[k, i] = row[k]
                i, j = i + 1, next_j
                arg_begin[i] = j
        elif end - p > 1:
            if wrong < bad_room:
                bad[wrong] = begin
            wrong += 1
        if count[0] != known:  # rare: a string that is new
            known = count[0]
            room = count_free_slots(pool, starts, table, count)
        p = end + 1
    state[:] = p, i, j, wrong
    return status
