"""One trace file -> Perfetto packets: its process, its threads, their nested slices, its counters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import isal_zlib

from analysis.perfetto import proto
from analysis.perfetto.bandwidth import BandwidthCounter
from analysis.perfetto.flows import ReadToStepFlows
from analysis.perfetto.nest import SliceLane
from analysis.trace.arguments import NO_CALL, count_moved_bytes, read_argument_of, read_real_argument
from analysis.trace.classify import KERNEL_COUNTERS
from analysis.trace.clocks import Clock
from analysis.trace.columns import resolve_paths
from analysis.trace.positions import FilePositions
from analysis.trace.process import TracedProcess
from analysis.trace.scan import INLINE, STRING, EventBlock
from analysis.trace.selection import WHOLE, Selection
from analysis.trace.source import EventBlockReader
from analysis.trace.strings import ID, MAX_NAMES, StringTable
from common.errors import printable

_PIDS = 1 << 22  # more than any kernel gives out: one of these apart, equal pids of two hosts stay apart
_CHUNK = 1 << 20
MAX_THREADS = 1024  # tracks of one process; further threads share one
MAX_LANES = 64  # of one track
MAX_COUNTERS = 1000  # of one process
RUN_GROUP = "run"  # the track above the run's counters
KERNEL_GROUP = "kernel"  # the track above those that the kernel keeps of a process, closed at first
OTHERS = -1  # the thread number of what shares a track
RUN_COUNTERS = ("loss", "samples_per_second")  # of the run: every rank logs the same values
# Slices of steps are named by their number. These names are numbered after those of all strings.
FIRST_STEP_NAME = MAX_NAMES + 2
MAX_STEP_NAMES = 1 << 20  # further steps are just "step"


@dataclass
class ConversionSummary:
    """What was written, and what was not."""

    path: Path
    events: int = 0
    moved: int = 0  # slices that overlapped another of their thread and got a lane of their own
    unresolved: int = 0  # arguments that name a file by a hash without a record
    lost: list[str] = field(default_factory=list)
    skew: dict[str, int] = field(default_factory=dict)  # between ranks at a barrier, us
    clocks: list[str] = field(default_factory=list)  # how hosts' times were moved
    notes: list[str] = field(default_factory=list)  # what a reader must know about the file


LEVEL = 1  # of ISA-L's deflate: four times the speed of zlib's level 1, at the same size


class TraceOutput:
    """Packets into a file, deflated in chunks as Perfetto's own tracing service does."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.waiting = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self.waiting += data
        if len(self.waiting) > _CHUNK:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            deflated = proto.encode_nested(proto.COMPRESSED, isal_zlib.compress(self.waiting, LEVEL))
            self.file.write(proto.encode_nested(proto.PACKET, deflated))
            self.waiting.clear()


class NameTable:
    """The numbers of strings that the trace has explained so far, by what they are used for."""

    def __init__(self, out: TraceOutput, strings: StringTable) -> None:
        self.out, self.strings = out, strings
        self.known = {kind: np.zeros(1, np.bool_) for kind in proto.INTERNED_KINDS}
        self.steps = np.zeros(1 << 10, np.bool_)  # whose names are known

    def explain_names(self, used: dict[int, np.ndarray]) -> None:
        """Write the texts that are used for the first time. used: kind -> numbers of strings."""
        entries = []
        for kind, numbers in used.items():
            needed = np.zeros(len(self.strings), np.bool_)
            needed[numbers] = True
            known = np.concatenate(
                [self.known[kind], np.zeros(len(needed) - len(self.known[kind]), np.bool_)]
            )
            entries += [(kind, n + 1, self.strings.text(n)) for n in np.flatnonzero(needed & ~known).tolist()]
            self.known[kind] = known | needed
        if entries:
            self.out.write(proto.encode_interned(entries))

    def name_steps(self, block: EventBlock) -> None:
        """`step 803` instead of `step`. To be called when names are Perfetto's already, which begin at 1."""
        chosen = np.flatnonzero((block.name == ID["step"] + 1) & (block.cat == ID["train"] + 1))
        if not len(chosen):
            return
        numbers = read_argument_of(block, chosen, ID["step"] + 1)
        named = (numbers >= 0) & (numbers < MAX_STEP_NAMES)
        chosen, numbers = chosen[named], numbers[named]
        if not len(chosen):
            return
        used = np.unique(numbers)
        if used[-1] >= len(self.steps):
            self.steps = np.concatenate([self.steps, np.zeros(int(used[-1]) + 1, np.bool_)])
        new = used[~self.steps[used]]
        self.steps[used] = True
        if len(new):
            self.out.write(proto.encode_step_names(new, FIRST_STEP_NAME))
        block.name[chosen] = FIRST_STEP_NAME + numbers


