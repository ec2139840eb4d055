"""Profiles of torch.profiler in the Perfetto trace: below each rank's threads, on the same clock.

In: profiles as `analysis.trace.kineto` reads them, and the ranks' tracks. Out: a track for each thread and
each stream of a device, slices with their times in ns, arrows from launches to kernels; and sentences on what
was left out. Operators take a few us: so begin and end are packets of their own, which have ns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.perfetto import proto
from analysis.perfetto.tracks import FIRST_STEP_NAME, MAX_LANES, MAX_STEP_NAMES, SharedTracks
from analysis.trace.clocks import Clock
from analysis.trace.kineto import Profile, ProfileTrack, find_process, find_profiles, read_profile
from analysis.trace.process import TracedProcess
from common.errors import UserError, printable

MAX_SLICES = 1_000_000  # of all profiles in a trace
MAX_NOTES = 8
# These texts are numbered after those of all strings and steps: a reading that is shared adds no strings.
_FIRST_TEXT = FIRST_STEP_NAME + MAX_STEP_NAMES
_FIRST_ARROW = 1 << 62


@dataclass
class Place:
    """Where the profiles of one rank in one launch go."""

    process: TracedProcess  # as read to its end
    clock: Clock
    uuid: int  # of the process's track
    pid: int  # in the trace


def write_profiles(
    shared: SharedTracks, run_dir: str | Path, given: Sequence[Profile], places: Sequence[Place],
    every_rank: set[int],
) -> list[str]:  # fmt: skip
    """Write the run's own profiles and those of --kineto. Returns sentences on what is not there.

    places: the ranks that are shown. every_rank: of the run.
    """
    writer, notes = ProfileWriter(shared), []
    for one in [*find_profiles(run_dir), *given]:
        try:
            profile = one if isinstance(one, Profile) else read_profile(one)
        except UserError as error:  # the run's own, damaged since: the rest of the trace does not need it
            notes.append(f"{error}; the trace is without it")
            continue
        place = find_place(profile, places, every_rank)
        if isinstance(place, str):
            notes.append(f"{printable(profile.path)}: not placed: {place}")
        elif place is not None:
            writer.write_profile(profile, place)
            if profile.losses:
                notes.append(profile.losses)
    if writer.beyond:
        notes.append(
            f"{writer.beyond:,} slices of profiles left out, beyond {MAX_SLICES:,}: choose --ranks or --steps"
        )
    if writer.crowded:
        notes.append(f"{writer.crowded:,} slices of profiles left out that overlap {MAX_LANES} others")
    more = len(notes) - MAX_NOTES
    return notes[:MAX_NOTES] + ([f"and {more} more such lines"] if more > 0 else [])


def find_place(profile: Profile, places: Sequence[Place], every_rank: set[int]) -> Place | str | None:
    """Where a profile goes; why it goes nowhere; or None for that of a rank that is not shown."""
    found = find_process(profile, [place.process for place in places], every_rank)
    if not isinstance(found, TracedProcess):
        return found
    return next(place for place in places if place.process is found)


@dataclass
class ProfileWriter:
    """Writes profiles, each on new tracks."""

    shared: SharedTracks
    slices: int = 0
    beyond: int = 0  # slices that were left out because there are too many
    crowded: int = 0  # because they overlap too many others
    arrows: int = 0
    numbers: dict[tuple[int, str], int] = field(default_factory=dict)  # kind, text -> its number

    def write_profile(self, profile: Profile, place: Place) -> None:
        """Write a profile's slices and arrows below the process that `place` names, on the run's clock."""
        begin, end = (place.clock.correct_ns(times) for times in (profile.begin, profile.end))
        chosen = self._choose_slices(profile, begin, end)
        if not len(chosen):
            return
        leaving, reaching = self._number_arrows(profile, chosen)
        order = chosen[np.lexsort((chosen, -end[chosen], begin[chosen], profile.track[chosen]))]
        by_track = np.split(order, np.flatnonzero(np.diff(profile.track[order])) + 1)
        for rows in sorted(by_track, key=lambda rows: _order_tracks(profile.tracks[profile.track[rows[0]]])):
            track = profile.tracks[profile.track[rows[0]]]
            name = _name_track(track, profile, place)
            number = track.number if track.device < 0 else 0
            for lane, slices in enumerate(self._split_into_lanes(rows, begin, end)):
                uuid = self.shared.make_uuid()
                tid = self.shared.reserve_number(number or place.pid)
                shown = f"{name} overlap {lane}" if lane else name
                self.shared.out.write(proto.describe_thread(uuid, place.uuid, place.pid, tid, shown))
                self._write_slices(uuid, slices, profile, begin, end, leaving, reaching)

    def _choose_slices(self, profile: Profile, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Rows that the selection keeps and that there is room for, the earliest ones."""
        selection = self.shared.selection
        keep = selection.is_inside(begin // 1000, (end - begin) // 1000)
        keep &= end - begin >= selection.min_us * 1000
        chosen = np.flatnonzero(keep)
        room = MAX_SLICES - self.slices
        if len(chosen) > room:
            self.beyond += len(chosen) - room
            chosen = np.sort(chosen[np.argsort(begin[chosen], kind="stable")[:room]])
        self.slices += len(chosen)
        self.shared.summary.events += len(chosen)
        return chosen

    def _number_arrows(
        self, profile: Profile, chosen: np.ndarray
    ) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """The numbers of the arrows that leave each row, and that reach it; those with one end are none."""
        shown = np.zeros(len(profile), np.bool_)
        shown[chosen] = True
        leaving: dict[int, list[int]] = {}
        reaching: dict[int, list[int]] = {}
        for one, other in profile.arrows:
            if shown[one] and shown[other]:
                self.arrows += 1
                leaving.setdefault(one, []).append(_FIRST_ARROW + self.arrows)
                reaching.setdefault(other, []).append(_FIRST_ARROW + self.arrows)
        return leaving, reaching

    def _split_into_lanes(self, rows: np.ndarray, begin: np.ndarray, end: np.ndarray) -> list[list[int]]:
        """Rows that nest, lane by lane. rows: by their beginning, the longest first."""
        lanes: list[list[int]] = []
        open_ends: list[list[int]] = []  # of each lane, the innermost last
        for row, ts, until in zip(rows.tolist(), begin[rows].tolist(), end[rows].tolist(), strict=True):
            for lane, ends in zip(lanes, open_ends, strict=True):
                while ends and ends[-1] <= ts:
                    ends.pop()
                if not ends or until <= ends[-1]:
                    lane.append(row)
                    ends.append(until)
                    break
            else:
                if len(lanes) == MAX_LANES:
                    self.crowded += 1
                    continue
                lanes.append([row])
                open_ends.append([until])
        return lanes

    def _write_slices(
        self, uuid: int, rows: list[int], profile: Profile, begin: np.ndarray, end: np.ndarray,
        leaving: dict[int, list[int]], reaching: dict[int, list[int]],
    ) -> None:  # fmt: skip
        """The slices of one lane, which nest: begins and ends in the order of time."""
        out, ends = self.shared.out, []
        self._explain_texts(rows, profile)
        out.write(proto.select_track(uuid))
        for row in rows:
            ts = int(begin[row])
            while ends and ends[-1] <= ts:
                out.write(proto.encode_slice_end(ends.pop()))
            about = [
                proto.encode_number(3, self.numbers[proto.CATEGORIES, profile.cats[profile.cat[row]]]),
                proto.encode_number(10, self.numbers[proto.NAMES, profile.names[profile.name[row]]]),
                *(
                    proto.encode_argument(self.numbers[proto.KEYS, key], value)
                    for key, value in profile.args.get(row, {}).items()
                ),
                *(proto.encode_arrow(proto.ARROW_OUT, number) for number in leaving.get(row, ())),
                *(proto.encode_arrow(proto.ARROW_IN, number) for number in reaching.get(row, ())),
            ]
            out.write(proto.encode_slice_begin(ts, *about))
            ends.append(int(end[row]))
        while ends:
            out.write(proto.encode_slice_end(ends.pop()))

    def _explain_texts(self, rows: list[int], profile: Profile) -> None:
        """Write the texts of these slices that the trace does not know yet."""
        keys: dict[str, Any] = {}
        for row in rows:
            keys.update(profile.args.get(row, {}))
        used = [
            *((proto.CATEGORIES, profile.cats[n]) for n in np.unique(profile.cat[rows]).tolist()),
            *((proto.NAMES, profile.names[n]) for n in np.unique(profile.name[rows]).tolist()),
            *((proto.KEYS, key) for key in keys),
        ]
        new = [pair for pair in used if pair not in self.numbers]
        for pair in new:
            self.numbers[pair] = _FIRST_TEXT + len(self.numbers)
        if new:
            self.shared.out.write(
                proto.encode_interned([(kind, self.numbers[kind, text], text) for kind, text in new])
            )


def _order_tracks(track: ProfileTrack) -> tuple[int, int]:
    return track.device, track.number


def _name_track(track: ProfileTrack, profile: Profile, place: Place) -> str:
    if track.device >= 0:
        return f"GPU {track.device} stream {track.number}"
    process = place.process
    known = process.threads.get(track.number) or ("main" if track.number == process.pid else "")
    name = known or profile.thread_names.get(track.number) or f"thread {track.number}"
    return f"{name}, profiled"
