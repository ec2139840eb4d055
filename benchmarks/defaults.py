"""Whether the defaults of 3_train.sh learn: six datasets of different size and learnability.

usage: python benchmarks/defaults.py [--work FOLDER] [--only NAME,NAME] [--ranks 1,2] [--options "..."]

Each dataset is made, and trained on as a newcomer would: DATASET_DIR=... ./3_train.sh, with no option at all.
The test rows' AUROC and log loss are compared with a constant predictor (AUROC 0.5, entropy of the base rate)
and, where the labels' true probabilities are known, with the best that any model could reach. The last line
is one JSON object; exit code 1 where a dataset was not learned.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.criteo import CRITEO, DatasetMeta, name_array_file, split_last_day

ROOT = Path(__file__).parents[1]
CHANCES = "chances.npy"  # the probabilities from which the test rows' labels were drawn
# what counts as clearly better than a constant: this share of the best gain in AUROC and in log loss, ...
GOOD_SHARE = 0.5
LEAST_AUROC, LEAST_GAIN = 0.55, 0.005  # ... and where the best is not known, at least this


def draw_ids(rng: np.random.Generator, rows: int, sizes: list[int]) -> np.ndarray:
    """int32 [rows, tables], skewed: common ids first."""
    ends = np.log(np.array(sizes) + 1.0)
    return (np.exp(rng.random((rows, len(sizes))) ** 2 * ends) - 1).astype(np.int32)


def draw_rare_clicks(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three clicks in a hundred, as in Criteo's own logs, a weak signal in ids of large tables."""
    sizes = [int(size) for size in np.geomspace(4, 60_000, CRITEO.categorical)]
    ids, dense = draw_ids(rng, rows, sizes), rng.normal(1.5, 1, (rows, CRITEO.numerical))
    effects = np.random.default_rng(1)
    odds = np.full(rows, -3.75)
    for table in range(0, CRITEO.categorical, 2):
        odds += effects.normal(0, 0.25, sizes[table])[ids[:, table]]
    return dense, ids, odds + (dense - 1.5) @ effects.normal(0, 0.1, CRITEO.numerical)


