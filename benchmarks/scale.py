"""Conversion, report and overview of traces of many ranks: time, memory and size of each step.

The traces are made from those of one real run: the file of one rank is copied for each rank, with its own
rank, process number and host (four ranks a node), and as many steps as asked for.

usage: python benchmarks/scale.py RUN [--ranks 64 256 1024 2048] [--steps 899 100 ...]
                                  [--commands perfetto report finish] [--cores 1 2] [--times 3] [--folder DIR]
"""

import argparse
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.process_tree import watch_command  # noqa: E402

RANKS_PER_NODE = 4
MEMBER_BYTES = 64 << 10  # of text
COMMANDS = ["perfetto", "report", "finish"]


def read_template(run: Path, steps: int) -> bytes:
    """The trace of one rank, its training cut after so many steps; what comes after it then comes earlier."""
    path = sorted((run / "trace").glob("train00000-*.pfw.gz"))[0]
    with gzip.open(path, "rb") as file:
        events = [json.loads(line) for line in file if line.startswith(b"{")]
    training = [each for each in events if each["cat"] == "train" and each["name"] in ("step", "epoch")]
    cut = max(each["ts"] + each["dur"] for each in training if 0 <= each["args"].get("step", -1) <= steps)
    end = max(each["ts"] + each["dur"] for each in training)
    kept = []
    for each in events:
        if each["ph"] == 1:
            if each["cat"] == "train" and each["name"] == "epoch":
                each["dur"] = cut - each["ts"]
            elif each["ts"] >= end:
                each["ts"] -= end - cut
            elif each["ts"] >= cut:
                continue
        if each["cat"] == "dftracer" and "num_events" in each.get("args", {}):
            each["args"]["num_events"] = sum(b'"ph":1' in line for line in kept)
        kept.append(json.dumps(each, separators=(",", ":")).encode() + b"\n")
    return b"".join(kept)


def make_run(template: bytes, folder: Path, ranks: int, run: Path) -> None:
    """A run folder with a trace for each rank."""
    (folder / "trace").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "results.json"):
        shutil.copyfile(run / name, folder / name)
    pid = re.search(rb'"pid":(\d+)', template)
    host = re.search(rb'"name":"host","value":"([^"]*)"', template)
    assert pid and host
    for rank in range(ranks):
        mine, node = str(1_000_000 + 100 * rank).encode(), f"x{rank // RANKS_PER_NODE:04d}".encode()
        text = template.replace(b'"pid":' + pid[1], b'"pid":' + mine)
        text = text.replace(b'"tid":' + pid[1], b'"tid":' + mine)
        text = text.replace(b'"name":"rank","value":"0"', b'"name":"rank","value":"%d"' % rank)
        world = b'"name":"world_size","value":"%d"' % ranks
        text = re.sub(rb'"name":"world_size","value":"\d+"', world, text)
        for before, after in ((b'"name":"host","value":"', b'"'), (b'"name":"', b'","value":"6')):
            text = text.replace(before + host[1] + after, before + node + after)
        path = folder / "trace" / f"train{rank:05d}-{rank:016x}-app.pfw.gz"
        with open(path, "wb") as file:
            for begin in range(0, len(text), MEMBER_BYTES):  # as DFTracer writes them
                file.write(gzip.compress(text[begin : begin + MEMBER_BYTES], compresslevel=1))


def measure(words: list[object], cores: int) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and GB of memory of a command on so many cores."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    pinned = ["taskset", "-c", ",".join(map(str, mine)), sys.executable, "-m", "analysis", *words]
    used = watch_command(pinned, every=0.05)
    # in copies of one rank the check finds requests that its launch does not explain
    if used.code not in ((0, 1) if words[0] == "finish" else (0,)):
        raise SystemExit(f"{words}: exit code {used.code}: {used.output}")
    return used.seconds, used.processor_seconds, used.memory / 1e9


def find_result(folder: Path, command: str) -> Path:
    """The file that a command is run for."""
    return next(folder.glob("*.pftrace" if command == "perfetto" else "report.html"))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="a traced run, e.g. the demo's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--steps", type=int, nargs="+", default=[899, 400, 100, 50], help="one for each")
    parser.add_argument("--commands", nargs="+", default=["perfetto", "report"], choices=COMMANDS)
    parser.add_argument(
        "--cores", type=int, nargs="+", default=[2], help="each command with so many, in turns"
    )
    parser.add_argument("--times", type=int, default=1, help="how often each")
    parser.add_argument("--folder", type=Path, help="where the traces are made (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for ranks, steps in zip(options.ranks, options.steps, strict=False):
            folder = Path(scratch) / f"ranks{ranks}"
            template = read_template(options.run, steps)
            make_run(template, folder, ranks, options.run)
            events = template.count(b'"ph":1') * ranks
            turns = [(command, cores) for command in options.commands for cores in options.cores]
            for command, cores in options.times * turns:
                seconds, used, memory = measure([command, folder], cores)
                row = {
                    "ranks": ranks,
                    "events": events,
                    "command": command,
                    "cores": cores,
                    "seconds": round(seconds, 1),
                    "processor_seconds": round(used, 1),
                    "GB": round(memory, 2),
                    "MB_written": round(find_result(folder, command).stat().st_size / 1e6, 1),
                }
                if command != "perfetto":
                    row["summary_MB"] = round((folder / "summary.json").stat().st_size / 1e6, 2)
                print(json.dumps(row), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
