"""Traces written line by line as DFTracer writes them, with planted times: for the tests of the report."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HASH = "6882804a826580cd"
BEGIN = 1_795_252_102_000_000


class Made:
    """The trace of one process. Times are us after BEGIN."""

    def __init__(
        self, rank: int | None = 0, world: int = 1, host: str = "n0", pid: int = 0, role: str = "train"
    ) -> None:
        self.rank, self.pid = rank, pid or 1000 + (rank or 0)
        self.lines: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self._meta("HH", host, HASH)
        if rank is not None:
            for key, value in {"rank": rank, "world_size": world, "host": host, "role": role}.items():
                self._meta("CM", key, str(value))

    def _meta(self, kind: str, name: str, value: str) -> None:
        args = {"hhash": HASH, "name": name, "value": value}
        self.lines.append(
            {
                "name": kind,
                "cat": "dftracer",
                "type": 1,
                "pid": self.pid,
                "tid": self.pid,
                "ph": 4,
                "args": args,
            }
        )

    def span(self, cat: str, name: str, ts: int, dur: int, thread: int = 0, **args: Any) -> None:
        self.lines.append({
            "id": len(self.lines), "name": name, "cat": cat, "type": 3, "pid": self.pid,
            "tid": self.pid + thread, "ts": BEGIN + ts, "dur": dur, "ph": 1, "args": {"hhash": HASH, **args},
        })  # fmt: skip

    def posix(
        self, name: str, ts: int, dur: int, file: str, thread: int = 0, cat: str = "POSIX", **args: Any
    ) -> None:
        if file not in self.files:
            self.files[file] = f"{len(self.files) + (self.rank or 0) * 1000:016x}"
            self._meta("FH", file, self.files[file])
        self.span(cat, name, ts, dur, thread, **args, fhash=self.files[file])

    def requests(
        self,
        name: str,
        file: str,
        n: int,
        size: int = 1 << 20,
        dur: int = 50,
        place: Callable[[int], int] | None = None,
        begin: int = 10_100,
        every: int = 200,
        **args: Any,
    ) -> "Made":
        """n calls of one thread, one after the other; place: the offset of the i-th, else behind the last."""
        for i in range(n):
            at = i * size if place is None else place(i)
            self.posix(name, begin + i * every, dur, file, 3, **{"ret": size, "offset": at, **args})
        return self

    def write(self, run: Path, end: bool = True) -> Path:
        folder = run / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        events = sum(line["ph"] == 1 for line in self.lines)
        if end:
            last = max((line["ts"] + line["dur"] for line in self.lines if line["ph"] == 1), default=BEGIN)
            self.span("dftracer", "end", last - BEGIN, 0, num_events=events)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self.lines)
        path = folder / f"train{self.rank or 0:05d}-{self.pid:016x}-app.pfw.gz"
        path.write_bytes(gzip.compress(text.encode()))
        return path


def training(
    rank: int = 0,
    world: int = 1,
    steps: int = 40,
    wait: int | Callable[[int], int] = 100,
    compute: int = 5_000,
    reads: int = 4,
    read_size: int = 1 << 20,
    read_us: int = 200,
    calls: bool = True,
    host: str = "n0",
) -> Made:
    """A healthy training, or a sick one by its parameters: a step waits, computes, talks; a thread reads.
    wait may depend on the step.

    Every step lasts as long as the longest: a rank that computes less is longer in communication.
    """
    made = Made(rank, world, host)
    made.span("startup", "imports", 0, 9_000)
    made.span("startup", "build", 9_500, 500)
    ts, longest = 10_000, 12_000
    for step in range(steps):
        waits = wait if isinstance(wait, int) else wait(step)
        own = waits + compute
        where = {"epoch": 0, "step": step, "batch": step}
        made.span("dataloader", "fetch.iter", ts, waits, **where)
        made.span("compute", "forward", ts + waits, compute // 2)
        made.span("compute", "backward", ts + waits + compute // 2, compute // 2)
        made.span("torchrec", "wait_sparse_data_dist", ts + own, max(0, longest - own))
        at = ts
        for i in range(reads):
            place = (step * reads + i) * read_size
            if calls:
                made.posix(
                    "pread64",
                    at,
                    read_us,
                    "/data/day_0_sparse.npy",
                    7,
                    ret=read_size,
                    count=read_size,
                    offset=place,
                )
            made.span("data", "read", at, read_us, 7, file="/data/day_0_sparse.npy", bytes=read_size, **where)
            at += read_us + 1
        made.span("train", "step", ts, max(longest, own), **where)
        ts += max(longest, own) + 10
    made.span("pipeline", "epoch", 10_000, ts - 10_000, epoch=0)
    return made
