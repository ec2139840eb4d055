"""Optimizers: the tables' run inside the backward pass (fbgemm's fused kernels), all others after it.

`apply_in_backward` comes before planning and sharding, `make_dense_optimizer` after it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dlrm.embeddings.row_adam import RowAdam
from dlrm.embeddings.tables import WEIGHT, list_table_weights
from dlrm.runtime.errors import UserError

Make = Callable[..., torch.optim.Optimizer]
BETAS = (0.9, 0.999)
ADAGRAD_EPS = 1e-8  # MLCommons' value; torch's own default is 1e-10


@dataclass(frozen=True)
class OptimizerRule:
    """One value of --optimizer."""

    fused: type[torch.optim.Optimizer]  # for tables: torchrec maps this class to fbgemm's kernel
    dense: Make  # the same rule for parameters with ordinary gradients
    uses: tuple[str, ...] = ()  # which of the arguments eps and betas it takes
    data_parallel: Make | None = None  # the same rule for a table with ordinary gradients


RULES = {
    "sgd": OptimizerRule(torch.optim.SGD, torch.optim.SGD, (), torch.optim.SGD),
    "adagrad": OptimizerRule(torch.optim.Adagrad, torch.optim.Adagrad, ("eps",), torch.optim.Adagrad),
    "rowwise_adagrad": OptimizerRule(RowWiseAdagrad, torch.optim.Adagrad, ("eps",)),
    # of a table, only the rows that were looked up: fbgemm's kernel on GPUs, `AdamTables` on CPUs
    "adam": OptimizerRule(torch.optim.Adam, torch.optim.Adam, ("eps", "betas"), RowAdam),
    # adam whose weight decay is not part of the gradient: fbgemm's adam is of that kind
    "adamw": OptimizerRule(torch.optim.Adam, torch.optim.AdamW, ("eps", "betas")),
}


class ShardedState(KeyedOptimizerWrapper):
    """The optimizer of table shards with ordinary gradients. Its `state_dict` has ShardedTensors, as the
    fused optimizers' do, so that a checkpoint can be loaded under another sharding.
    """

    def __init__(self, params: Mapping[str, Any], make: Make, weights: Mapping[str, Any]) -> None:
        """`params`: name -> this rank's shard. `make`: parameters -> optimizer. `weights`: name ->
        ShardedTensor.
        """
        super().__init__(params, make)
        self.weights = weights

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for name, values in found["state"].items():
            weight = self.weights[name]
            for key, value in values.items():
                if value.dim():
                    shard = weight.local_shards()[0].metadata
                    values[key] = ShardedTensor._init_from_local_shards_and_global_metadata(
                        [Shard(value, shard)], weight.metadata(), process_group=weight._process_group
                    )
        return found


def _choose_optimizer_arguments(
    name: str, lr: float, eps: float, betas: tuple[float, float], weight_decay: float
) -> dict[str, Any]:
    """The keyword arguments of optimizer `name`, a key of RULES: those of these that it uses."""
    if name not in RULES:
        raise UserError(f"--optimizer {name} is unknown; choose from {', '.join(RULES)}")
    extras: dict[str, Any] = {"weight_decay": weight_decay} if weight_decay else {}
    known = {"eps": eps, "betas": betas}
    return {"lr": lr} | extras | {key: value for key, value in known.items() if key in RULES[name].uses}


def apply_in_backward(
    parameters: Iterable[nn.Parameter],
    name: str,
    lr: float,
    device: torch.device,
    eps: float = ADAGRAD_EPS,
    weight_decay: float = 0.0,
) -> None:
    """Attach the fused optimizer to the tables' parameters. Before planning and sharding: the planner counts
    the memory of the optimizer's state.

    name  a key of RULES;  eps  ignored by the optimizers that do not use it
    """
    arguments = _choose_optimizer_arguments(name, lr, eps, BETAS, weight_decay)
    arguments.pop("betas", None)  # fbgemm has them under other names, with the same defaults
    if device.type == "cpu" and weight_decay and RULES[name].fused is torch.optim.Adam:
        raise UserError(f"--optimizer {name}: on CPUs tables have no weight decay; give --weight_decay 0")
    apply_optimizer_in_backward(RULES[name].fused, parameters, arguments)


def make_dense_optimizer(
    model: DistributedModelParallel,
    name: str,
    lr: float,
    eps: float = ADAGRAD_EPS,
    betas: tuple[float, float] = BETAS,
    weight_decay: float = 0.0,
    all_rows: bool = False,
) -> CombinedOptimizer:
    """All of the model's optimizers as one, with step, zero_grad, state_dict and param_groups.

    all_rows: tables with ordinary gradients get the rule of the dense part, which (adam) also moves rows that
    were not looked up.

    Some tables have ordinary gradients: data-parallel ones, and the shards that `planner.with_gradients`
    makes. torchrec's in-backward optimizers silently skip them, so they would never be trained. They get the
    same rule here, each kind as a part of its own.
    """
    arguments = _choose_optimizer_arguments(name, lr, eps, betas, weight_decay)
    rule = RULES[name]
    others = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {key: value for key, value in others.items() if WEIGHT.search(key)}
    # dense adagrad is not the row-wise one
    of_tables: Any = rule.dense if all_rows and name != "rowwise_adagrad" else rule.data_parallel
    if replicated and of_tables is None:
        raise UserError(
            f"--optimizer {name}: {len(replicated)} tables are data-parallel, which it cannot train; "
            "give them another sharding, or choose adagrad"
        )
    parts: list[Any] = [model.fused_optimizer]
    weights = {
        key: weight for key, _, weight in list_table_weights(model) if isinstance(weight, ShardedTensor)
    }
    sharded = {key: value for key, value in replicated.items() if key in weights}

    def make_optimizer(make: Make, parameters: Any) -> torch.optim.Optimizer:
        values = list(parameters)
        # on CPUs torch's fused adam is five times as fast as foreach
        fused = make in (torch.optim.Adam, torch.optim.AdamW) and all(v.device.type == "cpu" for v in values)
        return make(values, **{"fused" if fused else "foreach": True}, **arguments)

    for make, parameters in (
        (rule.dense, {k: v for k, v in others.items() if k not in replicated}),
        (of_tables, {k: v for k, v in replicated.items() if k not in sharded}),
    ):
        if parameters:
            parts.append(KeyedOptimizerWrapper(parameters, partial(make_optimizer, make)))
    if sharded:
        parts.append(ShardedState(sharded, partial(make_optimizer, of_tables), weights))
    return CombinedOptimizer(parts)