@dataclass
class SharedTracks:
    """What the files of one run share."""

    out: TraceOutput
    summary: ConversionSummary
    posix: bool
    begin: int  # us: the trace's times count from here
    total: BandwidthCounter
    selection: Selection = WHOLE
    strings: StringTable = field(default_factory=StringTable)
    paths: dict[int, int] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)
    group: int = 0  # the track above the run's counters, once it is there
    uuid: int = 0
    taken: set[int] = field(default_factory=set)
    buffer: np.ndarray = field(default_factory=lambda: np.empty(1 << 20, np.uint8))

    def __post_init__(self) -> None:
        self.names = NameTable(self.out, self.strings)
        self.out.write(proto.encode_clock(self.begin))

    def use_tables(self, strings: StringTable, paths: dict[int, int]) -> None:
        """The tables that the reader fills: those of this object, or of a reading that is shared."""
        self.strings = self.names.strings = strings
        self.paths = paths

    def describe_run_counter(self, name: str, unit: str = "") -> int:
        """A counter of the run, in a group of their own. Returns its track."""
        if not self.group:
            self.group = self.make_uuid()
            self.out.write(proto.describe_group(self.group, RUN_GROUP))
        uuid = self.make_uuid()
        self.out.write(proto.describe_counter_track(uuid, self.group, name, unit))
        return uuid

    def make_uuid(self) -> int:
        self.uuid += 1
        return self.uuid

    def reserve_number(self, number: int) -> int:
        """A pid or tid that no other process or thread of this trace has."""
        number = max(1, number)
        while number in self.taken:
            number += _PIDS
        self.taken.add(number)
        return number

    def get_buffer(self, size: int) -> np.ndarray:
        if size > len(self.buffer):
            self.buffer = np.empty(2 * size, np.uint8)
        return self.buffer


@dataclass
class Track:
    uuid: int
    tid: int
    name: str = ""
    lanes: list[tuple[int, SliceLane]] = field(default_factory=list)


@dataclass(frozen=True)
class TrackLabels:
    """How a process is shown."""

    pid: int
    name: str
    order: int
    has_run_counters: bool  # its counters of the run are shown, those of the other ranks are the same


