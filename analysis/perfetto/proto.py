"""Perfetto's protobuf, written by hand: a Python half for the few packets, a numba half for the events.

A trace is a row of `packet` fields. Events refer to names by number; a number is explained once, before
its first use (InternedData). Times are microseconds since the beginning, on a clock of this sequence.
"""

import itertools
import struct
from collections.abc import Iterator

import numpy as np

from analysis.trace.scan import FLOAT, INT, STRING
from analysis.trace.strings import compiled, pointer

SEQUENCE, CLOCK, BOOTTIME, REALTIME = 1, 64, 6, 1
PACKET, TIMESTAMP, SEQUENCE_ID, TRACK_EVENT, INTERNED, FLAGS, COMPRESSED = 1, 8, 10, 11, 12, 13, 50
LEGACY, PROCESS_DESCRIPTOR = 6, 43
CLOCK_ID, DEFAULTS, DESCRIPTOR, SNAPSHOT, TRACE_UUID = 58, 59, 60, 6, 89
CLEARED, NEEDED = 1, 2
SLICE_BEGIN, SLICE_END, INSTANT, COUNTER = 1, 2, 3, 4
CATEGORIES, NAMES, KEYS, VALUES = 1, 2, 3, 29  # fields of InternedData
ARROW_OUT, ARROW_IN = 47, 48  # fields of TrackEvent
INTERNED_KINDS = (CATEGORIES, NAMES, KEYS, VALUES)
BYTES_PER_STEP_NAME = 48
BYTES_PER_EVENT, BYTES_PER_ARG = 104, 32  # upper bounds, texts apart


def encode_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_number(field: int, value: int) -> bytes:
    return encode_varint(field << 3) + encode_varint(value)


def encode_nested(field: int, *parts: bytes | str) -> bytes:
    body = b"".join(part.encode(errors="replace") if isinstance(part, str) else part for part in parts)
    return encode_varint(field << 3 | 2) + encode_varint(len(body)) + body


def encode_packet(*fields: bytes) -> bytes:
    return encode_nested(PACKET, encode_number(SEQUENCE_ID, SEQUENCE), *fields)


def describe_process(uuid: int, pid: int, name: str, labels: list[str], order: int) -> bytes:
    """The packet that names the track of a process. order: of the processes in the UI, the lowest on top."""
    about = encode_number(1, pid) + encode_nested(6, name) + encode_number(3, order)
    return encode_packet(
        encode_nested(
            DESCRIPTOR,
            encode_number(1, uuid),
            encode_nested(3, about, *(encode_nested(8, label) for label in labels)),
        )
    )


def describe_thread(uuid: int, parent: int, pid: int, tid: int, name: str) -> bytes:
    """The packet that names the track `uuid` of a thread; parent: the track of its process."""
    about = encode_number(1, pid) + encode_number(2, tid) + encode_nested(5, name)
    return encode_packet(
        encode_nested(DESCRIPTOR, encode_number(1, uuid), encode_number(5, parent), encode_nested(4, about))
    )


def describe_process_early(pid: int, name: str) -> bytes:
    """The older way to describe a process: it is numbered as this is read, not as its events come."""
    return encode_packet(encode_nested(PROCESS_DESCRIPTOR, encode_number(1, pid), encode_nested(6, name)))


def describe_counter_track(uuid: int, parent: int, name: str, unit: str) -> bytes:
    """The packet that names the track of a counter; parent: the track that it stands under, 0 for none."""
    above = encode_number(5, parent) if parent else b""
    return encode_packet(
        encode_nested(
            DESCRIPTOR,
            encode_number(1, uuid),
            above,
            encode_nested(2, name),
            encode_nested(8, encode_nested(6, unit)),
        )
    )


def describe_group(uuid: int, name: str, parent: int = 0) -> bytes:
    """A track without events, for other tracks to be below."""
    above = encode_number(5, parent) if parent else b""
    return encode_packet(encode_nested(DESCRIPTOR, encode_number(1, uuid), above, encode_nested(2, name)))


