"""Published settings, as functions that give the options their defaults: `--preset NAME`."""

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


def toy() -> Defaults:
    """The demo: seconds on a laptop, and it learns."""
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
    """facebookresearch/dlrm, bench/dlrm_s_criteo_kaggle.sh."""
    return {
        "dataset_name": "criteo_kaggle",
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
    """facebookresearch/dlrm, bench/dlrm_s_criteo_terabyte.sh: ids folded at 10 million."""
    return {
        "num_embeddings": 10_000_000,
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
    """MLPerf DLRM up to v2.1: dot interaction, SGD, AUROC 0.8025; 55296 samples a step on 8 ranks."""
    return {
        "num_embeddings_per_feature": SIZES_MLPERF_V1,
        "embedding_dim": 128,
        "dense_arch_layer_sizes": (512, 256, 128),
        "over_arch_layer_sizes": (1024, 1024, 512, 256, 1),
        "batch_size": 6912,
        "test_batch_size": 131072,
        "learning_rate": 24.0,
        "lr_warmup_steps": 2750,
        "lr_decay_start": 49315,
        "lr_decay_steps": 27772,
        "validation_auroc": 0.8025,
        "validation_freq_within_epoch": 3205,
    }


def mlperf_v2() -> Defaults:
    """MLPerf DLRM-DCNv2 from v3.0: multi-hot, Adagrad, AUROC 0.80275; 65536 samples a step on 8 ranks."""
    return {
        "num_embeddings_per_feature": SIZES_MLPERF_V2,
        "embedding_dim": 128,
        "dense_arch_layer_sizes": (512, 256, 128),
        "over_arch_layer_sizes": (1024, 1024, 512, 256, 1),
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
    """NVIDIA DeepLearningExamples DLRM, base: 65536 samples a step on 8 ranks."""
    return {
        "embedding_dim": 128,
        "dense_arch_layer_sizes": (512, 256, 128),
        "over_arch_layer_sizes": (1024, 1024, 512, 256, 1),
        "batch_size": 8192,
        "test_batch_size": 8192,
        "learning_rate": 24.0,
        "lr_schedule": "nvidia",
        "lr_warmup_steps": 8000,
        "lr_decay_start": 48000,
        "lr_decay_steps": 24000,
        "evaluate_on_epoch_end": True,
        "evaluate_on_training_end": True,
    }


PRESETS: dict[str, Callable[[], Defaults]] = {
    "toy": toy,
    "kaggle": kaggle,
    "terabyte": terabyte,
    "mlperf_v1": mlperf_v1,
    "mlperf_v2": mlperf_v2,
    "nvidia_base": nvidia_base,
}
