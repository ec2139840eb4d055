"""The dense layers compute what torchrec's MLP under autograd computes, to the bit."""

from collections.abc import Iterator

import pytest
import torch

from dlrm.models.dlrm import mlp
from dlrm.runtime import accelerate
from dlrm.trainer.device import enable_fast_path


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    enable_fast_path(torch.device("cpu"), True)
    yield
    accelerate.use_hooks(accelerate.PLAIN)


@pytest.mark.parametrize("layers", [[6], [8, 5], [7, 9, 4, 3]])
@pytest.mark.parametrize("kind", [mlp.DenseArch, mlp.OverArch])
@pytest.mark.parametrize("inputs_need_gradient", [False, True])
def test_same_values_and_gradients(kind: type, layers: list[int], inputs_need_gradient: bool) -> None:
    torch.manual_seed(3)
    module = kind(11, layers, None)
    features = torch.randn(33, 11, requires_grad=inputs_need_gradient)
    wanted = [*module.parameters(), *([features] if inputs_need_gradient else [])]
    weights = torch.randn(33, layers[-1])
    out = module(features)
    ours = torch.autograd.grad((out * weights).sum(), wanted)
    plain = module.model(features)
    theirs = torch.autograd.grad((plain * weights).sum(), wanted)
    assert torch.equal(out, plain)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_mixed_precision_is_left_to_torch() -> None:
    module = mlp.DenseArch(4, [4, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(3, 4)).dtype == torch.bfloat16
