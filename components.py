"""torchx components: `torchx run -s SCHEDULER components.py:run_dlrm_main --num_trainers=8 -- OPTION...`

Call torchx in the project's folder, or in scripts/. Out: an AppDef that starts scripts/dlrm_main.py or
scripts/bert4rec_main.py by torchrun, on as many nodes as the trainers need.
"""

import os

import torchx.specs as specs
from torchx.components.dist import ddp


def run_dlrm_main(
    *script_args: str,
    num_trainers: int = 8,
    trainers_per_node: int = 8,
    cpus_per_trainer: int = 12,
    gpus_per_trainer: int = 1,
) -> specs.AppDef:
    """Train a DLRM.

    Args:
        script_args: options of scripts/dlrm_main.py
        num_trainers: ranks in all
        trainers_per_node: ranks of a full node; more trainers must be a multiple of it
        cpus_per_trainer: processor cores to ask the scheduler for, per rank
        gpus_per_trainer: GPUs to ask the scheduler for, per rank; 0 for nodes without
    """
    shape = (num_trainers, trainers_per_node, cpus_per_trainer, gpus_per_trainer)
    return _make_job("train_dlrm", "dlrm_main.py", script_args, *shape)


def run_bert4rec_main(
    *script_args: str,
    num_trainers: int = 8,
    trainers_per_node: int = 8,
    cpus_per_trainer: int = 12,
    gpus_per_trainer: int = 1,
) -> specs.AppDef:
    """Train BERT4Rec.

    Args:
        script_args: options of scripts/bert4rec_main.py
        num_trainers: ranks in all
        trainers_per_node: ranks of a full node; more trainers must be a multiple of it
        cpus_per_trainer: processor cores to ask the scheduler for, per rank
        gpus_per_trainer: GPUs to ask the scheduler for, per rank; 0 for nodes without
    """
    shape = (num_trainers, trainers_per_node, cpus_per_trainer, gpus_per_trainer)
    return _make_job("train_bert4rec", "bert4rec_main.py", script_args, *shape)


def _make_job(
    name: str, script: str, script_args: tuple[str, ...], trainers: int, per_node: int, cpus: int, gpus: int
) -> specs.AppDef:
    """A torchx job of `trainers` ranks, `per_node` on each node; cpus and gpus are those of a rank."""
    if trainers < 1 or per_node < 1:
        raise ValueError(f"--num_trainers {trainers}, --trainers_per_node {per_node}: give at least 1")
    if trainers > per_node and trainers % per_node:
        raise ValueError(
            f"--num_trainers {trainers}: on several nodes give a multiple of --trainers_per_node {per_node}"
        )
    ranks = min(trainers, per_node)
    return ddp(
        *script_args,
        name=name,
        script=_find_script(script),
        image=os.getcwd(),
        cpu=cpus * ranks,
        gpu=gpus * ranks,
        memMB=-1,
        j=f"{trainers // ranks}x{ranks}",
    )


def _find_script(name: str) -> str:
    """Below the working directory: torchx executes this file's text, so it has no path of its own."""
    for folder in ("", "scripts"):
        path = os.path.join(os.getcwd(), folder, name)
        if os.path.exists(path):
            return path
    raise ValueError(f"no {name} in {os.getcwd()} or its scripts/: call torchx in the project's folder")
