"""A run folder as training leaves it, with made traces, and the command line that reports on it."""

import json
from pathlib import Path

from support.analysis_command import run_command
from support.made_traces import training

ROOT = Path(__file__).parents[2]
METRICS = [
    {"step": 1, "epoch": 0, "loss": 0.7, "samples_per_second": 900.0, "time": 1_795_252_102.05},
    {"step": 21, "epoch": 0, "loss": 0.5, "samples_per_second": 1000.0, "time": 1_795_252_102.3},
    {"step": 40, "epoch": 1, "split": "val", "auroc": 0.8, "time": 1_795_252_102.5},
]


def analysis(*arguments: object, code: int = 0) -> tuple[str, str]:
    """What `python -m analysis` prints to stdout and to stderr, in a fork; but for the line on compiling,
    which comes where another process has taken this one's place in numba's list of compiled loops.
    """
    done = run_command(*arguments)
    assert done.code == code, done.err + done.out
    assert "Traceback" not in done.err
    lines = done.err.splitlines(keepends=True)
    return done.out, "".join(line for line in lines if not line.startswith("analysis: compiling the loops"))


def a_run(folder: Path, wait: int = 100) -> Path:
    for rank in range(2):
        training(rank, 2, wait=wait).write(folder)
    config = {"data": {"batch_size": 256}, "model": {"embedding_dim": 16}, "launch": {"device": "cpu"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"samples_per_second": 1000.0, "test_auroc": 0.81}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    return folder
