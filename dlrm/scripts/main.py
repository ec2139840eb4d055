"""Takes the command lines of NVIDIA's DLRM: its flags and defaults, as options of python -m dlrm.train.

In: flags as absl reads them, which NVIDIA's program uses, too (--flag=value, --nofp16, -shuffle). Out: the
training, test or benchmark that they ask for; the command in our words is printed first. Batch sizes are of
all ranks together, as a step of NVIDIA's one GPU has them.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dlrm import train
from dlrm.runtime import entry
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

Flags = Any  # absl's FlagValues, whose attributes are the flags' values
PROGRAM = "python -m dlrm.scripts.main"
SYNTHETIC_ROWS = 32768 * 1024  # of an epoch, as NVIDIA's
NUMERICAL = 13  # numerical columns of synthetic data, unless the flag says otherwise


def define_flags() -> flags.FlagValues:
    """NVIDIA's flags with NVIDIA's defaults."""
    found = flags.FlagValues()
    new: dict[str, Any] = {"flag_values": found}
    flags.DEFINE_enum("mode", "train", ["train", "test", "inference_benchmark"], "what to do", **new)
    flags.DEFINE_integer("seed", 12345, "random seed", **new)
    flags.DEFINE_integer("batch_size", 32768, "rows of a training step, all ranks together", **new)
    flags.DEFINE_integer("test_batch_size", 32768, "rows of a test batch, all ranks together", **new)
    flags.DEFINE_float("lr", 28.0, "base learning rate of SGD", **new)
    flags.DEFINE_integer("epochs", 1, "passes over the training set", **new)
    flags.DEFINE_integer("max_steps", None, "stop after this many steps", **new)
    flags.DEFINE_integer("warmup_factor", 0, "the warm-up starts at 1 - 2^-N of the rate", **new)
    flags.DEFINE_integer("warmup_steps", 6400, "steps of the warm-up", **new)
    flags.DEFINE_integer("decay_steps", 80000, "steps of the decay; 0: none", **new)
    flags.DEFINE_integer("decay_start_step", 64000, "first step of the decay", **new)
    flags.DEFINE_integer("embedding_dim", 128, "width of the embeddings", **new)
    flags.DEFINE_list("top_mlp_sizes", "1024,1024,512,256,1", "layers of the top MLP", **new)
    flags.DEFINE_list("bottom_mlp_sizes", "512,256,128", "layers of the bottom MLP", **new)
    flags.DEFINE_enum("interaction_op", "dot", ["dot", "cat", "cuda_dot"], "feature interaction", **new)
    flags.DEFINE_boolean("self_interaction", False, "dot: each feature also with itself", **new)
    flags.DEFINE_string("dataset", None, "folder made by python -m dlrm.prep run", **new)
    flags.DEFINE_float("dataset_subset", None, "train on this share of the training rows", **new)
    flags.DEFINE_boolean(
        "shuffle_batch_order", False, "take the batches in random order", short_name="shuffle", **new
    )
    flags.DEFINE_boolean("synthetic_dataset", False, "random rows instead of a dataset", **new)
    flags.DEFINE_list("synthetic_dataset_table_sizes", None, "rows of each table of random data", **new)
    flags.DEFINE_integer("num_numerical_features", NUMERICAL, "a dataset's own count is used", **new)
    flags.DEFINE_integer("max_table_size", None, "larger tables get this many rows", **new)
    flags.DEFINE_boolean("hash_indices", False, "always done where tables are cut", **new)
    flags.DEFINE_string("load_checkpoint_path", None, "a checkpoint of this program", **new)
    flags.DEFINE_string("save_checkpoint_path", None, "folder of the checkpoints", **new)
    flags.DEFINE_string("output_dir", None, "run folder: results.json, metrics.jsonl", **new)
    flags.DEFINE_string("log_path", None, "not written: results.json in --output_dir has it", **new)
    flags.DEFINE_integer("test_freq", None, "test every N steps (default: after each epoch)", **new)
    flags.DEFINE_float("test_after", 0.0, "no test before this many epochs", **new)
    flags.DEFINE_integer("print_freq", 200, "steps between two progress lines", **new)
    flags.DEFINE_integer("benchmark_warmup_steps", 0, "first steps left out of throughput", **new)
    flags.DEFINE_string("base_device", "cuda", "cpu hides the GPUs", **new)
    flags.DEFINE_boolean("fp16", True, "mixed precision", **new)
    flags.DEFINE_float("loss_scale", 8192.0, "static loss scale", **new)
    flags.DEFINE_list("inference_benchmark_batch_sizes", "1,64,4096", "batch sizes to time", **new)
    flags.DEFINE_integer("inference_benchmark_steps", 200, "timed iterations of each", **new)
    flags.DEFINE_float("auc_threshold", None, "stop once the test set reaches this AUC", **new)
    return found


def read_flags(argv: Sequence[str]) -> Flags:
    """The values of these words; UserError for a wrong one."""
    found = define_flags()
    try:
        rest = found([PROGRAM, *argv])[1:]
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())} (--help lists the flags)") from None
    if rest:
        raise UserError(f"{rest[0]}: is not a flag (--help lists the flags)")
    return found


def translate_flags(given: Flags, ranks: int) -> list[str]:
    """The same as options of python -m dlrm.train. ranks: among which batch sizes are divided."""
    return [str(word) for words in _translate_all(given, ranks) for word in words]


def _translate_all(given: Flags, ranks: int) -> Iterator[Sequence[object]]:
    for name in ("mode", "seed", "benchmark_warmup_steps", "inference_benchmark_steps"):
        yield f"--{name}", given[name].value
    for name in ("output_dir", "load_checkpoint_path", "max_table_size"):
        if given[name].value is not None:
            yield f"--{name}", given[name].value
    yield "--inference_benchmark_batch_sizes", ",".join(given.inference_benchmark_batch_sizes)
    yield "--test_batch_size", _divide_by_ranks(given, "test_batch_size", ranks)
    yield from _translate_data(given)
    yield from _translate_model(given)
    if given.fp16:
        yield "--amp", "fp16", "--loss_scale_policy", "static", "--loss_scale", given.loss_scale
    if given.mode == "train":
        yield "--batch_size", _divide_by_ranks(given, "batch_size", ranks)
        yield from _translate_training(given)


def _translate_data(given: Flags) -> Iterator[Sequence[object]]:
    if given.dataset and not given.synthetic_dataset:
        if any(Path(given.dataset).glob("*.bin")):
            raise UserError(
                f"--dataset {given.dataset}: NVIDIA's binary files are not read; make the dataset from the "
                "text files with python -m dlrm.prep run"
            )
        yield "--in_memory_binary_criteo_path", given.dataset
        return
    if not given.synthetic_dataset and given.mode != "inference_benchmark":
        raise UserError("give --dataset, a folder made by python -m dlrm.prep run, or --synthetic_dataset")
    if given.num_numerical_features != NUMERICAL:
        yield "--num_numerical", given.num_numerical_features
    if given.synthetic_dataset_table_sizes:
        yield "--num_embeddings_per_feature", ",".join(given.synthetic_dataset_table_sizes)
    yield "--limit_train_batches", given.max_steps or max(1, SYNTHETIC_ROWS // given.batch_size)


def _translate_model(given: Flags) -> Iterator[Sequence[object]]:
    """All of the model's flags; of a checkpoint only those that the user gave, because it has its own."""
    own = given.mode != "train" and given.load_checkpoint_path
    values = {
        "embedding_dim": ("--embedding_dim", given.embedding_dim),
        "bottom_mlp_sizes": ("--dense_arch_layer_sizes", ",".join(given.bottom_mlp_sizes)),
        "top_mlp_sizes": ("--over_arch_layer_sizes", ",".join(given.top_mlp_sizes)),
        "interaction_op": ("--interaction_type", given.interaction_op.removeprefix("cuda_")),
        "self_interaction": ("--self_interaction",) if given.self_interaction else (),
    }
    yield from (words for name, words in values.items() if given[name].present or not own)


