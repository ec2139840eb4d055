"""Real processes that trace themselves with dlrm.runtime.trace, for tests of the trace and of its readers."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks
run, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
here = Ranks(rank, rank, world, world, "node7")
"""
# A file of 8 MiB that is on the disk and no longer in memory.
COLD_FILE = """
path = f"{run}/data.bin"
with open(path, "wb") as file:
    file.write(os.urandom(8 << 20))
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
"""
# Three steps of something like training: a thread reads batches, the main thread takes them.
TRAINING = """
path = f"{run}/data{rank}.bin"
open(path, "wb").write(bytes(100_000 + rank))
trace.start_tracing(run, here, "train")
trace.instant("clock", "barrier", when="start")
read = [threading.Event() for _ in range(3)]
def prefetch():
    trace.name_thread("prefetch train")
    for batch in range(3):
        for part in range(2):
            with trace.span("data", "read", batch=batch, file=path, bytes=1000):
                fd = os.open(path, os.O_RDONLY)
                os.pread(fd, 1000, batch * 2000 + part * 1000)
                os.close(fd)
        read[batch].set()
thread = threading.Thread(target=prefetch)
thread.start()
with trace.span("pipeline", "epoch"):
    for step in range(3):
        trace.set_context(epoch=0, step=step)
        read[step].wait()
        with trace.span("train", "step", batch=step):
            with trace.span("compute", "forward", number=step):
                time.sleep(0.002)
            with trace.span("compute", "backward"):
                time.sleep(0.001)
        trace.counter("loss", 0.5 / (step + 1))
thread.join()
with open(f"{run}/out{rank}.bin", "wb", buffering=0) as out:
    out.write(bytes(5000))
trace.instant("clock", "barrier", when="end")
trace.stop_tracing()
"""


def start(folder: Path, body: str, rank: int = 0, world: int = 1, *prefix: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder.parent / f"{folder.name}-{rank}.py"  # a file: DFTracer notes the command line
    script.write_text(HEAD.format(root=str(ROOT)) + body)
    command = [*prefix, sys.executable, str(script), str(folder), str(rank), str(world)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)


def run(folder: Path, body: str, world: int = 1) -> Path:
    """Every rank to its end; the run folder."""
    for process in [start(folder, body, rank, world) for rank in range(world)]:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    return folder
