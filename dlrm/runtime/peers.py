"""Ranks as processes, and the end of those on this host: noticed at once, with the cause if it can be known.

A pidfd becomes readable when its process ends. Where there is none (Linux before 5.3), the start times in
/proc are looked at.
"""

import contextlib
import fcntl
import os
import select
import signal
import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.25  # between looks at processes without a pidfd
GET_INFO = 0xC0000000 | 64 << 16 | 0xFF << 8 | 11  # PIDFD_GET_INFO: Linux 6.13, exit status from 6.15
INFO_EXIT = 8


@dataclass(frozen=True)
class Process:
    """A rank as a process of a host."""

    host: str
    pid: int
    start: str  # pids are used again
    system: str  # boot and pid namespace: where the same, pids mean the same

    @classmethod
    def here(cls, host: str) -> "Process":
        return cls(host, os.getpid(), _start(os.getpid()), _system())

    @classmethod
    def read(cls, values: Any) -> "Process":
        """From JSON; ValueError for anything else."""
        names = {field.name: field.type for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError("not a process")
        if type(values["pid"]) is not int or not 0 < values["pid"] < 1 << 31:
            raise ValueError("not a pid")
        if not all(isinstance(values[name], str) for name in names if name != "pid"):
            raise ValueError("not text")
        return cls(**values)

    @property
    def is_local(self) -> bool:
        return bool(self.start and self.system) and self.system == _system()

    def end(self) -> None:
        """Kill it, if it is on this host: a process that stands still holds up the launcher."""
        if self.is_local and _start(self.pid) == self.start:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _start(pid: int) -> str:
    found = _stat(pid)
    return found[19] if len(found) > 19 else ""


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class LocalPeers:
    """The other ranks' processes, as far as they are on this host."""

    def __init__(self, pidfds: bool = hasattr(os, "pidfd_open")) -> None:
        self._with_pidfds = pidfds
        self._poll = select.poll()
        self._pidfds: dict[int, int] = {}  # pidfd -> rank
        self._processes: dict[int, Process] = {}
        self._ended: dict[int, str] = {}  # found when they were added
        self._wake = os.pipe()
        self._poll.register(self._wake[0], select.POLLIN)

    def add(self, rank: int, process: Process) -> None:
        if not process.is_local or process.pid == os.getpid() or rank in self._processes:
            return
        self._processes[rank] = process
        if not self._with_pidfds:
            return  # `wait` looks at /proc
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._ended[rank] = ""
            del self._processes[rank]
            return
        except OSError:  # a kernel without, or no descriptor left
            return
        if _start(process.pid) != process.start:  # ended before, and its pid is another's
            os.close(pidfd)
            self._ended[rank] = ""
            del self._processes[rank]
            return
        self._pidfds[pidfd] = rank
        self._poll.register(pidfd, select.POLLIN)

    def wait(self, seconds: float) -> dict[int, str]:
        """Wait so long for ends of processes: each rank, and the cause or "". Empty too after `wake`."""
        if self._ended:
            ended, self._ended = self._ended, {}
            return ended
        watched = set(self._pidfds.values())
        looked_at = {rank: each for rank, each in self._processes.items() if rank not in watched}
        ready = self._poll.poll(1000 * (min(seconds, LOOK_SECONDS) if looked_at else seconds))
        ended = {}
        for descriptor, _ in ready:
            if descriptor in self._pidfds:
                rank = self._pidfds.pop(descriptor)
                ended[rank] = _cause(self._processes.pop(rank), descriptor)
                self._poll.unregister(descriptor)
                os.close(descriptor)
        for rank, process in looked_at.items():
            found = _stat(process.pid)
            if len(found) < 20 or found[19] != process.start or found[0] in "ZX":
                ended[rank] = _cause(self._processes.pop(rank), None)
        return ended

    def wake(self) -> None:
        os.write(self._wake[1], b"x")

    def close(self) -> None:
        for descriptor in (*self._pidfds, *self._wake):
            os.close(descriptor)
        self._pidfds.clear()


def _cause(process: Process, pidfd: int | None) -> str:
    """From /proc until its parent has asked, from the pidfd afterwards; "" where neither says."""
    found = _stat(process.pid)
    status = 0
    if len(found) > 20 and found[19] == process.start and found[0] in "ZX" and found[-1].isdigit():
        status = int(found[-1])  # 0 also where this user may not see it
    if not status and pidfd is not None:
        info = bytearray(struct.pack("Q", INFO_EXIT) + bytes(56))
        try:
            fcntl.ioctl(pidfd, GET_INFO, info)
        except OSError:
            return ""
        if not struct.unpack_from("Q", info)[0] & INFO_EXIT:
            return ""
        status = struct.unpack_from("i", info, 60)[0]
        if not status:
            return ENDED_WELL
    if status & 0x7F:
        return f"killed by signal {status & 0x7F}"
    return f"ended with code {status >> 8}" if status else ""


ENDED_WELL = "ended with code 0"
