"""What does `python -m dlrm.traced` cost a plain PyTorch loop? The same script, by it and by python alone.

A DataLoader with two workers that np.load files of some rows each, an MLP, SGD. Both run at the same time,
each on a core of its own with its workers, and change cores from pair to pair: a machine whose speed changes
from one minute to the next changes both. Last line: one JSON object.

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
import json, os, sys, time
from pathlib import Path
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset
data, steps, batch, rows, width = sys.argv[1], *map(int, sys.argv[2:6])
class Rows(Dataset):
    def __len__(self):
        return steps * batch // rows
    def __getitem__(self, file):
        return torch.from_numpy(np.load(f"{data}/{file % 64}.npy"))
def workers_seconds():
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")
torch.manual_seed(0)
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(1024, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
begun = None
for number, inputs in enumerate(DataLoader(Rows(), batch // rows, num_workers=2)):
    if number == 20:
        begun, own, others = time.perf_counter(), time.process_time(), workers_seconds()
    optimizer.zero_grad()
    loss = net(inputs.flatten(0, 1)).square().mean()
    loss.backward()
    optimizer.step()
    if number == steps - 1:
        wall, processor = time.perf_counter() - begun, time.process_time() - own
        workers = workers_seconds() - others
print(json.dumps({
    "step_ms": 1000 * wall / (steps - 20), "processor_ms": 1000 * processor / (steps - 20),
    "workers_ms": 1000 * workers / (steps - 20), "loss": loss.item(),
}))
"""


def run_pair(folder: Path, options: argparse.Namespace, cores: list[int]) -> list[dict[str, float]]:
    """What the script says of itself without and with the tracer. cores: of the one and of the other."""
    script = [
        folder / "loop.py", folder, options.steps, options.batch_size, options.rows_per_file, options.width,
    ]  # fmt: skip
    traced = ["-m", "dlrm.traced", "--output_dir", folder / "run", *script]
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, *map(str, words)], cwd=ROOT,
            stdout=subprocess.PIPE, text=True,
        )
        for core, words in zip(cores, (script, traced), strict=True)
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a script failed: see above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def main() -> None:
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1])
    for name, default in (
        ("pairs", 8),
        ("steps", 220),
        ("batch_size", 128),
        ("rows_per_file", 128),
        ("width", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("needs two cores: one for each of the two runs")
    pairs = list[list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "loop.py").write_text(SCRIPT)
        for number in range(64):
            rows = np.random.default_rng(number).normal(size=(options.rows_per_file, 1024))
            np.save(folder / f"{number}.npy", rows.astype(np.float32))
        for _ in range(options.pairs):
            pairs.append(run_pair(folder, options, cores))
            cores.reverse()
            print(json.dumps({"load": os.getloadavg()[0], "plain_and_traced": pairs[-1]}), flush=True)
    assert len({each["loss"] for pair in pairs for each in pair}) == 1, "tracing changed the loss"
    report: dict[str, object] = {"pairs": options.pairs}
    for key in ("step_ms", "processor_ms", "workers_ms"):
        plain, traced = ([pair[side][key] for pair in pairs] for side in (0, 1))
        costs = [100 * (b / a - 1) for a, b in zip(plain, traced, strict=True)]
        # of two pairs after each other each side has had each core once
        costs = [statistics.mean(costs[at : at + 2]) for at in range(0, len(costs) - 1, 2)] or costs
        report[key] = [round(statistics.median(plain), 2), round(statistics.median(traced), 2)]
        report[f"{key}_cost_percent"] = [
            round(value, 2) for value in (statistics.median(costs), min(costs), max(costs))
        ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
