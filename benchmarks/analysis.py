"""From 10 million events to a report: seconds and memory, against reading such traces with json and pandas.

    python benchmarks/analysis.py [--events N] [--ranks R] [--baseline-events N] [--keep DIR]

The baseline does far less (sums by operation and file, no intervals) and is run on fewer events: it needs
about 2 GB per million of them. The last line of stdout is one JSON object.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
READS = 20  # per step
BASELINE = """
import gzip, json, sys
from pathlib import Path
import pandas as pd
rows, names = [], {}
for path in sorted(Path(sys.argv[1]).glob("trace/*.pfw.gz")):
    for line in gzip.open(path, "rt"):
        event = json.loads(line)
        args = event.pop("args")
        if event["ph"] == 1:
            rows.append({**event, **args})
        elif event["name"] == "FH":
            names[args["value"]] = args["name"]
table = pd.DataFrame(rows)
table["file"] = table["fhash"].map(names)
posix = table[table["cat"] == "POSIX"]
print(len(table), posix.groupby(["name", "file"])[["ret", "dur"]].sum().sum().tolist(),
      table.groupby(["cat", "name"])["dur"].describe(percentiles=[0.5, 0.99]).shape)
"""


META = (
    '{{"name":"{}","cat":"dftracer","type":1,"pid":{pid},"tid":{pid},"ph":4,'
    '"args":{{"hhash":"6882804a826580cd","name":"{}","value":"{}"}}}}\n'
)
EVENT = (
    '{{"id":{},"name":"{}","cat":"{}","type":3,"pid":{pid},"tid":{},"ts":{},"dur":{},"ph":1,'
    '"args":{{"hhash":"6882804a826580cd",{}}}}}\n'
)


def write_trace(folder: str, rank: int, events: int) -> int:
    """One rank's trace of a training with READS reads per step; returns the number of events."""
    pid, ts, n, state, step = 1000 + rank, 1_795_252_102_000_000 + rank, 0, rank + 12345, 0
    with gzip.open(f"{folder}/train{rank:05d}-{rank:016x}-app.pfw.gz", "wt", compresslevel=1) as out:
        out.write(META.format("CM", "rank", rank, pid=pid))
        for file in range(72):
            out.write(META.format("FH", f"/data/day_{file}.npy", f"88f871061151{file:04x}", pid=pid))
        while n < events:
            begin, file, lines = ts, step // 50 % 72, []
            where = f'"batch":{step},"epoch":0,"step":{step}'
            hashed = f'"fhash":"88f871061151{file:04x}"'
            for i in range(READS):
                state = (1103515245 * state + 12345) % (1 << 31)
                size, dur = 4096 << (state >> 8) % 8, 5 + state % 200
                arguments = f'"file":"/data/day_{file}.npy","bytes":{size},{where}'
                for name, cat, at, us, args in (
                    ("lseek64", "POSIX", ts, 1, f'"ret":{i * size},"whence":0,"offset":{i * size},{hashed}'),
                    ("read", "POSIX", ts + 2, dur, f'"ret":{size},"count":{size},{hashed}'),
                    ("read", "data", ts - 1, dur + 5, arguments),
                ):
                    lines.append(EVENT.format(n, name, cat, pid + 9, at, us, args, pid=pid))
                    n += 1
                ts += dur + 9 + state % 50
            work = ts - begin
            for name, cat, at, us in (
                ("wait", "data", begin, 40),
                ("wait_sparse_data_dist", "torchrec", begin + 60, work // 8),
                ("forward", "torchrec", begin + 70 + work // 8, work // 3),
                ("backward", "torchrec", begin + 80 + work // 2, work // 3),
                ("step", "train", begin, work - 1),
            ):
                lines.append(EVENT.format(n, name, cat, pid, at, us, where, pid=pid))
                n += 1
            ts, step = ts + 20, step + 1
            out.write("".join(lines))
        out.write(EVENT.format(n, "end", "dftracer", pid, ts, 0, f'"num_events":{n}', pid=pid))
    return n


def make_traces(run: Path, events: int, ranks: int) -> int:
    """Write the traces of so many ranks, `events` in all; returns how many there are."""
    folder = run / "trace"
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(2) as pool:
        return sum(pool.map(write_trace, [str(folder)] * ranks, range(ranks), [events // ranks] * ranks))


def run_measured(command: list[str], events: int) -> dict[str, float]:
    """Seconds on the clock and on the processors, and peak memory."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    spent, cpu = time.perf_counter() - begun, usage.ru_utime + usage.ru_stime
    return {
        "events": events, "seconds": spent, "cpu_seconds": cpu, "events_per_s": events / spent,
        "MB": usage.ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--baseline-events", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="use or leave the traces in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = options.keep or Path(scratch)
        found = {}
        for name, events in (("report", options.events), ("baseline", options.baseline_events)):
            run = home / f"{name}-{events}-{options.ranks}"
            if not run.exists():
                make_traces(run, events, options.ranks)
            command = [sys.executable, "-m", "analysis", "report", str(run)]
            if name == "baseline":
                command = [sys.executable, "-c", BASELINE, str(run)]
            found[name] = cost = run_measured(command, events)
            size = sum(p.stat().st_size for p in run.glob("trace/*")) / 1e6
            print(
                f"{name:<9}{events:>12,} events, {size:,.0f} MB of traces: {cost['seconds']:6.1f} s elapsed, "
                f"{cost['cpu_seconds']:6.1f} s on the processors, {cost['MB']:,.0f} MB",
                flush=True,
            )
    faster = found["report"]["events_per_s"] / found["baseline"]["events_per_s"]
    about = {
        "benchmark": "analysis",
        "ranks": options.ranks,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps({**about, **found, "times_faster": faster}))


if __name__ == "__main__":
    main()
