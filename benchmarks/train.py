"""Training against the reference's loop: same model, data, settings and first weights, run in turn.

    python benchmarks/train.py [--rounds 4] [--reference_path CHECKOUT_OF_MLCOMMONS_TORCHREC_DLRM]

Prints each run, then ratios with their spread, and a JSON object as the last line. Start-up is the time from
starting the processes to the end of the first step, on files of a million rows, of which the reference loads
all before it begins. Both find bytecode of all modules and, after a pause, memory that was not used lately:
some virtual machines have given it back by then. `others` is what foreign work took meanwhile, in cores:
above 0.2 the ratios of wall times say little, and those of processor time (step_cpu, start_cpu) are left.
"""

import argparse
import compileall
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bound  # next to this file
import numpy as np
import torch

from dlrm.data.criteo import CRITEO

ROOT = Path(__file__).parents[1]
DAYS, WARM_UP, WINDOW = 24, 10, 5
PAUSE = 4  # seconds before a run
DENSE, OVER = (512, 256, 64), (512, 512, 256, 1)
MLPERF_HOTS = (
    "3,2,1,2,6,1,1,1,1,7,3,8,1,6,9,5,1,1,1,12,100,27,10,3,1,1"  # ids per feature of MLPerf's DLRM-v2
)


@dataclass
class Run:
    who: str
    start_seconds: float
    samples_per_second: float
    eval_samples_per_second: float
    eval_samples: int
    auroc: float
    step_cpu: float  # processor seconds of rank 0 per step: what is left to compare on a busy machine
    start_cpu: float  # until the end of the first step
    losses: Any  # the reference: of each step; ours: (step, mean since the report before)
    others: float

    def format_line(self) -> str:
        return (
            f"{self.who:<10} start {self.start_seconds:5.2f} s, "
            f"training {self.samples_per_second:9,.0f} samples/s, "
            f"evaluation {self.eval_samples_per_second:9,.0f} samples/s "
            f"({self.eval_samples} samples, AUROC {self.auroc:.6f}); "
            f"processor: start {self.start_cpu:.2f} s, step {self.step_cpu * 1e3:.0f} ms; "
            f"others {self.others:.2f}"
        )


