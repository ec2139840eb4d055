"""What test_planner.py runs on every rank: three steps under a plan, then losses and tables as numbers.

In: sys.argv[1], lists of tasks by backend as JSON. Out: the first rank prints the results likewise.
"""

import json
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.cpu.pooled_embeddings import ShmPooledEmbeddingDist
from dlrm.embeddings.planner import make_plan, plan_as_dict, shard_model
from dlrm.embeddings.tables import list_table_weights, make_table_configs
from dlrm.models.dlrm.model import build_dlrm
from dlrm.runtime import accelerate, gloo
from dlrm.runtime.ranks import Ranks
from dlrm.trainer.device import enable_fast_path
from dlrm.trainer.lr_schedule import set_lr
from dlrm.trainer.optimizers import apply_in_backward, make_dense_optimizer

NAMES = ["cat_0", "cat_1", "cat_2", "cat_3"]
SIZES = [50, 700, 35, 401]
STEPS = 3


def batches(rank: int, world: int, rows: int) -> list[Batch]:
    """This rank's share of the same global batches, of so many rows."""
    random = torch.Generator().manual_seed(1)
    made = []
    mine = slice(rank * rows // world, (rank + 1) * rows // world)
    for _ in range(STEPS):
        ids = torch.randint(0, 35, (len(NAMES), rows), generator=random)[:, mine]
        dense = torch.randn(rows, 5, generator=random)[mine]
        labels = torch.randint(0, 2, (rows,), generator=random)[mine]
        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        made.append(
            Batch(dense, KeyedJaggedTensor.from_lengths_sync(NAMES, ids.reshape(-1), lengths), labels)
        )
    return made


def gathered(weight: Any) -> torch.Tensor:
    """The whole table from the ranks' shards."""
    if not hasattr(weight, "local_shards"):
        return weight.detach().clone()
    whole = torch.zeros(*weight.metadata().size)
    for shard_ in weight.local_shards():
        (row, column), (rows, columns) = shard_.metadata.shard_offsets, shard_.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = shard_.tensor
    dist.all_reduce(whole)
    return whole


def run_task(ranks: Ranks, task: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cpu")
    model = build_dlrm(
        task["interaction"],
        make_table_configs(SIZES, 8, NAMES),
        5,
        [6, 8],
        [7, 1],
        2,
        3,
        (16,),
        (16,),
        seed=4,
    )
    name, rate = task["optimizer"], 0.5
    apply_in_backward(model.model.sparse_arch.parameters(), name, rate, device)
    plan = make_plan(model, device, ranks, task["rows"] // ranks.world_size, task["constraints"])
    sharded = shard_model(model, plan, device, seed=4)
    first = {table: gathered(weight) for _, table, weight in list_table_weights(sharded)}
    optimizer = make_dense_optimizer(sharded, name, rate)
    pipeline = TrainPipelineSparseDist(sharded, optimizer, device)
    iterator = iter(batches(ranks.rank, ranks.world_size, task["rows"]))
    losses = []
    for step in range(STEPS):
        set_lr(optimizer, rate / (step + 1))
        loss = pipeline.progress(iterator)[0].detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / ranks.world_size)
    last = {table: gathered(weight) for _, table, weight in list_table_weights(sharded)}
    dists = [each for part in sharded.modules() for each in getattr(part, "_output_dists", [])]
    return {
        "losses": losses,
        "direct": [isinstance(getattr(each, "_dist", None), ShmPooledEmbeddingDist) for each in dists],
        "plan": plan_as_dict(plan),
        "first": {table: weight.tolist() for table, weight in first.items()},
        "last": {table: weight.tolist() for table, weight in last.items()},
    }


def main(ranks: Ranks) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gloo.register_backend()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, ranks.world_size, ranks.first)
    found = {}
    for backend, tasks in json.loads(sys.argv[1]).items():
        if backend == "shared":  # the last: it changes how ranks exchange what follows
            enable_fast_path(torch.device("cpu"), True)
            accelerate.hooks.choose_backend(torch.device("cpu"))
        dist.init_process_group(
            backend, store=dist.PrefixStore(backend, store), rank=ranks.rank, world_size=ranks.world_size
        )
        found[backend] = [run_task(ranks, task) for task in tasks]
        dist.barrier()
        dist.destroy_process_group()
    if ranks.first:
        print(json.dumps(found))
