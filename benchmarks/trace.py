"""What does tracing cost the training? Traced and untraced runs in turn, and the trace's size per step.

Each pair of runs trains the same model on the same data with the same seed; only --trace differs, and which
of the two comes first alternates. Last line: one JSON object. On a busy machine the spread is larger than
the cost: look at it before believing the median.

usage: python benchmarks/trace.py [--pairs 5] [--steps 200] [--batch_size 2048] [--data NPY_FOLDER]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from analysis import events  # noqa: E402


def train(folder: Path, options: argparse.Namespace, traced: bool) -> dict:
    command = [
        sys.executable, "-m", "dlrm.train", "--output_dir", str(folder),
        "--batch_size", str(options.batch_size),
        "--limit_train_batches", str(options.steps), "--limit_val_batches", "1", "--limit_test_batches", "1",
        "--embedding_dim", "32", "--dense_arch_layer_sizes", "512,256,32",
        "--over_arch_layer_sizes", "512,256,1",
        "--learning_rate", "0.05", "--seed", "0",
    ]  # fmt: skip
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
    options = parser.parse_args()
    costs, speeds, sizes, counts, steps = [], {True: [], False: []}, 0, 0, 1
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            found = {}
            for traced in (True, False) if pair % 2 else (False, True):
                folder = Path(scratch) / f"{pair}-{traced}"
                result = train(folder, options, traced)
                found[traced] = result["samples_per_second"]
                speeds[traced].append(found[traced])
                if traced:
                    table = events.load(folder, columns=("cat", "name", "ts"))
                    steps = max(1, len(table.filter((table["cat"] == "train") & (table["name"] == "step"))))
                    training = table.filter(table["cat"].cast(str) != "POSIX")
                    sizes = sum(path.stat().st_size for path in events.files(folder)) / len(table)
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
        "spans_per_step": round(counts, 1),
        "bytes_per_event": round(sizes, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