class FileTracks:
    """One process: feed it the blocks of its trace file."""

    def __init__(
        self,
        shared: SharedTracks,
        process: TracedProcess,
        reader: EventBlockReader,
        clock: Clock,
        about: "TrackLabels",
    ) -> None:
        """shared: what the tracks of all files share, the output among it. reader: of the same file; it
        learns the names of threads on the way. clock: of the host. about: how the process is shown.
        """
        self.shared, self.process, self.reader, self.clock = shared, process, reader, clock
        self.uuid, self.pid = shared.make_uuid(), about.pid
        self.tracks: dict[int, Track] = {}
        self.counters: dict[int, int] = {}
        self.kernel_group = 0  # the track above the kernel's counters, once it is there
        self.crowded = self.uncounted = 0  # events that were left out
        self.flows = ReadToStepFlows(about.order + 1)
        self.positions = FilePositions()
        self.offsets = np.empty(0, np.int64)  # of the block's events, where the calls do not say them
        self.selection = shared.selection
        self.has_run_counters = about.has_run_counters
        self.bandwidth = BandwidthCounter(clock.correct_time(process.first))
        labels = [] if process.role in ("", "train", "worker") else [process.role]
        # between two of them there is room for the counters of a node
        shared.out.write(proto.describe_process(self.uuid, self.pid, about.name, labels, 2 * about.order))

    def add_block(self, block: EventBlock) -> None:
        """Write the block's slices, instants and counters. The block's columns are changed."""
        shared = self.shared
        block.ts, block.dur = self.clock.correct_spans(block.ts, block.dur)
        keep = block.is_event()
        # these follow the file from its beginning, whatever is shown of it
        calls, amounts = count_moved_bytes(block, shared.strings)
        flow = self.flows.find_flows(block)
        self.offsets = self.positions.find_offsets(block, shared.strings, amounts)
        inside = self.selection.is_inside(block.ts, block.dur)
        keep &= inside & self.selection.is_long(block)
        if shared.posix:
            keep &= (block.cat == ID["POSIX"]) | (block.cat == ID["STDIO"])
        calls = np.where(inside, calls, NO_CALL)
        if not keep.any() and not (calls != NO_CALL).any():
            return
        shared.summary.events += int(np.count_nonzero(keep))
        for sums in (self.bandwidth, shared.total):
            sums.add(block.ts, block.dur, calls, amounts)
        counter = keep & (block.cat == ID["counter"])
        self._write_counters(block, np.flatnonzero(counter))
        self._resolve_files(block)
        instant = keep & (block.cat == ID["clock"])
        slices = keep & ~counter & ~instant
        strings = block.arg_kind == STRING
        shared.names.explain_names(
            {
                proto.CATEGORIES: block.cat[keep], proto.NAMES: block.name[keep],
                proto.KEYS: block.arg_key, proto.VALUES: block.arg_val[strings],
            }
        )  # fmt: skip
        if (self.offsets >= 0).any():
            shared.names.explain_names({proto.KEYS: np.array([ID["offset"]])})
        for column, where in (
            (block.cat, ...),
            (block.name, ...),
            (block.arg_key, ...),
            (block.arg_val, strings),
        ):
            column[where] += 1  # in Perfetto the number 0 means none
        shared.names.name_steps(block)
        chosen = np.flatnonzero(slices | instant)
        tids = self._limit_threads(block.tid[chosen])
        order = np.argsort(tids, kind="stable")
        chosen, tids = chosen[order], tids[order]
        groups = np.split(chosen, np.flatnonzero(np.diff(tids)) + 1) if len(chosen) else []
        for tid, own in zip(np.unique(tids).tolist(), groups, strict=True):
            is_slice = slices[own]
            track = self._find_track(tid)
            self._write_thread(block, own[is_slice], own[~is_slice], track, flow)

    def finish_file(self) -> None:
        """The counters that need the whole file, and what the file lacks."""
        shared = self.shared
        write_bandwidth(shared, self.uuid, self.bandwidth)
        if self.reader.process.lost:
            shared.summary.lost.append(self.reader.process.lost)
        name = printable(self.process.path.name)
        if self.crowded:
            shared.summary.lost.append(
                f"{name}: {self.crowded} slices left out that overlap more than {MAX_LANES} others "
                "of their thread"
            )
        if self.uncounted:
            shared.summary.lost.append(
                f"{name}: {self.uncounted} values of counters left out, beyond {MAX_COUNTERS} counters"
            )

    def _limit_threads(self, tids: np.ndarray) -> np.ndarray:
        """Thread numbers; those that get no track of their own any more as OTHERS."""
        found = np.unique(tids)
        new = found[~np.isin(found, np.fromiter(self.tracks, np.int64, len(self.tracks)))]
        late = new[max(0, MAX_THREADS - len(self.tracks)) :]
        return np.where(np.isin(tids, late), OTHERS, tids) if len(late) else tids

    def _resolve_files(self, block: EventBlock) -> None:
        """File hashes become paths, under the name `file`."""
        shared = self.shared
        hashed = (block.arg_key == ID["fhash"]) & (block.arg_kind == STRING)
        paths = resolve_paths(block.arg_val[hashed], shared.paths, shared.strings)
        shared.summary.unresolved += int(np.count_nonzero(paths == block.arg_val[hashed]))
        block.arg_val[hashed] = paths
        block.arg_key[hashed | (block.arg_key == ID["fname"])] = ID["file"]

    def _find_track(self, tid: int) -> Track:
        """The track of a thread, described anew where its name has become known."""
        process = self.process
        main = tid == process.pid
        name = self.reader.process.threads.get(tid) or (
            "main" if main else "other threads" if tid == OTHERS else f"thread {tid}"
        )
        track = self.tracks.get(tid)
        if track is None:
            uuid = self.shared.make_uuid()
            track = Track(
                uuid, self.pid if main else self.shared.reserve_number(tid), lanes=[(uuid, SliceLane())]
            )
            self.tracks[tid] = track
        if track.name != name:
            track.name = name
            self.shared.out.write(proto.describe_thread(track.uuid, self.uuid, self.pid, track.tid, name))
        return track

    def _write_thread(
        self, block: EventBlock, slices: np.ndarray, instants: np.ndarray, track: Track, flow
    ) -> None:
        """Write events of one thread; slices that do not nest go to further lanes."""
        if len(instants):
            self._write_events(block, instants, track.uuid, flow, True)
        level = 0
        while len(slices):
            if level == MAX_LANES:
                self.crowded += len(slices)
                return
            if level == len(track.lanes):
                uuid = self.shared.make_uuid()
                track.lanes.append((uuid, SliceLane()))
                about = self.pid, self.shared.reserve_number(track.tid), f"{track.name} overlap {level}"
                self.shared.out.write(proto.describe_thread(uuid, self.uuid, *about))
            uuid, lane = track.lanes[level]
            leaf = (block.cat[slices] == ID["POSIX"] + 1) | (block.cat[slices] == ID["STDIO"] + 1)
            order, late, refused = lane.nest_slices(block.ts[slices], block.dur[slices], leaf)
            for i in slices[late].tolist():
                self._write_late_parent(block, i, uuid, flow)
            self._write_events(block, slices[order], uuid, flow, False)
            slices = slices[refused]
            self.shared.summary.moved += len(slices) if level == 0 else 0
            level += 1

    def _write_events(self, block: EventBlock, order: np.ndarray, uuid: int, flow, instant: bool) -> None:
        """Write events of a block on one track. The arguments are those of `_encode_events`; uuid: the
        track.
        """
        if not len(order):
            return
        if instant:
            order = order[np.argsort(block.ts[order], kind="stable")]
        self.shared.out.write(proto.select_track(uuid))
        self.shared.out.write(self._encode_events(block, order, flow, instant))

    def _encode_events(self, block: EventBlock, order: np.ndarray, flow, instant: bool) -> memoryview:
        """Events of a block as packets, in a buffer that the next call uses again.

        order: int64, which events, and in which order. flow: (first number, count) of each event's arrows,
        arrays. instant: as points in time, not as slices.
        """
        texts = len(block.text) if (block.arg_kind >= INLINE).any() else 0
        base, count = flow
        ends = int(np.maximum(count[order], 0).sum()) * 10
        size = proto.BYTES_PER_EVENT * len(order) + proto.BYTES_PER_ARG * len(block.arg_key) + texts + ends
        out = self.shared.get_buffer(size)
        used = proto.encode_events(
            order, self.shared.begin, block.ts, block.dur, block.name, block.cat, instant,
            block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, block.text, base, count,
            self.offsets, ID["offset"] + 1, out,
        )  # fmt: skip
        return out.data[:used]

    def _write_late_parent(self, block: EventBlock, i: int, uuid: int, flow) -> None:
        """A parent that began in the same microsecond as a child that is written already: 1 ns before it."""
        begin = int(block.ts[i])
        self.shared.out.write(proto.select_track(uuid))
        event = bytes(self._encode_events(block, np.array([i]), flow, False))
        self.shared.out.write(
            proto.split_into_boundaries(event, begin * 1000 - 1, (begin + int(block.dur[i])) * 1000)
        )

    def _write_counters(self, block: EventBlock, chosen: np.ndarray) -> None:
        """Write the values of counters. chosen: numbers of their events in the block."""
        if not len(chosen):
            return
        values = read_real_argument(block, ID["value"])
        for number in np.unique(block.name[chosen]).tolist():
            own = chosen[block.name[chosen] == number]
            own = own[np.argsort(block.ts[own], kind="stable")]
            name = self.shared.strings.text(number)
            of_run = name in RUN_COUNTERS
            if of_run and not self.has_run_counters:
                continue
            if number not in self.counters and len(self.counters) == MAX_COUNTERS:
                self.uncounted += len(own)
                continue
            if number not in self.counters:
                self.counters[number] = (
                    self.shared.describe_run_counter(name) if of_run else self._describe_counter(name)
                )
                self.shared.counted.add(name)
            write_counter(self.shared, self.counters[number], block.ts[own], values[own])

    def _describe_counter(self, name: str) -> int:
        parent = self.uuid
        if name.startswith(KERNEL_COUNTERS):
            if not self.kernel_group:
                self.kernel_group = self.shared.make_uuid()
                self.shared.out.write(proto.describe_group(self.kernel_group, KERNEL_GROUP, self.uuid))
            parent = self.kernel_group
        uuid = self.shared.make_uuid()
        self.shared.out.write(proto.describe_counter_track(uuid, parent, name, ""))
        return uuid


