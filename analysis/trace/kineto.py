"""Profiles of torch.profiler (Kineto's Chrome JSON, plain or in gzip) -> columns, and whose they are.

In: a file as `export_chrome_trace` writes it. Out: a `Profile`, its times in ns since 1970: Kineto counts in
us from `baseTimeNanoseconds`, older versions of torch from 1970. The text is taken apart event by event, so
that memory is needed for what is kept alone; MAX_ELEMENTS and MAX_TEXT bound that, and the time.
"""

import codecs
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from analysis.trace.process import TracedProcess, is_forked
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular

# Of a run folder, in which trainings write their profiles. Both it and STEP_NAME are in
# dlrm/runtime/step_profiler.py, too, which writes them: dlrm/ and analysis/ share no imports.
FOLDER = "profile"
ENDINGS = (".json.gz", ".json")
MAX_ELEMENTS = 1_500_000  # of traceEvents that are read: slices, ends of arrows, names
MAX_TEXT = 2 << 30  # bytes
MAX_TRACKS = 4096
LONGEST_NAME = 300  # characters; C++ has longer ones
DEVICE_CATS = ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cuda_sync")
COPY_CATS = ("gpu_memcpy", "gpu_memset")
STEP_NAME = "ProfilerStep#"  # the beginning of the name of a step's mark
_ARROWS = ("ac2g", "fwdbwd")  # from a launch to its kernel; from an operator to its gradient's
# numbers that tie events together, which arrows show
_BOOKKEEPING = (
    "External id", "Ev Idx", "Record function id", "Sequence number", "Fwd thread id", "correlation",
    "Python id", "Python parent id", "Python module id",
)  # fmt: skip
_MOST_ARGS, _LONGEST_ARG = 24, 200
_PIECE, _AHEAD = 4 << 20, 8 << 20  # bytes that are read at once; characters that one value may have
SLACK_US = 10_000_000  # that a profile may begin before its rank's first event, or after its last one
_GZIP = b"\x1f\x8b"
_FROM_1970 = 1e14  # us: a smaller time counts from a base
_LATEST, _LONGEST = 4e15, 1e12  # us: in the year 2096; eleven days
_LAST = 1 << 62  # ns
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class ProfileTrack:
    """What a slice ran on: a thread of the process, or a stream of a device."""

    device: int  # -1: a thread
    number: int  # the thread's number, or the stream's


@dataclass
class Profile:
    """One profile. The columns have a row for each slice."""

    path: Path
    rank: int = -1  # by `distributedInfo`; -1: it has none
    pid: int = -1
    names: list[str] = field(default_factory=list)
    cats: list[str] = field(default_factory=list)
    tracks: list[ProfileTrack] = field(default_factory=list)
    thread_names: dict[int, str] = field(default_factory=dict)
    begin: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # ns
    end: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    name: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))  # places in `names`
    cat: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    track: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    args: dict[int, dict[str, Any]] = field(default_factory=dict)  # row -> its arguments
    arrows: list[tuple[int, int]] = field(default_factory=list)  # rows: from, to
    without_clock: bool = False  # its times count from a moment that it does not say
    left_out: int = 0  # events with impossible values
    cut: bool = False  # it has more events than are read

    def __len__(self) -> int:
        return len(self.begin)

    def has_cat(self, *cats: str) -> np.ndarray:
        """Which rows (bool) are of one of these categories."""
        return np.isin(self.cat, [number for number, cat in enumerate(self.cats) if cat in cats])

    @property
    def devices(self) -> np.ndarray:
        """The device of each row; -1: none."""
        return np.array([track.device for track in self.tracks], np.int64)[self.track]

    def is_of(self, process: TracedProcess) -> bool:
        """Whether it names the process's rank; or, where it names none, has its pid."""
        return self.rank == process.rank if self.rank >= 0 else self.pid == process.pid

    def is_at_the_time_of(self, process: TracedProcess) -> bool:
        """Whether it was recorded while the process was traced: both are on the clock of its host. process:
        as read to its end.
        """
        begin, end = int(self.begin.min()) // 1000, int(self.end.max()) // 1000
        return end >= process.first - SLACK_US and begin <= process.last + SLACK_US

    @property
    def losses(self) -> str:
        """What was not read, as a sentence; empty where all was."""
        parts = []
        if self.cut:
            parts.append(f"more than {MAX_ELEMENTS:,} events: only the first are shown; profile fewer steps")
        if self.left_out:
            parts.append(f"{self.left_out:,} events with impossible values left out")
        return f"{printable(self.path.name)}: {'; '.join(parts)}" if parts else ""


def find_profiles(run_dir: str | Path) -> list[Path]:
    """Those that the run's trainings wrote."""
    folder = Path(run_dir) / FOLDER
    try:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(ENDINGS) and not name.startswith(".")]