def make_data(folder: Path, train_rows: int, eval_rows: int, seed: int = 0) -> None:
    """Criteo-like: skewed ids, labels that depend on some of the columns."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(DAYS):
        rows = 2 * eval_rows if day == DAYS - 1 else -(-train_rows // (DAYS - 1))
        dense = np.log1p(random.exponential(8, (rows, CRITEO.numerical))).astype(np.float32)
        sparse = np.exp(random.random((rows, CRITEO.categorical)) * np.log(3e7)).astype(np.int32)
        score = dense[:, 0] - dense[:, 1] + 0.5 * (sparse[:, 0] % 2) - 0.5 * (sparse[:, 1] % 3) - 0.5
        labels = (random.random(rows) < 1 / (1 + np.exp(-score))).astype(np.int32).reshape(-1, 1)
        for part, array in (("dense", dense), ("sparse", sparse), ("labels", labels)):
            np.save(folder / f"day_{day}_{part}.npy", array)


def busy_seconds() -> float:
    """Of all cores, everybody's work."""
    fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def run_on_ranks(ranks: int, command: list[str], log: Path) -> tuple[float, float]:
    """Run it on so many ranks here. When they were started; what others did meanwhile, in cores."""
    port = random.randrange(10_000, 20_000)  # below those that the system gives to connections
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy, begun, started = busy_seconds(), time.monotonic(), time.time()
    processes = []
    for rank in range(ranks):
        names = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with open(f"{log}.{rank}", "w") as out:
            processes.append(
                subprocess.Popen(command, env=os.environ | names, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise SystemExit(f"{' '.join(command)} ended with {codes}:\n{Path(f'{log}.0').read_text()[-3000:]}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return started, max(0.0, busy_seconds() - busy - ours) / (time.monotonic() - begun)


def compile_modules() -> None:
    """As 0_setup_env.sh does; an environment that forbids bytecode, and patches, leave some without."""
    torchrec = importlib.util.find_spec("torchrec")
    assert torchrec and torchrec.submodule_search_locations
    for folder in (ROOT / "dlrm", *torchrec.submodule_search_locations):
        compileall.compile_dir(folder, quiet=1)


def compute_rate(ends: Sequence[float], batch: int) -> float:
    return (len(ends) - WARM_UP) * batch / (ends[-1] - ends[WARM_UP - 1])


def train_reference(args: argparse.Namespace, data: Path, out: Path) -> Run:
    """One run of the reference's loop on all ranks. out: a folder for its results, made here."""
    command = [
        sys.executable, str(ROOT / "benchmarks" / "reference.py"), "--data", str(data), "--days", str(DAYS),
        "--out", str(out), "--batch_size", str(args.batch_size), "--steps", str(args.steps),
        "--num_embeddings", str(args.num_embeddings), "--embedding_dim", str(args.embedding_dim),
        "--dense", ",".join(map(str, DENSE)), "--over", ",".join(map(str, OVER)),
        "--interaction", args.interaction, "--optimizer", args.optimizer,
        "--learning_rate", str(args.learning_rate),
        *(["--multi_hot", MLPERF_HOTS] if args.multi_hot else []),
    ]  # fmt: skip
    out.mkdir(parents=True)
    started, others = run_on_ranks(args.ranks, command, out / "log")
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(args.ranks)]
    first, evaluation = ranks[0], ranks[0]["evaluation"]
    clock, cpu = zip(*first["ends"][: args.steps], strict=True)
    losses = np.mean([rank["losses"][: args.steps] for rank in ranks], axis=0)
    return Run(
        "reference",
        clock[0] - started - first["weights"],
        compute_rate(clock, args.ranks * args.batch_size),
        args.eval_rows / evaluation["seconds"],
        evaluation["samples"],
        evaluation["auroc"],
        (cpu[-1] - cpu[WARM_UP - 1]) / (args.steps - WARM_UP),
        cpu[0] - first["weights_cpu"],
        losses.tolist(),
        others,
    )


def train_ours(args: argparse.Namespace, data: Path, out: Path) -> Run:
    """One run of this project with the same model and data. out: its run folder, made here."""
    command = [
        sys.executable, "-m", "dlrm.train", "--in_memory_binary_criteo_path", str(data),
        "--output_dir", str(out), "--batch_size", str(args.batch_size), "--epochs", "1",
        "--limit_train_batches", str(args.steps), "--num_embeddings", str(args.num_embeddings),
        "--embedding_dim", str(args.embedding_dim), "--dense_arch_layer_sizes", ",".join(map(str, DENSE)),
        "--over_arch_layer_sizes", ",".join(map(str, OVER)), "--interaction_type", args.interaction,
        "--optimizer", args.optimizer, "--learning_rate", str(args.learning_rate),
        "--evaluate_on_epoch_end", "--report_every", str(WINDOW), "--seed", "0",
        *(["--multi_hot_sizes", MLPERF_HOTS] if args.multi_hot else []), *args.ours.split(),
    ]  # fmt: skip
    out.mkdir(parents=True)
    started, others = run_on_ranks(args.ranks, command, out / "log")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "loss" in line]
    evaluation = json.loads((out / "results.json").read_text())["evaluations"]["val"]
    warm = next(line for line in reports if line["step"] >= WARM_UP)
    samples = (reports[-1]["step"] - warm["step"]) * args.ranks * args.batch_size
    return Run(
        "ours",
        reports[0]["time"] - started,
        samples / (reports[-1]["time"] - warm["time"]),
        args.eval_rows / evaluation["seconds"],
        evaluation["samples"],
        evaluation["auroc"],
        (reports[-1]["cpu_seconds"] - warm["cpu_seconds"]) / (reports[-1]["step"] - warm["step"]),
        reports[0]["cpu_seconds"],
        [(line["step"], line["loss"]) for line in reports],
        others,
    )


def find_largest_difference(reference: list[float], reports: list[tuple[int, float]]) -> float:
    """The largest, between a report's mean loss and that of the same steps of the reference."""
    steps = [0, *(step for step, _ in reports)]
    return max(
        abs(float(np.mean(reference[begin:end])) - loss)
        for begin, end, (_, loss) in zip(steps, steps[1:], reports, strict=False)
    )


def train_mlcommons(args: argparse.Namespace, data: Path, out: Path) -> dict[str, float]:
    """MLCommons' own program prints no speed: two runs of different lengths tell."""
    seconds = {}
    for steps in (args.steps // 2, args.steps):
        command = [
            sys.executable, str(Path(args.reference_path) / "dlrm_main.py"),
            "--in_memory_binary_criteo_path", str(data), "--batch_size", str(args.batch_size),
            "--limit_train_batches", str(steps), "--num_embeddings", str(args.num_embeddings),
            "--embedding_dim", str(args.embedding_dim), "--dense_arch_layer_sizes", ",".join(map(str, DENSE)),
            "--over_arch_layer_sizes", ",".join(map(str, OVER)), "--learning_rate", str(args.learning_rate),
            "--interaction_type", args.interaction, *(["--adagrad"] if args.optimizer == "adagrad" else []),
        ]  # fmt: skip
        begun = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        run_on_ranks(args.ranks, command, out / f"log{steps}")
        seconds[steps] = time.monotonic() - begun
    (few, short), (many, long) = sorted(seconds.items())
    batch = args.ranks * args.batch_size
    return {"mlcommons_samples_per_second": (many - few) * batch / (long - short)}


def describe_spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def main() -> None:
    cuda = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=cuda or 2)
    parser.add_argument("--steps", type=int, default=60, help="of a run, at most what the data has")
    parser.add_argument("--batch_size", type=int, default=2048, help="per rank")
    parser.add_argument("--train_rows", type=int, default=1_000_000, help="at least, in the files")
    parser.add_argument("--eval_rows", type=int, default=40960)
    parser.add_argument("--num_embeddings", type=int, default=100_000)
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--interaction", choices=("original", "dcn"), default="original")
    parser.add_argument("--optimizer", choices=("sgd", "adagrad"), default="sgd")
    parser.add_argument(
        "--multi_hot", action="store_true", help="ids per feature as in MLPerf's DLRM-v2: 1 to 100"
    )
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--ours", default="", help="more options for our runs, in one string")
    parser.add_argument("--reference_path", help="MLCommons' recommendation_v2/torchrec_dlrm, run as well")
    args = parser.parse_args()
    args.steps -= args.steps % WINDOW
    if args.steps < WARM_UP + WINDOW:
        parser.error(f"--steps: at least {WARM_UP + WINDOW}, of which {WARM_UP} are not timed")
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        rows = max(args.train_rows, args.steps * args.batch_size * args.ranks)
        make_data(here / "data", rows, args.eval_rows)
        compile_modules()
        flops = bound.count_operations(CRITEO.numerical, DENSE, OVER, CRITEO.categorical, args.embedding_dim)
        limit = bound.measure_bound(
            args.ranks, args.batch_size, args.embedding_dim, CRITEO.categorical, args.num_embeddings, flops
        )
        runs: dict[str, list[Run]] = {"reference": [], "ours": []}
        for number in range(args.rounds):
            turn = [train_reference, train_ours] if number % 2 == 0 else [train_ours, train_reference]
            for train in turn:
                time.sleep(PAUSE)
                run = train(args, here / "data", here / f"{train.__name__}{number}")
                runs[run.who].append(run)
                print(run.format_line(), flush=True)
        theirs = train_mlcommons(args, here / "data", here / "mlcommons") if args.reference_path else {}
    print_report(args, runs, limit, theirs)


def print_report(
    args: argparse.Namespace, runs: dict[str, list[Run]], limit: dict[str, float], theirs: dict[str, float]
) -> None:
    """Print the ratios of each pair of runs, then all as JSON.

    runs: "reference" and "ours", run by turns. limit, theirs: further numbers, by name, for the JSON.
    """
    pairs = list(zip(runs["reference"], runs["ours"], strict=True))
    ratios = {
        "training": describe_spread([b.samples_per_second / a.samples_per_second for a, b in pairs]),
        "evaluation": describe_spread(
            [b.eval_samples_per_second / a.eval_samples_per_second for a, b in pairs]
        ),
        "start": describe_spread([b.start_seconds / a.start_seconds for a, b in pairs]),
        "step_cpu": describe_spread([b.step_cpu / a.step_cpu for a, b in pairs]),
        "start_cpu": describe_spread([b.start_cpu / a.start_cpu for a, b in pairs]),
    }
    apart = max(find_largest_difference(a.losses, b.losses) for a, b in pairs)
    fastest = max(run.samples_per_second for run in runs["ours"])
    of_bound = fastest / limit["samples_per_second"]
    print()
    for name, each in ratios.items():
        low, high = each["low"], each["high"]
        print(f"{name + ', ours / reference':<32} {each['median']:.2f} ({low:.2f} .. {high:.2f})")
    print(f"{'largest difference of the losses':<32} {apart:.2e} over {args.steps} steps")
    print(
        f"{'measured bound':<32} {limit['samples_per_second']:,.0f} samples/s "
        f"({limit['gflops_per_rank']:.0f} GFLOP/s per rank); our fastest run reached {of_bound:.0%} of it"
    )
    for name, value in theirs.items():
        print(f"{name:<32} {value:,.0f}")
    settings = {key: value for key, value in vars(args).items() if key not in ("ours", "reference_path")}
    result = {
        **{f"{name}_ratio": each for name, each in ratios.items()}, "loss_difference": apart, "bound": limit,
        "of_bound": of_bound, **theirs, "settings": settings,
        "runs": [{k: v for k, v in asdict(r).items() if k != "losses"} for both in pairs for r in both],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
