"""What the trainer, the scripts and the report need to know of a model.

A model is one folder (dlrm/models/NAME/, or any importable module outside the package) that ends in one
`SPEC = ModelSpec(...)`. `dlrm.models.registry` finds it by name. The spec itself is cheap: it imports neither
torch nor torchrec, so that --help and --check_options are quick; `load_parts` brings what needs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dlrm.runtime.ranks import Ranks

Presets = Mapping[str, Callable[[], Mapping[str, Any]]]


@dataclass(frozen=True)
class ScriptOptions:
    """How the variables of 3_train.sh become options of the model."""

    # variable -> the words that it adds, with {} for its value:
    # DATASET_DIR, BATCH_SIZE (per rank), EMBEDDING_DIM, EPOCHS, LEARNING_RATE and what else the model offers
    variables: Mapping[str, tuple[str, ...]]
    always: tuple[str, ...] = ()  # of every run, e.g. --evaluate_on_training_end
    # Without DATASET_DIR: the options, where {demo_data} is a folder that the script chooses, ...
    demo: tuple[str, ...] = ()
    demo_title: str = "made-up data"  # ... what they train on, for the log, ...
    # ... and that folder's name: "toy" is filled with the toy dataset (in npy/), another one may be missing
    demo_data: str = ""


@dataclass(frozen=True)
class ModelParts:
    """What the trainer calls, in this order. `options` is an instance of the spec's options type."""

    # this rank's batches to train on, to validate and to test with: `trainer.Datasets`
    open_data: Callable[[Any, "Ranks"], Any]
    # the model on its device, its tables on the meta device; the same on all ranks
    build_model: Callable[[Any, Any, "torch.device"], "nn.Module"]
    # (options, model, data, ranks, device, run folder) -> (DistributedModelParallel, CombinedOptimizer)
    shard_model: Callable[..., tuple[Any, Any]]
    # a subclass of `trainer.Trainer`: its learning rate, its metrics, its lines of results.json
    trainer: type[Any]
    # one line for each group of options that change nothing in this run
    list_unused_options: Callable[[Any, str], list[str]] = field(default=lambda options, device: [])
    # what MLPerf's log says of the settings, of (options, number of ranks)
    mlperf_settings: Callable[[Any, int], Mapping[str, Any]] = field(default=lambda options, ranks: {})


@dataclass(frozen=True)
class ModelSpec:
    """One model: its name, its options and where its parts are."""

    name: str  # MODEL=name of 3_train.sh, --model name of python -m dlrm.train
    title: str  # what the report and the log call it
    description: str  # the first lines of --help
    options: type  # a dataclass of option groups, with `run` (RunOptions) and `checkpoint`
    presets: Presets
    script: ScriptOptions
    load_parts: Callable[[], ModelParts]
