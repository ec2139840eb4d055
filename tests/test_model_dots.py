"""Dot products of all pairs in machine code, against the definition in double precision."""

import pytest
import torch

from dlrm.model import cpu, machine
from dlrm.model.dots import MOST, dots
from dlrm.model.interaction import Dot, PairDots, Shape
from dlrm.model.tower import Over

pytestmark = pytest.mark.skipif(machine.host() is None, reason="needs AVX2")


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def definition(
    dense: torch.Tensor, sparse: torch.Tensor, place: torch.Tensor, diagonal: bool, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The output and both gradients."""
    inputs = [each.double().requires_grad_() for each in (dense, sparse)]
    z = torch.cat(inputs, dim=1).view(len(dense), len(place), dense.size(1))[:, place]
    first, second = torch.triu_indices(len(place), len(place), int(not diagonal))
    out = torch.cat((inputs[0], (z[:, first] * z[:, second]).sum(2)), dim=1)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.double())]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dim", [8, 24, 64, 128])
@pytest.mark.parametrize("entries", [2, 3, 4, 5, 7, 8, 9, 27, 40])
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
    assert cpu.dots(dense, sparse, False)
    assert not cpu.dots(dense.double(), sparse.double(), False)
    assert not cpu.dots(torch.randn(4, 32)[:, ::2], sparse, False)
    assert not cpu.dots(torch.randn(4, 12), torch.randn(4, 36), False)
    assert dots(MOST, 8, False) and not dots(MOST + 1, 8, False) and not dots(1, 8, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.dots(dense, sparse, False)
    torch.set_num_threads(2)
    assert not cpu.dots(dense, sparse, False)


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
