"""The trace shows, to the byte, what a rank read from each file."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.data_folder import write_days
from support.file_calls import count_traced_calls, read_events
from test_multihot import multi_hot_days
from test_parquet import day, table

KINDS = ("stream", "memory", "mmap", "multi_hot", "parquet")
ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
run, folder, rank, world, *kinds = sys.argv[1:]
from dlrm.runtime import trace
from dlrm.runtime.ranks import Ranks
trace.start_tracing(run, Ranks(rank=int(rank), world_size=int(world)), "train")
from dlrm.data.readers import open_source
from dlrm.data.batches import BatchLoader
from dlrm.data.prefetch import Prefetcher
result = {}
for kind in kinds:
    source = open_source(kind, f"{folder}/{kind}", "train", read_chunk_mb=0.03)
    loader = Prefetcher(BatchLoader(source, 30, int(rank), int(world)), 2)
    rows = 0
    for batch in loader:
        with trace.span("train", "step", batch=loader.batch_number, kind=kind):
            rows += len(batch.labels)
    source.close()
    result[kind] = {"rows": rows, "bytes": source.bytes_read}
trace.stop_tracing()
print(json.dumps(result))
"""
Traced = tuple[dict[str, Any], list[dict[str, Any]], int]


@pytest.fixture(scope="module", params=[(0, 1), (1, 2)], ids=["alone", "second of two"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Every kind reads its own folder in one traced process: what it says it read, and the trace."""
    (rank, world), here = request.param, tmp_path_factory.mktemp("traced")
    for kind in KINDS:
        write = multi_hot_days if kind == "multi_hot" else write_days
        folder = write(here / kind, [240, 120, 30])
        if kind == "parquet":
            for number in range(3):
                pq.write_table(
                    table(day(folder, number)), folder / f"day_{number}.parquet", row_group_size=50
                )
    (here / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", "run", str(here), str(rank), str(world), *KINDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), read_events(here / "run"), world


@pytest.mark.parametrize("kind", KINDS)
def test_trace_equals_what_was_read(traced: Traced, kind: str) -> None:
    results, events, world = traced
    result, seen = results[kind], count_traced_calls(events).bytes
    assert result["rows"] == 360 // world
    assert result["bytes"]
    assert {path: seen[path, "read"] for path in result["bytes"]} == result["bytes"]
    for path, size in result["bytes"].items():
        if kind == "mmap":
            assert size == 128  # the header: page faults are not seen
        elif kind != "parquet":
            assert size == expected(path, world), path


@pytest.mark.parametrize("kind", ["stream", "memory", "multi_hot", "parquet"])
def test_spans_tell_file_bytes_batch_and_thread(traced: Traced, kind: str) -> None:
    results, events, world = traced
    bytes_read = results[kind]["bytes"]
    spans = [
        e for e in events
        if e.get("cat") == "data" and e["name"] == "read" and e["args"]["file"] in bytes_read
    ]  # fmt: skip
    in_spans: Counter[str] = Counter()
    for event in spans:
        in_spans[event["args"]["file"]] += event["args"]["bytes"]
    assert in_spans
    for path, size in in_spans.items():
        assert size <= bytes_read[path]
        assert kind not in ("stream", "memory") or size == bytes_read[path] - 128  # all but the header
    threads = {e["tid"] for e in events if e["name"] == "CM" and e["args"]["value"].startswith("prefetch")}
    assert {e["tid"] for e in spans} <= threads
    steps = {e["args"]["batch"] for e in events if e["name"] == "step" and e["args"]["kind"] == kind}
    waits = {e["args"]["batch"] for e in events if e["name"] == "fetch.iter"}
    assert steps == set(range(360 // 30 // world))
    assert steps <= waits
    assert {e["args"]["batch"] for e in spans} <= steps | {0}


def test_mapped_reads_tell_what_they_copied(traced: Traced) -> None:
    """Page faults are not calls: the spans say which bytes of which file were copied for which batch."""
    results, events, world = traced
    copied = [
        e["args"] for e in events if (e.get("cat"), e["name"]) == ("data", "read") and "mapped" in e["args"]
    ]
    assert all(args["mapped"] == 1 for args in copied)
    sizes: Counter[str] = Counter()
    for args in copied:
        sizes[args["file"]] += args["bytes"]
    assert sizes == {
        path: expected(path, world) - 128 for path in results["mmap"]["bytes"] if "day_2" not in path
    }
    assert {args["batch"] for args in copied} == set(range(360 // 30 // world))
    for path in sizes:  # each rank's rows, in the order of the file
        array = np.load(path)
        own = sorted((args["offset"], args["bytes"]) for args in copied if args["file"] == path)
        row = array[:1].nbytes
        assert all((at - 128) % row == 0 and 128 <= at <= array.nbytes + 128 - size for at, size in own)
        assert all(at + size <= after for (at, size), (after, _) in zip(own, own[1:], strict=False))


def test_streamed_reads_tell_their_offsets(traced: Traced) -> None:
    results, events, _ = traced
    for path in results["stream"]["bytes"]:
        own = sorted(
            (args["offset"], args["bytes"])
            for e in events
            if (e.get("cat"), e["name"]) == ("data", "read") and (args := e["args"])["file"] == path
        )
        assert ("day_2" in path) == (not own)
        assert all(at + size <= after for (at, size), (after, _) in zip(own, own[1:], strict=False))
        assert not own or own[0][0] >= 128


def expected(path: str, world: int) -> int:
    """Header and this rank's rows; the last day's file is only looked at."""
    if path.endswith(".npz"):
        with np.load(path) as members:
            headers = result_of_npz(path)
            rows = sum(members[str(k)].nbytes for k in range(26))
        return headers + (0 if "day_2" in path else rows // world)
    array = np.load(path)
    return 128 + (0 if "day_2" in path else array.nbytes // world)


def result_of_npz(path: str) -> int:
    """What opening costs: the directory at the end and, per member, the local and the array's header."""
    import zipfile

    class Counting:
        def __init__(self, file: object) -> None:
            self.file, self.count = file, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def read(self, *size: int) -> bytes:
            found = self.file.read(*size)  # type: ignore[attr-defined]
            self.count += len(found)
            return found

    with open(path, "rb", buffering=0) as file:
        counting = Counting(file)
        zipfile.ZipFile(counting)  # type: ignore[arg-type]
        return counting.count + 26 * (30 + 128)