def find_process(
    profile: Profile, shown: Sequence[TracedProcess], every_rank: set[int]
) -> TracedProcess | str | None:
    """Whose profile it is; why it is nobody's; or None where it is that of a rank that is not shown.

    shown: as read to their ends. every_rank: of the run.
    """
    if not len(profile):
        return "it has no events"
    if profile.without_clock:
        return "it has no baseTimeNanoseconds, so its time is unknown"
    if profile.rank >= 0 and profile.rank not in every_rank:
        return f"it is of rank {profile.rank}, which the run does not have"
    found = [process for process in shown if not is_forked(process)]
    if profile.rank >= 0 or len(every_rank) > 1:
        found = [process for process in found if profile.is_of(process)]
    if not found:
        if profile.rank >= 0:
            return None
        return f"it names no rank (distributedInfo), and its pid {profile.pid} is none of the run's"
    at_its_time = [process for process in found if profile.is_at_the_time_of(process)]
    if at_its_time:
        return at_its_time[-1]
    apart = int(profile.begin.min()) / 1e9 - min(process.first for process in found) / 1e6
    when = f"{abs(apart):,.0f} s {'before' if apart < 0 else 'after'} the rank's trace begins"
    return f"it was recorded {when}, and not while the run was traced"


def read_profile(path: Path) -> Profile:
    """UserError for a file that is not a profile, or is damaged."""
    text, reading = _JsonText(path), _Reading(Profile(path))
    try:
        _read_object(text, reading)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))
        raise UserError(
            f"{printable(path)}: is not a profile of torch.profiler: {printable(why[:100])}"
        ) from None
    finally:
        text.close()
    return reading.finish()


def _read_object(text: "_JsonText", reading: "_Reading") -> None:
    """The file's object, key by key. Returns early where the limit of elements is reached."""
    text.expect("{")
    found = False
    while text.peek() != "}":
        key = text.value()
        text.expect(":")
        if key == "traceEvents" and text.peek() == "[":
            found = True
            text.expect("[")
            while text.peek() != "]":
                reading.add_event(text.value())
                if reading.profile.cut:
                    return
                if text.peek() != "]":
                    text.expect(",")
            text.expect("]")
        else:
            reading.add_property(key, text.value())
        if text.peek() != "}":
            text.expect(",")
    if not found:
        raise ValueError("it has no traceEvents")


