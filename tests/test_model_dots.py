"""Dot products of all pairs in machine code, against the definition in double precision."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm.model import cpu, machine
from dlrm.model.dlrm import build
from dlrm.model.dots import MOST, dots
from dlrm.model.interaction import Dot, PairDots, Shape
from dlrm.model.tables import table_configs
from dlrm.model.tower import Over

pytestmark = pytest.mark.skipif(machine.host() is None, reason="needs AVX2")


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The code of so many shapes goes elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "FOLDER", tmp_path_factory.mktemp("code"))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_compiled_model_does_without(threads: int) -> None:
    """Whoever compiles it: one part alone compiled meets the other's columns, too."""
    torch.set_num_threads(threads)
    tables = table_configs([7, 9], 8, ["a", "b"])
    shape: dict[str, Any] = {"dense_in": 5, "dense_layers": [8], "over_layers": [6, 1], "seed": 1}
    model = build("dot", tables, table_device=torch.device("cpu"), **shape).model
    pooled = KeyedTensor.from_tensor_list(["a", "b"], [torch.randn(6, 8) for _ in range(2)])
    dense = torch.randn(6, 8)
    expected = model.over_arch(model.inter_arch(dense, pooled))
    for parts in ([model.inter_arch], [model.over_arch], [model.inter_arch, model.over_arch]):
        inter, over = (
            torch.compile(part, backend="eager") if part in parts else part
            for part in (model.inter_arch, model.over_arch)
        )
        torch.testing.assert_close(over(inter(dense, pooled)), expected)


def definition(
    dense: torch.Tensor, sparse: torch.Tensor, place: torch.Tensor, diagonal: bool, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The output and both gradients."""
    inputs = [each.double().requires_grad_() for each in (dense, sparse)]
    z = torch.cat(inputs, dim=1).view(len(dense), len(place), dense.size(1))[:, place]
    first, second = torch.triu_indices(len(place), len(place), int(not diagonal))
    out = torch.cat((inputs[0], (z[:, first] * z[:, second]).sum(2)), dim=1)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.double())]


SHAPES = [(entries, dim) for entries in (2, 3, 4, 5, 7, 8, 9, 27, 40) for dim in (8, 24, 64, 128)]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("entries", "dim"), [*SHAPES, (MOST, 8), (5, 1024)])
def test_equal_the_definition(entries: int, dim: int, diagonal: bool) -> None:
    code = dots(entries, dim, diagonal)
    assert code
    place = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(entries - 1)))
    for rows in (0, 1, 5):
        dense, sparse = torch.randn(rows, dim), torch.randn(rows, (entries - 1) * dim)
        gradient = torch.randn(rows, code.columns)
        out, *gradients = definition(dense, sparse, place, diagonal, gradient[:, : code.width])
        out = torch.nn.functional.pad(out, (0, code.columns - code.width))
        found = [code.forward(dense, sparse, place), *code.backward(gradient, dense, sparse, place)]
        for one, other in zip(found, [out, *gradients], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("entries", [2, 9, 27])
def test_nothing_else_is_written(entries: int) -> None:
    code = dots(entries, 16, False)
    assert code
    rows, around = 3, 64
    sizes = [rows * code.columns, rows * 16, rows * (entries - 1) * 16]
    inputs = [torch.randn(size) for size in sizes]
    outputs = [torch.full((size + 2 * around,), 7.0) for size in sizes]
    out, of_dense, of_sparse = (output[around:-around].view(rows, -1) for output in outputs)
    place = torch.arange(entries)
    gradient, dense, sparse = (each.view(rows, -1) for each in inputs)
    code._call("forward", (dense, sparse, place, out))
    code._call("backward", (gradient, dense, sparse, place, of_dense, of_sparse))
    for output in outputs:
        assert (output[:around] == 7).all() and (output[-around:] == 7).all() and (output != 7).any()


def test_only_for_what_it_can_do() -> None:
    dense, sparse = torch.randn(4, 16), torch.randn(4, 48)
    assert cpu.pair_code(dense, sparse, 4, False)
    assert not cpu.pair_code(dense.double(), sparse.double(), 4, False)
    assert not cpu.pair_code(torch.randn(4, 32)[:, ::2], sparse, 4, False)
    assert not cpu.pair_code(torch.randn(4, 12), torch.randn(4, 36), 4, False)
    assert not cpu.pair_code(dense, sparse[:3], 4, False) and not cpu.pair_code(dense, sparse, 3, False)
    assert dots(MOST, 8, False) and not dots(MOST + 1, 8, False) and not dots(1, 8, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.pair_code(dense, sparse, 4, False)
    torch.set_num_threads(2)
    assert not cpu.pair_code(dense, sparse, 4, False)


def test_a_model_gives_the_same_either_way() -> None:
    """Through the layer behind it, too, which reads more columns than its weight has."""
    module, over = Dot(Shape(["a", "b", "c"], [16] * 3, 16)), Over(16 + 6, [8, 1], None)
    inputs = [torch.randn(6, 16, requires_grad=True), torch.randn(6, 48, requires_grad=True)]
    order = module._order(("c", "a", "b"), torch.device("cpu"))
    found, columns = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        pairs: torch.Tensor = PairDots.apply(*inputs, order)  # type: ignore[assignment]
        out = over(pairs)
        found.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, *over.parameters()])))
        columns.append(pairs.size(1))
    assert columns == [32, 22]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
