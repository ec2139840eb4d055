"""Counters of nodes in the Perfetto trace: a process `node HOST` below the ranks of that host.

In: the files of DFTracer's service as `analysis.trace.nodes` reads them, and the ranks that are shown. Out: a
track for each counter, and sentences on where they stand and what was left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.perfetto import proto
from analysis.perfetto.tracks import SharedTracks, write_counter
from analysis.trace.clocks import Clock
from analysis.trace.nodes import SHARE_ERROR, NodeFile, read_node_file
from analysis.trace.process import TracedProcess
from common.errors import UserError, printable

MAX_VALUES = 1_000_000  # of all nodes; more are averaged, so many at a time that these are left
MAX_NOTES = 8
AROUND_US = 60_000_000  # a service starts before its rank's trace does, and ends after it
NODE_PID = 1


def write_nodes(
    shared: SharedTracks, paths: Sequence[Path], shown: Sequence[TracedProcess],
    clocks: Mapping[Path, Clock], end: int,
) -> list[str]:  # fmt: skip
    """Write the counters of the nodes that ranks are shown of, or all that --node_counters names.

    shown: the processes in the order of their tracks. end: of the run, us; 0: not known. What a service has
    recorded long before the run or after it is left out. Returns sentences for who reads the trace.
    """
    hosts = list(dict.fromkeys(process.host for process in shown))
    nodes, notes = [], []
    for path in paths:
        try:
            node = read_node_file(path, hosts)
        except UserError as error:
            notes.append(f"{error}; the trace is without it")
            continue
        notes += node.losses
        if node.records and (node.host in hosts or shared.selection.is_whole):
            nodes.append(node)
    series = [(node, list(node.list_series())) for node in nodes]
    total = sum(len(each.ts) for _, found in series for each in found)
    for node, found in series:
        clock, order = _find_clock(node, shown, clocks), _find_order(node, shown)
        pid = shared.reserve_number(NODE_PID)
        uuid = shared.make_uuid()
        shared.out.write(proto.describe_process(uuid, pid, f"node {node.host}", [], order))
        values_of_node = 0
        for each in found:
            ts, values = _thin_out(each.ts, each.values, -(-total // MAX_VALUES))
            ts = clock.correct_times(ts)
            inside = shared.selection.is_inside(ts, np.zeros_like(ts)) & (ts >= shared.begin)
            inside &= (ts <= end + AROUND_US) | (not end)
            values_of_node += np.count_nonzero(inside)
            if not inside.any():
                continue
            track = shared.make_uuid()
            shared.out.write(proto.describe_counter_track(track, uuid, f"{each.name} {each.unit}", each.unit))
            write_counter(shared, track, ts[inside], values[inside])
        notes.append(_describe(node, clock, node.host in hosts, bool(values_of_node)))
    more = len(notes) - MAX_NOTES
    return notes[:MAX_NOTES] + ([f"and {more} more such lines"] if more > 0 else [])


def _find_clock(node: NodeFile, shown: Sequence[TracedProcess], clocks: Mapping[Path, Clock]) -> Clock:
    """That of the host's ranks in the launch that the service was started by."""
    own = [process for process in shown if process.host == node.host]
    begun = [process for process in own if process.first <= node.first + AROUND_US]
    if not own:
        return Clock()
    return clocks[max(begun, key=lambda p: p.first).path if begun else own[0].path]


def _find_order(node: NodeFile, shown: Sequence[TracedProcess]) -> int:
    """Below the last process of its host; the processes have the even numbers."""
    places = [place for place, process in enumerate(shown) if process.host == node.host]
    return 2 * (places[-1] if places else len(shown)) + 1


def _thin_out(ts: np.ndarray, values: np.ndarray, at_a_time: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of so many values at a time, from the first one's time on."""
    if at_a_time < 2 or not len(ts):
        return ts, values
    starts = np.arange(0, len(ts), at_a_time)
    return ts[starts], np.add.reduceat(values, starts) / np.diff(np.append(starts, len(ts)))


def _describe(node: NodeFile, clock: Clock, known: bool, has_values: bool) -> str:
    where = f"counters of node {printable(node.host)} by dftracer_service"
    if not has_values:
        return f"{where}: nothing of {printable(node.path)} is of the time that is shown"
    if not known:
        return f"{where}: none of the run's ranks was there, so its clock was not compared with theirs"
    error = f", which is right within {clock.error} us" if clock.by else ""
    shares = (
        f"shares of processors within {SHARE_ERROR:g} points"
        if node.boot_time is not None
        else "shares of processors since its boot only, as no node.json says when that was"
    )
    return f"{where}: once a second, on the clock of its ranks{error}; {shares}"
