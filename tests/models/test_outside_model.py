"""A model that is not in the package: found by DLRM_MODELS, trained by 3_train.sh, read by the analysis."""

import json
import subprocess
from pathlib import Path

import pytest
from support.job_scripts import clean_environment

from common.errors import UserError
from dlrm.models.registry import find_model

ROOT = Path(__file__).parents[2]
WHERE = {"DLRM_MODELS": "two_layers", "PYTHONPATH": str(ROOT / "tests" / "support")}


def start(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=clean_environment(**WHERE, **more), capture_output=True, text=True, timeout=240
    )


@pytest.mark.mpi
def test_3_train_runs_it_and_resumes(tmp_path: Path) -> None:
    more = {"MODEL": "two_layers", "NPROC": "2", "BATCH_SIZE": "8", "ARGS": "--checkpoint_every_steps 2"}
    words = ["./3_train.sh", "--max_steps", "4"]
    done = start(*words, RESULTS=str(tmp_path), **more)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = (path for path in tmp_path.iterdir() if (path / "config.json").exists())
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["rows"] == 8 and config["launch"]["world_size"] == 2
    results = json.loads((run / "results.json").read_text())
    assert results["evaluations"]["test"]["samples"] == 6 * 8 * 2
    assert "coverage 100.0%" in done.stdout and "Two layers" in (run / "report.html").read_text()

    again = start(words[0], "--max_steps", "6", RESUME=str(run), TRACE="no", **more)
    assert again.returncode == 0 and "step 4, epoch 0" in again.stdout, again.stdout + again.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 6


def test_help_shows_its_options() -> None:
    done = start("python", "-m", "dlrm.train", "--model", "two_layers", "--help")
    assert done.returncode == 0 and "--rows N" in done.stdout and "--interaction_type" not in done.stdout


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ("", "model two_layers is unknown; there are dlrm, bert4rec"),
        ("no_such_module", "DLRM_MODELS: no_such_module cannot be loaded"),
        ("json", "DLRM_MODELS: json cannot be loaded"),
    ],
)
def test_mistakes_in_one_line(modules: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        find_model("two_layers", {"DLRM_MODELS": modules})
    assert "\n" not in str(caught.value)
