"""The four functions that a fast path may replace, each with torch's or torchrec's own way as its default.

A fast path is a package that nothing imports unless it is switched on (dlrm.cpu, for CPU ranks). When it is
switched on it calls `use_hooks` with functions of its own; the code that calls these hooks does not know
which fast path there is, or whether there is one. A hook changes speed, and results by rounding at most.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dlrm.runtime import gloo


def choose_backend(device: torch.device) -> str:
    """Name of torch.distributed's backend for the ranks' process group on this kind of device."""
    return "nccl" if device.type == "cuda" else gloo.register_backend()


def run_mlp(module: nn.Module, features: torch.Tensor, last_relu: bool) -> torch.Tensor:
    """`module`'s output: Linear layers with a ReLU after each, after the last one only if `last_relu`."""
    return module(features)


def replace_output_dists(model: nn.Module) -> int:
    """Replace torchrec's exchange of pooled embeddings in a sharded model; returns in how many modules."""
    return 0


@dataclass(frozen=True)
class FastPath:
    """One function for each hook."""

    # device -> backend's name, registered with torch.distributed
    choose_backend: Callable[[torch.device], str] = choose_backend
    # (layers, features [rows, inputs], whether a ReLU ends them) -> [rows, outputs]
    run_mlp: Callable[[nn.Module, torch.Tensor, bool], torch.Tensor] = run_mlp
    # sharded model -> number of modules changed
    replace_output_dists: Callable[[nn.Module], int] = replace_output_dists
    # a context in which torchrec need not fill tables, because `initialize_tables` fills them afterwards
    skip_first_weights: Callable[[], AbstractContextManager[object]] = nullcontext


PLAIN = FastPath()
hooks = PLAIN  # read as `accelerate.hooks.NAME(...)` at each call; set by `use_hooks` alone


def use_hooks(fast_path: FastPath) -> None:
    """Make these the hooks of this process; `use_hooks(PLAIN)` restores the defaults."""
    global hooks
    hooks = fast_path


def is_cpu_fast_path_usable(device: torch.device, wanted: bool) -> bool:
    """Whether dlrm.cpu is imported at all: on CPU ranks, unless --no-cpu_fast_path."""
    return wanted and device.type == "cpu"
