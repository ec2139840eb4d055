"""Links from a report to its run's trace in the viewer. A link names its run: no other run answers it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from analysis.trace.process import TracedProcess
from common.errors import printable

PORT = 9001  # of `view`, unless --port says otherwise


@dataclass(frozen=True)
class LinkedRun:
    """A run as its links name it."""

    number: int  # 64 bits, the same in the trace that was made of the run; 0: not known
    name: str

    @property
    def id(self) -> str:
        return f"{self.number:016x}"


def number_run(processes: Sequence[TracedProcess]) -> int:
    """64 bits that tell a run from any other: from the names, hosts and pids of its trace files."""
    about = sorted(f"{process.path.name} {process.host} {process.pid}" for process in processes)
    return int.from_bytes(hashlib.sha256("\n".join(about).encode(errors="replace")).digest()[:8], "big") or 1


def name_run(processes: Sequence[TracedProcess], name: str) -> LinkedRun:
    return LinkedRun(number_run(processes), printable(name)[:80])


def make_link(ts: int, dur: int, run: LinkedRun | None = None) -> str:
    """Where the UI shows the slice that begins at `ts` and takes `dur`, both in us, while `view` runs.

    The time is in it twice: the part after # is read on loading, and a new ? makes a browser load.
    """
    around = max(dur, 100)
    sight = f"visStart={(ts - around) * 1000}&visEnd={(ts + dur + around) * 1000}"
    of = f"&{urlencode({'run': run.id, 'name': run.name}, quote_via=quote)}" if run else ""
    return f"http://127.0.0.1:{PORT}/?{ts}{of}#!/?ts={ts * 1000}&dur={dur * 1000}&{sight}"
