"""The MLPerf log against MLCommons' own compliance checker."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mlperf_logging.compliance_checker import mlp_compliance

RULES = "6.0.0"
CRITEO_VALIDATION_ROWS = 89137319
DCN = """--preset toy --interaction_type dcn --dcn_low_rank_dim 4 --dcn_num_layers 1 --mllog
--mllog_submitter somebody --validation_freq_within_epoch 20 --validation_auroc 0.6"""


def read_entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]


def is_compliant(path: Path) -> bool:
    checker = mlp_compliance.make_checker("training", RULES, False, False)
    return mlp_compliance.main(str(path), f"training_{RULES}/common.yaml", checker)[0]


@pytest.fixture
def log(toy: Path, train: Any) -> Path:
    done = train(2, *DCN.split(), "--in_memory_binary_criteo_path", toy)
    assert done.codes == [0, 0], done.err
    assert ":::MLLOG" in done.out[0] and ":::MLLOG" not in done.out[1]
    return done.folder / "mlperf.log"


def as_on_criteo(log: Path, auroc: float = 0.81) -> Path:
    """The same log, as if it had been made on the data that the rules require."""
    text = log.read_text()
    text = re.sub(r'("key": "eval_samples", "value": )\d+', rf"\g<1>{CRITEO_VALIDATION_ROWS}", text)
    text = re.sub(r'("key": "eval_accuracy", "value": )[0-9.]+', rf"\g<1>{auroc}", text)
    changed = log.with_name("criteo.log")
    changed.write_text(text)
    return changed


def test_the_checker_accepts_it(log: Path) -> None:
    assert is_compliant(as_on_criteo(log))
    assert not is_compliant(log)  # the toy's samples are not Criteo's: the checker does look
    assert not is_compliant(as_on_criteo(log, auroc=0.7))


def test_what_it_says(log: Path) -> None:
    entries = read_entries(log)
    keys = [line["key"] for line in entries]
    value = {line["key"]: line["value"] for line in entries}
    assert value["submission_benchmark"] == "dlrm_dcnv2" and value["submission_org"] == "somebody"
    assert value["global_batch_size"] == 2 * 256 and value["opt_adagrad_epsilon"] == 1e-8
    assert value["eval_samples"] == 1500
    kinds = {line["key"]: line["event_type"] for line in entries}
    assert kinds["init_start"] == kinds["run_start"] == "INTERVAL_START"
    assert kinds["init_stop"] == kinds["run_stop"] == "INTERVAL_END"
    stop = next(line for line in entries if line["key"] == "run_stop")
    assert stop["metadata"]["status"] == "success"
    accuracies = [line for line in entries if line["key"] == "eval_accuracy"]
    assert accuracies[0]["metadata"]["epoch_num"] == pytest.approx(20 / 30)
    order = ["cache_clear", "init_start", "init_stop", "run_start", "epoch_start", "eval_start", "run_stop"]
    assert [keys.index(key) for key in order] == sorted(keys.index(key) for key in order)
    for key in ("eval_samples", "train_samples", "run_stop", "init_stop", "seed"):
        assert keys.count(key) == 1


def test_a_run_that_does_not_reach_the_goal_is_aborted(toy: Path, train_here: Any) -> None:
    done = train_here("--preset", "toy", "--in_memory_binary_criteo_path", toy, "--max_steps", 3, "--mllog")
    stop = next(line for line in read_entries(done.folder / "mlperf.log") if line["key"] == "run_stop")
    assert stop["metadata"]["status"] == "aborted"
    again = train_here("--preset", "toy", "--in_memory_binary_criteo_path", toy, "--max_steps", 3)
    assert not (again.folder / "mlperf.log").exists()
