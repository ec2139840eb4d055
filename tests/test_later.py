"""What is put off is not imported by a training, and is the real thing for whoever wants it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_golden import COMMON, GOLDEN, RUNS

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: object) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_training_needs_none_of_it(tmp_path: Path) -> None:
    code = """
import json, sys
from dlrm.ranks import Ranks
from dlrm.train import main
main(Ranks())
from dlrm import later
placed = [name for name in later.KNOWN if type(sys.modules[name]) is later.PutOff]
print(json.dumps([
    [name for name in later.KNOWN if name not in placed],
    [name for name in ("sympy", "numba", "torch._inductor", "torch._prims") if name in sys.modules],
]))
"""
    words = [*COMMON.split(), *RUNS["dot sgd"].split(), "--output_dir", tmp_path]
    assert python(code, *words) == [[], []]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["dot sgd"], abs=1e-5)


def test_whoever_wants_more_gets_it() -> None:
    code = """
import json, sys, torch
from dlrm import later
later.put_off()
import torch.fx.experimental.symbolic_shapes as shapes, tensordict, torchrec
sizes = [shapes.guard_or_false(True), shapes.is_nested_int(3), shapes.is_nested_int.__module__]
assert isinstance(shapes, later.PutOff) and isinstance(torch._dynamo, later.PutOff)
held = torch._dynamo.config
limit = held.recompile_limit
held.recompile_limit = limit + 1
import torch._dynamo.config as config
assert config.recompile_limit == held.recompile_limit == limit + 1
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(3)).tolist()
assert config is torch._dynamo.config and not isinstance(torch._dynamo, later.PutOff)
assert type(tensordict.TensorDict) is later.Class
assert not isinstance({}, tensordict.TensorDict) and isinstance(tensordict, later.PutOff)
stacked = tensordict.LazyStackedTensorDict.__module__
environment = shapes.ShapeEnv.__module__
print(json.dumps([sizes, doubled, stacked, environment, sys.modules["tensordict"].TensorDict.__module__]))
"""
    sizes, doubled, stacked, environment, real = python(code)
    assert sizes == [True, False, "dlrm.later"]
    assert doubled == [2, 2, 2]
    assert stacked == "tensordict._lazy" and real == "tensordict._td"
    assert environment == "torch.fx.experimental.symbolic_shapes"


def test_a_class_that_was_put_off_is_the_real_one_when_it_is_used() -> None:
    code = """
import json, sys
from dlrm import later
later.import_torch()
later.put_off()
import torch, torchrec
from torchrec.distributed.embedding_lookup import DTensor
from torchrec.distributed.sharding.rw_sharding import Shard
plain = torch.ones(2)
before = isinstance(plain, DTensor), "torch.distributed.tensor._api" in sys.modules
first = Shard(0)
from torch.distributed.tensor import Shard as real, DTensor as tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
assert type(first) is real and isinstance(first, Shard) and not isinstance(plain, DTensor)
assert issubclass(tensor, DTensor) and DTensor.from_local == tensor.from_local
print(json.dumps([before, MetadataIndex("a").fqn]))
"""
    assert python(code) == [[False, False], "a"]


def test_kernels_that_were_put_off_are_there_for_tensors_without_data() -> None:
    code = """
import json, sys
from dlrm import later
later.import_torch()
later.put_off()
import torch
drawn = torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
before = "torch._prims" in sys.modules
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    shape = list(torch.linalg.qr(torch.empty(4, 3))[0].shape)
again = torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
print(json.dumps([before, shape, drawn == again]))
"""
    assert python(code) == [False, [4, 3], True]


def test_a_kernel_that_was_put_off_is_there_by_its_name() -> None:
    code = """
import json, sys
from dlrm import later
later.import_torch()
later.put_off()
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counted:
    torch.ones(2, 3) @ torch.ones(3, 4)
pool = torch._meta_registrations.pooling_output_shape(8, 2, 0, 2, 1, False)
from torch._meta_registrations import device_hint
print(json.dumps([counted.get_total_flops(), pool, device_hint(torch.empty(1, device="meta"))]))
"""
    assert python(code) == [48, 4, "cuda"]


def test_another_build_of_torch_is_imported_whole() -> None:
    code = """
import json, sys
from dlrm import later
later.version = lambda name: {"torch": "2.13.0"}[name]
later.import_torch()
print(json.dumps("torch._prims" in sys.modules))
"""
    assert python(code) is True
