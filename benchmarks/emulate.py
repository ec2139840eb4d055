"""How faithful is an emulated run? Real trainings, each emulated, and both compared by their traces.

Each case is one traced training on two ranks: as it is, waiting for slow reads (a library below DFTracer
makes them slow, in the emulation too), with checkpoints, with tables in files. Printed are the requests that
differ and the errors of step times, waiting and bandwidth over time, as `analysis compare` states them; the
median of the repetitions. Last line: one JSON object. The emulation wants the machine that the training had:
other work shows in the step times, and the load is printed.

usage: python benchmarks/emulate.py [--steps N] [--repeat N] [--cases A,B]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from analysis.workload.fidelity import compare_with_original  # noqa: E402
from benchmarks.whatif import build_slow_reads, make_data  # noqa: E402

SLOW = {"SLOW_LATENCY_US": "5000", "SLOW_BYTES_PER_US": "1"}
CASES: dict[str, tuple[list[str], Mapping[str, str]]] = {  # options of the training, its variables
    "as it is": ([], {}),
    "waits for data": (["--source", "stream", "--read_chunk_mb", "0.5"], SLOW),
    "checkpoints": (["--checkpoint_every_steps", "60"], {}),
    "tables in files": (["--store_type", "cached_ssd", "--cache_memory_budget_mb", "1"], {}),
}


def run_ranks(words: list[object], variables: Mapping[str, str]) -> None:
    command = ["mpiexec", "-n", "2", "./launcher.sh", "python", "-m", *map(str, words)]
    fixed = {"OMP_WAIT_POLICY": "passive", "DLRM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **fixed, **variables}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"benchmarks/emulate.py: {' '.join(command)}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data, library = make_data(folder), build_slow_reads(folder)
        for case in options.cases.split(","):
            more, slow = CASES[case]
            variables = {**slow, "SLOW_FOLDER": str(data), "LD_PRELOAD": str(library)} if slow else {}
            results = []
            for number in range(options.repeat):
                original, copy = (folder / f"{case} {number} {what}" for what in ("original", "copy"))
                run_ranks(
                    ["dlrm.train", "--preset", "toy", "--in_memory_binary_criteo_path", data, "--trace",
                     "--max_steps", options.steps, "--output_dir", original, *more],
                    variables,
                )  # fmt: skip
                run_ranks(["dlrm.emulate", "--from", original, "--output_dir", copy], variables)
                results.append(compare_with_original(original, copy))
            errors = {
                name: float(np.median([each.errors[name] for each in results])) for name in results[0].errors
            }
            requests = sum(file.requests for file in results[0].files)
            differ = max(each.different_requests for each in results)
            found[case] = {"requests": requests, "different": differ, "errors": errors}
            print(f"{case}: {requests:,} requests, {differ:,} differ, load {os.getloadavg()[0]:.1f}")
            for name, error in errors.items():
                values = results[-1].values.get(name)
                text = f"  ({values[0]:.4g} and {values[1]:.4g})" if values else ""
                print(f"  {name:28} {error:7.2%}{text}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
