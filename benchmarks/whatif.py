"""Are the predictions of `python -m analysis whatif` true? Real trainings, once as they are and once changed.

Each family is one run, from whose trace everything is predicted, and runs with one setting changed: the
speed of storage (a library below DFTracer makes reads of the dataset, or calls on tables in files, as slow
as asked), its latency, the queue, the chunk of a read, the number of ranks, and of emulated runs (python -m
dlrm.emulate) what a step computes. What is compared is the training's time per step, traced. Nothing is
tuned between the families. Last line: one JSON object. Other work on the machine changes how long computing
takes between two runs: each line has its load.

usage: python benchmarks/whatif.py [--steps N] [--batch_size N] [--families A,B]
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from analysis.workload.simulate import Model, Scenario, make_model, measure, predict  # noqa: E402
from analysis.workload.steps import measure_steps  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """Of a real run."""

    MB_per_s: float  # of the reads of each rank
    latency_ms: float = 1.0
    prefetch: int = 4
    chunk_mb: float = 0.5
    ranks: int = 1
    compute_ms: float | None = None  # of an emulated step, which waits so long; None: a real training
    rows_ms: float | None = None  # of a call on a table in a file; None: tables are in memory
    batch_size: int | None = None  # of a rank; None: as the command line says


FAMILIES = {  # name -> the run that is traced, and what is changed in the others
    "waits": (
        Setting(MB_per_s=4),
        ({"MB_per_s": 8}, {"MB_per_s": 16}, {"MB_per_s": 2}, {"latency_ms": 20}, {"prefetch": 1},
         {"prefetch": 16}, {"chunk_mb": 0.1}, {"chunk_mb": 2}, {"ranks": 2}),
    ),
    "hidden": (
        Setting(MB_per_s=40, latency_ms=2, chunk_mb=1),
        ({"MB_per_s": 5}, {"MB_per_s": 2.5}, {"latency_ms": 60}, {"prefetch": 1}, {"chunk_mb": 0.1}),
    ),
    "two_ranks": (
        Setting(MB_per_s=4, latency_ms=2, ranks=2),
        ({"MB_per_s": 8}, {"MB_per_s": 2}, {"latency_ms": 20}, {"prefetch": 1}),
    ),
    "emulated_waits": (
        Setting(MB_per_s=5, latency_ms=1.5, chunk_mb=0.3, compute_ms=15),
        ({"MB_per_s": 10}, {"MB_per_s": 2.5}, {"latency_ms": 15}, {"prefetch": 1}, {"chunk_mb": 1.5},
         {"compute_ms": 5}, {"compute_ms": 40}),
    ),
    "emulated_hidden": (
        Setting(MB_per_s=30, latency_ms=2, chunk_mb=1, compute_ms=20),
        ({"MB_per_s": 4}, {"latency_ms": 50}, {"prefetch": 1}, {"compute_ms": 3}),
    ),
    "emulated_ranks": (
        Setting(MB_per_s=6, latency_ms=2, ranks=2, compute_ms=15),
        ({"MB_per_s": 12}, {"MB_per_s": 3}, {"latency_ms": 20}, {"prefetch": 1}, {"compute_ms": 5},
         {"ranks": 4}),
    ),
    "tables": (
        Setting(MB_per_s=1000, rows_ms=2, batch_size=8),
        ({"rows_ms": 0.5}, {"rows_ms": 1}, {"rows_ms": 4}),
    ),
    "emulated_tables": (
        Setting(MB_per_s=1000, compute_ms=60, rows_ms=2, batch_size=8),
        ({"rows_ms": 0.5}, {"rows_ms": 4}, {"compute_ms": 20}, {"compute_ms": 180}),
    ),
}  # fmt: skip


def build_slow_reads(folder: Path) -> Path:
    library = folder / "slow_reads.so"
    source = ROOT / "benchmarks" / "slow_reads.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def make_data(folder: Path) -> Path:
    npy = folder / "npy"
    for words in (
        ["toy", folder / "tsv", "--days", 6, "--rows", 20_000, "--seed", 1],
        ["run", "--input_dir", folder / "tsv", "--output_dir", npy],
    ):
        command = [sys.executable, "-m", "dlrm.prep", *map(str, words)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return npy


def run_training(
    data: Path, library: Path, output: Path, setting: Setting, options: argparse.Namespace
) -> None:
    """A traced training with slow reads, or an emulated one."""
    command: list[object] = [
        "mpiexec", "-n", str(setting.ranks), "./launcher.sh", "python", "-m", "dlrm.train", "--preset", "toy",
        "--in_memory_binary_criteo_path", data, "--output_dir", output, "--trace", "--source", "stream",
        "--batch_size", setting.batch_size or options.batch_size, "--max_steps", options.steps,
        "--epochs", 99, "--limit_test_batches", 20, "--prefetch_batches", setting.prefetch,
        "--read_chunk_mb", setting.chunk_mb,
    ]  # fmt: skip
    if setting.rows_ms is not None:
        command += ["--store_type", "cached_ssd", "--cache_memory_budget_mb", 1]
        command += ["--persistent_path", output.parent / "rows" / output.name]
    if setting.compute_ms is not None:
        # what is emulated: only its model, its data and the calls on its tables matter
        source = output.parent / ("source" if setting.rows_ms is None else "source-tables")
        if not source.exists():
            quick = dataclasses.replace(setting, MB_per_s=1000, latency_ms=0, rows_ms=setting.rows_ms and 0.0)
            run_training(data, library, source, dataclasses.replace(quick, compute_ms=None), options)
        communication = "barrier" if setting.ranks > 1 else "none"
        command[: command.index("--preset")] = [sys.executable, "-m", "dlrm.emulate", "--from", source]
        del command[command.index("--preset") : command.index("--preset") + 2]
        command += ["--ranks", setting.ranks, "--compute", f"{setting.compute_ms}ms"]
        command += ["--communication", communication]
    slow = {
        "SLOW_FOLDER": str(data.resolve()), "SLOW_LATENCY_US": str(1e3 * setting.latency_ms),
        "SLOW_BYTES_PER_US": str(setting.MB_per_s), "LD_PRELOAD": str(library),
        "OMP_WAIT_POLICY": "passive", "DLRM_THREADS": "1",
    }  # fmt: skip
    if setting.rows_ms is not None:
        slow["SLOW_FOLDER"] = f"{output.parent.resolve()}/rows"
        slow["SLOW_LATENCY_US"] = str(1e3 * setting.rows_ms)
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | slow, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"benchmarks/whatif.py: {output.name}: {done.stderr[-2000:]}")


def make_scenario(base: Setting, changed: dict[str, float]) -> Scenario:
    """The change as the model takes it."""
    words = {
        "MB_per_s": lambda value: {"storage": value / base.MB_per_s},
        "latency_ms": lambda value: {"latency": value / base.latency_ms},
        "prefetch": lambda value: {"prefetch": value},
        "chunk_mb": lambda value: {"read_chunk_mb": value},
        "ranks": lambda value: {"ranks": value},
        "rows_ms": lambda value: {"storage": (base.rows_ms or 1) / value},
        "compute_ms": lambda value: {"compute": value / (base.compute_ms or 1)},
    }
    return Scenario(**{k: v for name, value in changed.items() for k, v in words[name](value).items()})


def measure_compute(model: Model) -> float:
    """Mean time that a step computes, without the first one: us."""
    return float(
        np.concatenate([p.compute[:, 1:].ravel() for p in model.passes if p.phase == "train"]).mean()
    )


def read_model(output: Path, setting: Setting) -> Model:
    return make_model(measure_steps(output), setting.prefetch, None, setting.chunk_mb, by_turns=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    parser.add_argument("--batch_size", type=int, default=512, help="of a rank")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in (default: they are removed)")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        data, library = make_data(Path(scratch)), build_slow_reads(Path(scratch))
        for family in options.families.split(","):
            base, changes = FAMILIES[family]
            run_training(data, library, folder / family, base, options)
            model = read_model(folder / family, base)
            print(f"{family}: {base}: {measure(model)[1]:.2f} ms a step, by the model "
                  f"{predict(model).step_ms:.2f}; {model.cost}", flush=True)  # fmt: skip
            for changed in changes:
                name = "_".join(f"{key}{value}" for key, value in changed.items())
                setting = dataclasses.replace(base, **changed)
                output = folder / f"{family}-{name}"
                run_training(data, library, output, setting, options)
                changed_model = read_model(output, setting)
                real = measure(changed_model)[1]
                scenario = make_scenario(base, changed)
                predicted = predict(model, scenario).step_ms
                error = predicted / real - 1
                # how long computing took in that run is not a setting: other work on the machine decides
                factor = measure_compute(changed_model) / measure_compute(model)
                corrected = predict(model, dataclasses.replace(scenario, compute=factor)).step_ms / real - 1
                case = {"family": family, **changed, "real_ms": real, "predicted_ms": predicted}
                found.append(case | {"error": error, "compute": factor, "error_with_its_compute": corrected})
                print(f"  {name}: {real:.2f} ms a step, predicted {predicted:.2f}, {error:+.1%}; "
                      f"computing took x{factor:.2f}: with that {corrected:+.1%}; "
                      f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    within, corrected_within = (
        sum(abs(case[name]) <= 0.1 for case in found) for name in ("error", "error_with_its_compute")
    )
    counts = {"cases": len(found), "within_10_percent": within, "with_their_compute": corrected_within}
    print(json.dumps(counts | {"load": os.getloadavg()[0], "errors": found}))


if __name__ == "__main__":
    main()
