"""What the trainer, the scripts and the report need to know of a model.

A model is one folder (dlrm/models/NAME/, or any importable module outside the package) with one
`SPEC = ModelSpec(...)`. `dlrm.models.registry` finds it by name. The spec itself is cheap to import: it needs
neither torch nor torchrec, so that --help and --validate_only are quick. `load_parts` imports what needs
them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dlrm.checkpoint.folder import Checkpoint
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
class ChosenOptions:
    """Options in which what the user left open is filled in."""

    options: Any
    summary: str = ""  # what was chosen, one line
    warnings: tuple[str, ...] = ()  # a line each


@dataclass(frozen=True)
class ModelParts:
    """What `trainer.train` calls. `options`: an instance of the spec's options type."""

    # (options, ranks) -> this rank's batches of train, val and test: `trainer.Datasets`
    open_data: Callable[[Any, "Ranks"], Any]
    # (options, data, device) -> dense layers on the device, tables on the meta device, with the tables'
    # optimizer attached; the same on all ranks, whose dense weights must be equal
    build_model: Callable[[Any, Any, "torch.device"], "nn.Module"]
    # (options, model, data, ranks, device, run folder) -> (DistributedModelParallel, CombinedOptimizer)
    shard_model: Callable[..., tuple[Any, Any]]
    # a subclass of `trainer.Trainer`: learning rate, mixed precision, metrics, entries of results.json
    trainer: type[Any]
    # (options, device type) -> one line for each group of options that have no effect in this run
    list_unused_options: Callable[[Any, str], list[str]] = field(default=lambda options, device: [])
    # (options, ranks, device, the checkpoint that the run starts from or None) -> the options of this run:
    # called first, on rank 0
    choose_options: Callable[[Any, "Ranks", "torch.device", "Checkpoint | None"], ChosenOptions] = field(
        default=lambda options, ranks, device, stored: ChosenOptions(options)
    )
    # (options, checkpoint) -> the options with the checkpoint's model, for a run that does not train
    adopt_model: Callable[[Any, "Checkpoint"], Any] = field(default=lambda options, checkpoint: options)
    # (options, number of ranks) -> hyperparameters for the MLPerf log, by MLPerf's keys
    mlperf_settings: Callable[[Any, int], Mapping[str, Any]] = field(default=lambda options, ranks: {})


@dataclass(frozen=True)
class ModelSpec:
    """One model: its name, its options, and how to load its parts."""

    name: str  # MODEL=name of 3_train.sh, --model name of python -m dlrm.train
    title: str  # what the report and the log call it
    description: str  # the first lines of --help
    # A dataclass of option groups, among them run: RunOptions, checkpoint: CheckpointOptions, optim. It may
    # have a method check_inputs(), which raises a UserError where the files of these options are not there:
    # --validate_only calls it, so that a job fails before it starts its ranks.
    options: type
    presets: Presets
    script: ScriptOptions
    load_parts: Callable[[], ModelParts]
    # -> what runs instead of `trainer.train`, with the same arguments (the emulator)
    load_program: Callable[[], Callable[..., None]] | None = None