class _Reading:
    """Gathers the columns of a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.elements = 0
        self.base_ns = 0
        self.names: dict[str, int] = {}
        self.cats: dict[str, int] = {}
        self.tracks: dict[ProfileTrack, int] = {}
        self.rows: list[tuple[float, float, int, int, int]] = []  # us, us, name, cat, track
        self.pids: Counter[int] = Counter()  # of the process
        # Kineto writes an arrow's end behind the slice it belongs to, with the same place and time
        self.latest: dict[tuple[Any, Any], tuple[float, int]] = {}  # pid, tid -> begin, row
        self.ends: dict[tuple[str, Any], tuple[list[int], list[int]]] = {}  # rows that it leaves, and reaches

    def add_property(self, key: Any, value: Any) -> None:
        if key == "baseTimeNanoseconds" and type(value) is int and 0 <= value < _LAST:
            self.base_ns = value
        elif key == "distributedInfo" and isinstance(value, dict):
            rank = value.get("rank")
            if type(rank) is int and 0 <= rank < 1 << 20:
                self.profile.rank = rank

    def add_event(self, event: Any) -> None:
        self.elements += 1
        if self.elements > MAX_ELEMENTS:
            self.profile.cut = True
            return
        if not isinstance(event, dict):
            raise ValueError("an event is not an object")
        phase = event.get("ph")
        if phase == "X":
            self._add_slice(event)
        elif phase in ("s", "f") and event.get("name") in _ARROWS:
            self._add_arrow_end(event, phase)
        elif phase == "M" and event.get("name") == "thread_name":
            self._add_thread_name(event)

    def _add_slice(self, event: dict[str, Any]) -> None:
        pid, tid, cat, name = (event.get(key) for key in ("pid", "tid", "cat", "name"))
        if type(pid) is not int or pid < 0:  # Kineto's own: its spans, its overhead
            return
        ts, dur = event.get("ts"), event.get("dur", 0)
        if not (
            _is_number(ts, _LATEST) and _is_number(dur, _LONGEST) and isinstance(name, str)
            and isinstance(cat, str) and pid < 1 << 32 and type(tid) is int and 0 <= tid < 1 << 32
        ):  # fmt: skip
            self.profile.left_out += 1
            return
        track = ProfileTrack(pid, tid) if cat in DEVICE_CATS else ProfileTrack(-1, tid)
        if track not in self.tracks and len(self.tracks) == MAX_TRACKS:
            self.profile.left_out += 1
            return
        if track.device < 0:
            self.pids[pid] += 1
        row = len(self.rows)
        self.rows.append((
            ts, dur, self.names.setdefault(name[:LONGEST_NAME], len(self.names)),
            self.cats.setdefault(cat[:LONGEST_NAME], len(self.cats)),
            self.tracks.setdefault(track, len(self.tracks)),
        ))  # fmt: skip
        self.latest[pid, tid] = ts, row
        given = event.get("args")
        if isinstance(given, dict) and (kept := _keep_arguments(given)):
            self.profile.args[row] = kept

    def _add_arrow_end(self, event: dict[str, Any], phase: str) -> None:
        number, place = event.get("id"), (event.get("pid"), event.get("tid"))
        if not all(type(part) is int for part in (number, *place)):
            return
        begin, row = self.latest.get(place, (-1.0, -1))
        if row >= 0 and begin == event.get("ts"):
            self.ends.setdefault((event["name"], number), ([], []))[phase == "f"].append(row)

    def _add_thread_name(self, event: dict[str, Any]) -> None:
        tid, given = event.get("tid"), event.get("args")
        name = given.get("name") if isinstance(given, dict) else None
        names = self.profile.thread_names
        if type(tid) is int and isinstance(name, str) and len(names) < MAX_TRACKS:
            names.setdefault(tid, name[:LONGEST_NAME])

    def finish(self) -> Profile:
        profile = self.profile
        profile.names, profile.cats, profile.tracks = list(self.names), list(self.cats), list(self.tracks)
        if self.pids:
            profile.pid = self.pids.most_common(1)[0][0]
        rows = np.array(self.rows, np.float64).reshape(-1, 5)
        begin = self.base_ns + _to_ns(rows[:, 0])
        profile.begin, profile.end = begin, begin + _to_ns(rows[:, 1])
        profile.name, profile.cat, profile.track = (rows[:, place].astype(np.int32) for place in (2, 3, 4))
        profile.without_clock = bool(len(rows) and not self.base_ns and rows[:, 0].min() < _FROM_1970)
        if (profile.end >= _LAST).any():
            raise UserError(f"{printable(profile.path)}: its times are beyond the year 2116; is it damaged?")
        for leaving, reaching in self.ends.values():
            if len(leaving) == 1:
                profile.arrows += [(leaving[0], row) for row in reaching]
        return profile


def _is_number(value: Any, most: float) -> TypeGuard[float]:
    """NaN and infinity are none; nor is what is below 0."""
    return (type(value) is int or type(value) is float) and 0 <= value < most


def _to_ns(us: np.ndarray) -> np.ndarray:
    """The whole part and the rest apart: so the ns of three months of us, as Kineto has them, are exact."""
    whole = np.floor(us)
    return whole.astype(np.int64) * 1000 + np.rint((us - whole) * 1000).astype(np.int64)


def _keep_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts that say something of the event itself."""
    kept: dict[str, Any] = {}
    for key, value in given.items():
        if key in _BOOKKEEPING or len(kept) == _MOST_ARGS:
            continue
        if type(value) is int and abs(value) < _LAST or type(value) is float and math.isfinite(value):
            kept[key[:_LONGEST_ARG]] = value
        elif isinstance(value, str):
            kept[key[:_LONGEST_ARG]] = value[:_LONGEST_ARG]
        elif isinstance(value, list) and value:  # shapes, a grid of blocks
            kept[key[:_LONGEST_ARG]] = json.dumps(value[:_MOST_ARGS])[:_LONGEST_ARG]
    return kept


class _JsonText:
    """A file's JSON, value by value; no more of the text is in memory than one value may have."""

    def __init__(self, path: Path) -> None:
        self._pieces = _inflate(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._at, self._ended = "", 0, False

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]

    def peek(self) -> str:
        """The next sign that is no space; empty at the end."""
        while True:
            if len(self._text) - self._at < _AHEAD and not self._ended:
                self._fill()
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                raise ValueError("it ends in the middle")

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            raise ValueError(f"{sign} is missing")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        found, self._at = _DECODER.raw_decode(self._text, self._at)
        return found

    def _fill(self) -> None:
        piece = next(self._pieces, None)
        self._ended = piece is None
        rest = self._decoder.decode(piece or b"", self._ended)
        self._text, self._at = self._text[self._at :] + rest, 0


def _inflate(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file, os_errors_as_user_errors(path):
        data, size = file.read(_PIECE), 0
        packed = data.startswith(_GZIP)
        stream = zlib.decompressobj(31)
        while data or (packed and not stream.eof):
            if not packed:
                piece, data = data, file.read(_PIECE)
            elif not data:
                raise UserError(f"{printable(path)}: its gzip stream is cut: it was not written to its end")
            else:
                try:
                    piece = stream.decompress(data, _PIECE)
                except zlib.error:
                    raise UserError(f"{printable(path)}: its gzip stream is damaged") from None
                data = stream.unconsumed_tail or stream.unused_data or file.read(_PIECE)
                if stream.eof and data:  # several members
                    stream = zlib.decompressobj(31)
            size += len(piece)
            if size > MAX_TEXT:
                raise UserError(
                    f"{printable(path)}: more than {MAX_TEXT >> 30} GB of text: profile fewer steps"
                )
            yield piece
