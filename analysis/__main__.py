"""Commands that read the traces of a run: convert them for Perfetto, check byte counts, write a report."""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from analysis.export.registry import EXPORT_FORMATS
from common.command_line import CommandLineParser
from common.errors import USAGE, UserError, printable, quote_for_shell
from common.progress import show_progress

if TYPE_CHECKING:
    from analysis.perfetto.tracks import ConversionSummary
    from analysis.trace.selection import Selection

# (name, what it calls, help) -> its parser, which takes RUN
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
FAILED = 1  # exit code: bytes are missing in the trace, or an analysis of `finish` failed
SET_UP = ("numpy", "polars", "numba", "pyarrow", "isal", "tqdm")  # what a shell lacks without env.sh


@contextlib.contextmanager
def _show_events_read() -> Iterator[Callable[[Path, int], None]]:
    """A function that is called with a trace file and how many of its events were read."""
    with show_progress("analysis", " events") as bar:
        yield lambda path, events: bar.add(events, printable(path.name))


def run_perfetto(options: argparse.Namespace) -> int:
    from analysis.perfetto import chrome, convert

    for name in ("kineto", "node_counters"):
        if getattr(options, name) and options.posix:
            raise UserError(f"--{name}: not with --posix, which shows file calls only; leave one of them out")
        if getattr(options, name) and options.format == "json":
            raise UserError(f"--{name}: not with --format json; leave one of them out")
    selection = _make_selection(options)
    with _show_events_read() as advance:
        if options.format == "json":
            if not selection.is_whole:
                raise UserError(f"{selection.describe()}: not with --format json; leave one of them out")
            summary = chrome.convert_to_json(options.run, options.output, options.posix, advance)
        else:
            summary = convert.convert_to_pftrace(
                options.run, options.output, options.posix, advance, selection=selection, whole=options.whole,
                kineto=options.kineto, node_counters=options.node_counters, over=_choose_map(options),
            )  # fmt: skip
    _print_conversion(summary, set())
    return 0


def _make_selection(options: argparse.Namespace) -> "Selection":
    from analysis.trace.selection import Selection

    steps = options.steps
    if steps is not None and len(steps) != 1:
        raise UserError("--steps: give one range, e.g. 100-120")
    return Selection(
        ranks=options.ranks or (), hosts=tuple(filter(None, options.hosts.split(","))), every=options.every,
        steps=steps[0] if steps else None, epoch=options.epoch,
        from_seconds=options.from_seconds, to_seconds=options.to_seconds, min_us=options.min_us,
    )  # fmt: skip


def _print_conversion(summary: "ConversionSummary", printed: set[str]) -> None:
    """printed: messages that are there already; two conversions of one run share most of them."""
    size = summary.path.stat().st_size
    from analysis.tables.gather import shorten_losses

    messages = [f"lost: {lost}" for lost in shorten_losses(summary.lost)] + summary.clocks
    messages += [
        f"ranks left the barrier at the {when} within {apart} us, by their own clocks"
        for when, apart in summary.skew.items()
    ]
    if summary.moved:
        messages.append(f"{summary.moved} slices overlap others of their thread: on lanes of their own")
    if summary.unresolved:
        messages.append(f"{summary.unresolved} events name their file only by a hash")
    for message in summary.notes + messages:
        if message not in printed:
            print(f"analysis: {message}", file=sys.stderr)
    printed.update(messages)
    print(
        f"{printable(summary.path)} ({summary.events:,} events, {size / 1e6:.1f} MB); "
        f"to see it: python -m analysis view {quote_for_shell(summary.path)}"
    )


def run_check(options: argparse.Namespace) -> int:
    from analysis.tables import check

    rows, processes, unchecked = check.check_run(options.run, over=_choose_map(options))
    print(check.format_check(rows, processes, unchecked, check.list_node_losses(options.run, processes)))
    return 1 if any(row.missed for row in rows) else 0


