"""A torchrec training that knows nothing of this project: TrainPipelineSparseDist, batches from a DataLoader.

usage: pipeline_training.py OUT         OUT: the file for the losses
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain

KEYS = ["a", "b"]
BATCHES, EPOCHS = 6, 2


def train(out: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f"t_{key}", embedding_dim=8, num_embeddings=50, feature_names=[key])
        for key in KEYS
    ]
    net = DLRM(EmbeddingBagCollection(tables=tables), 4, [8, 8], [8, 1])
    model = DistributedModelParallel(DLRMTrain(net), device=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    data = RandomRecDataset(KEYS, 16, 50, manual_seed=1, num_dense=4, num_batches=BATCHES)
    losses = []
    for training in [True] * EPOCHS + [False]:
        model.train(training)
        with torch.set_grad_enabled(training):
            batches = iter(DataLoader(data, batch_size=None))
            while True:
                try:
                    losses.append(pipeline.progress(batches)[0].item())
                except StopIteration:
                    break
    Path(out).write_text(repr(losses))


if __name__ == "__main__":
    train(sys.argv[1])
