"""Takes the command lines of OneFlow's dlrm_train_eval.py: its options, with the defaults of its README.

In: OneFlow's options. Out: the training and the evaluations that they ask for; the command in our words is
printed first. Batch sizes are of all ranks together, as OneFlow's. Where its launcher stood
(python3 -m oneflow.distributed.launch), torchrun takes the same words.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence

from common.command_line import CommandLineParser
from dlrm import train
from dlrm.models.dlrm.options import check_shared_sizes
from dlrm.models.dlrm.other_names import ONEFLOW
from dlrm.runtime import entry
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

# options whose value is the same here
SAME = (
    "data_dir", "table_size_array", "embedding_vec_size", "bottom_mlp", "train_batches", "learning_rate",
    "warmup_batches", "decay_start", "decay_batches", "loss_print_interval", "eval_interval",
    "model_load_dir", "store_type", "output_dir",
)  # fmt: skip
NOT_NEEDED = ("disable_fusedmlp", "disable_interaction_padding", "disable_dense_input_padding")


def make_parser() -> CommandLineParser:
    """OneFlow's options."""
    parser = CommandLineParser(prog="dlrm_train_eval.py", description=__doc__)
    add = parser.add_argument
    add("--data_dir", required=True, help="folder with train/, val/ and test/ of Parquet files")
    add("--persistent_path", required=True, help="folder for the tables' files")
    add("--table_size_array", help="rows of each table [as the dataset says]")
    stores = ["device_mem", "cached_host_mem", "cached_ssd"]
    add("--store_type", default="cached_ssd", choices=stores, help="where tables are [cached_ssd]")
    add("--cache_memory_budget_mb", type=float, default=8192, help="of each rank, for cached_ssd [8192]")
    add("--embedding_vec_size", type=int, default=128, help="width of the embeddings [128]")
    add("--bottom_mlp", default="512,256,128", help="layers of the bottom MLP [512,256,128]")
    add("--top_mlp", default="1024,1024,512,256", help="layers of the top MLP but the last, which is 1")
    add("--interaction_itself", action="store_true", help="each feature also with itself")
    add("--train_batch_size", type=int, default=55296, help="rows of a step, all ranks together [55296]")
    add("--train_batches", type=int, default=75000, help="steps, over as many epochs as they take [75000]")
    add("--learning_rate", type=float, default=24, help="of SGD [24]")
    add("--warmup_batches", type=int, default=2750, help="steps of the warm-up [2750]")
    add("--decay_start", type=int, default=49315, help="first step of the decay [49315]")
    add("--decay_batches", type=int, default=27772, help="steps of the decay [27772]")
    add("--loss_print_interval", type=int, default=1000, help="steps between two lines [1000]")
    add("--eval_interval", type=int, default=10000, help="steps between two evaluations of test/ [10000]")
    add("--eval_batches", type=int, default=1612, help="batches of an evaluation, at most [1612]")
    add("--eval_batch_size", type=int, default=55296, help="rows of such a batch, all ranks [55296]")
    add("--model_load_dir", help="a checkpoint of this program")
    add("--model_save_dir", help="folder for checkpoints")
    add("--save_model_after_each_eval", action="store_true", help="a checkpoint after each evaluation")
    add("--save_initial_model", action="store_true", help="a checkpoint before the first step")
    add("--amp", action="store_true", help="float16")
    add("--loss_scale_policy", default="static", choices=["static", "dynamic"], help="of --amp [static]")
    add("--one_embedding_key_type", help="not needed")
    for name in NOT_NEEDED:
        add(f"--{name}", action="store_true", help="not needed")
    add("--output_dir", help="run folder, which OneFlow has not: results.json, metrics.jsonl, log")
    return parser


def translate_options(given: argparse.Namespace, ranks: int) -> list[str]:
    """The same as options of python -m dlrm.train. ranks: among which batch sizes are divided."""
    return [str(word) for words in _translate_all(given, ranks) for word in words]


def _translate_all(given: argparse.Namespace, ranks: int) -> Iterator[Sequence[object]]:
    for name in SAME:
        if getattr(given, name) is not None:
            yield ONEFLOW.get(f"--{name}", f"--{name}"), getattr(given, name)
    for name in ("train_batch_size", "eval_batch_size"):
        check_shared_sizes(name, [getattr(given, name)], ranks)
        yield ONEFLOW[f"--{name}"], getattr(given, name) // ranks
    # steps end the training, however few rows there are; an epoch has at least one
    yield "--epochs", max(given.train_batches, 1)
    yield "--over_arch_layer_sizes", f"{given.top_mlp},1"
    yield "--interaction_type", "dot", *(["--self_interaction"] if given.interaction_itself else [])
    yield "--optimizer", "sgd", "--lr_schedule", "nvidia"
    yield "--validation_split", "test", "--evaluate_on_training_end"
    yield "--limit_val_batches", given.eval_batches, "--limit_test_batches", given.eval_batches
    if given.store_type == "cached_ssd":
        yield "--persistent_path", given.persistent_path
        yield "--cache_memory_budget_mb", given.cache_memory_budget_mb
    if given.amp:
        yield "--amp", "fp16", "--loss_scale_policy", given.loss_scale_policy
    if given.model_save_dir:
        yield "--checkpoint_dir", given.model_save_dir, "--keep_checkpoints", 0
        for name in ("save_model_after_each_eval", "save_initial_model"):
            if getattr(given, name):
                yield (f"--{name}",)


def main(here: Ranks) -> None:
    given = make_parser().parse_args()
    try:
        words = translate_options(given, here.world_size)
    except UserError as error:
        error.shared = True  # every rank has the same command line
        raise
    if here.first:
        print(f"python -m dlrm.train {shlex.join(words)}", flush=True)
    train.main(here, words)


if __name__ == "__main__":
    entry.run_entry(main)
