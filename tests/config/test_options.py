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


@pytest.mark.parametrize(
    ("name", "ranks", "rows_of_step", "rate", "schedule", "largest_table"),
    [
        ("kaggle", 1, 128, 0.1, (0, 0, 0), None),
        ("terabyte", 1, 2048, 0.1, (0, 0, 0), 10_000_000),
        ("mlperf_v1", 8, 55_296, 24.0, (2750, 49_315, 27_772), 39_979_771),
        ("mlperf_x2", 16, 65_536, 15.0, (0, 0, 0), 80_000_000),
        ("full_size", 80, 65_520, 15.0, (0, 0, 0), 292_775_614),
        ("mlperf_v2", 8, 65_536, 0.005, (0, 0, 0), 40_000_000),
        ("nvidia_base", 1, 32_768, 28.0, (6400, 64_000, 80_000), None),
        ("oneflow", 8, 55_296, 24.0, (2750, 49_315, 27_772), 39_979_772),
    ],
)
def test_presets_have_the_published_numbers(
    name: str,
    ranks: int,
    rows_of_step: int,
    rate: float,
    schedule: tuple[int, ...],
    largest_table: int | None,
) -> None:
    config = parsed("--preset", name)
    optim, model = config.optim, config.model
    assert config.data.batch_size * ranks == rows_of_step and optim.learning_rate == rate
    assert (optim.lr_warmup_steps, optim.lr_decay_start, optim.lr_decay_steps) == schedule
    sizes = model.num_embeddings_per_feature
    assert (max(sizes) if sizes else model.max_table_size) == largest_table
    assert model.num_embeddings is None  # no table is made longer than its ids


def test_help_lists_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    listed = capsys.readouterr().out.partition("\npresets:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(PRESETS)
    assert all(len(line.split()) > 2 for line in listed)


def test_options_that_were_given_are_known_also_where_they_equal_the_default() -> None:
    run = parsed("--batch_size", "32", "--no-evaluate_on_epoch_end", "--adagrad").run
    assert run.given_options == ("adagrad", "batch_size", "evaluate_on_epoch_end") and run.preset is None
    run = parsed("--preset", "kaggle").run
    assert run.preset == "kaggle" and "learning_rate" in run.given_options


def test_the_dump_holds_every_option(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(as_json(parsed(), {"world_size": 2}))
    values = json.loads((tmp_path / "config.json").read_text())
    assert set(values) == {"data", "model", "optim", "plan", "run", "checkpoint", "inference", "launch"}
    assert values["data"]["batch_size"] == 32 and values["launch"] == {"world_size": 2}