def encode_trace_uuid(high: int, low: int) -> bytes:
    """Which trace it is, in 128 bits."""
    return encode_packet(encode_nested(TRACE_UUID, encode_number(1, high), encode_number(2, low)))


def find_trace_uuid(begin: bytes) -> tuple[int, int] | None:
    """The two halves of the number that `encode_trace_uuid` wrote near the beginning of a trace."""
    try:
        for field, _, packet in itertools.islice(_list_fields(begin), 4):
            for inner, _, body in _list_fields(packet) if field == PACKET else ():
                if inner == TRACE_UUID:
                    _, p = _read_varint(body, 0)
                    high, p = _read_varint(body, p)
                    _, p = _read_varint(body, p)
                    return high, _read_varint(body, p)[0]
    except IndexError:  # the beginning ends within a field, or is something else
        pass
    return None


def encode_interned(entries: list[tuple[int, int, str]]) -> bytes:
    """entries: (CATEGORIES | NAMES | KEYS | VALUES, number, text)."""
    texts = [
        encode_nested(kind, encode_number(1, iid), encode_nested(2, text.encode(errors="replace")))
        for kind, iid, text in entries
    ]
    return encode_packet(encode_number(FLAGS, NEEDED), encode_nested(INTERNED, *texts))


def encode_step_names(numbers: np.ndarray, first: int) -> bytes:
    """The names `step N` of these numbers (int64); the name of step 0 has the number `first`."""
    out = np.empty(BYTES_PER_STEP_NAME * len(numbers), np.uint8)
    used = _put_step_names(numbers, first, out)
    return encode_packet(encode_number(FLAGS, NEEDED), encode_nested(INTERNED, out[:used].tobytes()))


def encode_clock(begin_us: int) -> bytes:
    """Times of events are microseconds since begin_us: small numbers. To be written once, first of all."""
    ns = begin_us * 1000
    clocks = [encode_nested(1, encode_number(1, id), encode_number(2, ns)) for id in (BOOTTIME, REALTIME)]
    return encode_packet(
        encode_number(FLAGS, CLEARED),
        encode_nested(
            SNAPSHOT,
            *clocks,
            encode_nested(1, encode_number(1, CLOCK), encode_number(2, 0), encode_number(4, 1000)),
        ),
    )


def select_track(uuid: int) -> bytes:
    """From here on events belong to this track."""
    defaults = encode_nested(
        DEFAULTS, encode_number(CLOCK_ID, CLOCK), encode_nested(TRACK_EVENT, encode_number(11, uuid))
    )
    return encode_packet(encode_number(FLAGS, NEEDED), defaults)


def encode_slice_begin(ts_ns: int, *about: bytes) -> bytes:
    """The beginning of a slice on the selected track, at an exact time. about: fields of its TrackEvent."""
    return _encode_boundary(SLICE_BEGIN, ts_ns, *about)


def encode_slice_end(ts_ns: int) -> bytes:
    return _encode_boundary(SLICE_END, ts_ns)


def _encode_boundary(kind: int, ts_ns: int, *about: bytes) -> bytes:
    when = encode_number(TIMESTAMP, ts_ns) + encode_number(CLOCK_ID, BOOTTIME)
    return encode_packet(
        when, encode_number(FLAGS, NEEDED), encode_nested(TRACK_EVENT, encode_number(9, kind), *about)
    )


def encode_argument(key: int, value: int | float | str) -> bytes:
    """A field of TrackEvent: an argument of a slice. key: the number of its name."""
    if isinstance(value, str):
        body = encode_nested(6, value)
    elif isinstance(value, float):
        body = encode_varint(5 << 3 | 1) + struct.pack("<d", value)
    else:
        body = encode_number(4, value)
    return encode_nested(4, encode_number(1, key), body)


def encode_arrow(end: int, number: int) -> bytes:
    """A field of TrackEvent: an arrow with this number begins (ARROW_OUT) or ends (ARROW_IN) here."""
    return encode_varint(end << 3 | 1) + struct.pack("<Q", number)


