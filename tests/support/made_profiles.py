"""Profiles as torch.profiler writes them on a machine with GPUs, with planted times.

The form is that of Kineto's output (libkineto/src/output_json.cpp): times in us since `baseTimeNanoseconds`,
launches and kernels with a `correlation`, arrows `ac2g` behind the slices that they belong to.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from support.made_traces import BEGIN

BASE_NS = 1_790_857_026_000_000_000


class MadeProfile:
    """The profile of one rank. Times are us after made_traces.BEGIN."""

    def __init__(self, rank: int | None = 0, world: int = 1, pid: int = 1000) -> None:
        self.pid, self.launches = pid, 0
        self.events: list[dict[str, Any]] = [
            {
                "ph": "M", "name": "thread_name", "pid": pid, "tid": pid,
                "args": {"name": f"thread {pid} (python)"},
            }
        ]  # fmt: skip
        self.head: dict[str, Any] = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "A GPU"}]}
        if rank is not None:
            self.head["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": world}
        self.head["baseTimeNanoseconds"] = BASE_NS

    def _at(self, ts: float) -> float:
        return round(BEGIN + ts - BASE_NS / 1000, 3)

    def slice(self, cat: str, name: str, ts: float, dur: float, pid: Any, tid: Any, **args: Any) -> None:
        self.events.append({
            "ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": self._at(ts), "dur": dur,
            "args": args,
        })  # fmt: skip

    def operator(self, name: str, ts: float, dur: float, cat: str = "cpu_op") -> None:
        self.slice(cat, name, ts, dur, self.pid, self.pid, **{"External id": 7, "Ev Idx": 1})

    def launch(
        self,
        name: str,
        ts: float,
        at: float,
        dur: float,
        cat: str = "kernel",
        stream: int = 7,
        device: int = 0,
    ) -> None:
        """A kernel that is launched at `ts` and runs at `at`."""
        self.launches += 1
        number = self.launches
        call = {"kernel": "cudaLaunchKernel", "gpu_memset": "cudaMemsetAsync"}.get(cat, "cudaMemcpyAsync")
        self.slice("cuda_runtime", call, ts, 4.5, self.pid, self.pid, correlation=number, cbid=211)
        self._arrow_end("s", number, self.pid, self.pid, ts)
        more = (
            {"grid": [24, 1, 1], "block": [128, 1, 1], "est. achieved occupancy %": 31}
            if cat == "kernel"
            else {}
        )
        self.slice(
            cat, name, at, dur, device, stream, correlation=number, stream=stream, device=device, **more
        )
        self._arrow_end("f", number, device, stream, at)

    def _arrow_end(self, phase: str, number: int, pid: int, tid: int, ts: float) -> None:
        binding = {"bp": "e"} if phase == "f" else {}
        self.events.append({
            "ph": phase, "id": number, "pid": pid, "tid": tid, "ts": self._at(ts), "cat": "ac2g",
            "name": "ac2g", **binding,
        })  # fmt: skip

    def text(self) -> str:
        end = {"name": "Record Window End", "ph": "i", "s": "g", "pid": "", "tid": "", "ts": self._at(0)}
        spans = {
            "ph": "X", "cat": "Trace", "ts": self._at(0), "dur": 5.0, "pid": "Spans",
            "tid": "PyTorch Profiler", "name": "PyTorch Profiler (0)", "args": {"Op count": 0},
        }  # fmt: skip
        return json.dumps(
            {**self.head, "traceEvents": [*self.events, spans, end], "traceName": "x"}, indent=1
        )

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.text().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path


def gpu_steps(rank: int = 0, world: int = 1, steps: range = range(3, 6), wait: int = 3_000) -> MadeProfile:
    """What a GPU does in steps of made_traces.training(wait=wait, compute=5_000): a copy while the batch
    comes, a kernel from the forward pass on, a sum of gradients that begins before it ends; else nothing.
    """
    made = MadeProfile(rank, world, 1000 + rank)
    for step in steps:
        ts = 10_000 + step * 12_010
        made.operator(f"ProfilerStep#{step}", ts, 12_000, "user_annotation")
        made.launch("Memcpy HtoD (Pinned -> Device)", ts + 100, ts + 1_000, 500, "gpu_memcpy")
        made.operator("aten::mm", ts + wait + 10, 1_000)
        made.launch("void gemm<float, 128>(Params)", ts + wait + 20, ts + wait + 200, 2_300)
        made.launch("ncclDevKernel_AllReduce_Sum_f32", ts + wait + 600, ts + wait + 2_400, 400, stream=20)
    return made