def draw_pairs_of_ids(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every second row is a click; only pairs of ids say which, no single field does."""
    sizes = [30, 50, 40, 60] + [1000] * (CRITEO.categorical - 4)
    ids = np.column_stack([rng.integers(0, size, rows) for size in sizes]).astype(np.int32)
    effects = np.random.default_rng(2)
    odds = np.zeros(rows)
    for one, two in ((0, 1), (2, 3)):
        left, right = effects.normal(0, 1, (sizes[one], 4)), effects.normal(0, 1, (sizes[two], 4))
        odds += (left[ids[:, one]] * right[ids[:, two]]).sum(1)
    return rng.normal(0, 1, (rows, CRITEO.numerical)), ids, odds


def draw_noise_in_large_tables(
    rng: np.random.Generator, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Only the counts mean something; the ids are noise in tables as long as the dataset: easily learned by
    heart. Counts are as they are without a logarithm's help: a few are a thousand times the usual.
    """
    ids = rng.integers(0, rows // 2, (rows, CRITEO.categorical)).astype(np.int32)
    dense = rng.lognormal(0, 1.2, (rows, CRITEO.numerical))
    slopes = np.random.default_rng(3).normal(0, 0.5, CRITEO.numerical)
    return dense, ids, np.log(dense) @ slopes - 1.0


Generator = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def make_drawn(folder: Path, days: int, rows: int, generate: Generator) -> None:
    """A dataset folder whose labels are drawn from known probabilities."""
    folder.mkdir(parents=True)
    largest = np.zeros(CRITEO.categorical, np.int64)
    for day in range(days):
        rng = np.random.default_rng([7, day])
        dense, ids, odds = generate(rng, rows)
        chance = 1 / (1 + np.exp(-odds))
        labels = (rng.random(rows) < chance).astype(np.int32)
        largest = np.maximum(largest, ids.max(0))
        arrays = {"dense": dense.astype(np.float32), "sparse": ids, "labels": labels[:, None]}
        for part, array in arrays.items():
            np.save(folder / name_array_file(day, part), array)
    test = split_last_day(rows)[1]
    np.save(folder / CHANCES, chance[test.start :])
    DatasetMeta([rows] * days, [int(size) + 1 for size in largest], made_by="benchmarks/defaults.py").save(
        folder
    )


def make_toy(folder: Path, days: int, rows: int) -> None:
    """The project's own toy data, through its own preprocessing."""
    raw = folder.with_name(folder.name + "-raw")
    for words in (
        ["toy", raw, "--days", days, "--rows", rows],
        ["run", "--input_dir", raw, "--output_dir", folder, "--no_md5"],
    ):
        subprocess.run([sys.executable, "-m", "dlrm.prep", *map(str, words)], cwd=ROOT, check=True)


DATASETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "toy_small": ("toy, 5 days of 5,000", lambda folder: make_toy(folder, 5, 5_000)),
    "toy": ("toy, 24 days of 20,000: the demo's", lambda folder: make_toy(folder, 24, 20_000)),
    "rare": (
        "3 % clicks, weak signal in large tables",
        lambda folder: make_drawn(folder, 5, 60_000, draw_rare_clicks),
    ),
    "rare_large": (
        "the same with two million training rows",
        lambda folder: make_drawn(folder, 5, 500_000, draw_rare_clicks),
    ),
    "pairs": (
        "50 % clicks, only pairs of ids count",
        lambda folder: make_drawn(folder, 6, 60_000, draw_pairs_of_ids),
    ),
    "noise": (
        "counts count, ids are noise in long tables",
        lambda folder: make_drawn(folder, 5, 25_000, draw_noise_in_large_tables),
    ),
}


def find_best(folder: Path) -> dict[str, float]:
    """AUROC and log loss of the true probabilities on the test rows; empty where they are not known."""
    if not (folder / CHANCES).exists():
        return {}
    chances = np.load(folder / CHANCES)
    last = DatasetMeta.load(folder).days - 1
    labels = np.load(folder / name_array_file(last, "labels"))[-len(chances) :, 0]
    log_loss = -np.mean(np.log(np.where(labels == 1, chances, 1 - chances)))
    return {"auroc": compute_auroc(chances, labels), "log_loss": float(log_loss)}


def compute_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """For scores without ties: the share of pairs of a click and another row that are in the right order."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    clicks = int(labels.sum())
    return float((ranks[labels == 1].sum() - clicks * (clicks + 1) / 2) / (clicks * (len(labels) - clicks)))


def train(folder: Path, runs: Path, ranks: int, options: str) -> dict[str, Any]:
    """One run of 3_train.sh with its defaults: what it says it chose, and its results."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PBS_")}
    environment |= {
        "DATASET_DIR": str(folder), "RESULTS": str(runs), "NPROC": str(ranks), "TRACE": "no", "ARGS": options,
    }  # fmt: skip
    before = set(runs.glob("*")) if runs.exists() else set()
    done = subprocess.run([str(ROOT / "3_train.sh")], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder.name}: {(done.stdout + done.stderr)[-3000:]}")
    (run,) = [each for each in runs.iterdir() if each not in before and (each / "results.json").exists()]
    config = json.loads((run / "config.json").read_text())
    test = json.loads((run / "results.json").read_text())["evaluations"]["test"]
    return {"chosen": config["launch"]["chosen"], **test}


def compare_with_best(test: dict[str, Any], best: dict[str, float]) -> dict[str, Any]:
    """The gain over a constant predictor, as a share of what can be gained where that is known."""
    entropy = test["log_loss"] / test["normalized_entropy"]  # of the base rate: a constant's log loss
    gains = {"auroc": test["auroc"] - 0.5, "log_loss": entropy - test["log_loss"]}
    if best:
        shares = {
            "auroc": gains["auroc"] / (best["auroc"] - 0.5),
            "log_loss": gains["log_loss"] / (entropy - best["log_loss"]),
        }
        learned = min(shares.values()) >= GOOD_SHARE
    else:
        shares = {}
        learned = test["auroc"] >= LEAST_AUROC and gains["log_loss"] >= LEAST_GAIN * entropy
    return {"entropy": entropy, "best": best, "share_of_best": shares, "learned": learned}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for datasets and runs (default: a temporary one)")
    parser.add_argument("--only", default=",".join(DATASETS), help="names, comma separated")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, comma separated")
    parser.add_argument("--options", default="", help="options of the training, to compare with the defaults")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        for name in args.only.split(","):
            title, make = DATASETS[name]
            folder = work / name
            if not folder.exists():
                make(folder)
            best = find_best(folder)
            for ranks in map(int, args.ranks.split(",")):
                test = train(folder, work / "runs", ranks, args.options)
                row = {
                    "dataset": name,
                    "title": title,
                    "ranks": ranks,
                    **test,
                    **compare_with_best(test, best),
                }
                rows.append(row)
                print(
                    f"{name}, {ranks} ranks: AUROC {row['auroc']:.4f} (best {best.get('auroc', 0):.4f}), "
                    f"log loss {row['log_loss']:.4f} (best {best.get('log_loss', 0):.4f}, constant "
                    f"{row['entropy']:.4f}), {'' if row['learned'] else 'NOT '}learned; {row['chosen']}",
                    flush=True,
                )
    print(json.dumps({"runs": rows}))
    sys.exit(not all(row["learned"] for row in rows))


if __name__ == "__main__":
    main()
