"""BERT4Rec against the best possible score: walks whose next item is known in 4 of 5 steps.

Trains with the paper's presets, smaller: --length instead of 50 or 200 items, --steps of batch --batch_size
instead of 400,000 of 256, and the rate that so few steps need. Model, masking, dropout, optimizer and
schedule are those of the preset. `best` is what a predictor reaches that knows every item's follower. The
last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METRICS = {"HR@1": "Recall@1", "HR@10": "Recall@10", "NDCG@10": "NDCG@10"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default="ml-20m,ml-1m,steam,beauty")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--negatives", type=int, default=50)
    parser.add_argument("--required_share", type=float, default=0.95, help="of the best NDCG@10")
    return parser.parse_args()


def train(args: argparse.Namespace, preset: str, folder: Path) -> dict[str, Any]:
    """{metric: [reached, best]} of the test, and the first loss."""
    words = [
        "--preset", preset, "--dataset_name", "markov", "--random_user_count", args.users,
        "--random_item_count", args.items, "--random_size", args.users * args.length,
        "--max_len", args.length, "--negatives", args.negatives, "--train_batch_size", args.batch_size,
        "--lr", args.lr, "--max_steps", args.steps, "--lr_decay_steps", args.steps, "--seed", 1,
        "--no-evaluate_on_epoch_end", "--output_dir", folder,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "dlrm.bert4rec", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{preset}: {done.stderr[-3000:]}")
    results = json.loads((folder / "results.json").read_text())
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    test, best = results["evaluations"]["test"], results["reachable"]
    found = {name: [test[key], best[key]] for name, key in METRICS.items()}
    return {"first_loss": first["loss"], **found}


def main() -> None:
    args = parse_arguments()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for preset in args.presets.split(","):
            found[preset] = each = train(args, preset, Path(scratch) / preset)
            scores = ", ".join(f"{name} {each[name][0]:.4f} of {each[name][1]:.4f}" for name in METRICS)
            print(f"{preset:<8} first loss {each['first_loss']:.3f}, {scores}", flush=True)
    shares = {preset: each["NDCG@10"][0] / each["NDCG@10"][1] for preset, each in found.items()}
    result = {
        "benchmark": "bert4rec_scores", **vars(args), "scores": found, "shares": shares,
        "passed": max(shares.values()) >= args.required_share,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