def _translate_training(given: Flags) -> Iterator[Sequence[object]]:
    start = given.warmup_steps if given.decay_start_step is None else given.decay_start_step
    yield "--optimizer", "sgd", "--learning_rate", given.lr, "--lr_schedule", "nvidia"
    yield "--lr_warmup_steps", given.warmup_steps, "--lr_warmup_factor", given.warmup_factor
    yield "--lr_decay_start", start, "--lr_decay_steps", given.decay_steps
    yield "--epochs", given.epochs, "--report_every", given.print_freq
    yield "--validation_split", "test", "--test_after", given.test_after
    if given.test_freq is None:
        yield ("--evaluate_on_epoch_end",)
    else:
        yield "--validation_freq_within_epoch", given.test_freq
    options = {
        "max_steps": "max_steps",
        "auc_threshold": "validation_auroc",
        "dataset_subset": "dataset_subset",
    }
    for name, option in options.items():
        if given[name].value is not None:
            yield f"--{option}", given[name].value
    if given.shuffle_batch_order:
        yield ("--shuffle_batch_order",)
    if given.save_checkpoint_path:
        yield "--checkpoint_dir", given.save_checkpoint_path, "--save_model_after_each_eval"


def _divide_by_ranks(given: Flags, name: str, ranks: int) -> int:
    """The share of one rank."""
    size = given[name].value
    if size < 1 or size % ranks:
        raise UserError(f"--{name} {size}: must be a multiple of the {ranks} ranks, which share it")
    return size // ranks


def main(here: Ranks) -> None:
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        if here.first:
            print(f"{__doc__}\n{define_flags().get_help()}")
        return
    try:
        given = read_flags(sys.argv[1:])
        words = translate_flags(given, here.world_size)
    except UserError as error:
        error.shared = True  # every rank has the same command line
        raise
    if given.base_device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if here.first:
        print(f"python -m dlrm.train {shlex.join(words)}", flush=True)
        if given.log_path:
            print("dlrm: --log_path is not written: see results.json in --output_dir", file=sys.stderr)
    train.main(here, words)


if __name__ == "__main__":
    entry.run_entry(main)
