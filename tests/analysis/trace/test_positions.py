"""Where reads began that do not say it: followed from open, seek and read."""

from pathlib import Path

from support.made_traces import Made

from analysis.tables.read import read_rank
from analysis.trace.launches import plan_launches
from analysis.trace.source import FileSource

FILE = "/data/day_0"


def list_positions(made: Made, run: Path) -> list[int | None]:
    """Of the reads, in their order."""
    made.write(run)
    (job,) = plan_launches(FileSource(run))
    calls = read_rank(job.rank, job.files, job.clock, details=True).calls.sort("ts")
    return calls.filter(calls["op"] == "read")["position"].to_list()


def test_one_descriptor_is_followed(tmp_path: Path) -> None:
    made = Made()
    made.posix("open64", 0, 1, FILE, flags=0)
    made.posix("read", 10, 1, FILE, ret=100, count=100)
    made.posix("read", 20, 1, FILE, ret=50, count=100, thread=1)  # another thread, the same descriptor
    made.posix("lseek64", 30, 1, FILE, ret=1000, offset=1000, whence=0)
    made.posix("read", 40, 1, FILE, ret=10, count=10)
    assert list_positions(made, tmp_path) == [0, 100, 1000]


def test_of_several_descriptors_a_thread_knows_its_own_seek(tmp_path: Path) -> None:
    made = Made()
    made.posix("open64", 0, 1, FILE, flags=0)
    made.posix("open64", 1, 1, FILE, flags=0, thread=1)
    made.posix("read", 10, 1, FILE, ret=100, count=100)  # of which descriptor?
    made.posix("lseek64", 20, 1, FILE, ret=500, offset=500, whence=0, thread=1)
    made.posix("read", 30, 1, FILE, ret=40, count=40, thread=1)
    made.posix("read", 40, 1, FILE, ret=40, count=40, thread=1)
    made.posix("read", 50, 1, FILE, ret=40, count=40)  # the other thread may move either of them
    made.posix("read", 60, 1, FILE, ret=40, count=40, thread=1)
    made.posix("lseek64", 70, 1, FILE, ret=0, offset=0, whence=0)
    made.posix("close", 80, 1, FILE, ret=0)  # which one?
    made.posix("read", 90, 1, FILE, ret=40, count=40)
    assert list_positions(made, tmp_path) == [None, 500, 540, None, None, None]
