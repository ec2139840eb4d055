"""Run by test_process_group.py on every rank: the shared-memory backend against gloo, and ends of ranks."""

import os
import random
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dlrm.cpu import process_group
from dlrm.runtime.ranks import find_ranks

TYPES = [torch.float32, torch.int64, torch.int32, torch.float16, torch.uint8]


def compare(rank: int, size: int, gloo: Any) -> None:
    """Random collectives in one order on all ranks; the same through gloo must bring the same."""
    order = random.Random(7)  # alike on all ranks
    values = torch.Generator().manual_seed(rank)
    waiting: list[Any] = []
    for number in range(250):
        kind = order.choice(["now", "later", "sum", "objects"])
        if kind in ("now", "later"):
            rows = [[order.randrange(order.choice([1, 5, 3000])) for _ in range(size)] for _ in range(size)]
            goes, comes = rows[rank], [row[rank] for row in rows]
            width, dtype = order.choice([(), (3,), (2, 2)]), order.choice(TYPES)
            data = (torch.rand(sum(goes), *width, generator=values) * 100).to(dtype)
            out, expected = (torch.empty(sum(comes), *width, dtype=dtype) for _ in range(2))
            dist.all_to_all_single(expected, data, comes, goes, group=gloo)
            work = dist.all_to_all_single(out, data, comes, goes, async_op=kind == "later")
            data.zero_()  # what was sent is sent
            waiting.append((work, out, expected))
            if kind == "now" and order.random() < 0.3 or len(waiting) > 9:
                order.shuffle(waiting)
                for work, out, expected in waiting:
                    if work is not None:
                        work.wait()
                    assert torch.equal(out, expected)
                waiting.clear()
        elif kind == "sum":
            dtype = order.choice([torch.float32, torch.float64, torch.int64])
            data = (torch.rand(order.randrange(9000), generator=values) * 9).to(dtype)
            expected = data.clone()
            dist.all_reduce(data)
            dist.all_reduce(expected, group=gloo)
            torch.testing.assert_close(data, expected)
            gathered: list[Any] = [None] * size
            dist.all_gather_object(gathered, data.tolist())
            assert all(other == gathered[0] for other in gathered), "ranks differ in their bits"
        else:
            gathered = [None] * size
            dist.all_gather_object(gathered, rank)
            sent = [number if rank == 1 else None]
            dist.broadcast_object_list(sent, src=1)
            dist.barrier()
            assert gathered == list(range(size)) and sent == [number]


def main(task: str) -> None:
    ranks = find_ranks()
    dist.init_process_group(process_group.register_backend(torch.device("cpu")), timeout=timedelta(seconds=6))
    if task == "compare":
        assert type(dist.group.WORLD) is process_group.ShmProcessGroup
        compare(ranks.rank, ranks.world_size, dist.new_group(backend="gloo"))
        print(f"rank {ranks.rank} agrees with gloo\n", end="", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return
    data = torch.ones(1000)
    dist.all_reduce(data)
    if ranks.rank == 1:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[task])
    begun = time.monotonic()
    try:
        dist.all_reduce(data)
    except RuntimeError as error:
        print(f"{time.monotonic() - begun:.1f} s: {error}", flush=True)
        os._exit(3)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
