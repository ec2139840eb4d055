"""How fast do traces become a Perfetto file, and how big is it?

Makes a trace like that of a training run (per step: reads of a prefetch thread with their POSIX calls, a
dozen nested spans, a counter), converts it on one core, and in the same run does it the two usual ways on a
part of it: a line at a time with json, and Perfetto's own Python builder. Last line: one JSON object.

usage: python benchmarks/perfetto.py [--events 10000000] [--ranks 2] [--keep FOLDER] [--baseline 200000]
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # not this folder: its perfetto.py would hide the package

from analysis.perfetto import convert  # noqa: E402
from analysis.trace import events  # noqa: E402

HHASH = "6882804a826580cd"
STAGES = (
    "copy_batch_to_gpu", "wait_for_batch", "start_sparse_data_dist", "wait_sparse_data_dist", "forward",
    "backward", "optimizer", "zero_grad",
)  # fmt: skip
FILES = [f"/data/criteo/day_{day}_{part}.npy" for day in range(24) for part in ("dense", "sparse", "labels")]
BATCH = 2048


def format_event(number: int, name: str, cat: str, tid: int, ts: int, dur: int, args: str) -> str:
    """A line of a trace. ts, dur: us. args: the rest of its arguments, as JSON without the braces."""
    kind = 3 if cat == "POSIX" else 6
    return (
        f'{{"id":{number},"name":"{name}","cat":"{cat}","type":{kind},"pid":4001,"tid":{tid},"ts":{ts},"dur":{dur},'
        f'"ph":1,"args":{{"hhash":"{HHASH}",{args}}}}}\n'
    )


def format_metadata(rank: int, ranks: int) -> Iterator[str]:
    about = {"rank": rank, "local_rank": rank, "world_size": ranks, "host": "node0", "role": "train"}
    for kind, key, value in (
        *(("CM", key, value) for key, value in about.items()),
        *(("FH", path, f"88f87106115{i:05x}") for i, path in enumerate(FILES)),
    ):
        yield (
            f'{{"name":"{kind}","cat":"dftracer","type":6,"pid":4001,"tid":4001,"ph":4,'
            f'"args":{{"hhash":"{HHASH}","name":"{key}","value":"{value}"}}}}\n'
        )


def format_steps(count: int, begin: int) -> Iterator[str]:
    """24 events a step: 3 files read (seek and read each, in a span), and the step with its stages."""
    number = 0
    for step in range(count):
        ts = begin + step * 3000
        about = f'"epoch":{step // 10000},"step":{step}'
        for part in range(3):
            size, file = BATCH * (52, 104, 4)[part], part + 3 * (step // 30000 % 24)
            at, fhash = ts + 400 * part, f'"fhash":"88f87106115{file:05x}"'
            yield format_event(number, "lseek64", "POSIX", 4002, at + 5, 1, f'"ret":{step * size},{fhash}')
            took = 100 + (step * 7919 + part * 104729) % 150
            call = f'"ret":{size},"count":{size},"offset":{step * size},{fhash}'
            yield format_event(number, "read", "POSIX", 4002, at + 9, took, call)
            read = f'{about},"file":"{FILES[file]}","batch":{step},"bytes":{size}'
            yield format_event(number, "read", "data", 4002, at, took + 12, read)
            number += 3
        yield format_event(
            number, "assemble", "data", 4002, ts + 1300, 200 + step % 90, f'{about},"batch":{step}'
        )
        yield format_event(number, "wait", "data", 4001, ts + 1505, 30 + step % 11, f'{about},"batch":{step}')
        for i, stage in enumerate(STAGES):
            begin_of_stage, counted = ts + 1560 + 150 * i, f'{about},"number":{step}'
            yield format_event(number, stage, "torchrec", 4001, begin_of_stage, 120 + step % 29, counted)
        yield format_event(number, "step", "train", 4001, ts + 1500, 1400, f'{about},"batch":{step}')
        yield format_event(
            number, "loss", "counter", 4001, ts + 2900, 0, f'"value":{0.7 / (1 + step):.6f},{about}'
        )
        number += 12


def make_traces(folder: Path, total: int, ranks: int) -> None:
    """Trace files as DFTracer writes them: a gzip member per 64 KiB of text."""
    (folder / "trace").mkdir(parents=True)
    per_step = sum(1 for _ in format_steps(1, 0))
    for rank in range(ranks):
        with open(folder / "trace" / f"train{rank:05d}-0-app.pfw.gz", "wb") as file:

            def put(lines: list[str], file=file) -> None:
                squeeze = zlib.compressobj(6, zlib.DEFLATED, 31)
                file.write(squeeze.compress("".join(lines).encode()) + squeeze.flush())

            put(list(format_metadata(rank, ranks)))
            waiting: list[str] = []
            for text in format_steps(total // ranks // per_step, 1_795_252_102_861_441 + rank * 7):
                waiting.append(text)
                if len(waiting) == 320:
                    put(waiting)
                    waiting = []
            put(waiting)


def by_json(lines: list[str], path: Path) -> None:
    """The usual way: parse each line, write Chrome JSON."""
    names: dict[str, str] = {}
    with path.open("w") as file:
        file.write('{"traceEvents":[\n')
        for text in lines:
            event = json.loads(text)
            args = event["args"]
            if event["ph"] == 4:
                names[args["value"]] = args["name"]
                continue
            if "fhash" in args:
                args["file"] = names.get(args.pop("fhash"))
            event["ph"] = "X"
            file.write(json.dumps(event) + ",\n")
        file.write("{}]}")


def by_builder(lines: list[str], path: Path) -> None:
    """Perfetto's own Python builder, a begin and an end per slice, as its documentation shows."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder

    builder = TraceProtoBuilder()
    for text in lines:
        event = json.loads(text)
        if event["ph"] == 4:
            continue
        for kind, time_us in (
            (TrackEvent.TYPE_SLICE_BEGIN, event["ts"]),
            (TrackEvent.TYPE_SLICE_END, event["ts"] + event["dur"]),
        ):
            packet = builder.add_packet()
            packet.timestamp = time_us * 1000
            packet.trusted_packet_sequence_id = 1
            packet.track_event.type = kind
            packet.track_event.track_uuid = event["tid"]
            if kind == TrackEvent.TYPE_SLICE_BEGIN:
                packet.track_event.name = event["name"]
                packet.track_event.categories.append(event["cat"])
                for key, value in event["args"].items():
                    note = packet.track_event.debug_annotations.add()
                    note.name = key
                    if isinstance(value, int):
                        note.int_value = value
                    elif isinstance(value, float):
                        note.double_value = value
                    else:
                        note.string_value = value
    path.write_bytes(builder.serialize())


