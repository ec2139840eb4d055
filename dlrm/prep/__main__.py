"""Preprocessing of Criteo-like data: toy makes TSV, run turns TSV into a dataset folder, check verifies one.

multihot adds synthetic multi-hot ids. parse, contiguous and shuffle are torchrec's scripts one by one.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from common.command_line import RELATIVE_TO_HELP, CommandLineParser
from common.errors import os_errors_as_user_errors, printable
from dlrm.data import criteo
from dlrm.prep.job import options as prep_options
from dlrm.runtime import errors, ranks

WORKERS_HELP = "processes that share the work; with mpiexec: threads of each rank [1]"


def make_parser() -> tuple[CommandLineParser, dict[str, CommandLineParser]]:
    """The parser, and those of its commands by name."""
    parser = CommandLineParser(prog="python -m dlrm.prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    toy = commands.add_parser("toy", help="write Criteo-like TSV that a model can learn")
    toy.add_argument("out", type=Path, help="folder for day_0, day_1 ...")
    toy.add_argument("--days", type=int, default=24, help="number of days [24]")
    toy.add_argument("--rows", type=int, default=20_000, help="rows per day [20000]")
    toy.add_argument("--seed", type=int, default=0, help="random seed [0]")
    add_column_options(toy, "Criteo's")
    toy.add_argument("--one_file", action="store_true", help="write all rows to one file, day_0")
    add_run_options(commands.add_parser("run", help="Criteo TSV -> a dataset folder"))
    check = commands.add_parser("check", help="verify a finished dataset folder")
    check.add_argument("folder", type=Path, help="the folder with meta.json")
    add_multihot_options(commands.add_parser("multihot", help="synthetic multi-hot ids for MLPerf DLRM v2"))
    add_script_options(commands)
    for name, command in commands.choices.items():
        if name != "toy":
            command.add_argument(
                "--trace_dir", type=Path, help="run folder for a DFTracer trace of this preprocessing"
            )
    return parser, commands.choices


class RenamedOption(argparse.Action):
    """An option under the name of an earlier release: it sets the new one, with a warning."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        if ranks.find_ranks().first:
            print(
                f"dlrm.prep: {option_string} is now --{self.dest}; this release accepts both", file=sys.stderr
            )


def add_column_options(command: argparse.ArgumentParser, default: str) -> None:
    for name, count in (("numerical", criteo.CRITEO.numerical), ("categorical", criteo.CRITEO.categorical)):
        command.add_argument(
            f"--num_{name}", type=int, metavar="N", help=f"{name} columns [{default}: {count}]"
        )


