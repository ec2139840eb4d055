"""The same training by torchrec's pieces and torch's optimizers; only the first weights are the project's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.data.criteo import DatasetMeta, name_features
from dlrm.embeddings.tables import make_table_configs
from dlrm.models.dlrm.model import build_dlrm

DIM, DENSE, OVER, BATCH, STEPS = 8, [16, 8], [16, 1], 128, 40
KINDS = {"original": DLRM, "dcn": DLRM_DCN}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


def batches(folder: Path, stage: str, days: range, rank: int = 0, world: int = 1) -> Any:
    files = [[str(folder / f"day_{d}_{part}.npy") for d in days] for part in ("dense", "sparse", "labels")]
    return InMemoryBinaryCriteoIterDataPipe(stage, *files, batch_size=BATCH, rank=rank, world_size=world)


def reference(folder: Path, interaction: str, optimizer: str, lr: float) -> tuple[list[float], float, int]:
    """Losses of the steps, then AUROC over all validation rows, and their number."""
    meta = DatasetMeta.load(folder)
    sizes = meta.table_sizes
    tables = [
        EmbeddingBagConfig(name=f"t_{n}", embedding_dim=DIM, num_embeddings=s, feature_names=[n])
        for n, s in zip(name_features(len(sizes)), sizes, strict=True)
    ]
    more = {"dcn_num_layers": 2, "dcn_low_rank_dim": 4} if interaction == "dcn" else {}
    model = KINDS[interaction](EmbeddingBagCollection(tables=tables), 13, DENSE, OVER, **more)
    ours = build_dlrm(
        interaction,
        make_table_configs(sizes, DIM),
        13,
        DENSE,
        OVER,
        2,
        4,
        table_device=torch.device("cpu"),
        seed=7,
    ).model
    model.load_state_dict(ours.state_dict())
    options: Any = {"lr": lr} | ({"eps": 1e-8} if optimizer == "adagrad" else {})
    step = OPTIMIZERS[optimizer](model.parameters(), **options)
    losses: list[float] = []
    for number, batch in enumerate(batches(folder, "train", range(meta.days - 1))):
        if number == STEPS:
            break
        logits = model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        losses.append(loss.item())
        step.zero_grad()
        loss.backward()
        step.step()
    scores, labels = [], []
    with torch.no_grad():
        for batch in batches(folder, "val", range(meta.days - 1, meta.days)):
            scores.append(model(batch.dense_features, batch.sparse_features).squeeze(-1).numpy())
            labels.append(batch.labels.numpy())
    score, label = np.concatenate(scores), np.concatenate(labels)
    return losses, float(roc_auc_score(label, score)), len(label)


@pytest.mark.parametrize(
    ("interaction", "optimizer", "lr", "ranks"),
    [("original", "sgd", 0.2, 1), ("original", "adagrad", 0.02, 2), ("dcn", "adagrad", 0.02, 1)],
)
def test_losses_and_auroc_are_torchrecs(
    interaction: str, optimizer: str, lr: float, ranks: int, toy: Path, train: Any, train_here: Any
) -> None:
    losses, auroc, rows = reference(toy, interaction, optimizer, lr)
    words = [
        "--in_memory_binary_criteo_path", toy, "--interaction_type", interaction, "--embedding_dim", DIM,
        "--dense_arch_layer_sizes", "16,8", "--over_arch_layer_sizes", "16,1", "--dcn_num_layers", 2,
        "--dcn_low_rank_dim", 4, "--optimizer", optimizer, "--learning_rate", lr, "--seed", 7,
        "--batch_size", BATCH // ranks, "--limit_train_batches", STEPS, "--report_every", 1,
        "--evaluate_on_epoch_end",
    ]  # fmt: skip
    done = train_here(*words) if ranks == 1 else train(ranks, *words)
    assert done.codes == [0] * ranks, done.err
    assert len(done.losses) == STEPS
    assert done.losses == pytest.approx(losses, abs=1e-5)
    assert max(losses) - min(losses) > 0.01  # it trained
    assert done.results["val_samples"] == rows
    assert done.results["val_scores"][0] == pytest.approx(auroc, abs=1e-5)
