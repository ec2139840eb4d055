"""The process that wrote a trace file, and what could not be read of it."""

from dataclasses import dataclass, field
from pathlib import Path

from analysis.trace.lines import ReadLoss
from analysis.trace.scan import MAX_LINE
from common.errors import printable
from common.words import format_number


@dataclass
class TracedProcess:
    """One trace file and the process that wrote it."""

    path: Path
    rank: int = -1
    local_rank: int = -1
    world_size: int = -1
    host: str = ""
    role: str = ""
    pid: int = -1
    parent: int = -1  # pid of the process that started it
    pids: int = 1  # how many processes' events are in the file: more in files that were merged
    folder: str = ""  # in which it began: relative names of files count from there
    sums: int = 0  # records that hold the sums of many calls
    summed: dict[str, int] = field(default_factory=dict)  # category/name of such calls -> how many
    counters: int = 0  # of the tracer or its service, which are not shown
    threads: dict[int, str] = field(default_factory=dict)  # tid -> name
    barriers: dict[str, int] = field(default_factory=dict)  # "start", "end" -> us on this host's clock
    # "start", "end" -> us on this host's clock, by how much it is ahead of the first rank's, and the error
    offsets: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    events: int = 0  # as DFTracer counts them
    file_systems: list[str] = field(default_factory=list)  # JSON, one of each folder of the run
    io_error: str = ""  # why the kernel's counters of the process are missing
    first: int = 0  # us
    last: int = 0
    ended: bool = False  # the process closed its trace
    expected: int = 0  # events that the process recorded, by its end record
    # bytes of all read calls while it was traced, by the kernel's count, and in the trace with its workers
    reads: tuple[int, int] | None = None  # filled by `check`
    # (category, name) of spans that analysis/trace/classify.py knows nothing about -> how many there are
    unknown: dict[tuple[str, str], int] = field(default_factory=dict)  # filled by `check`
    bad_lines: int = 0
    loss: ReadLoss = field(default_factory=ReadLoss)

    @property
    def lost(self) -> str:
        """What this trace lacks, as one sentence; empty when it is whole."""
        parts = []
        if not self.ended:
            parts.append(
                "no end record (killed or still running): what was not yet flushed is missing"
                if self.role
                else "no end record (killed, still running, or its DFTracer writes none)"
            )
        elif self.expected > self.events + self.counters and not self.sums:
            parts.append(f"{self.expected - self.events - self.counters} of {self.expected} events missing")
        if self.sums:
            parts.append(
                f"{self.sums} sums of many calls (DFTRACER_ENABLE_AGGREGATION) are not shown: "
                f"{self.describe_sums()}"
            )
        if self.counters:
            parts.append(f"{self.counters} counters of DFTracer (ph 2) are not shown")
        if self.loss.cut:
            parts.append("the gzip stream is cut")
        if self.loss.bomb:
            parts.append("it inflates to more than a hundred times its size and was read no further")
        if self.loss.long:
            parts.append(f"lines longer than {MAX_LINE >> 20} MiB left out")
        if self.loss.bytes:
            parts.append(f"{self.loss.bytes} bytes unreadable")
        if self.bad_lines:
            parts.append(f"{self.bad_lines} lines are not JSON")
        return f"{printable(self.path.name)}: " + "; ".join(parts) if parts else ""

    def describe_sums(self) -> str:
        """12 calls of POSIX/read, ...: those with most calls first."""
        most = sorted(self.summed.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{format_number(count, 'call')} of {printable(name)[:80]}" for name, count in most[:3]]
        return ", ".join(shown) + (f" and {len(most) - 3} more names" if len(most) > 3 else "")


def is_forked(process: TracedProcess) -> bool:
    """A worker of a process that has a trace of its own."""
    return process.role == "worker" or "-fork." in process.path.name