def run_finish(options: argparse.Namespace) -> int:
    """Prints what each analysis gave, and at the end how to repeat those that failed."""
    from analysis import finish
    from analysis.tables import check

    with _show_events_read() as advance:
        outcomes = finish.run_analyses(options.run, advance, _choose_map(options))
    failed, printed = [], set[str]()
    for outcome in outcomes:
        if outcome.error is not None:
            message = _describe_error(outcome.error, options.run)
            if message is None:
                traceback.print_exception(outcome.error)
            else:
                _print_refusal(message)
            failed.append(outcome.command)
        elif outcome.command == "check":
            rows, processes, unchecked = outcome.result
            nodes = check.list_node_losses(options.run, processes)
            print(f"\n{check.format_check(rows, processes, unchecked, nodes)}\n")
            if any(row.missed for row in rows):
                failed.append(outcome.command)
        elif outcome.command == "report":
            page, text = outcome.result
            print(f"{text}\n\n{printable(page)}")
        else:
            _print_conversion(outcome.result, printed)
    if not failed:
        return 0
    again = " and ".join(
        f"python -m analysis {command} {quote_for_shell(Path(options.run))}" for command in failed
    )
    print(f"analysis: failed: {', '.join(failed)}; to do it again: {again}", file=sys.stderr)
    return FAILED


def run_view(options: argparse.Namespace) -> int:
    from analysis.perfetto import view

    view.serve_trace(options.run, options.file, options.port)
    return 0


def run_report(options: argparse.Namespace) -> int:
    from analysis.report import report

    page, text = report.write_report(
        options.run,
        options.output,
        _choose_map(options),
        parquet=options.parquet,
        selection=_make_selection(options),
        kineto=options.kineto,
    )
    print(f"{text}\n\n{printable(page)}")
    return 0


def run_summary(options: argparse.Namespace) -> int:
    from analysis.report import report

    print(report.render_terminal(options.run, _choose_map(options)))
    return 0


def run_list(options: argparse.Namespace) -> int:
    from analysis.runs import list_runs

    results = Path(options.run)
    runs = list_runs.list_runs(results, options.where, options.sort, options.reverse)
    if options.json:
        print(list_runs.format_json(runs))
    elif options.csv:
        print(list_runs.format_csv(runs))
    else:
        print(list_runs.format_table(results, runs))
    return 0


def run_watch(options: argparse.Namespace) -> int:
    from analysis.runs import watch

    return watch.watch_run(Path(options.run), options.interval, options.once)


def run_whatif(options: argparse.Namespace) -> int:
    from analysis.report import whatif
    from analysis.workload.simulate import Scenario

    scenario = Scenario(
        options.storage, options.latency, options.compute, options.prefetch, options.read_chunk_mb,
        options.ranks,
    )  # fmt: skip
    text, found = whatif.predict_run(options.run, scenario, _choose_map(options))
    print(json.dumps(found, indent=1, allow_nan=False) if options.json else text)
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from analysis.report import compare

    runs = [options.run, *options.others]
    page, text = compare.write_comparison(runs, options.output, _choose_map(options), options.vs)
    print(f"{text}\n\n{printable(page)}")
    return 0


def run_replay(words: Sequence[str]) -> NoReturn:
    """The player is `dlrm.replay`: it starts the tracer, which no command of this package does."""
    os.execv(sys.executable, [sys.executable, "-m", "dlrm.replay", *words])


def run_export(options: argparse.Namespace) -> int:
    for text in EXPORT_FORMATS[options.format].write(options):
        print(text)
    return 0


def _choose_map(options: argparse.Namespace):
    """Where ranks are read: on this machine's cores, or by a Dask cluster."""
    from analysis.tables.cores import Cores

    if options.dask is None:
        cores = Cores()
        cores.start_early(options.run, "analysis.finish")
        return cores
    from analysis.tables import dask_cluster

    return dask_cluster.map_on_cluster(options.dask)


def _parse_factor(text: str) -> float:
    """x2 or x0.25: a bare number might be meant as MB/s or ms."""
    found = re.fullmatch(r"x(\d+\.?\d*|\.\d+)", text, re.ASCII)
    factor = float(found[1]) if found else 0.0
    if not 1e-6 <= factor <= 1e6:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a factor from 0.000001 to 1000000, e.g. x2 or x0.25"
        )
    return factor


def _parse_chunk(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r}: give MB, more than 0, e.g. 32")
    return size


def _parse_count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 to {most}")
        return int(text)

    return parse


def _parse_ranges(text: str) -> tuple[tuple[int, int], ...]:
    from analysis.trace.selection import parse_ranges

    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds since the run began, e.g. 12.5")
    return seconds


