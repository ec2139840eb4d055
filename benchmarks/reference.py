"""The reference's training loop, rebuilt from torchrec's public pieces as MLCommons' dlrm_main.py uses them.

One rank of it: InMemoryBinaryCriteoIterDataPipe, DLRM or DLRM_DCN, TrainPipelineSparseDist with its two
filler batches, torchmetrics' AUROC. Its weights are set to ours, else nothing is shared. Times and losses go
to a JSON file. Started by benchmarks/train.py, with the variables that torch reads in its environment.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import distributed as dist
from torch.utils.data import DataLoader
from torchrec import EmbeddingBagCollection
from torchrec.datasets.criteo import (
    CAT_FEATURE_COUNT,
    DEFAULT_CAT_NAMES,
    INT_FEATURE_COUNT,
    InMemoryBinaryCriteoIterDataPipe,
)
from torchrec.datasets.utils import Batch
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm  # noqa: F401  # the reference imports it: part of its start-up

IMPORTED = time.time()
FILLERS = 2  # the reference's TRAIN_PIPELINE_STAGES - 1


def make_loader(args: argparse.Namespace, stage: str) -> Iterable[Batch]:
    days = range(args.days - 1) if stage == "train" else [args.days - 1]
    files = [
        [str(args.data / f"day_{day}_{part}.npy") for day in days] for part in ("dense", "sparse", "labels")
    ]
    pipe = InMemoryBinaryCriteoIterDataPipe(
        stage, *files, batch_size=args.batch_size, rank=dist.get_rank(), world_size=dist.get_world_size(),
        hashes=[args.num_embeddings] * CAT_FEATURE_COUNT,
    )  # fmt: skip
    loader = DataLoader(pipe, batch_size=None, collate_fn=lambda batch: batch)
    return MultiHotBatches(loader, args.num_embeddings, args.multi_hot) if args.multi_hot else loader


class MultiHotBatches:
    """The batches of a loader with several ids per feature, made as the reference makes them: each feature's
    by a lookup in a table of ids, and offsets that all full batches share.
    """

    def __init__(self, loader: DataLoader, rows: int, sizes: list[int]) -> None:
        from dlrm.data.multihot import MultiHotMaker  # the same tables of ids

        self.loader, self.sizes = loader, torch.tensor(sizes, dtype=torch.int32)
        self.tables = [torch.from_numpy(table) for table in MultiHotMaker([rows] * len(sizes), sizes).tables]
        self.offsets: dict[int, torch.Tensor] = {}  # batch size -> where each sample's ids begin

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            size = len(batch.dense_features)
            if size not in self.offsets:
                ends = self.sizes.repeat_interleave(size).cumsum(0)
                self.offsets[size] = torch.cat([torch.zeros(1, dtype=ends.dtype), ends])
            ids = batch.sparse_features.values().view(len(self.tables), size)
            found = [
                torch.nn.functional.embedding(column, table).flatten()
                for column, table in zip(ids, self.tables, strict=True)
            ]
            features = KeyedJaggedTensor.from_offsets_sync(
                batch.sparse_features.keys(), torch.cat(found), offsets=self.offsets[size]
            )
            yield Batch(batch.dense_features, features, batch.labels)


def make_model(args: argparse.Namespace, device: torch.device) -> tuple[Any, CombinedOptimizer]:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", embedding_dim=args.embedding_dim, num_embeddings=args.num_embeddings,
            feature_names=[name],
        )
        for name in DEFAULT_CAT_NAMES
    ]  # fmt: skip
    shape: dict[str, Any] = {
        "embedding_bag_collection": EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        "dense_in_features": INT_FEATURE_COUNT,
        "dense_arch_layer_sizes": args.dense,
        "over_arch_layer_sizes": args.over,
        "dense_device": device,
    }
    dcn = args.interaction == "dcn"
    train_model = DLRMTrain(
        DLRM_DCN(dcn_num_layers=3, dcn_low_rank_dim=512, **shape) if dcn else DLRM(**shape)
    )
    kind = torch.optim.Adagrad if args.optimizer == "adagrad" else torch.optim.SGD
    options: dict[str, Any] = {"lr": args.learning_rate} | (
        {"eps": 1e-8} if args.optimizer == "adagrad" else {}
    )
    apply_optimizer_in_backward(kind, train_model.model.sparse_arch.parameters(), dict(options))
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            local_world_size=get_local_size(), world_size=dist.get_world_size(), compute_device=device.type
        ),
        batch_size=args.batch_size,
        storage_reservation=HeuristicalStorageReservation(percentage=0.05),
    )
    plan = planner.collective_plan(train_model, get_default_sharders(), dist.GroupMember.WORLD)
    model = DistributedModelParallel(module=train_model, device=device, plan=plan)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda p: kind(p, **options)
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def with_fillers(batches: Iterable[Batch], limit: int | None) -> Any:
    return itertools.chain(itertools.islice(iter(batches), limit), itertools.islice(iter(batches), FILLERS))


def train(pipeline: Any, batches: Iterable[Batch], limit: int) -> tuple[list[Any], list[torch.Tensor]]:
    """When each step ended by the clock and in processor time, and its loss."""
    pipeline._model.train()
    iterator, ends, losses = with_fillers(batches, limit), [], []
    while True:
        try:
            loss, _, _ = pipeline.progress(iterator)
        except StopIteration:
            return ends, losses
        losses.append(loss)
        ends.append((time.time(), time.process_time()))


def evaluate_model(pipeline: Any, batches: Iterable[Batch]) -> dict[str, Any]:
    begun = time.time()
    pipeline._model.eval()
    auroc: Any = torchmetrics.AUROC(task="binary").to(pipeline._device)
    iterator = with_fillers(batches, None)
    with torch.no_grad():
        while True:
            try:
                _, logits, labels = pipeline.progress(iterator)
            except StopIteration:
                break
            auroc(torch.sigmoid(logits), labels)
    result = auroc.compute().item()
    samples = torch.tensor(sum(map(len, auroc.target)), device=pipeline._device)
    dist.reduce(samples, 0)
    return {"auroc": result, "samples": samples.item(), "seconds": time.time() - begun}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--days", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--num_embeddings", type=int, required=True)
    parser.add_argument("--embedding_dim", type=int, required=True)
    parser.add_argument("--dense", type=lambda text: list(map(int, text.split(","))), required=True)
    parser.add_argument("--over", type=lambda text: list(map(int, text.split(","))), required=True)
    parser.add_argument("--interaction", choices=("original", "dcn"), default="original")
    parser.add_argument("--optimizer", choices=("sgd", "adagrad"), default="sgd")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--multi_hot", type=lambda text: list(map(int, text.split(","))))
    parser.add_argument("--weights", choices=("ours", "own"), default="ours")
    return parser.parse_args()


def use_our_weights(model: Any, args: argparse.Namespace) -> None:
    from dlrm.embeddings.tables import initialize_tables, make_table_configs
    from dlrm.models.dlrm.model import build_dlrm

    tables = make_table_configs([args.num_embeddings] * CAT_FEATURE_COUNT, args.embedding_dim)
    ours = build_dlrm(args.interaction, tables, INT_FEATURE_COUNT, args.dense, args.over, seed=0)
    dense = {name: weight for name, weight in ours.state_dict().items() if "sparse_arch" not in name}
    theirs = dict(model.module.named_parameters())
    with torch.no_grad():
        for name, weight in dense.items():
            theirs[name].copy_(weight)
    initialize_tables(model, 0)


def main() -> None:
    args = parse_arguments()
    rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{rank}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    model, optimizer = make_model(args, device)
    built, built_cpu = time.time(), time.process_time()
    if args.weights == "ours":
        use_our_weights(model, args)
    filled, filled_cpu = time.time(), time.process_time()
    sets = {stage: make_loader(args, stage) for stage in ("train", "val", "test")}
    pipelines = [TrainPipelineSparseDist(model, optimizer, device) for _ in range(2)]
    ends, losses = train(pipelines[0], sets["train"], args.steps)
    result = {
        "imported": IMPORTED, "built": built, "weights": filled - built,
        "weights_cpu": filled_cpu - built_cpu, "ends": ends,
        "losses": torch.stack(losses).tolist(), "evaluation": evaluate_model(pipelines[1], sets["val"]),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