def name_process_track(process: TracedProcess, launch: int = 0) -> str:
    """launch: which one it was, of a run that was stopped and resumed."""
    name = f"rank {process.rank}" + (f" on {process.host}" if process.host else "")
    name += f", launch {launch}" if launch else ""
    return name + (f", worker {process.pid}" if process.role == "worker" else "")


def write_counter(shared: SharedTracks, uuid: int, ts: np.ndarray, values: np.ndarray) -> None:
    """Values (float64 [n]) of the counter track `uuid` at ts (us, int64 [n]), as far as they are finite."""
    finite = np.isfinite(values)
    ts, values = ts[finite], np.ascontiguousarray(values[finite], np.float64)
    if len(ts):
        shared.out.write(proto.select_track(uuid))
        out = shared.get_buffer(proto.BYTES_PER_EVENT * len(ts))
        used = proto.encode_counters(ts, values, shared.begin, out)
        shared.out.write(out.data[:used])


def write_bandwidth(shared: SharedTracks, parent: int, bandwidth: BandwidthCounter) -> None:
    """The two bandwidth tracks of a process, or with parent 0 those of the run."""
    for name in bandwidth.bytes:
        ts, rate = bandwidth.make_series(name)
        if len(ts):
            if parent:
                uuid = shared.make_uuid()
                shared.out.write(proto.describe_counter_track(uuid, parent, f"{name} MB/s by calls", "MB/s"))
            else:
                uuid = shared.describe_run_counter(f"{name} MB/s by calls, all ranks", "MB/s")
            write_counter(shared, uuid, ts, rate / 1e6)
