"""Play the file calls of a traced run again, closed-loop, on files below a root.

RUN: a run folder, or any folder of DFTracer traces, or one of them. Alone, or under mpiexec: traced ranks are
dealt to the processes in blocks. It leaves a run folder with a trace of its own.
"""

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.tables.gather import describe_missing_ranks, shorten_losses
from analysis.trace.launches import Launch, plan_launches
from analysis.trace.source import FileSource
from analysis.workload.fidelity import PLAYED_FILES, REPLAY
from common.command_line import CommandLineParser
from common.errors import UserError, os_errors_as_user_errors, printable
from common.lock import LOCK_NAME, FolderLock
from common.owned import OutputFolder, discard_empty_folder, discard_file
from dlrm.replay.calls import ADVISING, KNOWN_CALLS, CallSettings, ReplayOutcome
from dlrm.replay.files import FilePlan, RunUse, list_uses, make_files, plan_files
from dlrm.replay.paths import MappedPaths
from dlrm.replay.plan import RankPlan, measure_waits, plan_rank
from dlrm.replay.player import Player
from dlrm.runtime import entry, mpi, trace
from dlrm.runtime.new_run_folder import make_run, write_environment
from dlrm.runtime.ranks import Ranks

ADVICE = {
    "willneed": os.POSIX_FADV_WILLNEED, "dontneed": os.POSIX_FADV_DONTNEED, "random": os.POSIX_FADV_RANDOM,
    "sequential": os.POSIX_FADV_SEQUENTIAL,
}  # fmt: skip


@dataclass(frozen=True)
class ReplayOptions:
    run: str
    root: Path | None  # default: files/ in the output folder
    output_dir: Path | None  # default: a new folder in results/ of the current folder
    speed: float  # 0: no think time
    ranks: tuple[int, int] | None  # first and last
    launch: int | None  # default: the last one
    real_bytes: bool
    overwrite: bool
    data_only: bool
    fadvise: str | None
    dry_run: bool


