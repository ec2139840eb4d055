"""python -m dlrm.prep: toy (make TSV), run (TSV -> dataset folder), check (a dataset folder)."""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from common.errors import os_errors_as_user_errors, printable
from dlrm.prep.job import options as choices
from dlrm.runtime import errors, ranks


def make_parser() -> argparse.ArgumentParser:
    top = OneLineParser(prog="python -m dlrm.prep", description=__doc__)
    whole_words: Any = partial(OneLineParser, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, parser_class=whole_words)
    toy = commands.add_parser("toy", help="write Criteo-like TSV that can be learned")
    toy.add_argument("out", type=Path)
    toy.add_argument("--days", type=int, default=24)
    toy.add_argument("--rows", type=int, default=20_000, help="per day")
    toy.add_argument("--seed", type=int, default=0)
    toy.add_argument("--one_file", action="store_true", help="one day_0 with all the rows, to be split")
    add_run_options(commands.add_parser("run", help="Criteo TSV -> a dataset folder"))
    check = commands.add_parser("check", help="verify a finished dataset folder")
    check.add_argument("folder", type=Path)
    add_multihot_options(commands.add_parser("multihot", help="synthetic multi-hot ids for MLPerf DLRM v2"))
    add_script_options(commands)
    return top


class OneLineParser(argparse.ArgumentParser):
    """A wrong option is one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(errors.USAGE, f"dlrm.prep: {printable(message)} (--help lists the options)\n")


def add_run_options(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--input_dir", type=Path, required=True, help="day_0, day_1 ... or train.txt, test.txt; plain or .gz")
    add("--output_dir", type=Path, required=True, help="the dataset; a run cut short goes on there")
    add("--frequency_threshold", type=int, default=0, help="ids seen less often become id 1 [0: none]")
    add("--frequency_limit", type=int, default=0, help="NVIDIA's recipe: rarer ids 1, gaps 0, log(x + 3)")
    add("--random_seed", type=int, default=0, help="of the shuffle [0]")
    add("--workers", type=int, default=1, help="threads in each process [1]")
    add("--tmp_dir", type=Path, help="for intermediate files, seen by every rank [OUTPUT_DIR]")
    add("--compat", choices=choices.COMPAT, default="", help="byte for byte what these wrote")
    add("--format", choices=choices.FORMATS, default="npy", help="of the dataset [npy]")
    add("--engine", choices=choices.ENGINES, default="numba", help="what does the work, same result [numba]")
    add("--dataset", choices=choices.DATASETS, default="", help="[what is found in the input]")
    add("--steps", default=",".join(choices.STEPS), help="parse[,contiguous][,shuffle] [all]")
    add("--max_ind_range", type=int, default=0, help="take raw ids modulo this")
    add(
        "--mod_idx", type=int, default=0, help="Parquet: OneFlow's ids, modulo this plus an offset per column"
    )
    add("--skip_bad_rows", action="store_true", help="count and report bad lines instead of stopping")
    add("--no_md5", dest="md5", action="store_false", help="no digests in meta.json")
    add("--trace_dir", type=Path, help="run folder for a DFTracer trace of this preprocessing")
    add("--part_bytes", type=int, default=0, help="cut the input into parts of about this size [by workers]")
    add("--map_bytes", type=int, default=96 << 20, help="id maps kept in memory; larger ones are streamed")
    add("--giant", type=int, default=8 << 20, help="ids of a column above which a bitmap numbers them")
    add("--keep_tmp", action="store_true", help="leave the intermediate files")
    add("--restart", action="store_true", help="forget what an earlier run has left")


def add_multihot_options(multihot: argparse.ArgumentParser) -> None:
    add = multihot.add_argument
    add("--input_dir", "--in_memory_binary_criteo_path", type=Path, required=True, help="a dataset folder")
    add("--output_dir", "--output_path", type=Path, required=True)
    add("--multi_hot_sizes", type=parse_numbers, required=True, help="26 numbers, with commas")
    add("--num_embeddings_per_feature", type=parse_numbers, help="26 numbers [the table sizes of the input]")
    add("--multi_hot_distribution_type", choices=("uniform", "pareto"), default="uniform")
    add("--copy_labels_and_dense", action="store_true")
    add("--workers", type=parse_workers, default=1)


def add_script_options(commands: Any) -> None:
    """torchrec's three scripts by their own arguments."""
    one = commands.add_parser("parse", help="npy_preproc_criteo alone: TSV -> NPY")
    two = commands.add_parser("contiguous", help="contiguous_preproc_criteo alone")
    three = commands.add_parser("shuffle", help="shuffle_preproc_criteo alone")
    for command in (one, two):
        command.add_argument("--input_dir", type=Path, required=True)
        command.add_argument("--output_dir", type=Path, required=True)
    one.add_argument("--dataset_name", dest="dataset", choices=choices.DATASETS, default="")
    one.add_argument(
        "--workers",
        type=parse_workers,
        default=1,
        help="processes that take turns at the files; if there are fewer files, threads in each [1]",
    )
    two.add_argument("--frequency_threshold", dest="threshold", type=parse_count, default=0)
    three.add_argument("--input_dir_labels_and_dense", dest="dense_dir", type=Path, required=True)
    three.add_argument("--input_dir_sparse", dest="sparse_dir", type=Path, required=True)
    three.add_argument("--output_dir_shuffled", dest="output_dir", type=Path, required=True)
    three.add_argument("--random_seed", dest="seed", type=parse_count, default=0)
    three.add_argument("--tmp_dir", type=Path)