def split_into_boundaries(event: bytes, begin_ns: int, end_ns: int) -> bytes:
    """One packet of `events` as a slice's begin and its end, at exact times."""
    track_event = _find_field(_find_field(event, PACKET), TRACK_EVENT)
    rest = b"".join(raw for field, raw, _ in _list_fields(track_event) if field != LEGACY)
    return encode_slice_begin(begin_ns, rest) + encode_slice_end(end_ns)


def _find_field(message: bytes, wanted: int) -> bytes:
    return next(body for field, _, body in _list_fields(message) if field == wanted)


def _list_fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """field number, its bytes with tag, its body (of nested ones)."""
    p = 0
    while p < len(message):
        start = p
        tag, p = _read_varint(message, p)
        body = p
        if tag & 7 == 0:
            _, p = _read_varint(message, p)
        elif tag & 7 == 1:
            p += 8
        else:
            size, body = _read_varint(message, p)
            p = body + size
        yield tag >> 3, message[start:p], message[body:p]


def _read_varint(message: bytes, p: int) -> tuple[int, int]:
    value = shift = 0
    while message[p] > 127:
        value |= (message[p] & 127) << shift
        shift += 7
        p += 1
    return value | message[p] << shift, p + 1


@compiled
def _put_varint(out, p, value):
    """Write a number in 7-bit groups at out[p], uint8; returns the place after it."""
    rest = np.uint64(value)
    while rest > np.uint64(127):
        out[p] = np.uint8(rest & np.uint64(127)) | np.uint8(128)
        rest >>= np.uint64(7)
        p += 1
    out[p] = np.uint8(rest)
    return p + 1


@compiled
def _put_step_names(numbers, first, out):
    """InternedData's event_names { iid, name }, one after the other; returns the bytes used."""
    p = 0
    for number in numbers:
        entry = p + 1
        out[p], out[p + 2] = NAMES << 3 | 2, 1 << 3
        p = _put_varint(out, p + 3, first + number)
        digits, rest = 1, number // 10
        while rest > 0:
            digits, rest = digits + 1, rest // 10
        out[p], out[p + 1] = 2 << 3 | 2, 5 + digits
        for i, letter in enumerate((115, 116, 101, 112, 32)):  # "step "
            out[p + 2 + i] = letter
        p += 7 + digits
        rest = number
        for i in range(digits):
            out[p - 1 - i] = 48 + rest % 10
            rest //= 10
        out[entry] = p - entry - 1
    return p


@compiled
def _put_size(out, p, size):
    """A length in three bytes, so that its bytes can be reserved before it is known."""
    out[p] = (size & 127) | 128
    out[p + 1] = ((size >> 7) & 127) | 128
    out[p + 2] = (size >> 14) & 127


@compiled
def _put_head(out, p, time):
    """packet { timestamp, sequence, flags, track_event { -> place, places of the two lengths."""
    out[p] = 10
    start = p + 1
    p = start + 3
    out[p] = TIMESTAMP << 3
    p = _put_varint(out, p + 1, time)
    out[p], out[p + 1], out[p + 2], out[p + 3] = SEQUENCE_ID << 3, SEQUENCE, FLAGS << 3, NEEDED
    out[p + 4] = TRACK_EVENT << 3 | 2
    return p + 8, start, p + 5


@compiled
def _put_annotation(out, p, key, kind, value, text):
    """debug_annotations { name_iid, value }."""
    out[p] = 34
    start = p + 1
    wide = kind != INT and kind != FLOAT and kind != STRING
    p = start + (3 if wide else 1)
    out[p] = 8
    p = _put_varint(out, p + 1, key)
    if kind == INT:
        out[p] = 32
        p = _put_varint(out, p + 1, value)
    elif kind == FLOAT:
        out[p] = 41
        for i in range(8):
            out[p + 1 + i] = (value >> (8 * i)) & 255
        p += 9
    elif kind == STRING:
        out[p], out[p + 1] = 0x88, 0x01
        p = _put_varint(out, p + 2, value)
    else:
        a, b = value >> 32, value & 0xFFFFFFFF
        out[p] = 50
        p = _put_varint(out, p + 1, b - a)
        for i in range(a, b):
            out[p] = text[i]
            p += 1
    if wide:
        _put_size(out, start, p - start - 3)
    else:
        out[start] = p - start - 1
    return p


