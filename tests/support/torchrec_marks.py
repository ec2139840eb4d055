"""A few steps of a sharded model under torch's profiler and DFTracer at once: torchrec's markers.

Each rank writes them to RUN_DIR/markers-RANK.json: ranks' long lines would mix on one stdout.

Started by tests/shell/test_patches.py on real ranks:
launcher.sh python tests/support/torchrec_marks.py RUN_DIR
"""

import json
import os
import sys
from pathlib import Path

from dlrm.runtime import ranks, trace

HERE = ranks.find_ranks()
trace.start_tracing(sys.argv[1], HERE, "marks")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType  # noqa: E402
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders  # noqa: E402
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology  # noqa: E402
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist  # noqa: E402
from torchrec.streamable import Pipelineable  # noqa: E402

TABLES, BATCH, STEPS = 4, 8, 5


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t{i}", embedding_dim=8, num_embeddings=50, feature_names=[f"f{i}"],
                    pooling=PoolingType.MEAN if i == 0 else PoolingType.SUM,
                )
                for i in range(TABLES)
            ],
            device=torch.device("meta"),
        )  # fmt: skip
        self.top = torch.nn.Linear(8 * TABLES, 1)

    def forward(self, batch: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.top(self.tables(batch).values())
        return out.mean(), out


def batch() -> Pipelineable:
    ids = torch.randint(0, 50, (TABLES * BATCH,))
    keys = [f"f{i}" for i in range(TABLES)]
    return KeyedJaggedTensor.from_lengths_sync(keys, ids, torch.ones(TABLES * BATCH, dtype=torch.int64))


def plan(model: torch.nn.Module):
    """Whole tables on different ranks, so that ids and embeddings really travel."""
    constraints = {f"t{i}": ParameterConstraints(sharding_types=["table_wise"]) for i in range(TABLES)}
    topology = Topology(world_size=HERE.world_size, compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    return planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)


def main() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo")
    model = DistributedModelParallel(Model(), device=torch.device("cpu"), plan=plan(Model()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = iter([batch() for _ in range(STEPS)])
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    with torch.profiler.profile() as profile:
        for _ in range(STEPS):
            pipeline.progress(batches)
    trace.stop_tracing()
    names = [event.name for event in profile.events() or () if event.name.startswith(("## ", "["))]
    (Path(sys.argv[1]) / f"markers-{HERE.rank}.json").write_text(json.dumps(names))
    dist.destroy_process_group()


main()
