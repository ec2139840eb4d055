"""Published settings, as functions that give the options their defaults: `--preset NAME`.

The first line of each function's text is what --help says of the preset. Batch sizes are per rank: a preset
has the published samples per step on the number of ranks in its line, otherwise on one.
"""

from collections.abc import Callable, Mapping
from typing import Any

Defaults = Mapping[str, Any]

SIZES_MLPERF_V1 = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938,
    155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
SIZES_MLPERF_V2 = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938,
    155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
)  # fmt: skip

SIZES_MLPERF_X2 = (
    80000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 80000000, 3067956, 405282, 10, 2209, 11938,
    155, 4, 976, 14, 80000000, 40790948, 80000000, 590152, 12973, 108, 36,
)  # fmt: skip
SIZES_FULL = (
    227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10, 2209, 11938,
    155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
)  # fmt: skip
SIZES_ONEFLOW = (
    39884407, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532952, 2953546, 403346, 10, 2208, 11938,
    155, 4, 976, 14, 39979772, 25641295, 39664985, 585935, 12972, 108, 36,
)  # fmt: skip
LARGE_LAYERS = {
    "embedding_dim": 128,
    "dense_arch_layer_sizes": (512, 256, 128),
    "over_arch_layer_sizes": (1024, 1024, 512, 256, 1),
}


def toy() -> Defaults:
    """the demo: small layers, Adagrad, seconds on a laptop"""
    return {
        "embedding_dim": 16,
        "dense_arch_layer_sizes": (64, 32, 16),
        "over_arch_layer_sizes": (64, 32, 1),
        "batch_size": 256,
        "learning_rate": 0.02,
        "optimizer": "adagrad",
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
        "seed": 0,
    }


def kaggle() -> Defaults:
    """facebookresearch/dlrm, bench/dlrm_s_criteo_kaggle.sh"""
    return {
        "embedding_dim": 16,
        "dense_arch_layer_sizes": (512, 256, 64, 16),
        "over_arch_layer_sizes": (512, 256, 1),
        "batch_size": 128,
        "test_batch_size": 16384,
        "learning_rate": 0.1,
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
    }


def terabyte() -> Defaults:
    """facebookresearch/dlrm, bench/dlrm_s_criteo_terabyte.sh: tables of at most 10 million rows"""
    return {
        "max_table_size": 10_000_000,
        "embedding_dim": 64,
        "dense_arch_layer_sizes": (512, 256, 64),
        "over_arch_layer_sizes": (512, 512, 256, 1),
        "batch_size": 2048,
        "test_batch_size": 16384,
        "learning_rate": 0.1,
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
    }


def mlperf_v1() -> Defaults:
    """MLPerf up to v2.1: dot products, SGD, until AUROC 0.8025, for 8 ranks"""
    return {
        **LARGE_LAYERS,
        "num_embeddings_per_feature": SIZES_MLPERF_V1,
        "batch_size": 6912,
        "test_batch_size": 131072,
        "learning_rate": 24.0,
        "lr_warmup_steps": 2750,
        "lr_decay_start": 49315,
        "lr_decay_steps": 27772,
        "validation_auroc": 0.8025,
        "validation_freq_within_epoch": 3205,
    }


def mlperf_x2() -> Defaults:
    """TorchRec's "MLPerfx2": tables of at most 80 million rows, 174 GiB, for 16 ranks"""
    return {
        **LARGE_LAYERS,
        "num_embeddings_per_feature": SIZES_MLPERF_X2,
        "batch_size": 4096,
        "learning_rate": 15.0,
        "pin_memory": True,
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
    }


def full_size() -> Defaults:
    """TorchRec's "Full Size": a row for each id of Criteo 1TB, 421 GiB, for 80 ranks"""
    return {**mlperf_x2(), "num_embeddings_per_feature": SIZES_FULL, "batch_size": 819}


def mlperf_v2() -> Defaults:
    """MLPerf DLRM-DCNv2, from v3.0: multi-hot ids, Adagrad, until AUROC 0.80275, for 8 ranks"""
    return {
        **LARGE_LAYERS,
        "num_embeddings_per_feature": SIZES_MLPERF_V2,
        "interaction_type": "dcn",
        "dcn_num_layers": 3,
        "dcn_low_rank_dim": 512,
        "batch_size": 8192,
        "test_batch_size": 8192,
        "learning_rate": 0.005,
        "optimizer": "adagrad",
        "validation_auroc": 0.80275,
        "validation_freq_within_epoch": 1600,
    }


def nvidia_base() -> Defaults:
    """NVIDIA DeepLearningExamples, the defaults of its main.py: fp16 with a fixed loss scale"""
    return {
        **LARGE_LAYERS,
        "batch_size": 32768,
        "test_batch_size": 32768,
        "learning_rate": 28.0,
        "lr_schedule": "nvidia",
        "lr_warmup_steps": 6400,
        "lr_decay_start": 64000,
        "lr_decay_steps": 80000,
        "amp": "fp16",
        "loss_scale_policy": "static",
        "loss_scale": 8192.0,
        "seed": 12345,
        "report_every": 200,
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
    }


def oneflow() -> Defaults:
    """OneFlow's DLRM, the defaults of its dlrm_train_eval.py: tables in files behind a cache, for 8 ranks"""
    return {
        **LARGE_LAYERS,
        "num_embeddings_per_feature": SIZES_ONEFLOW,
        "store_type": "cached_ssd",
        "cache_memory_budget_mb": 8192.0,
        "batch_size": 6912,
        "test_batch_size": 6912,
        "max_steps": 75000,
        "learning_rate": 24.0,
        "lr_schedule": "nvidia",
        "lr_warmup_steps": 2750,
        "lr_decay_start": 49315,
        "lr_decay_steps": 27772,
        "validation_freq_within_epoch": 10000,
        "limit_val_batches": 1612,
        "limit_test_batches": 1612,
        "evaluate_on_training_end": True,
        "report_every": 1000,
    }


# name -> defaults, in the order of --help: from small to large
PRESETS: dict[str, Callable[[], Defaults]] = {
    each.__name__: each
    for each in (
        toy, kaggle, terabyte, mlperf_v1, mlperf_x2, full_size, mlperf_v2, nvidia_base, oneflow
    )
}  # fmt: skip
