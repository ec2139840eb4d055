"""Options of python -m dlrm.train: MLCommons' dlrm_main.py command lines run unchanged, its flags keep their
names and meaning here; and ours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dlrm.config.options import CheckpointOptions, PlanOptions, RunOptions
from dlrm.config.parser import check_at_least, check_at_most, option, path_option
from dlrm.data.criteo import CRITEO, check_column_counts
from dlrm.data.registry import CHOICES
from dlrm.models.dlrm.other_names import OTHER_NAMES
from dlrm.runtime.errors import UserError

LARGEST_BATCH = (1 << 31) - 1  # rows; its ids are counted with 32 bits, which is seen with the data
LARGEST_TABLE = (1 << 31) - 1  # rows: ids have 32 bits
LARGEST_FACTOR = 1000  # 2^N must be a float
INFERENCE_POOL = 8  # --mode inference_benchmark: different batches per batch size, at most
LARGEST_LAYER = 1 << 24  # what fits into memory is seen once the whole model is known
LAYERS = (
    "dense_arch_layer_sizes", "over_arch_layer_sizes", "interaction_branch1_layer_sizes",
    "interaction_branch2_layer_sizes",
)  # fmt: skip


# --interaction_type -> module:class. By name, because options are parsed before torch is imported. A new
# interaction is a file and a line here.
INTERACTIONS = {
    "original": "dlrm.models.dlrm.interactions:InteractionArch",
    "dot": "dlrm.models.dlrm.interactions:InteractionArch",
    "dcn": "dlrm.models.dlrm.interactions:InteractionDCNArch",
    "projection": "dlrm.models.dlrm.interactions:InteractionProjectionArch",
    "cat": "dlrm.models.dlrm.interactions:ConcatArch",
}


@dataclass(frozen=True)
class DataOptions:
    in_memory_binary_criteo_path: str | None = path_option("folder of day_*_{dense,sparse,labels}.npy")
    synthetic_multi_hot_criteo_path: str | None = path_option("folder with day_*_sparse_multi_hot.npz")
    dataset_name: str = option(
        "criteo_1t", "name of the dataset, checked against the files", ("criteo_1t", "criteo_kaggle")
    )
    defaults: str = option(
        "mlcommons", "options that are not given: MLCommons' values, or chosen for the dataset and the ranks",
        ("mlcommons", "dataset"),
    )  # fmt: skip
    source: str = option(
        "auto", "how rows are read; auto: streamed, unless another flag asks for something else",
        ("auto", *CHOICES),
    )  # fmt: skip
    num_numerical: int | None = option(
        None, f"numerical columns of random data (default: {CRITEO.numerical}); a dataset's are in meta.json"
    )
    num_categorical: int | None = option(
        None,
        "categorical columns of random data (default: as --num_embeddings_per_feature has sizes, "
        f"else {CRITEO.categorical})",
    )
    batch_size: int = option(32, "training batch size per rank")
    test_batch_size: int | None = option(
        None, "batch size per rank of validation and test (default: --batch_size)"
    )
    drop_last_training_batch: bool = option(False, "drop the last batch of an epoch when it is not full")
    limit_train_batches: int | None = option(None, "train on N batches per epoch and rank")
    limit_val_batches: int | None = option(None, "validate on N batches per rank")
    limit_test_batches: int | None = option(None, "test on N batches per rank")
    mmap_mode: bool = option(False, "map the files instead of reading them (a trace shows no page faults)")
    pin_memory: bool = option(False, "copy batches through pinned memory")
    shuffle_batches: bool = option(False, "shuffle the rows of each training batch")
    shuffle_training_set: bool = option(False, "shuffle the training rows of each rank, in memory")
    shuffle_batch_order: bool = option(
        False, "take the training batches in random order, each epoch in another one"
    )
    dataset_subset: float | None = option(None, "train on the first X of the training rows; 1 is all")
    read_chunk_mb: float = option(8.0, "MB of one read of the streaming source")
    prefetch_batches: int = option(4, "batches that the loading thread prepares ahead")
    multi_hot_sizes: tuple[int, ...] | None = option(None, "ids per feature, made from one id on the fly")
    multi_hot_distribution_type: str | None = option(
        None, "distribution of the generated ids (uniform when not given)", ("uniform", "pareto")
    )
    collect_multi_hot_freqs_stats: bool = option(False, "save how often each id was looked up")

    def __post_init__(self) -> None:
        check_column_counts(self.num_numerical, self.num_categorical)
        check_at_least(1, self, "batch_size", "test_batch_size", "prefetch_batches")
        check_at_most(LARGEST_BATCH, self, "batch_size", "test_batch_size")
        check_at_least(0, self, "limit_train_batches", "limit_val_batches", "limit_test_batches")
        check_at_least(0.001, self, "read_chunk_mb")
        if self.dataset_subset is not None and not 0 < self.dataset_subset <= 1:
            raise UserError(f"--dataset_subset {self.dataset_subset}: must be above 0 and at most 1")
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
        """The kind of source that these flags select, see `dlrm.data.readers`."""
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
    max_table_size: int | None = option(
        None, "larger tables get N rows, and ids are taken modulo their table's size"
    )
    embedding_dim: int = option(64, "width of the embeddings")
    dense_arch_layer_sizes: tuple[int, ...] = option((512, 256, 64), "layers of the bottom MLP")
    over_arch_layer_sizes: tuple[int, ...] = option((512, 512, 256, 1), "layers of the top MLP")
    interaction_type: str = option(
        "original", "feature interaction; original is the pairwise dot product", tuple(INTERACTIONS)
    )  # fmt: skip
    self_interaction: bool = option(False, "dot: each feature also with itself")
    dcn_num_layers: int = option(3, "layers of the cross network")
    dcn_low_rank_dim: int = option(512, "rank of the cross network's matrices")
    interaction_branch1_layer_sizes: tuple[int, ...] = option((2048, 2048), "projection: first branch")
    interaction_branch2_layer_sizes: tuple[int, ...] = option((2048, 2048), "projection: second branch")

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "num_embeddings", "max_table_size", "embedding_dim", "dcn_num_layers", "dcn_low_rank_dim"
        )
        check_at_most(LARGEST_TABLE, self, "num_embeddings", "max_table_size")
        check_at_most(LARGEST_LAYER, self, "embedding_dim", "dcn_num_layers", "dcn_low_rank_dim")
        for rows in self.num_embeddings_per_feature or ():
            if not 1 <= rows <= LARGEST_TABLE:
                raise UserError(f"--num_embeddings_per_feature {rows}: must be from 1 to {LARGEST_TABLE:,}")
        for name in LAYERS:
            for size in getattr(self, name):
                if not 1 <= size <= LARGEST_LAYER:
                    raise UserError(f"--{name} {size}: must be from 1 to {LARGEST_LAYER:,}")
        if self.over_arch_layer_sizes[-1:] != (1,):
            raise UserError("--over_arch_layer_sizes must end in 1: the model has one output, the click")


def keep_model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are fields of ModelOptions, with lists as tuples."""
    known = ModelOptions.__dataclass_fields__
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k in known}