def add_run_options(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--input_dir", type=Path, required=True, help="day_0, day_1 ... or train.txt, test.txt; plain or .gz")
    add("--output_dir", type=Path, required=True, help="dataset folder; run again to resume a killed run")
    add("--frequency_threshold", type=int, default=0, help="ids that occur less often get id 1 [0: off]")
    add(
        "--frequency_limit",
        type=int,
        default=0,
        help="like --frequency_threshold, by NVIDIA's rules: missing ids get 0, counts log(x + 3) [0: off]",
    )
    add("--random_seed", type=int, default=0, help="seed of the shuffle [0]")
    add("--workers", type=int, default=1, help=WORKERS_HELP)
    add("--tmp_dir", type=Path, help="folder for intermediate files, shared by all ranks [OUTPUT_DIR]")
    add(
        "--compat",
        choices=prep_options.COMPAT,
        default="",
        help="write the same bytes as this implementation",
    )
    add("--format", choices=prep_options.FORMATS, default="npy", help="format of the dataset [npy]")
    add(
        "--engine",
        choices=prep_options.ENGINES,
        default="numba",
        help="implementation; all write the same bytes [numba]",
    )
    add("--spark_driver_memory_gb", type=int, default=0, help="with --engine spark: memory of its driver")
    add("--spark_tmp_dir", type=Path, help="with --engine spark: folder for what it shuffles [Spark's]")
    add(
        "--spark_conf",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --engine spark: a setting, e.g. spark.executor.memory=32g; can be repeated",
    )
    add("--dataset", choices=prep_options.DATASETS, default="", help="[by the files in INPUT_DIR]")
    add_column_options(run, "as in the first lines; Criteo's")
    add("--steps", default=",".join(prep_options.STEPS), help="parse[,contiguous][,shuffle] [all]")
    add("--max_ind_range", type=int, default=0, help="take raw ids modulo this number [0: off]")
    add(
        "--mod_idx",
        type=parse_mod_idx,
        default=0,
        metavar="N",
        help="for Parquet: OneFlow's ids, modulo N plus N x column; 0 or less: its 64-bit hashes [off]",
    )
    add(
        "--skip_bad_rows",
        action="store_true",
        help="skip and count bad lines instead of stopping at the first",
    )
    add("--no_md5", dest="md5", action="store_false", help="write no md5 sums to meta.json")
    add(
        "--part_bytes", type=int, default=0, help="cut the input into parts of about this size [by --workers]"
    )
    add(
        "--map_bytes",
        type=int,
        default=96 << 20,
        help="id maps up to this size stay in memory; larger ones are read from disk [96 MiB]",
    )
    add(
        "--bitmap_entries",
        type=int,
        default=8 << 20,
        help="number the ids of a column with more entries than this by a bitmap [8 Mi]",
    )
    add("--giant", dest="bitmap_entries", type=int, action=RenamedOption, help=argparse.SUPPRESS,
        default=argparse.SUPPRESS)  # fmt: skip
    add("--relative_to", metavar="FOLDER", help=RELATIVE_TO_HELP)
    add("--keep_tmp", action="store_true", help="keep the intermediate files")
    add("--restart", action="store_true", help="discard the files of an earlier, unfinished run")


def add_multihot_options(multihot: argparse.ArgumentParser) -> None:
    add = multihot.add_argument
    add("--input_dir", "--in_memory_binary_criteo_path", type=Path, required=True, help="a dataset folder")
    add("--output_dir", "--output_path", type=Path, required=True, help="folder for the .npz files")
    add(
        "--multi_hot_sizes",
        type=parse_numbers,
        required=True,
        help="ids per row: a number for each categorical column, with commas",
    )
    add(
        "--num_embeddings_per_feature",
        type=parse_numbers,
        help="rows of each table, with commas [the table sizes of the input]",
    )
    add("--multi_hot_distribution_type", choices=("uniform", "pareto"), default="uniform", help="[uniform]")
    add("--copy_labels_and_dense", action="store_true", help="also copy labels and counts: a whole dataset")
    add("--workers", type=parse_workers, default=1, help=WORKERS_HELP)


def add_script_options(commands: Any) -> None:
    """The commands for torchrec's three scripts, with the scripts' own arguments."""
    parse = commands.add_parser("parse", help="npy_preproc_criteo alone: TSV -> NPY")
    contiguous = commands.add_parser("contiguous", help="contiguous_preproc_criteo alone")
    shuffle = commands.add_parser("shuffle", help="shuffle_preproc_criteo alone")
    for command in (parse, contiguous):
        what = "the TSV files" if command is parse else "the arrays of parse, day_*_{dense,sparse,labels}.npy"
        command.add_argument("--input_dir", type=Path, required=True, help=f"folder of {what}")
        command.add_argument("--output_dir", type=Path, required=True, help="folder for the arrays")
    parse.add_argument(
        "--dataset_name",
        dest="dataset",
        choices=prep_options.DATASETS,
        default="",
        help="[by the files in INPUT_DIR]",
    )
    add_column_options(parse, "as in the first lines; Criteo's")
    parse.add_argument(
        "--workers",
        type=parse_workers,
        default=1,
        help="processes, at most one per input file; more than that become threads within them [1]",
    )
    contiguous.add_argument(
        "--frequency_threshold",
        dest="threshold",
        type=parse_count,
        default=0,
        help="ids that occur less often get id 1 [0: off]",
    )
    for name, dest, text in (
        (
            "--input_dir_labels_and_dense",
            "dense_dir",
            "folder of the labels and counts, as parse writes them",
        ),
        ("--input_dir_sparse", "sparse_dir", "folder of the ids, as contiguous writes them"),
        ("--output_dir_shuffled", "output_dir", "folder for the shuffled arrays"),
    ):
        shuffle.add_argument(name, dest=dest, type=Path, required=True, help=text)
    shuffle.add_argument(
        "--random_seed", dest="seed", type=parse_count, default=0, help="seed of the shuffle [0]"
    )
    shuffle.add_argument("--tmp_dir", type=Path, help="folder for intermediate files [OUTPUT_DIR_SHUFFLED]")


def run_script(args: argparse.Namespace) -> None:
    from dlrm.prep.tools import torchrec_scripts, torchrec_shuffle

    values = dict(vars(args))
    command = values.pop("command")
    {
        "parse": torchrec_scripts.parse_folder,
        "contiguous": torchrec_scripts.number_ids_of_folder,
        "shuffle": torchrec_shuffle.shuffle_folder,
    }[command](**values)


def parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"not integers separated by commas: {text!r}") from None


def parse_count(text: str) -> int:
    """A seed or a threshold. numpy's generators take seeds of 32 bits."""
    number = int(text)
    if not 0 <= number < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 0 to {(1 << 32) - 1}")
    return number


def parse_mod_idx(text: str) -> int:
    """OneFlow's option: 0 or less means no limit, which gives hashes. Not given, it is off (0)."""
    return int(text) if int(text) > 0 else prep_options.HASHED