def parse_options(argv: list[str]) -> ReplayOptions:
    parser = CommandLineParser(prog="python -m analysis replay", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, or any folder of DFTracer traces, or one of them")
    add("--root", type=Path, help="folder below which all files lie [files/ in the output folder]")
    add("--output_dir", type=Path, help="new folder for its own trace [results/TIME in the current folder]")
    add("--speed", default="1", help="1: time between calls as in the trace; 2: half of it; max: none [1]")
    add("--ranks", metavar="A-B", help="only these ranks of the trace, e.g. 0-3 or 5 [all]")
    add("--launch", type=int, metavar="N", help="which launch of a run that was resumed [the last]")
    add(
        "--real_bytes",
        action="store_true",
        help="write the files that are to be read, instead of sparse ones",
    )
    add("--overwrite", action="store_true", help="files below --root that are there already may be changed")
    add(
        "--fadvise",
        choices=tuple(ADVICE),
        help="replay posix_fadvise with this advice: a trace does not say which it was [not replayed]",
    )
    add("--data_only", action="store_true", help="leave out files of programs and of the system")
    add("--dry_run", action="store_true", help="print what would be done; change nothing")
    found = parser.parse_args(argv)
    try:
        speed = 0.0 if found.speed == "max" else float(found.speed)
        if found.speed != "max" and not 0 < speed < float("inf"):
            raise ValueError
    except ValueError:
        parser.error(f"--speed {found.speed}: give a number above 0, or max")
    return ReplayOptions(
        found.run, found.root, found.output_dir, speed, _parse_ranks(parser, found.ranks), found.launch,
        found.real_bytes, found.overwrite, found.data_only, found.fadvise, found.dry_run,
    )  # fmt: skip


def _parse_ranks(parser: CommandLineParser, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(first) > int(last or first):
        parser.error(f"--ranks {text}: give one rank, or A-B with A not above B")
    return int(first), int(last or first)


def main(here: Ranks) -> None:
    options = parse_options(sys.argv[1:])
    with mpi.open_group(here) as group:
        replay_run(options, group)


def replay_run(options: ReplayOptions, group: mpi.RankGroup) -> None:
    """Plan, make the files, play, record. A collective."""
    here, output = group.here, Path()
    with group.errors_on_all_ranks():
        jobs, notes = choose_jobs(options)
        known = set(KNOWN_CALLS) - set(() if options.fadvise else ADVISING)
        # without think time there is nothing to take out
        timed = here.first and options.speed > 0
        waits = measure_waits(Path(options.run), jobs[0].launch) if timed else {}
    waits = group.broadcast_from_first(waits)
    with group.errors_on_all_ranks():
        plans = [plan_rank(job, known, options.data_only, waits) for job in deal_jobs(jobs, here)]
        uses = list_uses(plans)
    if not options.dry_run:
        with group.errors_on_all_ranks():
            output = _make_output(options) if here.first else output
        output = group.broadcast_from_first(output)
    root = Path(os.path.realpath(options.root or output / "files"))
    paths = MappedPaths(root)
    run_use, left_out = RunUse(), Counter[str]()
    for use, counts in group.gather_from_all((uses, sum((plan.left_out for plan in plans), Counter[str]()))):
        run_use.merge(use)
        left_out += counts
    with _discard_if_refused(output, group):
        files = plan_files(run_use, paths)
        if not run_use.files:
            raise UserError(f"{printable(options.run)}: the traces hold no calls on files to be replayed")
    summaries = [each for all_of in group.gather_from_all(_summarize(plans)) for each in all_of]
    if here.first:
        print_plan(summaries, files, left_out, notes, options)
    if options.dry_run:
        return
    with _discard_if_refused(output, group):
        if here.first:
            files.kept = make_files(root, files, options.real_bytes, options.overwrite)
    files.kept = group.broadcast_from_first(files.kept)
    outcome, seconds = play(plans, paths, files, options, group, output)
    finish(group, output, options, paths, outcome, seconds, summaries, left_out)


def choose_jobs(options: ReplayOptions) -> tuple[list[Launch], list[str]]:
    """(the traced ranks to replay, lines to print)."""
    source = FileSource(options.run)
    found, notes = plan_launches(source), []
    launches = sorted({job.launch for job in found})
    chosen = options.launch if options.launch is not None else launches[-1]
    if chosen not in launches:
        raise UserError(f"--launch {chosen}: {printable(options.run)} has launches 1 to {launches[-1]}")
    if len(launches) > 1 and options.launch is None:
        notes.append(f"the run has {len(launches)} launches: the last is replayed (--launch N: another)")
    elif len(launches) == 1 and (missing := describe_missing_ranks(source.read_heads(), "the run")):
        notes.append(missing)
    jobs = [job for job in found if job.launch == chosen]
    if options.ranks is not None:
        first, last = options.ranks
        jobs = [job for job in jobs if first <= job.rank <= last]
        if not jobs:
            raise UserError(f"--ranks {first}-{last}: {printable(options.run)} has no such rank")
    return jobs, notes


def deal_jobs(jobs: list[Launch], here: Ranks) -> list[Launch]:
    """The traced ranks of this process: blocks of equal size, the first ones one larger."""
    each, more = divmod(len(jobs), here.world_size)
    begin = here.rank * each + min(here.rank, more)
    return jobs[begin : begin + each + (here.rank < more)]


def _make_output(options: ReplayOptions) -> Path:
    folder = options.output_dir
    if folder is None:
        return make_run(Path("results"), None)[0].absolute()
    trace.check_name(folder)
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(folder, "replaying into it"):  # of two at once one finds the other's env.txt
            if set(os.listdir(folder)) - {LOCK_NAME}:
                raise UserError(f"--output_dir {printable(folder)}: is not empty; name a new folder")
            write_environment(folder)
    return folder.absolute()


@contextmanager
def _discard_if_refused(output: Path, group: mpi.RankGroup) -> Iterator[None]:
    """As `errors_on_all_ranks`; after an error what `_make_output` has made goes, too."""
    try:
        with group.errors_on_all_ranks():
            yield
    except UserError:
        if group.here.first and output != Path():
            for name in ("env.txt", "gpu.txt"):
                discard_file(output / name)
            discard_empty_folder(output)
        raise


def _summarize(plans: list[RankPlan]) -> list[dict[str, Any]]:
    """What each rank does, in numbers."""
    made = []
    for plan in plans:
        reads, read = plan.count_calls("read")
        writes, written = plan.count_calls("write")
        made.append({
            "rank": plan.rank, "threads": len(plan.threads), "calls": len(plan.calls), "reads": reads,
            "bytes_read": read, "writes": writes, "bytes_written": written, "begin_us": plan.begin,
            "seconds": (plan.end - plan.begin) / 1e6, "lost": plan.lost,
            "barriers": [list(key) for key in plan.list_barriers()],
        })  # fmt: skip
    return made


def print_plan(
    summaries: list[dict[str, Any]], files: FilePlan, left_out: Counter[str], notes: list[str],
    options: ReplayOptions,
) -> None:  # fmt: skip
    """What is to be done, a line for each rank; on stderr what is left out."""
    for each in summaries:
        print(
            f"rank {each['rank']}: {each['threads']} threads, {each['calls']:,} calls: "
            f"{each['reads']:,} reads of {each['bytes_read']:,} bytes, "
            f"{each['writes']:,} writes of {each['bytes_written']:,} bytes; "
            f"{each['seconds']:.2f} s in the trace"
        )
    kind = "of random bytes" if options.real_bytes else "sparse"
    print(
        f"files to be there: {len(files.sizes):,}, {sum(files.sizes.values()):,} bytes, "
        f"{kind} where missing; files that the calls make: {len(files.absent):,}, "
        f"up to {files.written:,} bytes"
    )
    for note in [*notes, *shorten_losses([text for each in summaries for text in each["lost"]])]:
        print(f"replay: {note}", file=sys.stderr)
    if left_out:
        named = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.most_common())
        print(f"replay: not replayed: {named}", file=sys.stderr)


def play(
    plans: list[RankPlan], paths: MappedPaths, files: FilePlan, options: ReplayOptions, group: mpi.RankGroup,
    output: Path,
) -> tuple[ReplayOutcome, float]:  # fmt: skip
    """(what the calls of this process gave, seconds). Traced."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keys = [plan.list_barriers() for plan in plans]
    common = find_common_barriers([key for process in group.gather_from_all(keys) for key in process])
    begins = [plan.begin for plan in plans if plan.threads]
    begin = min(each for each in group.gather_from_all(min(begins, default=None)) if each is not None)
    settings = CallSettings(options.overwrite, ADVICE.get(options.fadvise or ""))
    trace.start_tracing(output, group.here, "replay", folders={"--root": paths.root})
    try:
        player = Player(
            plans, paths, files, options.speed, settings, group.barrier, set(common), begin
        )  # fmt: skip
        group.mark_clock("start")
        started = time.perf_counter()
        outcome = player.play()
        group.barrier()
        seconds = time.perf_counter() - started
        group.mark_clock("end")
    finally:
        trace.stop_tracing()
    return outcome, seconds


def find_common_barriers(lists: list[list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """The barriers that all ranks come to once, if all come to them in the same order; else none. Ranks
    without any, of a trace that has more processes than ranks, do not count.
    """
    lists = [keys for keys in lists if keys]
    if not lists:
        return []
    counts = [Counter(keys) for keys in lists]
    shared = {key for key in counts[0] if all(each[key] == 1 for each in counts)}
    orders = [[key for key in keys if key in shared] for keys in lists]
    return orders[0] if all(order == orders[0] for order in orders) else []


def finish(
    group: mpi.RankGroup, output: Path, options: ReplayOptions, paths: MappedPaths, outcome: ReplayOutcome,
    seconds: float, summaries: list[dict[str, Any]], left_out: Counter[str],
) -> None:  # fmt: skip
    """Record and print what came of it. A collective."""
    total, mapping = ReplayOutcome(), {}
    for each, names in group.gather_from_all((outcome, paths.list_all())):
        total.merge(each)
        mapping |= names
    if not group.here.first:
        return
    folder = OutputFolder(output)
    folder.write(PLAYED_FILES, json.dumps(mapping, indent=1, sort_keys=True) + "\n")
    for each in summaries:
        del each["barriers"]
    record = {
        "run": os.path.abspath(options.run), "root": str(paths.root), "speed": options.speed or "max",
        "processes": group.here.world_size, "ranks": summaries, "seconds": seconds, "calls": total.calls,
        "bytes_read": total.moved["read"], "bytes_written": total.moved["write"],
        "differences": dict(total.differences), "failed": dict(total.failed), "not_replayed": dict(left_out),
    }  # fmt: skip
    folder.write(REPLAY, json.dumps(record, indent=1) + "\n")
    traced = max(each["begin_us"] / 1e6 + each["seconds"] for each in summaries)
    traced -= min(each["begin_us"] for each in summaries) / 1e6
    print(
        f"{printable(output)}: {total.calls:,} calls in {seconds:.2f} s ({traced:.2f} s in the trace), "
        f"{total.moved['read']:,} bytes read, {total.moved['write']:,} written"
    )
    if total.differences:
        named = "; ".join(f"{what}: {count:,}" for what, count in total.differences.most_common())
        print(f"replay: other than in the trace: {named}", file=sys.stderr)
    if total.failed:
        named = "; ".join(f"{what}: {count:,}" for what, count in total.failed.most_common())
        print(
            f"replay: failed, and the trace does not say whether they did in the run: {named}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    entry.run_entry(main)
