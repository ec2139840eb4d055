"""Options: frozen dataclasses, checked, turned into flags, dumped into the run folder.

MLCommons' dlrm_main.py command lines run unchanged: its flags keep their names and meaning here.
"""

import argparse
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from dlrm.runtime.environment import mask_secrets
from dlrm.runtime.errors import UserError

C = TypeVar("C")


def option(default: Any, help: str, choices: Sequence[str] | None = None, bare: str | None = None) -> Any:
    """`bare`: what the flag means without a value."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare})


def check_at_least(low: float, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name} {value}: must be a number of at least {low:g}")


@dataclass(frozen=True)
class DataOptions:
    in_memory_binary_criteo_path: str | None = option(None, "folder of day_*_{dense,sparse,labels}.npy")
    synthetic_multi_hot_criteo_path: str | None = option(None, "folder with day_*_sparse_multi_hot.npz")
    dataset_name: str = option("criteo_1t", "dataset, held against the files", ("criteo_1t", "criteo_kaggle"))
    source: str = option(
        "auto", "how rows are read; auto: what the folder holds is streamed, if no other flag says more",
        ("auto", "stream", "memory", "mmap", "parquet", "random"),
    )  # fmt: skip
    batch_size: int = option(32, "training batch size per rank")
    test_batch_size: int | None = option(None, "batch size per rank of validation and test")
    drop_last_training_batch: bool = option(False, "drop the last batch of an epoch when it is not full")
    limit_train_batches: int | None = option(None, "train on so many batches per epoch and rank")
    limit_val_batches: int | None = option(None, "validate on so many batches per rank")
    limit_test_batches: int | None = option(None, "test on so many batches per rank")
    mmap_mode: bool = option(False, "map the files instead of reading them (a trace cannot see page faults)")
    pin_memory: bool = option(False, "copy batches through pinned memory")
    shuffle_batches: bool = option(False, "shuffle the rows of each training batch")
    shuffle_training_set: bool = option(False, "shuffle the training rows of each rank, in memory")
    read_chunk_mb: float = option(8.0, "MB of one read of the streaming source")
    prefetch_batches: int = option(4, "batches that the loading thread prepares ahead")
    multi_hot_sizes: tuple[int, ...] | None = option(None, "ids per feature, made from one id on the fly")
    multi_hot_distribution_type: str | None = option(
        None, "distribution of the made ids (uniform when not given)", ("uniform", "pareto")
    )
    collect_multi_hot_freqs_stats: bool = option(False, "save how often each id was looked up")

    def __post_init__(self) -> None:
        check_at_least(1, self, "batch_size", "test_batch_size", "prefetch_batches")
        check_at_least(0, self, "limit_train_batches", "limit_val_batches", "limit_test_batches")
        check_at_least(0.001, self, "read_chunk_mb")
        if self.folder is None and self.source not in ("auto", "random"):
            raise UserError(f"--source {self.source} needs --in_memory_binary_criteo_path, the data's folder")
        if self.in_memory_binary_criteo_path and self.synthetic_multi_hot_criteo_path:
            raise UserError("one of --in_memory_binary_criteo_path and --synthetic_multi_hot_criteo_path")
        if self.multi_hot_sizes and self.synthetic_multi_hot_criteo_path:
            raise UserError("--multi_hot_sizes makes ids from one-hot data: not with multi-hot files")

    @property
    def folder(self) -> str | None:
        return self.in_memory_binary_criteo_path or self.synthetic_multi_hot_criteo_path

    @property
    def kind(self) -> str:
        """The data source that these flags ask for."""
        asked = {
            "random": self.folder is None,
            "multi_hot": self.synthetic_multi_hot_criteo_path is not None,
            "memory": self.shuffle_training_set,
            "mmap": self.mmap_mode,
        }
        if self.source == "auto" or asked["random"] or asked["multi_hot"]:
            return next((kind for kind, yes in asked.items() if yes), "stream")
        return self.source


@dataclass(frozen=True)
class ModelOptions:
    num_embeddings: int | None = option(None, "rows of every table (default: meta.json, else 100000)")
    num_embeddings_per_feature: tuple[int, ...] | None = option(None, "rows of each table, comma separated")
    embedding_dim: int = option(64, "width of the embeddings")
    dense_arch_layer_sizes: tuple[int, ...] = option((512, 256, 64), "layers of the bottom MLP")
    over_arch_layer_sizes: tuple[int, ...] = option((512, 512, 256, 1), "layers of the top MLP")
    interaction_type: str = option(
        "original", "feature interaction; original is the pairwise dot product",
        ("original", "dot", "dcn", "projection", "cat"),
    )  # fmt: skip
    self_interaction: bool = option(False, "dot: each feature also with itself")
    dcn_num_layers: int = option(3, "layers of the cross network")
    dcn_low_rank_dim: int = option(512, "rank of the cross network's matrices")
    interaction_branch1_layer_sizes: tuple[int, ...] = option((2048, 2048), "projection: first branch")
    interaction_branch2_layer_sizes: tuple[int, ...] = option((2048, 2048), "projection: second branch")

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_embeddings", "embedding_dim", "dcn_num_layers", "dcn_low_rank_dim")
        if self.over_arch_layer_sizes[-1] != 1:
            raise UserError("--over_arch_layer_sizes must end in 1: the model has one output, the click")


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(15.0, "base learning rate")
    optimizer: str = option("sgd", "optimizer", ("sgd", "adagrad", "rowwise_adagrad", "adam"))
    adagrad: bool = option(False, "the same as --optimizer adagrad")
    eps: float = option(1e-8, "epsilon of adagrad and adam")
    lr_schedule: str = option("mlperf", "how warm-up, hold and decay are joined", ("mlperf", "nvidia"))
    lr_warmup_steps: int = option(0, "steps of linear warm-up")
    lr_decay_start: int = option(0, "first step of the polynomial decay")
    lr_decay_steps: int = option(0, "steps of the decay; 0: none")
    change_lr: bool = option(False, "change the rate once, within the first epoch")
    lr_change_point: float = option(0.8, "share of the first epoch after which --change_lr acts")
    lr_after_change_point: float = option(0.2, "learning rate after that point")
    grad_clip: float | None = option(None, "largest norm of the dense gradients")
    amp: str = option(
        "off", "mixed precision of the dense part; --amp alone: bf16", ("off", "bf16", "fp16"), "bf16"
    )
    loss_scale_policy: str = option("dynamic", "fp16: how the loss is scaled", ("static", "dynamic"))
    loss_scale: float = option(1024.0, "fp16: the static scale, or the first dynamic one")

    def __post_init__(self) -> None:
        check_at_least(1e-30, self, "grad_clip", "loss_scale")
        check_at_least(0, self, "learning_rate", "eps", "lr_warmup_steps", "lr_decay_start", "lr_decay_steps")
        if self.lr_decay_steps and self.lr_decay_start < self.lr_warmup_steps:
            raise UserError("--lr_decay_start must not come before the end of --lr_warmup_steps")

    @property
    def name(self) -> str:
        return "adagrad" if self.adagrad else self.optimizer


@dataclass(frozen=True)
class PlanOptions:
    sharding_file: str | None = option(None, "JSON: table name -> sharding, kernel; * for all others")
    print_sharding_plan: bool = option(False, "print how each table is sharded")
    store_type: str = option(
        "device_mem", "where tables live; auto: where they fit",
        ("device_mem", "cached_host_mem", "cached_ssd", "auto"),
    )  # fmt: skip
    cache_memory_budget_mb: float = option(8192, "memory per rank for the rows of tables that live elsewhere")
    persistent_path: str | None = option(None, "folder of the tables' files (default: store in --output_dir)")

    def __post_init__(self) -> None:
        check_at_least(0.001, self, "cache_memory_budget_mb")


@dataclass(frozen=True)
class RunOptions:
    output_dir: str | None = option(
        None, "run folder: config, metrics, results, traces (default: none written)"
    )
    mode: str = option("train", "test: only test, from a checkpoint", ("train", "test"))
    epochs: int = option(1, "passes over the training set")
    seed: int | None = option(None, "makes a run reproducible")
    evaluate_on_epoch_end: bool = option(False, "validate after each epoch")
    evaluate_on_training_end: bool = option(False, "test after the last epoch")
    validation_freq_within_epoch: int | None = option(None, "validate every so many steps")
    validation_auroc: float | None = option(None, "stop once validation reaches this AUROC")
    max_steps: int | None = option(None, "stop after so many steps in all")
    report_every: int = option(20, "steps between two reports of loss and samples per second")
    print_lr: bool = option(False, "print the learning rate of every step")
    print_progress: bool = option(False, "a progress bar on rank 0")
    allow_tf32: bool = option(False, "TF32 matrix products on CUDA")
    compile: bool = option(False, "torch.compile the dense part")
    trace: bool = option(False, "record every I/O call and stage with DFTracer (needs --output_dir)")
    trace_flush_ms: int = option(1000, "a killed run loses at most this much of its trace")
    mllog: bool = option(False, "MLPerf :::MLLOG lines, in mlperf.log of the run folder too")
    mllog_submitter: str = option("dlrm-io", "submission_org of the MLPerf log")
    mllog_platform: str = option("dlrm-io", "submission_platform of the MLPerf log")
    tensorboard: bool = option(False, "scalars for TensorBoard in the run folder")
    exchange: str = option(
        "auto", "how CPU ranks meet; auto: through shared memory where all are on one host", ("auto", "gloo")
    )
    timeout: int = option(60, "seconds without a sign of life after which a rank counts as lost")

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "epochs", "report_every", "timeout", "validation_freq_within_epoch", "max_steps"
        )
        if self.trace and not self.output_dir:
            raise UserError("--trace needs --output_dir: the trace is written there")


@dataclass(frozen=True)
class CheckpointOptions:
    checkpoint_dir: str | None = option(None, "where checkpoints go (default: checkpoints in --output_dir)")
    checkpoint_every_steps: int | None = option(None, "save every so many steps")
    checkpoint_every_minutes: float | None = option(None, "save every so many minutes")
    checkpoint_epochs: bool = option(True, "where checkpoints are asked for: also save after each epoch")
    keep_checkpoints: int = option(3, "how many to keep, the best one besides; 0: all")
    save_initial_model: bool = option(False, "save before the first step")
    save_model_after_each_eval: bool = option(False, "save after each validation")
    resume: str = option(
        "auto", "auto: go on from the newest good checkpoint of this run folder", ("auto", "never")
    )
    load_checkpoint_path: str | None = option(
        None, "a checkpoint, or a folder of them, to go on from (or to test)"
    )
    load_model_only: bool = option(False, "take the weights of --load_checkpoint_path, begin at step 0")
    stop_before_walltime: float | None = option(None, "save and stop so many seconds before the job's end")
    walltime: str | None = option(None, "the job's time, [HH:]MM:SS or seconds (default: as PBS says)")

    def __post_init__(self) -> None:
        check_at_least(1, self, "checkpoint_every_steps")
        check_at_least(0, self, "checkpoint_every_minutes", "keep_checkpoints", "stop_before_walltime")
        if self.load_model_only and not self.load_checkpoint_path:
            raise UserError("--load_model_only needs --load_checkpoint_path")

    @property
    def asked(self) -> bool:
        return bool(
            self.checkpoint_dir or self.checkpoint_every_steps or self.checkpoint_every_minutes
            or self.save_initial_model or self.save_model_after_each_eval
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimizerOptions = field(default_factory=OptimizerOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


class OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def list_flags(kind: Any) -> list[Any]:
    """The fields that a command line can set."""
    return [each for each in fields(kind) if each.init]


def parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _add_flag(group: Any, name: str, kind: Any, default: Any, metadata: Mapping[str, Any]) -> None:
    of = [arm for arm in typing.get_args(kind) if arm is not type(None)]
    bare = of[0] if isinstance(kind, types.UnionType) else kind
    listed = typing.get_origin(bare) is tuple
    shown = ",".join(map(str, default)) if listed and default else default
    text = metadata["help"] + ("" if default in (None, False) else f" [{shown}]")
    text = text.replace("%", "%%")
    if bare is bool:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    parse = parse_numbers if listed else bare
    alone = {"nargs": "?", "const": metadata["bare"]} if metadata["bare"] else {}
    group.add_argument(
        f"--{name}", type=parse, default=default, help=text, choices=metadata["choices"],
        metavar=None if metadata["choices"] else {int: "N", float: "X", str: "S"}.get(parse, "N,N,.."),
        **alone,
    )  # fmt: skip


def parse_options(
    kind: type[C],
    argv: Sequence[str],
    program: str,
    description: str,
    presets: Mapping[str, Callable[[], Mapping[str, Any]]] | None = None,
) -> C:
    """Flags -> a config of nested dataclasses. A preset gives defaults, flags on the line win."""
    try:
        return _parse_options(kind, argv, program, description, presets or {})
    except UserError as error:
        error.shared = True  # every rank has the same command line
        raise


def _parse_options(
    kind: type[C],
    argv: Sequence[str],
    program: str,
    description: str,
    presets: Mapping[str, Callable[[], Mapping[str, Any]]],
) -> C:
    parser = OptionParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--check_options", action="store_true", help="only see whether the options are right")
    if presets:
        parser.add_argument("--preset", choices=sorted(presets), help="published settings as defaults")
    groups = {f.name: f.default_factory for f in fields(kind)}  # type: ignore[arg-type, misc]
    for title, group_kind in groups.items():
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(group_kind)
        for each in list_flags(group_kind):
            _add_flag(group, each.name, hints[each.name], each.default, each.metadata)
    if presets:
        chooser = OptionParser(add_help=False, allow_abbrev=False)
        chooser.add_argument("--preset", choices=sorted(presets))
        chosen = chooser.parse_known_args(argv)[0].preset
        if chosen:
            parser.set_defaults(**presets[chosen]())
    values = vars(parser.parse_args(argv))
    made = {
        title: group_kind(**{f.name: values[f.name] for f in list_flags(group_kind)})  # type: ignore[operator, misc]
        for title, group_kind in groups.items()
    }
    return parser.exit() if values["check_options"] else kind(**made)


def as_json(config: Any, launch: Mapping[str, Any]) -> str:
    return json.dumps(_mask({**asdict(config), "launch": dict(launch)}), indent=1) + "\n"


def _mask(value: Any) -> Any:
    """The same without what looks like a password or a key in a path or an address."""
    if isinstance(value, str):
        return mask_secrets(value)
    if isinstance(value, dict):
        return {name: _mask(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mask(each) for each in value]
    return value