def _add_selection_options(made: argparse.ArgumentParser) -> None:
    """Which part of a run is shown."""
    group = made.add_argument_group("a part of the run")
    group.add_argument("--ranks", type=_parse_ranges, metavar="A-B,C", help="e.g. 0-7,64")
    group.add_argument("--hosts", default="", metavar="NAME,NAME", help="the ranks on these hosts")
    group.add_argument(
        "--every", type=_parse_count(1 << 20), default=1, metavar="N", help="every N-th of these ranks"
    )
    group.add_argument("--steps", type=_parse_ranges, metavar="A-B", help="all that went on during them")
    group.add_argument("--epoch", type=int, metavar="E", help="all that went on during it")
    group.add_argument(
        "--from", dest="from_seconds", type=_parse_seconds, metavar="S", help="seconds after the run began"
    )
    group.add_argument(
        "--to", dest="to_seconds", type=_parse_seconds, metavar="S", help="the same, of the end"
    )
    group.add_argument(
        "--min-us", type=_parse_count(1 << 40), default=0, metavar="N", help="leave out shorter events"
    )


def _add_kineto_option(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--kineto", type=Path, nargs="+", default=[], metavar="FILE",
        help="profiles of torch.profiler (.json, .json.gz) from elsewhere; those of --profile_steps are "
        "found in RUN",
    )  # fmt: skip


def _add_dask_option(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--dask",
        metavar="WHERE",
        help="read the ranks of a large run on a Dask cluster: `local`, `pbs`, `slurm`, or host:port "
        "(default: on the cores of this machine)",
    )


def _add_list_command(commands: Any) -> None:
    help = "the runs in a folder: state, settings, speed, waiting, score, and what makes each differ"
    made = commands.add_parser("list", help=help, description=help)
    made.add_argument("run", metavar="RESULTS", nargs="?", default="results", help="default: results")
    made.add_argument(
        "--where", metavar="CONDITION", action="append", default=[],
        help="only runs for which it holds, of a column or an option: model=DLRM, 'ranks>=4', state!=done "
        "(may be repeated)",
    )  # fmt: skip
    made.add_argument("--sort", metavar="NAME", help="by a column or an option")
    made.add_argument("--reverse", action="store_true", help="the other way round, largest first")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all columns, and all settings that differ")
    form.add_argument("--csv", action="store_true")
    made.set_defaults(function=run_list)


def _add_watch_command(add_command: AddCommand) -> None:
    made = add_command(
        "watch", run_watch, "a run while it goes: step, time to go, speed, waiting, loss, lost ranks, queue"
    )
    made.add_argument(
        "--interval", type=_parse_count(3600), default=5, metavar="S", help="seconds between two looks (5)"
    )
    made.add_argument("--once", action="store_true", help="print it a single time")


def _add_perfetto_command(add_command: AddCommand) -> None:
    made = add_command("perfetto", run_perfetto, "convert the traces for the Perfetto UI")
    made.add_argument(
        "-o", dest="output", type=Path, help="file to write (default: in RUN, named after its settings)"
    )
    made.add_argument("--posix", action="store_true", help="I/O calls only")
    made.add_argument(
        "--format", choices=("pftrace", "json"), default="pftrace", help="json: for older tools"
    )
    made.add_argument(
        "--whole", action="store_true", help="no overview of a run that is too large for the Perfetto UI"
    )
    _add_kineto_option(made)
    made.add_argument(
        "--node_counters", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="what dftracer_service has recorded of nodes; that of NODE_COUNTERS=yes is found in RUN",
    )  # fmt: skip
    _add_selection_options(made)
    _add_dask_option(made)


def _add_view_command(add_command: AddCommand) -> None:
    made = add_command("view", run_view, "show the trace in a browser, without a network")
    made.add_argument(
        "file", metavar="FILE", nargs="?", help="which trace of the run (default: the full one)"
    )
    made.add_argument(
        "--port", type=int, default=9001,
        help="port on the loopback interface (default: 9001, where a report's links go); 0: any",
    )  # fmt: skip


def _add_report_command(add_command: AddCommand) -> None:
    made = add_command(
        "report", run_report, "report.html, summary.json and tables/*.csv: where the time and the bytes went"
    )
    made.add_argument(
        "-o", dest="output", type=Path, metavar="WHERE",
        help="file to write the page to, or a folder that exists, for all files (default: RUN)",
    )  # fmt: skip
    made.add_argument(
        "--parquet", action="store_true", help="also write tables/*.parquet, which keep the types"
    )
    _add_kineto_option(made)
    _add_selection_options(made)
    _add_dask_option(made)