def parse_workers(text: str) -> int:
    number = int(text)
    if not 1 <= number <= prep_options.MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 1 to {prep_options.MAX_WORKERS}")
    return number


def run_check(args: argparse.Namespace) -> None:
    from dlrm.prep.tools.check import check_dataset

    problems = check_dataset(args.folder)
    if problems:
        for problem in problems[:-1]:
            print(f"dlrm.prep: {printable(problem)}", file=sys.stderr)
        raise errors.UserError(problems[-1])  # printed by `main`, with the exit code
    print(f"{printable(args.folder)}: complete and consistent")


def run_multihot(args: argparse.Namespace) -> None:
    from dlrm.prep.job.workers import Workers
    from dlrm.prep.tools.multihot import MultiHotOptions, write_multi_hot

    tables = args.num_embeddings_per_feature or tuple(criteo.DatasetMeta.load(args.input_dir).table_sizes)
    options = MultiHotOptions(
        args.input_dir, args.output_dir, args.multi_hot_sizes, tables,
        args.multi_hot_distribution_type, args.copy_labels_and_dense,
    )  # fmt: skip
    write_multi_hot(options.check_values(), Workers(ranks.find_ranks(), args.workers))


def run_pipeline(args: argparse.Namespace) -> None:
    values: dict[str, Any] = vars(args) | {
        "steps": tuple(args.steps.split(",")),
        "spark_conf": tuple(args.spark_conf),
    }
    for name in ("command", "relative_to"):
        del values[name]
    options = prep_options.PrepOptions(**values).check_values()
    from dlrm.prep.engines.registry import ENGINES

    ENGINES[options.engine](options)


def run_toy(args: argparse.Namespace) -> None:
    from dlrm.prep.tools.toy import write_days

    columns = criteo.Columns(
        criteo.CRITEO.numerical if args.num_numerical is None else args.num_numerical,
        criteo.CRITEO.categorical if args.num_categorical is None else args.num_categorical,
    )
    write_days(args.out, args.days, args.rows, args.seed, args.one_file, columns)
    rows, files = args.days * args.rows, 1 if args.one_file else args.days
    names = f"{files} file{'s' if files > 1 else ''}"
    print(f"toy: {rows:,} rows in {names} of {printable(args.out)}", file=sys.stderr)


COMMANDS = {"toy": run_toy, "run": run_pipeline, "check": run_check, "multihot": run_multihot}
COMMANDS |= dict.fromkeys(("parse", "contiguous", "shuffle"), run_script)


def run_command(args: argparse.Namespace) -> None:
    """Run a command, traced where --trace_dir is given. `run` traces itself, with its engine."""
    trace_dir: Path | None = None if args.command == "run" else vars(args).pop("trace_dir", None)
    if trace_dir is None:
        COMMANDS[args.command](args)
        return
    from dlrm.prep.io.tracing import save_byte_counts, trace_command
    from dlrm.prep.job.workers import Workers

    paths = {name: path.absolute() for name, path in vars(args).items() if isinstance(path, Path)}
    vars(args).update(paths)  # the trace names files as they are opened
    trace_dir = trace_dir.absolute()
    named = {f"--{name}": path for name, path in paths.items()}
    prep_options.check_traced_paths(trace_dir, {"--trace_dir": trace_dir, **named})
    here = ranks.find_ranks()
    with trace_command(trace_dir, {name: str(path) for name, path in named.items()}, here):
        COMMANDS[args.command](args)
        save_byte_counts(trace_dir, Workers(here, 1))


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code; a UserError becomes one line on stderr, from rank 0 only."""
    args = argparse.Namespace(command="")
    try:
        parser, commands = make_parser()
        args = parser.parse_args(argv)
        commands[args.command].resolve_paths(args, getattr(args, "relative_to", None))
        with os_errors_as_user_errors(getattr(args, "output_dir", None) or "python -m dlrm.prep"):
            run_command(args)
    except (errors.UserError, ModuleNotFoundError) as error:
        message = errors.explain_missing_module(error) if isinstance(error, ModuleNotFoundError) else error
        if message is None:
            raise
        if ranks.find_ranks().first:  # all ranks have the same error, see Workers.raise_shared_error
            print(f"dlrm.prep: {printable(message)}", file=sys.stderr)
        return errors.USAGE
    except MemoryError as error:
        if ranks.find_ranks().first:
            print(f"dlrm.prep: out of memory: {printable(error)[:200]}: use smaller sizes", file=sys.stderr)
        return errors.USAGE
    except KeyboardInterrupt:
        if ranks.find_ranks().first:
            remedy = "; run the same command again to resume" if args.command == "run" else ""
            print(f"\ndlrm.prep: interrupted{remedy}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
