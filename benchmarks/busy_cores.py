"""What waiting threads cost: spinning (the default), OMP_WAIT_POLICY=passive, and one thread, in turns.

One rank trains on random data, with as many threads as there are cores, once with the cores to itself and
once beside processes that are busy all the time (--busy). The runs alternate; medians of samples per second
count. --nice -15 (as root) takes the cores from other work on the machine, which then counts as idle. The
last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
WAYS: dict[str, dict[str, str]] = {
    "spinning": {"OMP_NUM_THREADS": str(CORES)},
    "passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def measure_training(way: dict[str, str], batch: int, steps: int, nice: int) -> float:
    """Samples per second of one training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nice", "-n", nice, sys.executable, "-m", "dlrm.train", "--output_dir", folder,
            "--batch_size", batch,
            "--limit_train_batches", steps, "--limit_val_batches", 1, "--limit_test_batches", 1,
            "--num_embeddings", 10_000, "--learning_rate", 0.1, "--seed", 0,
        ]  # fmt: skip
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=os.environ | way, capture_output=True
        )
        if done.returncode:
            sys.exit(done.stderr.decode()[-2000:])
        return float(json.loads((Path(folder) / "results.json").read_text())["samples_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, default=CORES, help="busy processes beside the training")
    parser.add_argument("--batch_sizes", default="64,2048", help="comma separated")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--nice", type=int, default=0, help="added to the priority of training and busy processes"
    )
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for busy in (0, args.busy):
        spin = ["nice", "-n", str(args.nice), sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(spin) for _ in range(busy)]
        try:
            for batch in map(int, args.batch_sizes.split(",")):
                runs = found.setdefault(f"{busy} busy, batch {batch}", {name: [] for name in WAYS})
                for _ in range(args.rounds):
                    for name, way in WAYS.items():
                        runs[name].append(measure_training(way, batch, args.steps, args.nice))
                print(f"{busy} busy, batch {batch}: ", end="")
                print(
                    ", ".join(f"{name} {statistics.median(values):,.0f}" for name, values in runs.items()),
                    flush=True,
                )
        finally:
            for other in others:
                other.kill()
                other.wait()
    print(json.dumps({"cores": CORES, "samples_per_second": found}))


if __name__ == "__main__":
    main()
