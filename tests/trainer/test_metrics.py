"""Exact metrics against scikit-learn, on several real ranks, uneven and tied."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

WORKER = """
import json, sys
import numpy as np, torch, torch.distributed as dist
from dlrm.trainer.metrics import AurocCollector
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
data = np.load(f"{folder}/rank{rank}.npz")
predictions = AurocCollector()
for part in np.array_split(np.arange(len(data["logits"])), 3):
    predictions.update(torch.from_numpy(data["logits"][part]), torch.from_numpy(data["labels"][part]))
result = predictions.compute()
if rank == world - 1:
    print(json.dumps(result), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def on_ranks(folder: Path, shares: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    world = len(shares)
    for rank, (logits, labels) in enumerate(shares):
        np.savez(folder / f"rank{rank}.npz", logits=logits, labels=labels)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(world), str(folder)], stdout=subprocess.PIPE
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    return json.loads(outputs[-1])


@pytest.mark.parametrize("sizes", [[1001], [700, 3], [500, 0, 2000]], ids=str)
def test_metrics_equal_scikit_learn(tmp_path: Path, sizes: list[int]) -> None:
    random = np.random.default_rng(len(sizes))
    shares = []
    for size in sizes:
        labels = (random.random(size) < 0.3).astype(np.float32)
        logits = np.round(random.normal(size=size) + labels, 1).astype(np.float32)  # many ties
        shares.append((logits, labels))
    result = on_ranks(tmp_path, shares)
    logits, labels = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert result["samples"] == sum(sizes)
    assert result["auroc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert result["log_loss"] == pytest.approx(log_loss(labels, chance), abs=1e-6)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, chance > 0.5), abs=1e-12)
    assert result["calibration"] == pytest.approx(chance.sum() / labels.sum(), abs=1e-6)


def test_a_set_of_one_class_has_no_auroc(tmp_path: Path) -> None:
    result = on_ranks(tmp_path, [(np.ones(5, np.float32), np.zeros(5, np.float32))])
    assert result["auroc"] is None and result["samples"] == 5
