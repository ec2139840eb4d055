"""BERT4Rec, as the trainer and the scripts know it."""

from dlrm.models.bert4rec.options import BertConfig
from dlrm.models.bert4rec.presets import PRESETS
from dlrm.trainer.spec import ModelParts, ModelSpec, ScriptOptions

DESCRIPTION = """Train BERT4Rec, rank items exactly over all users, write a run folder.

Every command line of torchrec's examples/bert4rec runs unchanged. Start it with launcher.sh, torchrun or
torchx, or alone for one rank. --dataset_name random or markov needs no files.
"""


def load_parts() -> ModelParts:
    from dlrm.models.bert4rec.build import build_model, shard_bert4rec
    from dlrm.models.bert4rec.dataloaders import open_datasets
    from dlrm.models.bert4rec.trainer import BERT4RecTrainer

    return ModelParts(open_datasets, build_model, shard_bert4rec, BERT4RecTrainer)


SPEC = ModelSpec(
    name="bert4rec",
    title="BERT4Rec",
    description=DESCRIPTION,
    options=BertConfig,
    presets=PRESETS,
    script=ScriptOptions(
        variables={
            "DATASET_DIR": ("--dataset_path", "{}"),
            "BATCH_SIZE": ("--train_batch_size", "{}"),
            "EMBEDDING_DIM": ("--emb_dim", "{}"),
            "EPOCHS": ("--num_epochs", "{}"),
            "LEARNING_RATE": ("--lr", "{}"),
        },
        demo=("--preset", "toy", "--cache_dir", "{demo_data}"),
        demo_title="walks whose best guess is known",
        demo_data="bert4rec",
    ),
    load_parts=load_parts,
)
