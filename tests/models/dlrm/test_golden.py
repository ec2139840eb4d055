"""Losses of the first steps as they were when this was written: a change that moves them must say so.

To write them anew, when they are meant to change: python tests/models/dlrm/test_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from dlrm.config.parser import parse_options
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.presets import PRESETS
from dlrm.runtime.ranks import Ranks

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).with_name("golden_losses.json")
SIZES = "9,800,7,60,500,3,4,5,6,700,8,900,10,11,12,13,14,15,16,17,1000,19,20,21,22,23"
COMMON = f"""--num_embeddings_per_feature {SIZES}
--embedding_dim 8 --dense_arch_layer_sizes 32,8 --over_arch_layer_sizes 32,16,1 --batch_size 64
--limit_train_batches 20 --report_every 1 --seed 11"""
RUNS = {
    "dot sgd": "--learning_rate 0.5",
    "dot adagrad warm-up and decay": "--optimizer adagrad --learning_rate 0.05 --lr_warmup_steps 5"
    " --lr_decay_start 10 --lr_decay_steps 10",
    "dcn adagrad": "--interaction_type dcn --dcn_num_layers 2 --dcn_low_rank_dim 8 --adagrad"
    " --learning_rate 0.05",
    "projection": "--interaction_type projection --interaction_branch1_layer_sizes 16,16"
    " --interaction_branch2_layer_sizes 16,16 --learning_rate 0.5",
    "multi-hot": "--learning_rate 0.5 --multi_hot_sizes 1,2,3,1,2,3,1,2,3,1,2,3,1,2,3,1,2,3,1,2,3,1,2,3,1,2"
    " --multi_hot_distribution_type pareto",
}


def losses(words: str, folder: Path) -> list[float]:
    from dlrm.models.dlrm.spec import SPEC
    from dlrm.trainer import trainer

    argv = [*COMMON.split(), *words.split(), "--output_dir", str(folder)]
    trainer.train(SPEC, parse_options(Config, argv, "train", "", PRESETS), Ranks())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_what_they_were(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    golden = json.loads(GOLDEN.read_text())[name]
    assert losses(RUNS[name], tmp_path / "run") == pytest.approx(golden, abs=1e-5)
    assert len(set(golden)) == 20


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            name: losses(words, Path(scratch) / str(number))
            for number, (name, words) in enumerate(RUNS.items())
        }
    GOLDEN.write_text(json.dumps(found, indent=0) + "\n")
