"""Options of python -m dlrm.bert4rec: those of torchrec's example under their names, and ours.

What training shares with DLRM (run folder, tracing, checkpoints) has the same flags as there.
"""

from dataclasses import dataclass, field
from typing import Any

from common.memory import refuse_too_large
from dlrm.config.options import CheckpointOptions, RunOptions
from dlrm.config.parser import check_at_least, check_at_most, option, path_option
from dlrm.models.bert4rec.dataset_files import (
    AUTO,
    DATASETS,
    find_default_path,
    find_ratings_file,
    recognize_dataset,
)
from dlrm.runtime.errors import UserError


def fixed_field(value: Any) -> Any:
    """A field that is not a flag of this model."""
    return field(default=value, init=False)


LARGEST = (1 << 31) - 3  # items, users and positions are counted with 32 bits, two item numbers are taken
MOST_COPIES = 10_000


@dataclass(frozen=True)
class BertData:
    dataset_name: str = option(
        AUTO, "auto: by the files at --dataset_path, without one ml-1m; text: lines of "
        "`user item [timestamp]`; random, markov: made here", DATASETS,
    )  # fmt: skip
    dataset_path: str | None = path_option(
        "the file with the ratings, or its folder (default: ./ml-1m or ./ml-20m, by --dataset_name)",
        default_path=lambda values: find_default_path(values["dataset_name"]),
    )
    cache_dir: str | None = path_option(
        "folder for prepared data (default: .bert4rec next to the ratings; none for random, markov)"
    )
    min_rating: float = option(0, "leave out ratings below this")
    min_user_count: int = option(5, "leave out users with fewer ratings")
    min_item_count: int = option(0, "leave out items with fewer ratings")
    max_len: int = option(100, "items of a history that the model sees")
    mask_prob: float = option(0.15, "share of the items hidden in training")
    mask_share: float = option(0.8, "share of the hidden items that the mask replaces, not a random item")
    window_share: float = option(
        0.1, "share of --max_len from one sequence of a long history to the next one"
    )
    dupe_factor: int = option(3, "copies of each training sequence, each masked differently")
    negatives: int | None = option(
        None,
        "items ranked with the right one (default: 100, random: 10; fewer if there are not enough)",
    )
    negative_sampling: str | None = option(
        None, "how they are drawn (default: popularity; random: uniform)", ("popularity", "uniform")
    )
    random_user_count: int = option(10, "users of the generated data (random, markov)")
    random_item_count: int = option(30, "items of the generated data")
    random_size: int = option(300, "ratings of the generated data")
    train_batch_size: int = option(128, "training batch size per rank")
    val_batch_size: int = option(128, "validation batch size per rank")
    test_batch_size: int = option(128, "test batch size per rank")
    prefetch_batches: int = option(4, "batches that the loading thread prepares ahead")
    pin_memory: bool = option(True, "copy batches to a GPU through pinned memory")

    def __post_init__(self) -> None:
        check_at_least(
            1, self, "max_len", "dupe_factor", "negatives", "random_user_count", "random_item_count",
            "random_size", "train_batch_size", "val_batch_size", "test_batch_size", "prefetch_batches",
        )  # fmt: skip
        check_at_least(3, self, "min_user_count")
        check_at_most(LARGEST, self, "max_len", "random_user_count", "random_item_count", "random_size")
        check_at_most(MOST_COPIES, self, "dupe_factor")
        check_at_most(LARGEST // self.max_len, self, "train_batch_size", "val_batch_size", "test_batch_size")
        for name in ("mask_prob", "window_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0 and at most 1")
        check_at_least(0, self, "mask_share")
        check_at_most(1, self, "mask_share")
        if self.dataset_name == AUTO:
            object.__setattr__(self, "dataset_name", recognize_dataset(self.dataset_path))

    @property
    def default_negatives(self) -> int:
        return 10 if self.dataset_name == "random" else 100

    @property
    def by_popularity(self) -> bool:
        default = "uniform" if self.dataset_name == "random" else "popularity"
        return (self.negative_sampling or default) == "popularity"


@dataclass(frozen=True)
class BertModel:
    emb_dim: int = option(256, "width of the model")
    nhead: int = option(2, "attention heads")
    num_layers: int = option(2, "transformer blocks")
    dropout: float = option(0.1, "dropout rate")
    attention_dropout: float | None = option(None, "dropout rate of the attention (default: --dropout)")
    output: str = option(
        "linear", "output layer: its own weights, or (the paper) the item embeddings", ("linear", "tied")
    )

    def __post_init__(self) -> None:
        check_at_least(1, self, "emb_dim", "nhead")
        check_at_least(0, self, "num_layers", "dropout", "attention_dropout")
        weights = self.num_layers * 12 * self.emb_dim**2 + 2 * self.emb_dim
        refuse_too_large(
            8 * weights, f"--num_layers {self.num_layers} of --emb_dim {self.emb_dim}", "lower them"
        )
        if self.emb_dim % self.nhead or self.emb_dim % 4:
            raise UserError(f"--emb_dim {self.emb_dim}: must be a multiple of 4 and of --nhead {self.nhead}")
        for name in ("dropout", "attention_dropout"):
            if (getattr(self, name) or 0) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be below 1")


@dataclass(frozen=True)
class BertOptim:
    lr: float = option(0.001, "learning rate")
    decay_step: int = option(25, "multiply the rate by --gamma after every N epochs")
    gamma: float = option(1.0, "factor of the learning rate decay")
    lr_warmup_steps: int = option(0, "steps in which the rate rises to --lr")
    lr_decay_steps: int | None = option(None, "the rate falls linearly, to 0 after N steps")
    weight_decay: float = option(0.0, "weight decay")
    optimizer: str = option(
        "adam", "optimizer; fused for the tables, except adam and adamw on CPUs",
        ("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad"),
    )  # fmt: skip
    eps: float = option(1e-8, "epsilon of adam and adagrad")
    grad_clip: float | None = option(None, "largest norm of the dense gradients")
    amp: str = option("off", "mixed precision of the transformer; --amp alone: bf16", ("off", "bf16", "fp16"),
                      "bf16")  # fmt: skip
    loss_scale_policy: str = option("dynamic", "fp16: how the loss is scaled", ("static", "dynamic"))
    loss_scale: float = option(1024.0, "fp16: the static scale, or the first dynamic one")

    def __post_init__(self) -> None:
        check_at_least(0, self, "lr", "gamma", "weight_decay", "eps")
        check_at_least(1, self, "decay_step", "lr_decay_steps")
        check_at_least(0, self, "lr_warmup_steps")
        check_at_least(1e-30, self, "grad_clip", "loss_scale")


@dataclass(frozen=True)
class BertPlan:
    mode: str = option(
        "dmp", "item embeddings: dmp shards them over the ranks, ddp gives each rank all", ("dmp", "ddp")
    )
    sharding_file: str | None = path_option("JSON: table name -> sharding, kernel (dmp)")
    print_sharding_plan: bool = option(False, "print how the table is sharded")

    def __post_init__(self) -> None:
        if self.mode == "ddp" and self.sharding_file:
            raise UserError("--sharding_file says how tables are sharded: only with --mode dmp")


@dataclass(frozen=True)
class BertRun(RunOptions):
    """The run's flags: some under the example's names, without those that have no meaning here."""

    num_epochs: int = option(100, "passes over the training set")
    evaluate_only: bool = option(False, "only test, from a checkpoint")
    evaluate_on_epoch_end: bool = option(True, "validate after each epoch")
    evaluate_on_training_end: bool = option(True, "test after the last epoch")
    export_root: str | None = path_option("where the model is saved: the same as --checkpoint_dir")
    mode: str = fixed_field("train")
    epochs: int = fixed_field(1)
    validation_auroc: float | None = fixed_field(None)
    compile: bool = fixed_field(False)
    mllog: bool = fixed_field(False)
    mlcommons_log: bool = fixed_field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "num_epochs")
        object.__setattr__(self, "epochs", self.num_epochs)
        object.__setattr__(self, "mode", "test" if self.evaluate_only else "train")


@dataclass(frozen=True)
class BertConfig:
    data: BertData = field(default_factory=BertData)
    model: BertModel = field(default_factory=BertModel)
    optim: BertOptim = field(default_factory=BertOptim)
    plan: BertPlan = field(default_factory=BertPlan)
    run: BertRun = field(default_factory=BertRun)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        if self.run.export_root and not self.checkpoint.checkpoint_dir:
            object.__setattr__(self.checkpoint, "checkpoint_dir", self.run.export_root)

    def check_inputs(self) -> None:
        """UserError where there is no file with the ratings."""
        find_ratings_file(self.data.dataset_name, self.data.dataset_path)