def time_call(function, *args) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--baseline", type=int, default=200_000, help="events for the two usual ways")
    parser.add_argument("--keep", type=Path, help="a folder for the traces; made when it is not there")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for all that follows
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "run"
        if not folder.exists():
            make_traces(folder, options.events, options.ranks)
        warm = Path(scratch) / "warm"
        make_traces(warm, 2400, 1)
        convert.convert_to_pftrace(warm)  # numba compiles once per installation
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        path = Path(scratch) / "out.pftrace"
        summary = None

        def convert_traces() -> None:
            nonlocal summary
            summary = convert.convert_to_pftrace(folder, path, whole=True)

        wall, cpu = time_call(convert_traces)
        assert summary is not None and not summary.moved and not summary.unresolved
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = []
        for text in read_text(events.find_trace_files(folder)[0]):
            lines += text.decode().splitlines()
            if len(lines) > options.baseline:
                break
        lines = lines[: options.baseline]
        result = {
            "events": summary.events,
            "events_per_second": round(summary.events / wall),
            "events_per_cpu_second": round(summary.events / cpu),
            "bytes_per_event": round(path.stat().st_size / summary.events, 2),
            "input_bytes_per_event": round(
                sum(f.stat().st_size for f in events.find_trace_files(folder)) / summary.events, 2
            ),
            "peak_mb": round(peak / 1024),
            "peak_mb_before": round(before / 1024),
        }
        for name, way in (("json", by_json), ("builder", by_builder)):
            out = Path(scratch) / name
            wall, cpu = time_call(way, lines, out)
            result[f"{name}_events_per_second"] = round(len(lines) / wall)
            result[f"{name}_events_per_cpu_second"] = round(len(lines) / cpu)
            result[f"{name}_bytes_per_event"] = round(out.stat().st_size / len(lines), 2)
    for key, value in result.items():
        print(f"{key:32} {value:>14,}")
    print(json.dumps(result))


def read_text(path: Path) -> Iterator[bytearray]:
    from analysis.trace.lines import ReadLoss, read_blocks

    return read_blocks(path, ReadLoss())


if __name__ == "__main__":
    main()
