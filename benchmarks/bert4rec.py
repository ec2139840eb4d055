"""BERT4Rec's training speed: dmp against ddp, and against torchrec's example (or a loop like it).

The same model, rows, order, optimizer, no dropout; the losses must agree. Runs alternate, medians count. On
CPUs Adam is not fused, adagrad is: its dmp touches only the rows that were looked up. The example's random
data set (500,000 items) needs more memory than a laptop has, so the default of --items is smaller. The
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
from typing import Any

ROOT = Path(__file__).parents[1]
LOSSES_AGREE = 2e-3  # relative; with several ranks the example takes the mean of the ranks' means


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference_path", help="folder with the example's bert4rec_main.py")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=200_000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_len", type=int, default=16)
    parser.add_argument("--emb_dim", type=int, default=128)
    parser.add_argument("--required_speedup", type=float, default=1.5)
    return parser.parse_args()


def run_torchrun(args: argparse.Namespace, words: list[Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.ranks]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [str(word) for word in [*command, *words]], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stderr[-3000:]}")


def train_ours(args: argparse.Namespace, words: list[Any], how: str, folder: Path) -> dict[str, float]:
    """One run of this project. words: options that both programs take. how: mode and optimizer, "dmp
    adam".
    """
    mode, optimizer = how.split()
    more = ["--mode", mode, "--optimizer", optimizer, "--max_steps", args.steps,
            "--report_every", args.steps, "--num_epochs", 1, "--no-evaluate_on_epoch_end",
            "--no-evaluate_on_training_end", "--output_dir", folder]  # fmt: skip
    run_torchrun(args, ["-m", "dlrm.bert4rec", *words, *more])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    return {"samples_per_second": results["samples_per_second"], "loss": lines[-1]["loss"]}


def train_reference(args: argparse.Namespace, words: list[Any], out: Path) -> dict[str, float]:
    """One run of the example with the same words. out: a JSON file with its results."""
    given = ["--reference_path", str(Path(args.reference_path).absolute())] if args.reference_path else []
    run_torchrun(args, [ROOT / "benchmarks/bert4rec_reference.py", *given, "--steps", args.steps,
                        "--out", out, *words])  # fmt: skip
    return json.loads(out.read_text())


def spread_of(losses: list[float]) -> float:
    return (max(losses) - min(losses)) / max(losses)


def main() -> None:
    args = parse_arguments()
    words = [
        "--dataset_name", "random", "--random_user_count", args.users, "--random_item_count", args.items,
        "--random_size", args.size, "--lr", 0.001, "--mask_prob", 0.2, "--train_batch_size", args.batch_size,
        "--max_len", args.max_len, "--emb_dim", args.emb_dim, "--dropout", 0, "--dupe_factor", 1, "--seed", 0,
    ]  # fmt: skip
    other = "torchrec's example, ddp" if args.reference_path else "a loop like the example's, ddp"
    hows = ("ddp adam", "dmp adam", "ddp adagrad", "dmp adagrad")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (other, *hows)}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.repeats):
            folder = Path(scratch)
            found[other].append(train_reference(args, words, folder / f"{number}.json"))
            for how in hows:
                found[how].append(train_ours(args, words, how, folder / f"{how}{number}".replace(" ", "-")))
    speeds = {
        name: statistics.median(run["samples_per_second"] for run in runs) for name, runs in found.items()
    }
    for name, runs in found.items():
        each = ", ".join(f"{run['samples_per_second']:.1f}" for run in runs)
        print(f"{name:<32} {speeds[name]:>9.1f} samples/s   ({each})   loss {runs[0]['loss']:.5f}")
    best = max(speeds["ddp adam"], speeds["dmp adam"])
    alike = [["ddp adam", "dmp adam"], ["ddp adagrad", "dmp adagrad"]]
    if args.reference_path:  # rebuilt, it has weights of its own
        alike[0].append(other)
    spread = max(spread_of([found[name][0]["loss"] for name in names]) for names in alike)
    result = {
        "benchmark": "bert4rec", "reference": other, "ranks": args.ranks, "items": args.items,
        "samples_per_second": speeds, "speedup": best / speeds[other],
        "dmp_over_ddp": {name: speeds[f"dmp {name}"] / speeds[f"ddp {name}"] for name in ("adam", "adagrad")},
        "loss_spread": spread,
        "passed": best / speeds[other] >= args.required_speedup and spread < LOSSES_AGREE,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
