"""DLRM, as the trainer and the scripts know it."""

from dlrm.models.dlrm.options import Config
from dlrm.models.dlrm.presets import PRESETS
from dlrm.trainer.spec import ModelParts, ModelSpec, ScriptOptions

DESCRIPTION = """Train a DLRM, evaluate it exactly, write a run folder.

Every command line of MLCommons' torchrec dlrm_main.py runs unchanged. Start it with launcher.sh or
torchrun, or alone for one rank. Without a dataset it trains on random data.
"""


def load_parts() -> ModelParts:
    from dlrm.models.dlrm.build import build_model, open_batches, shard_dlrm
    from dlrm.models.dlrm.defaults import choose_dlrm_options
    from dlrm.models.dlrm.mlperf_settings import list_mlperf_settings
    from dlrm.models.dlrm.stored_model import adopt_model
    from dlrm.models.dlrm.trainer import DLRMTrainer
    from dlrm.models.dlrm.unused_options import list_unused_options

    return ModelParts(
        open_batches, build_model, shard_dlrm, DLRMTrainer, list_unused_options, choose_dlrm_options,
        adopt_model, list_mlperf_settings,
    )  # fmt: skip


SPEC = ModelSpec(
    name="dlrm",
    title="DLRM",
    description=DESCRIPTION,
    options=Config,
    presets=PRESETS,
    script=ScriptOptions(
        variables={
            "DATASET_DIR": ("--in_memory_binary_criteo_path", "{}"),
            "BATCH_SIZE": ("--batch_size", "{}"),
            # dot products need a bottom MLP that ends as wide as the tables; ARGS can override it
            "EMBEDDING_DIM": ("--embedding_dim", "{}", "--dense_arch_layer_sizes", "512,256,{}"),
            "EPOCHS": ("--epochs", "{}"),
            "LEARNING_RATE": ("--learning_rate", "{}"),
        },
        always=("--evaluate_on_epoch_end", "--evaluate_on_training_end", "--defaults", "dataset"),
        demo=("--in_memory_binary_criteo_path", "{demo_data}/npy", "--preset", "toy"),
        demo_title="toy data",
        demo_data="toy",
    ),
    load_parts=load_parts,
)
