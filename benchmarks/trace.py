"""What does tracing cost the training? Traced and untraced runs in turn, and the trace's size per step.

Each pair of runs trains the same model on the same data with the same seed; only --trace differs, and which
of the two comes first alternates. Last line: one JSON object. On a busy machine the spread is larger than
the cost: look at it before you trust the median. Two more numbers are steadier: processor time per step,
and what one span costs in a loop of nothing else.

usage: python benchmarks/trace.py [--pairs N] [--steps N] [--batch_size N] [--data NPY_FOLDER] [--preset NAME]
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from analysis.trace import events  # noqa: E402

SPANS = """
import sys, tempfile, time
from dlrm.runtime import ranks, trace
from torchrec.dftracer_spans import record_function
def best(make):
    costs = []
    for _ in range(7):
        begun = time.perf_counter()
        for number in range(20_000):
            with make(number):
                pass
        costs.append((time.perf_counter() - begun) / 20_000)
    return round(min(costs) * 1e9)
def own(number):
    return trace.span("train", "step", batch=number)
def torchrecs(number):
    return record_function(f"## forward {number} ##")
found = {"off": best(own), "torchrec_off": best(torchrecs)}
with tempfile.TemporaryDirectory() as folder:
    trace.start_tracing(folder, ranks.find_ranks(), "bench")
    trace.set_context(epoch=0, step=1)
    found |= {"on": best(own), "torchrec_on": best(torchrecs)}
    trace.stop_tracing()
print(found)
"""


def measure_span_costs() -> dict:
    """ns for one span, and for one marker of torchrec, untraced and traced."""
    done = subprocess.run([sys.executable, "-c", SPANS], cwd=ROOT, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def compute_processor_ms(folder: Path) -> float:
    """Of a step, without start-up: between the first and the last report of the training."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss" in line]
    return 1000 * (last["cpu_seconds"] - first["cpu_seconds"]) / (last["step"] - first["step"])


def train_once(folder: Path, options: argparse.Namespace, traced: bool) -> dict:
    """One training; its results."""
    command = [
        sys.executable, "-m", "dlrm.train", "--output_dir", str(folder),
        "--batch_size", str(options.batch_size),
        "--limit_train_batches", str(options.steps), "--limit_val_batches", "1", "--limit_test_batches", "1",
        "--learning_rate", "0.05", "--seed", "0",
    ]  # fmt: skip
    if options.preset:
        command += ["--preset", options.preset]
    else:
        command += ["--embedding_dim", "32", "--dense_arch_layer_sizes", "512,256,32"]
        command += ["--over_arch_layer_sizes", "512,256,1"]
    if options.data:
        command += ["--in_memory_binary_criteo_path", str(options.data)]
    else:
        command += ["--num_embeddings", "20000"]
    done = subprocess.run(command + ["--trace"] * traced, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads((folder / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--data", type=Path, help="dataset folder (default: random batches, no reads)")
    parser.add_argument("--preset", help="the model of a preset instead, e.g. toy")
    options = parser.parse_args()
    costs, speeds, cpu = [], {True: [], False: []}, {True: [], False: []}
    sizes, counts, steps = 0, 0, 1
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            found = {}
            for traced in (True, False) if pair % 2 else (False, True):
                folder = Path(scratch) / f"{pair}-{traced}"
                result = train_once(folder, options, traced)
                found[traced] = result["samples_per_second"]
                speeds[traced].append(found[traced])
                cpu[traced].append(compute_processor_ms(folder))
                if traced:
                    table = events.load_events(folder, columns=("cat", "name", "ts"))
                    steps = max(1, len(table.filter((table["cat"] == "train") & (table["name"] == "step"))))
                    training = table.filter(table["cat"].cast(str) != "POSIX")
                    sizes = sum(path.stat().st_size for path in events.find_trace_files(folder)) / len(table)
                    counts = len(training) / steps
            costs.append(100 * (1 - found[True] / found[False]))
            print(
                f"pair {pair}: {found[False]:,.0f} samples/s, traced {found[True]:,.0f}: {costs[-1]:+.2f}%",
                flush=True,
            )
    rate = statistics.median(speeds[False])
    result = {
        "pairs": options.pairs,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "step_ms": round(1000 * options.batch_size / rate, 3),
        "samples_per_second": round(rate, 1),
        "samples_per_second_traced": round(statistics.median(speeds[True]), 1),
        "cost_percent_median": round(statistics.median(costs), 3),
        "cost_percent_min": round(min(costs), 3),
        "cost_percent_max": round(max(costs), 3),
        "processor_ms_per_step": round(statistics.median(cpu[False]), 3),
        "processor_cost_percent": round(
            100 * (statistics.median(cpu[True]) / statistics.median(cpu[False]) - 1), 3
        ),
        "ns_per_span": measure_span_costs(),
        "spans_per_step": round(counts, 1),
        "bytes_per_event": round(sizes, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
