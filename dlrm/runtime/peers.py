"""Ranks as processes, and the end of those on this host: reported at once, with the cause where it is known.

A pidfd becomes readable when its process ends. Where the kernel has none (Linux before 5.3), /proc is read
four times a second.
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

from common.descriptors import opening
from common.processes import START_TIME, read_process_stat, read_start_time

POLL_SECONDS = 0.25  # for processes without a pidfd
# ioctl PIDFD_GET_INFO, _IOWR(0xFF, 11, 64 bytes): Linux 6.13, with the exit status from 6.15 on
GET_INFO = 0xC0000000 | 64 << 16 | 0xFF << 8 | 11
INFO_EXIT = 8  # PIDFD_INFO_EXIT: the mask's bit for the exit status
ENDED_WELL = "ended with code 0"


@dataclass(frozen=True)
class RankProcess:
    """Which process of which host a rank is."""

    host: str
    pid: int
    start_time: str  # clock ticks since boot: tells the process from a later one with the same pid
    pid_namespace: str  # boot id and namespace: pids can only be compared where this is the same

    @classmethod
    def of_this_process(cls, host: str) -> "RankProcess":
        return cls(host, os.getpid(), read_start_time(os.getpid()), _find_pid_namespace())

    @classmethod
    def from_json(cls, values: Any) -> "RankProcess":
        """ValueError for anything else than a process: the values come from the store."""
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
        """Whether it is on this host, so that its pid means something here."""
        return bool(self.start_time and self.pid_namespace) and self.pid_namespace == _find_pid_namespace()

    def kill(self) -> None:
        """SIGKILL, if it is on this host: a process that stands still would hold up the launcher."""
        if self.is_local and read_start_time(self.pid) == self.start_time:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _find_pid_namespace() -> str:
    try:
        with opening:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class LocalPeers:
    """The other ranks' processes on this host. One thread waits; another may wake it."""

    def __init__(self, pidfds: bool = hasattr(os, "pidfd_open")) -> None:
        self._with_pidfds = pidfds
        self._poll = select.poll()
        self._pidfds: dict[int, int] = {}  # pidfd -> rank
        self._processes: dict[int, RankProcess] = {}  # by rank: those that have not ended
        self._ended: dict[int, str] = {}  # those that had ended before they were added
        self._wake = os.pipe()
        self._poll.register(self._wake[0], select.POLLIN)

    def add(self, rank: int, process: RankProcess) -> None:
        """Watch this process; one of another host, or this process itself, is ignored."""
        if not process.is_local or process.pid == os.getpid() or rank in self._processes:
            return
        self._processes[rank] = process
        if not self._with_pidfds:
            return  # `wait` reads /proc
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._ended[rank] = ""
            del self._processes[rank]
            return
        except OSError:  # a kernel without pidfds, or no descriptor left: `wait` reads /proc
            return
        if read_start_time(process.pid) != process.start_time:  # it ended, and its pid is another's now
            os.close(pidfd)
            self._ended[rank] = ""
            del self._processes[rank]
            return
        self._pidfds[pidfd] = rank
        self._poll.register(pidfd, select.POLLIN)

    def wait(self, seconds: float) -> dict[int, str]:
        """Wait at most so long for processes to end. Returns the ranks that ended, each with the cause, or ""
        where the kernel does not tell it: "killed by signal 9", "ended with code 1", ENDED_WELL. Empty after
        `seconds`, and after `wake_waiter`.
        """
        if self._ended:
            ended, self._ended = self._ended, {}
            return ended
        with_pidfd = set(self._pidfds.values())
        polled = {rank: each for rank, each in self._processes.items() if rank not in with_pidfd}
        ready = self._poll.poll(1000 * (min(seconds, POLL_SECONDS) if polled else seconds))
        ended = {}
        for descriptor, _ in ready:
            if descriptor in self._pidfds:
                rank = self._pidfds.pop(descriptor)
                ended[rank] = _find_cause(self._processes.pop(rank), descriptor)
                self._poll.unregister(descriptor)
                os.close(descriptor)
        for rank, process in polled.items():
            found = read_process_stat(process.pid)
            if len(found) <= START_TIME or found[START_TIME] != process.start_time or found[0] in "ZX":
                ended[rank] = _find_cause(self._processes.pop(rank), None)
        return ended

    def wake_waiter(self) -> None:
        """Make a `wait` in another thread return."""
        os.write(self._wake[1], b"x")

    def close(self) -> None:
        for descriptor in (*self._pidfds, *self._wake):
            os.close(descriptor)
        self._pidfds.clear()


def _find_cause(process: RankProcess, pidfd: int | None) -> str:
    """How it ended, or "". /proc has the status as long as the process is a zombie, that is until its parent
    has waited for it; afterwards a pidfd has it, on new kernels.
    """
    found = read_process_stat(process.pid)
    status = 0
    if (
        len(found) > START_TIME
        and found[START_TIME] == process.start_time
        and found[0] in "ZX"
        and found[-1].isdigit()
    ):
        status = int(found[-1])  # 0 also where this user may not read it
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
