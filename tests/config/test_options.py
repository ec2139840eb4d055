"""Options: MLCommons' flags are all there, mistakes end in one line, presets yield to flags."""

import json
from pathlib import Path

import pytest

from dlrm.config.parser import as_json, parse_options
from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.presets import PRESETS
from dlrm.runtime.errors import UserError

# every flag of MLCommons' recommendation_v2/torchrec_dlrm/dlrm_main.py, with a value
MLCOMMONS = """
--epochs 1 --batch_size 32 --drop_last_training_batch --test_batch_size 64 --limit_train_batches 5
--limit_val_batches 5 --limit_test_batches 5 --dataset_name criteo_1t --num_embeddings 100
--num_embeddings_per_feature 1,2,3 --dense_arch_layer_sizes 512,256,64 --over_arch_layer_sizes
512,512,256,1 --embedding_dim 64 --interaction_branch1_layer_sizes 2048,2048
--interaction_branch2_layer_sizes 2048,2048 --dcn_num_layers 3 --dcn_low_rank_dim 512 --seed 1
--pin_memory --mmap_mode --in_memory_binary_criteo_path /x --learning_rate 15.0 --shuffle_batches
--shuffle_training_set --validation_freq_within_epoch 10 --validation_auroc 0.8
--evaluate_on_epoch_end --evaluate_on_training_end --adagrad --interaction_type=dcn
--collect_multi_hot_freqs_stats --multi_hot_sizes=3,2,1 --multi_hot_distribution_type uniform
--lr_warmup_steps 1 --lr_decay_start 2 --lr_decay_steps 3 --print_lr --allow_tf32
--print_sharding_plan --print_progress
"""


def parsed(*argv: str) -> Config:
    return parse_options(Config, argv, "python -m dlrm.train", "Train.", PRESETS)


def test_mlcommons_flags_are_understood() -> None:
    config = parsed(*MLCOMMONS.split())
    assert config.model.num_embeddings_per_feature == (1, 2, 3)
    assert config.optim.name == "adagrad" and config.model.interaction_type == "dcn"
    assert config.data.multi_hot_sizes == (3, 2, 1) and config.run.print_progress
    assert parsed("--synthetic_multi_hot_criteo_path", "/y").data.kind == "multi_hot"


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--bogus"], "--bogus"),
        (["--batch_size", "0"], "--batch_size"),
        (["--batch_size", "many"], "--batch_size"),
        (["--interaction_type", "sum"], "--interaction_type"),
        (["--trace"], "--output_dir"),
        (["--over_arch_layer_sizes", "8,2"], "--over_arch_layer_sizes"),
        (["--lr_warmup_steps", "9", "--lr_decay_start", "3", "--lr_decay_steps", "3"], "--lr_decay_start"),
        (
            ["--in_memory_binary_criteo_path", "a", "--synthetic_multi_hot_criteo_path", "b"],
            "--in_memory_binary_criteo_path",
        ),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], names: str) -> None:
    with pytest.raises(UserError, match=names):
        parsed(*argv)


def test_options_can_be_checked_alone() -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--batch_size", "7", "--validate_only")
    assert ended.value.code in (0, None)
    with pytest.raises(UserError, match="--batch_size"):
        parsed("--batch_size", "0", "--validate_only")


def test_the_old_name_of_validate_only_is_accepted_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--batch_size", "7", "--check_options")
    assert ended.value.code in (0, None)
    assert capsys.readouterr().err == (
        "dlrm: --check_options is now --validate_only; this release accepts both\n"
    )


def test_flags_win_over_presets_and_all_presets_are_valid() -> None:
    for name in PRESETS:
        assert parsed("--preset", name, "--batch_size", "7").data.batch_size == 7
    assert parsed("--preset", "mlperf_v2").model.interaction_type == "dcn"


def test_the_dump_holds_every_option(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(as_json(parsed(), {"world_size": 2}))
    values = json.loads((tmp_path / "config.json").read_text())
    assert set(values) == {"data", "model", "optim", "plan", "run", "checkpoint", "launch"}
    assert values["data"]["batch_size"] == 32 and values["launch"] == {"world_size": 2}