@dataclass(frozen=True)
class InferenceOptions:
    """Of --mode inference_benchmark."""

    inference_benchmark_batch_sizes: tuple[int, ...] = option(
        (1, 64, 4096), "rows of a batch, all ranks together"
    )
    inference_benchmark_steps: int = option(200, "iterations of each batch size that are timed")

    def __post_init__(self) -> None:
        check_at_least(1, self, "inference_benchmark_steps")
        if not self.inference_benchmark_batch_sizes or min(self.inference_benchmark_batch_sizes) < 1:
            raise UserError("--inference_benchmark_batch_sizes: give sizes of at least 1")


def check_shared_sizes(name: str, sizes: Iterable[int], world_size: int) -> None:
    """UserError for the first batch size that the ranks cannot share. `name`: the option that has it."""
    for size in sizes:
        if size % world_size:
            raise UserError(f"--{name} {size}: not a multiple of the {world_size} ranks")


@dataclass(frozen=True)
class OptimizerOptions:
    learning_rate: float = option(15.0, "base learning rate")
    optimizer: str = option("sgd", "optimizer", ("sgd", "adagrad", "rowwise_adagrad", "adam"))
    adagrad: bool = option(False, "the same as --optimizer adagrad")
    eps: float = option(1e-8, "epsilon of adagrad and adam")
    lr_schedule: str = option("mlperf", "how warm-up, hold and decay are joined", ("mlperf", "nvidia"))
    lr_warmup_steps: int = option(0, "steps of linear warm-up")
    lr_warmup_factor: int = option(0, "nvidia: the warm-up starts at 1 - 2^-N of the rate")
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
        check_at_least(0, self, "lr_warmup_factor")
        check_at_most(LARGEST_FACTOR, self, "lr_warmup_factor")
        if self.lr_decay_steps and self.lr_decay_start < self.lr_warmup_steps:
            raise UserError("--lr_decay_start must not come before the end of --lr_warmup_steps")

    @property
    def name(self) -> str:
        return "adagrad" if self.adagrad else self.optimizer


@dataclass(frozen=True)
class Config:
    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES  # for the message about a wrong option

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimizerOptions = field(default_factory=OptimizerOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    run: RunOptions = field(default_factory=RunOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def check_inputs(self) -> None:
        """UserError where the files of the dataset are not what its source reads."""
        if self.data.folder:
            from dlrm.data.readers import detect_format, scan_dataset  # --help is quicker without numpy

            scan_dataset(detect_format(self.data.kind, self.data.folder), self.data.folder)