def run_script(args: argparse.Namespace) -> None:
    from dlrm.prep.tools import torchrec_scripts, torchrec_shuffle

    values = vars(args)
    command = values.pop("command")
    {
        "parse": torchrec_scripts.parse_folder,
        "contiguous": torchrec_scripts.number_folder,
        "shuffle": torchrec_shuffle.shuffle_folder,
    }[command](**values)


def parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not integers separated by commas: {text!r}") from None


def parse_count(text: str) -> int:
    """A seed or a threshold: numpy's generators take 32 bits."""
    number = int(text)
    if not 0 <= number < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 0 to {(1 << 32) - 1}")
    return number


def parse_workers(text: str) -> int:
    number = int(text)
    if not 1 <= number <= choices.MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 1 to {choices.MOST_WORKERS}")
    return number


def run_check(args: argparse.Namespace) -> None:
    from dlrm.prep.tools.check import check_dataset as flaws_of

    flaws = flaws_of(args.folder)
    if flaws:
        for flaw in flaws[:-1]:
            print(f"dlrm.prep: {printable(flaw)}", file=sys.stderr)
        raise errors.UserError(flaws[-1])
    print(f"{printable(args.folder)}: complete and consistent")


def run_multihot(args: argparse.Namespace) -> None:
    from dlrm.data import criteo
    from dlrm.prep.job.workers import Workers
    from dlrm.prep.tools.multihot import MultiHotOptions
    from dlrm.prep.tools.multihot import write_multi_hot as materialise

    tables = args.num_embeddings_per_feature or tuple(criteo.DatasetMeta.load(args.input_dir).table_sizes)
    options = MultiHotOptions(
        args.input_dir, args.output_dir, args.multi_hot_sizes, tables,
        args.multi_hot_distribution_type, args.copy_labels_and_dense,
    )  # fmt: skip
    materialise(options.checked(), Workers(ranks.find_ranks(), args.workers))


def run_pipeline(args: argparse.Namespace) -> None:
    values: dict[str, Any] = vars(args) | {"steps": tuple(args.steps.split(","))}
    del values["command"]
    options = choices.PrepOptions(**values).checked()
    from dlrm.prep.engines.registry import ENGINES

    ENGINES[options.engine](options)


def run_toy(args: argparse.Namespace) -> None:
    from dlrm.prep.tools.toy import write_days

    write_days(args.out, args.days, args.rows, args.seed, args.one_file)


COMMANDS = {"toy": run_toy, "run": run_pipeline, "check": run_check, "multihot": run_multihot}
COMMANDS |= dict.fromkeys(("parse", "contiguous", "shuffle"), run_script)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        with os_errors_as_user_errors(getattr(args, "output_dir", None) or "python -m dlrm.prep"):
            COMMANDS[args.command](args)
    except (errors.UserError, ModuleNotFoundError) as error:
        told = errors.explain_missing_module(error) if isinstance(error, ModuleNotFoundError) else error
        if told is None:
            raise
        if ranks.find_ranks().first:  # the ranks have agreed on one error
            print(f"dlrm.prep: {printable(told)}", file=sys.stderr)
        return errors.USAGE
    except MemoryError as error:
        if ranks.find_ranks().first:
            print(f"dlrm.prep: out of memory: {printable(error)[:200]}: use smaller sizes", file=sys.stderr)
        return errors.USAGE
    except KeyboardInterrupt:
        if ranks.find_ranks().first:
            goes_on = "; the same command goes on where it was" if args.command == "run" else ""
            print(f"\ndlrm.prep: interrupted{goes_on}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
