"""Optimizers: the tables' fused into the backward pass, everything else's after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dlrm.errors import UserError
from dlrm.model.tables import WEIGHT

Make = Callable[..., torch.optim.Optimizer]
ADAGRAD_EPS = 1e-8  # MLCommons' value; torch's own default is 1e-10


@dataclass(frozen=True)
class Rule:
    fused: type[torch.optim.Optimizer]  # what torchrec maps to fbgemm's kernel
    dense: Make  # the same rule for parameters with ordinary gradients
    uses: tuple[str, ...] = ()  # of eps, betas
    on_cpu: bool = True  # fbgemm has the kernel there


RULES = {
    "sgd": Rule(torch.optim.SGD, torch.optim.SGD),
    "adagrad": Rule(torch.optim.Adagrad, torch.optim.Adagrad, ("eps",)),
    "rowwise_adagrad": Rule(RowWiseAdagrad, torch.optim.Adagrad, ("eps",)),
    "adam": Rule(torch.optim.Adam, torch.optim.Adam, ("eps", "betas"), on_cpu=False),
}
SPARSE = tuple(RULES)


def _arguments(name: str, lr: float, eps: float, betas: tuple[float, float]) -> dict[str, Any]:
    if name not in RULES:
        raise UserError(f"--optimizer {name} is unknown; choose from {', '.join(RULES)}")
    return {"lr": lr} | {
        key: value for key, value in (("eps", eps), ("betas", betas)) if key in RULES[name].uses
    }


def apply_in_backward(
    parameters: Iterable[nn.Parameter],
    name: str,
    lr: float,
    device: torch.device,
    eps: float = ADAGRAD_EPS,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Mark the tables' parameters, before planning and sharding: the planner counts the optimizer's state."""
    arguments = _arguments(name, lr, eps, betas)
    if device.type == "cpu" and not RULES[name].on_cpu:
        able = ", ".join(key for key, rule in RULES.items() if rule.on_cpu)
        raise UserError(
            f"--optimizer {name}: fbgemm cannot update tables with it on CPUs; choose from {able}"
        )
    apply_optimizer_in_backward(RULES[name].fused, parameters, arguments)


def dense_optimizer(
    model: DistributedModelParallel,
    name: str,
    lr: float,
    eps: float = ADAGRAD_EPS,
    betas: tuple[float, float] = (0.9, 0.999),
) -> CombinedOptimizer:
    """All of the model's optimizers in one: step, zero_grad, state_dict, param_groups.

    Data-parallel tables have ordinary gradients, which torchrec's in-backward optimizers silently pass by:
    they get the same rule here, as a part of their own.
    """
    arguments = _arguments(name, lr, eps, betas)
    rule = RULES[name]
    others = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {key: value for key, value in others.items() if WEIGHT.search(key)}
    if replicated and rule.dense is not rule.fused:
        raise UserError(
            f"--optimizer {name}: {len(replicated)} tables are data-parallel, which it cannot train; "
            "give them another sharding, or choose adagrad"
        )
    parts: list[Any] = [model.fused_optimizer]
    for parameters in ({k: v for k, v in others.items() if k not in replicated}, replicated):
        if parameters:
            parts.append(
                KeyedOptimizerWrapper(parameters, lambda p: rule.dense(p, foreach=True, **arguments))
            )
    return CombinedOptimizer(parts)
