"""What does `python -m dlrm.traced` cost a plain PyTorch loop? The same script, traced and not, by turns.

One process, a DataLoader with two workers that np.load files of some rows each, an MLP, SGD. Which of the two
comes first alternates. Last line: one JSON object. On a busy machine look at the spread, and at the processor
time, which is steadier.

usage: python benchmarks/traced.py [--pairs N] [--steps N] [--batch_size N] [--rows_per_file N] [--width N]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, resource, sys, time
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset
data, steps, batch, rows, width = sys.argv[1], *map(int, sys.argv[2:6])
class Rows(Dataset):
    def __len__(self):
        return steps * batch // rows
    def __getitem__(self, file):
        return torch.from_numpy(np.load(f"{data}/{file % 64}.npy"))
torch.manual_seed(0)
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(1024, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
begun = None
for number, inputs in enumerate(DataLoader(Rows(), batch // rows, num_workers=2)):
    if number == 20:
        begun, own = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    loss = net(inputs.flatten(0, 1)).square().mean()
    loss.backward()
    optimizer.step()
wall, processor = time.perf_counter() - begun, time.process_time() - own
children = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "step_ms": 1000 * wall / (steps - 20), "processor_ms": 1000 * processor / (steps - 20),
    "workers_ms": 1000 * (children.ru_utime + children.ru_stime) / steps, "loss": loss.item(),
}))
"""


def run_once(folder: Path, options: argparse.Namespace, traced: bool) -> dict[str, float]:
    environment = {**os.environ, "TRACE": "yes" if traced else "no"}
    command = [
        sys.executable,
        "-m",
        "dlrm.traced",
        "--output_dir",
        str(folder / "run"),
        str(folder / "loop.py"),
    ]
    command += [
        str(folder),
        str(options.steps),
        str(options.batch_size),
        str(options.rows_per_file),
        str(options.width),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    for name, default in (
        ("pairs", 5),
        ("steps", 220),
        ("batch_size", 128),
        ("rows_per_file", 128),
        ("width", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "loop.py").write_text(SCRIPT)
        for number in range(64):
            rows = np.random.default_rng(number).normal(size=(options.rows_per_file, 1024))
            np.save(folder / f"{number}.npy", rows.astype(np.float32))
        for pair in range(options.pairs):
            for traced in (False, True) if pair % 2 else (True, False):
                found[traced].append(run_once(folder, options, traced))
                print(
                    json.dumps({"traced": traced, "load": os.getloadavg()[0], **found[traced][-1]}),
                    flush=True,
                )
    assert len({each["loss"] for runs in found.values() for each in runs}) == 1, "tracing changed the loss"
    report: dict[str, object] = {"pairs": options.pairs}
    for key in ("step_ms", "processor_ms", "workers_ms"):
        plain, traced_ = ([each[key] for each in found[which]] for which in (False, True))
        costs = [100 * (b / a - 1) for a, b in zip(plain, traced_, strict=True)]
        report[key] = [round(statistics.median(plain), 2), round(statistics.median(traced_), 2)]
        report[f"{key}_cost_percent"] = [
            round(value, 2) for value in (statistics.median(costs), min(costs), max(costs))
        ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