def _add_whatif_command(add_command: AddCommand) -> None:
    made = add_command(
        "whatif", run_whatif, "predict the training with other storage, queue, processors or number of ranks"
    )
    for name, help in (
        ("storage", "bandwidth of reads, e.g. x2 or x0.25"),
        ("latency", "what a read takes whatever its size, e.g. x0.5"),
        ("compute", "time that a step computes, e.g. x0.1 for a processor ten times as fast"),
    ):
        made.add_argument(f"--{name}", type=_parse_factor, default=1.0, metavar="xF", help=help)
    made.add_argument("--prefetch", type=_parse_count(1 << 20), metavar="N", help="batches prepared ahead")
    made.add_argument("--read_chunk_mb", type=_parse_chunk, metavar="MB", help="MB of one read of a stream")
    made.add_argument(
        "--ranks", type=_parse_count(4096), metavar="N",
        help="this number of ranks, each with the batch size and the storage that one has now",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="print the numbers as JSON")
    _add_dask_option(made)


def _add_compare_command(add_command: AddCommand) -> None:
    made = add_command(
        "compare", run_compare, "two runs or more: what differs, by how much, and whether that is noise"
    )
    made.add_argument(
        "others", metavar="ANOTHER_RUN", nargs="+",
        help="runs to compare it with; runs of the same settings tell how large the noise is",
    )  # fmt: skip
    made.add_argument(
        "--vs", metavar="SETTING", default="",
        help="draw the runs over a setting, e.g. batch_size or ranks: how the speed scales",
    )  # fmt: skip
    made.add_argument(
        "-o", dest="output", type=Path, metavar="FILE",
        help="page to write, or FILE.json for the numbers (default: compare.html and compare.json in "
        "the last run)",
    )  # fmt: skip
    _add_dask_option(made)


def _add_export_command(commands: Any) -> None:
    made = commands.add_parser("export", help="the run's I/O for other tools: fio, DLIO, MLPerf Storage")
    formats = made.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, form in EXPORT_FORMATS.items():
        made = formats.add_parser(name, help=form.help, description=form.help)
        made.add_argument("run", metavar="RUN", help="run folder, or any folder of DFTracer traces")
        made.add_argument("-o", dest="output", type=Path, required=True, metavar=form.metavar)
        form.add_options(made)
        made.set_defaults(function=run_export)


def make_parser() -> argparse.ArgumentParser:
    top = CommandLineParser(prog="python -m analysis", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(
        name: str, run: Callable[[argparse.Namespace], int], help: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.add_argument(
            "run", metavar="RUN", help="run folder, or any folder of DFTracer traces, or one of them"
        )
        made.set_defaults(function=run)
        return made

    _add_perfetto_command(add_command)
    help = "all at the end of a job: perfetto, perfetto --posix, check, report"
    _add_dask_option(add_command("finish", run_finish, help))
    help = "compare the bytes that the run counted with those in the trace"
    _add_dask_option(add_command("check", run_check, help))
    _add_view_command(add_command)
    _add_report_command(add_command)
    _add_dask_option(add_command("summary", run_summary, "the run in numbers, in the terminal"))
    _add_whatif_command(add_command)
    _add_compare_command(add_command)
    _add_list_command(commands)
    _add_watch_command(add_command)
    _add_export_command(commands)
    commands.add_parser("replay", help="make the run's file calls again, in another folder")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    run, words = "", list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["replay"]:
        run_replay(words[1:])
    try:
        options = make_parser().parse_args(words)
        run = options.run
        code = _run_command(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe
        _drop_output()
        return 0
    except Exception as error:
        message = _describe_error(error, run)
        if message is None:
            raise
        if isinstance(error, OSError) and error.filename is None:  # standard output is full
            _drop_output()
        return _print_refusal(message)


def _run_command(options: argparse.Namespace) -> int:
    if options.function in (run_list, run_watch):  # they read no traces
        return options.function(options)
    from analysis.runs.list_runs import refuse_results_folder

    refuse_results_folder(Path(options.run))
    if options.function is run_view:  # nor does this
        return run_view(options)
    from analysis.trace.compiling import announce_compiling

    with announce_compiling():
        return options.function(options)


def _drop_output() -> None:
    """What is left to print cannot be printed: the interpreter would end with a complaint and code 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe_error(error: BaseException, run: str) -> str | None:
    """One line about what the user or the system has to mend; None: a mistake in this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in SET_UP:
        return f"{sys.executable} has no {error.name}: source ./env.sh first (./0_setup_env.sh makes it)"
    if isinstance(error, OSError):
        return f"{printable(error.filename or run or 'standard output')}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"{printable(run)}: not enough memory to read it; a damaged trace?"
    return None


def _print_refusal(error: object) -> int:
    """One line, whatever the names in it are."""
    print(f"analysis: {printable(error)}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