@compiled
def _put_flow(out, p, field, flow):
    """Write the number of an arrow, uint64, as a field of eight bytes at out[p]; returns the place after
    it.
    """
    p = _put_varint(out, p, field << 3 | 1)
    for i in range(8):
        out[p + i] = (flow >> np.uint64(8 * i)) & np.uint64(255)
    return p + 8


@compiled
def make_flow_id(base, k):
    h = (np.uint64(base) + np.uint64(k)) * np.uint64(0x9E3779B97F4A7C15)
    return h ^ (h >> np.uint64(31))


@compiled
def encode_events(
    order,
    begin,
    ts,
    dur,
    name,
    cat,
    instant,
    arg_begin,
    arg_key,
    arg_kind,
    arg_val,
    text,
    flow_base,
    flow_count,
    offset,
    offset_key,
    out,
):
    """The events in this order on a clock that began at `begin` -> bytes written.

    `out` has BYTES_PER_EVENT for each, BYTES_PER_ARG for each argument of the block, space for the block's
    text and for the flows that end (`FileTracks._encode_events`). An event is below 2 MiB, so its length fits
    into three bytes: the scanner limits a line and its arguments, ReadToStepFlows the flows.

    offset: where in its file an event began, written as its argument `offset_key`; below 0 none is written.
    flow_count: 0 none; -1 - k: this event starts flow k of its base; n: n flows of its base end here.
    """
    q, text_p, p = pointer(out), pointer(text), 0
    keys, kinds, values = pointer(arg_key), pointer(arg_kind), pointer(arg_val)
    for i in order:
        p, packet_at, event_at = _put_head(q, p, ts[i] - begin)
        q[p] = 24
        p = _put_varint(q, p + 1, cat[i])
        q[p] = 80
        p = _put_varint(q, p + 1, name[i])
        if instant:
            q[p], q[p + 1] = 72, INSTANT
            p += 2
        else:  # legacy_event { phase 'X', duration_us }: begin and end in one packet
            q[p] = 50
            size_at = p + 1
            q[p + 2], q[p + 3], q[p + 4] = 16, 88, 24
            p = _put_varint(q, p + 5, dur[i])
            q[size_at] = p - size_at - 1
        for j in range(arg_begin[i], arg_begin[i + 1]):
            p = _put_annotation(q, p, keys[j], kinds[j], values[j], text_p)
        if offset[i] >= 0:
            p = _put_annotation(q, p, offset_key, INT, offset[i], text_p)
        if flow_count[i] < 0:
            p = _put_flow(q, p, ARROW_OUT, make_flow_id(flow_base[i], -1 - flow_count[i]))
        for k in range(flow_count[i]):
            p = _put_flow(q, p, ARROW_IN, make_flow_id(flow_base[i], k))
        _put_size(q, event_at, p - event_at - 3)
        _put_size(q, packet_at, p - packet_at - 3)
    return p


@compiled
def encode_counters(ts, values, begin, out):
    """Packets with values (float64 [n]) of the selected track at ts (us, int64 [n]; the trace's times count
    from `begin`). Returns how many bytes of `out` are used.
    """
    q, p = pointer(out), 0
    bits = values.view(np.int64)
    for i in range(len(ts)):
        p, packet_at, event_at = _put_head(q, p, ts[i] - begin)
        q[p], q[p + 1] = 72, COUNTER
        p = _put_varint(q, p + 2, 44 << 3 | 1)
        for k in range(8):
            q[p + k] = (bits[i] >> (8 * k)) & 255
        p += 8
        _put_size(q, event_at, p - event_at - 3)
        _put_size(q, packet_at, p - packet_at - 3)
    return p
