"""Counters of nodes: the files of DFTracer's service -> series of numbers, node by node.

In: *.pfw.gz of `dftracer_service`, a line of JSON for each processor, disk and interface once a second, and
node.json beside them where this project has started the service. Out: `NodeFile`, on the node's clock, and
sentences on what was not read or not understood.

What the service writes (DFTracer 2.2), and what is made of it:
  cpu          shares of the processors' time since the node was booted, six digits. The share of an interval
               is the difference of two such sums, so it needs the time of the boot, and where that is long
               ago an interval long enough that the digits suffice
  memory       MemAvailable in kB, all else of /proc/meminfo in percent of it
  disks, net   what an interval moved, in the record at its end; the first record is no interval
"""

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.trace.lines import ReadLoss, open_trace, read_blocks
from analysis.trace.scan import MAX_TS
from common.errors import UserError, printable
from common.inputs import read_json_object
from common.words import format_number

FOLDER = "node_counters"  # of a run, where 3_train.sh has the service write
SHARE_ERROR = 2.0  # points of percent, of a share of the processors' time
MAX_DEVICES = 64  # disks and interfaces of a node
MAX_RECORDS = 5_000_000  # of a file
MAX_UNKNOWN = 1000  # different names
MAX_FILES = 10_000
_NAME = 64  # characters of a disk's or an interface's name
_SNIFFED = 256  # bytes of the first line
_ONE_CORE = b'{"name":"cpu-'  # not shown, and not parsed: a node may have hundreds
_DIGITS = 6
# counter -> keys of the record
_SHARES = {
    "CPU busy": ("user_pct", "nice_pct", "system_pct", "irq_pct", "softirq_pct", "steal_pct"),
    "CPU system": ("system_pct", "irq_pct", "softirq_pct"),
    "CPU iowait": ("iowait_pct",),
    "CPU steal": ("steal_pct",),
}
_MEMORY = {
    "memory used": (("MemTotal",), 100.0),  # less what is available
    "memory page cache": (("Cached", "Buffers"), 0.0),
    "memory to be written": (("Dirty", "Writeback"), 0.0),
}
_MOVED = {
    "io": (("read", ("bytes_read",)), ("write", ("bytes_written",))),
    "net": (
        ("received", ("bytes_recv",)),
        ("sent", ("bytes_sent",)),
        ("errors and drops", ("rx_errors", "tx_errors", "rx_dropped", "tx_dropped", "collisions")),
    ),
}
_LABELS = {"io": "disk", "net": "net"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One counter of a node: from ts (us, int64 [n]) on it has these values (float64 [n])."""

    name: str
    unit: str
    ts: np.ndarray
    values: np.ndarray


@dataclass
class NodeFile:
    """What one service has recorded."""

    path: Path
    host: str = ""
    boot_time: float | None = None  # s since 1970, on the node's clock
    error: str = ""  # why the service ended too soon
    records: int = 0
    unknown: dict[str, int] = field(default_factory=dict)  # category/name -> records that are not understood
    bad_lines: int = 0
    beyond: int = 0  # records left out because there are too many, or of too many devices
    loss: ReadLoss = field(default_factory=ReadLoss)
    by_name: dict[tuple[str, str], dict[int, Record]] = field(default_factory=dict)  # -> time -> record

    @property
    def first(self) -> int:
        """When the first record was made, us; 0: there are none."""
        return min((min(times) for times in self.by_name.values()), default=0)

    def list_series(self) -> Iterator[Series]:
        for (kind, name), records in sorted(self.by_name.items()):
            ts = np.array(sorted(records), np.int64)
            rows = [records[at] for at in ts.tolist()]
            if kind == "sys":
                make = self._list_shares if name == "cpu" else _list_memory
                yield from make(ts, rows)
            else:
                yield from _list_rates(kind, name, ts, rows)

    def _list_shares(self, ts: np.ndarray, rows: list[Record]) -> Iterator[Series]:
        for name, keys in _SHARES.items():
            parts = np.array([[row[key] for key in keys] for row in rows])
            share = parts.sum(axis=1)
            if name == "CPU steal" and not share.any():
                continue
            if self.boot_time is None or ts[0] / 1e6 <= self.boot_time:
                yield Series(f"{name}, mean since boot", "%", ts, share)
                continue
            uncertain = _find_last_digit(parts).sum(axis=1)
            yield Series(name, "%", *_take_differences(ts, share, uncertain, self.boot_time))

    @property
    def losses(self) -> list[str]:
        """What was not read of it or not understood, a sentence each."""
        shown, found = printable(self.path), []
        if self.error:
            found.append(f"{shown}: ends early: {printable(self.error)[:200]}")
        if not self.records:
            found.append(
                f"{shown}: has no records: its service writes most of them when it ends, and was killed"
            )
        parts = ["its gzip stream is cut"] * self.loss.cut
        parts += [
            "it inflates to more than a hundred times its size and was read no further"
        ] * self.loss.bomb
        parts += [f"{self.loss.bytes} bytes unreadable"] * bool(self.loss.bytes)
        parts += [f"{format_number(self.bad_lines, 'line')} not JSON or without time"] * bool(self.bad_lines)
        parts += [f"{format_number(self.beyond, 'record')} beyond what is kept"] * bool(self.beyond)
        if parts:
            found.append(f"{shown}: {'; '.join(parts)}")
        if self.unknown:
            most = sorted(self.unknown.items(), key=lambda each: (-each[1], each[0]))
            names = ", ".join(f"{printable(name)[:80]} ({count})" for name, count in most[:5])
            names += f" and {len(most) - 5} more names" if len(most) > 5 else ""
            count = format_number(sum(self.unknown.values()), "record")
            found.append(f"{shown}: {count} not understood: {names}")
        return found


def _take_differences(
    ts: np.ndarray, share: np.ndarray, uncertain: np.ndarray, boot: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shares since boot -> shares of intervals, each as long as it takes to be right within SHARE_ERROR."""
    since = ts / 1e6 - boot
    sums, errors = share * since, uncertain * since
    begin, at, values = 0, [], []
    for end in range(1, len(ts)):
        seconds = since[end] - since[begin]
        if errors[end] + errors[begin] <= SHARE_ERROR * seconds:
            at.append(ts[begin])
            values.append(min(100.0, max(0.0, (sums[end] - sums[begin]) / seconds)))
            begin = end
    return np.array(at, np.int64), np.array(values, np.float64)


def _find_last_digit(values: np.ndarray) -> np.ndarray:
    """Half of the last digit that the service writes of each value."""
    size = np.floor(np.log10(np.maximum(values, 1e-9)))
    return np.where(values > 0, 0.5 * 10.0 ** (size - _DIGITS + 1), 0.0)


def _list_memory(ts: np.ndarray, rows: list[Record]) -> Iterator[Series]:
    available = np.array([row["MemAvailable"] for row in rows]) * 1024 / 1e9
    for name, (keys, less) in _MEMORY.items():
        percent = np.array([sum(row[key] for key in keys) for row in rows]) - less
        yield Series(name, "GB", ts, percent / 100 * available)


def _list_rates(kind: str, name: str, ts: np.ndarray, rows: list[Record]) -> Iterator[Series]:
    """Per second, from the beginning of each interval; nothing of a device that moved nothing."""
    seconds = np.diff(ts) / 1e6
    for direction, keys in _MOVED[kind]:
        moved = np.array([sum(row[key] for key in keys) for row in rows])[1:]
        if not moved.any():
            continue
        is_bytes = "bytes" in keys[0]
        rate = np.append(moved / seconds * (1e-6 if is_bytes else 1.0), 0.0)
        yield Series(f"{_LABELS[kind]} {name} {direction}", "MB/s" if is_bytes else "1/s", ts, rate)


def is_service_file(path: Path) -> bool:
    """Whether a trace file is that of a service: by its name and its first record."""
    if not _has_service_name(path):
        return False
    with suppress(UserError, OSError, StopIteration):
        text = bytes(next(iter(read_blocks(path, ReadLoss(), open_trace, _SNIFFED))))
        line = text[: text.find(b"\n")]
        return b'"cat":"sys"' in line and b'"ph":2' in line and b'"pid":0' in line
    return False


def _has_service_name(path: Path) -> bool:
    """Its host comes after a _; the files of a program end in -app."""
    return "_" in path.name and "-app.pfw" not in path.name


def find_node_files(run_dir: str | Path, given: Sequence[Path] = ()) -> list[Path]:
    """The services' files: those in RUN/node_counters, among the run's traces, and in `given` folders."""
    run, found = Path(run_dir), dict[Path, None]()
    with suppress(OSError):
        for folder in (run, run / "trace") if run.is_dir() else ():
            found |= dict.fromkeys(path for path in _list_files(folder) if is_service_file(path))
        for folder in (run / FOLDER, *(each for each in sorted((run / FOLDER).glob("*")) if each.is_dir())):
            found |= dict.fromkeys(_list_files(folder))
    for folder in given:
        below = [each for each in sorted(folder.glob("*")) if each.is_dir()] if folder.is_dir() else []
        inside = [path for each in (folder, *below) for path in _list_files(each) if _has_service_name(path)]
        if not inside:
            raise UserError(
                f"--node_counters: {printable(folder)}: no files of dftracer_service (*.pfw.gz) in it"
            )
        found |= dict.fromkeys(inside)
    return list(found)[:MAX_FILES]


def _list_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(folder / name for name in os.listdir(folder) if name.endswith((".pfw.gz", ".pfw")))


def read_node_file(path: Path, hosts: Collection[str] = ()) -> NodeFile:
    """The records of one file. hosts: of the run's ranks, one of which may be in the file's name."""
    node = NodeFile(path)
    _read_note(node)
    stem = path.name.removesuffix(".gz").removesuffix(".pfw")
    named = max((host for host in hosts if host and stem.endswith("_" + host)), key=len, default="")
    node.host = node.host or named or stem.rpartition("_")[2]
    for text in read_blocks(path, node.loss):
        for line in bytes(text).split(b"\n"):
            if node.records == MAX_RECORDS:
                node.beyond += 1
            elif line.startswith(_ONE_CORE):
                node.records += 1
            elif line.strip(b" \r,[]"):
                _add_line(node, line)
    return node


def _read_note(node: NodeFile) -> None:
    """node.json, as dlrm/runtime/node_counters.py writes it; what is damaged in it counts as missing."""
    with suppress(UserError):
        note = read_json_object(node.path.with_name("node.json"))
        boot = note.get("boot_time")
        node.host = printable(str(note.get("host", ""))[:_NAME])
        node.error = str(note.get("error", ""))
        if isinstance(boot, int | float) and math.isfinite(boot) and 0 < boot < MAX_TS / 1e6:
            node.boot_time = float(boot)


def _add_line(node: NodeFile, line: bytes) -> None:
    try:
        record = json.loads(line.rstrip(b" \r,"))
        name, kind, at, args = str(record["name"]), str(record["cat"]), record["ts"], record["args"]
    except (ValueError, TypeError, KeyError, RecursionError):
        node.bad_lines += 1
        return
    if type(at) is not int or not 0 < at < MAX_TS or not isinstance(args, dict):
        node.bad_lines += 1
        return
    node.records += 1
    found = _take_values(kind, name, args) if record.get("ph") in (2, "2") else None
    if found is None:
        label = f"{kind[:_NAME]}/{name[:_NAME]}"
        if label in node.unknown or len(node.unknown) < MAX_UNKNOWN:
            node.unknown[label] = node.unknown.get(label, 0) + 1
        else:
            node.beyond += 1
        return
    key = kind, printable(name.removeprefix("net-").strip()[:_NAME])
    if key not in node.by_name and len(node.by_name) == MAX_DEVICES:
        node.beyond += 1
        return
    node.by_name.setdefault(key, {}).setdefault(at, found)


def _take_values(kind: str, name: str, args: Record) -> Record | None:
    """The numbers that a counter is made of; None where one of them is missing, or the record is another."""
    if kind == "sys" and name in ("cpu", "memory"):
        groups = list(_SHARES.values())
        if name == "memory":
            groups = [("MemAvailable",), *(keys for keys, _ in _MEMORY.values())]
    elif kind in _MOVED:
        groups = [keys for _, keys in _MOVED[kind]]
    else:
        return None
    found: Record = {}
    for key in (key for keys in groups for key in keys):
        value = args.get(key)
        if not isinstance(value, int | float) or not 0 <= value < 1e18:
            return None
        found[key] = value
    return found


def list_losses(run_dir: str | Path, hosts: Collection[str]) -> list[str]:
    """What was not read or not understood of a run's own counters of nodes. hosts: of its ranks."""
    found: list[str] = []
    for path in find_node_files(run_dir):
        try:
            found += read_node_file(path, hosts).losses
        except UserError as error:
            found.append(str(error))
    return found
