"""What the report holds, in order: entries of (section, title, table, plot, caption)."""

import polars as pl

from analysis.report import plots, plots_io, whatif
from analysis.report.facts import Facts
from analysis.report.many_ranks import (
    HEAT_ROWS,
    LISTED_NODES,
    LISTED_RANKS,
    MANY_RANKS,
    ChosenRanks,
    choose_ranks,
    group_file_systems,
    make_rate_heat,
    make_share_heat,
    sum_nodes,
)
from analysis.report.page import ReportEntry, format_seconds
from analysis.report.run import TracedRun
from analysis.tables import answers, device, gpu, progress
from analysis.tables.calls import MAPPED
from analysis.tables.gather import JoinedTables
from analysis.trace.classify import KINDS
from analysis.trace.clocks import list_clocks, make_clocks
from analysis.workload.simulate import Scenario
from common.errors import UserError

KEPT = (
    "launch",
    "rank",
    "epoch",
    "step",
    "batch",
    "wall_us",
    "excess_us",
    "why",
    *(f"{k}_us" for k in KINDS),
    "ts",
)

SHOW = "The links show it in Perfetto while `python -m analysis view RUN` runs, here or through its ssh line."


def list_entries(run: TracedRun, facts: Facts) -> list[ReportEntry]:
    """All entries in the order of the page; those without a table or figure show nothing."""
    chosen = choose_ranks(facts)
    return [
        *_list_times(run, facts, chosen),
        *_list_steps(run, facts, chosen),
        *_list_gpus(run),
        *_list_predictions(run),
        *_list_io(run, chosen),
        *_list_requests(run),
        *_list_special(run, chosen),
    ]


def _list_times(run: TracedRun, facts: Facts, chosen: ChosenRanks) -> list[ReportEntry]:
    """The section Time. chosen: the ranks that the page shows of many."""
    j = run.joined
    timeline, curves, gaps = (
        progress.make_timeline(j),
        progress.make_curves(j, run.metrics),
        progress.find_gaps(j),
    )
    return [
        ReportEntry(
            "Time", "Launches", facts.launches if facts.launches.height > 1 else None, None,
            "The run was stopped and resumed. The time between two launches is not counted: not as I/O, "
            "not as waiting.", "launches",
        ),
        ReportEntry(
            "Time", "Where each rank's time went", facts.breakdown,
            plots.plot_time_by_rank(facts.breakdown, chosen),
            "Seconds of wall clock. Training is cut by what its main thread did: I/O and waiting for "
            "data first, "
            "then communication, copies, compute; `rest` is training that no span covers."
            + _describe_gradient_sums(facts) + chosen.describe(),
            "breakdown", shown=chosen.show(facts.breakdown),
        ),
        *(_list_many_ranks(run, facts) if chosen.ranks > MANY_RANKS else ()),
        ReportEntry(
            "Time", "How much I/O is hidden", facts.phases, plots.plot_hidden_io(facts.phases, chosen),
            "The union of all I/O of a rank, on any thread: behind compute or communication of the main "
            "thread, or not hidden. Start-up has no spans of compute, so its I/O counts as not hidden.",
            "phases", shown=chosen.show(facts.phases),
        ),
        ReportEntry(
            "Time", "Over the run", timeline, plots.plot_over_time(timeline, curves, gaps),
            "All ranks on one clock. Drag to zoom, double-click to see all again. "
            + device.describe_reads(j),
            "timeline",
        ),
        ReportEntry(
            "Time", "By epoch", answers.sum_epochs(j), None, "Training, of a rank on average.", "epochs",
        ),
        ReportEntry(
            "Time", "By range of steps", progress.sum_step_ranges(j), None,
            "The training in up to twenty ranges of steps, of a rank on average.", "step_ranges",
        ),
    ]  # fmt: skip


def _list_many_ranks(run: TracedRun, facts: Facts) -> list[ReportEntry]:
    """What stands for a row per rank where there are too many of them."""
    nodes = sum_nodes(facts)
    waiting, talking = ("wait_us", "io_us"), ("communication_us",)
    of_row = "Sorted by node."
    if facts.breakdown.height > HEAT_ROWS:
        of_row += " A row stands for several ranks: it shows the one with most."
    return [
        ReportEntry(
            "Time", "Where each node's time went", nodes, plots.plot_nodes(nodes),
            f"Seconds of a rank, the mean of the node's, of the {min(len(nodes), plots.MAX_NODES)} nodes (of "
            f"{len(nodes):,}) with the slowest ranks. `own` is the steps without communication: of the "
            "node's ranks on average, and of its slowest one.",
            "nodes",
        ),
        ReportEntry(
            "Time", "Waiting for data and I/O, rank by time", None,
            plots_io.plot_heat(make_share_heat(run.joined, *waiting), run.begin_us, "% of the time"),
            f"Of the main thread. {of_row}",
        ),
        ReportEntry(
            "Time", "Communication, rank by time", None,
            plots_io.plot_heat(make_share_heat(run.joined, *talking), run.begin_us, "% of the time"),
            f"Of the main thread: a slow rank is a light row among dark ones, which wait for it. {of_row}",
        ),
    ]  # fmt: skip


def _describe_gradient_sums(facts: Facts) -> str:
    """A sentence where ranks sum gradients and no span shows it: through NCCL, or gloo on several hosts."""
    table = facts.joined["collectives"]
    if not facts.is_own_run or facts.ranks.height < 2 or (table["name"] == "all_reduce").any():
        return ""
    return " The sum of gradients over the ranks has no span in this run: it counts as compute."


def _list_steps(run: TracedRun, facts: Facts, chosen: ChosenRanks) -> list[ReportEntry]:
    j = run.joined
    if not len(j["steps"]):
        return []
    steps = progress.list_steps(j)
    # one launch needs no number
    late = progress.find_late_steps(j).select(KEPT[facts.launches.height == 1 :])
    return [
        ReportEntry(
            "Steps", "Time of each step", steps,
            plots.plot_step_times(steps, run.begin_us, progress.find_gaps(j)),
            "On the slowest rank. Point at a step for what it did; drag to zoom.", "steps",
        ),
        ReportEntry(
            "Steps", "Distribution", None, plots.plot_step_histogram(steps),
            "Steps by their time on the slowest rank.",
        ),
        ReportEntry(
            "Steps", "Late steps", late, None,
            "Steps of more than twice the median, and what took the extra time. `ts` is the step's begin in "
            f"the trace, in us. {SHOW}", "late_steps", jump="wall_us", run=run.linked,
        ),
        ReportEntry(
            "Steps", "Ranks against each other", facts.ranks, plots.plot_work(facts.ranks, chosen),
            "A rank's own work is its steps without communication: a slow rank has more, the others wait."
            + chosen.describe(),
            "ranks", shown=chosen.show(facts.ranks),
        ),
        ReportEntry(
            "Steps", "Spans by name", answers.sum_spans(j), None,
            "Of all ranks; spans may contain each other. p50 is the middle rank's, p99 the worst "
            "rank's.", "spans",
        ),
    ]  # fmt: skip


def _list_gpus(run: TracedRun) -> list[ReportEntry]:
    table = run.joined[gpu.TABLE]
    if not len(table):  # no profile, or none of a GPU
        return []
    waiting, busy = (float(table[f"{name}_us"].sum()) for name in ("waiting", "busy_while_waiting"))
    said = "Nothing waited for data then."
    if waiting:
        said = (
            f"The main threads waited {format_seconds(waiting / 1e6)} for data, and for "
            f"{1 - busy / waiting:.0%} of that their GPUs had nothing to do."
        )
    us = [name for name in table.columns if name.endswith("_us")]
    shown = table.select(pl.exclude(us), *answers.to_seconds(*us))
    return [
        ReportEntry(
            "GPU", "What the GPU did while waiting for data", shown, plots.plot_gpus(table),
            f"{said} Of the steps that torch.profiler recorded (`--profile_steps`): kernels, then "
            "collectives that no kernel hides, then copies; the rest is idle, cut by what the rank's main "
            "thread did meanwhile, I/O and waiting for data first. `waiting` is the main thread's, in file "
            "calls of its own too.",
            "gpu",
        )
    ]  # fmt: skip


def _list_predictions(run: TracedRun) -> list[ReportEntry]:
    try:
        model = whatif.make_run_model(run)
        table = whatif.predict_table(model)
    except UserError:  # without steps, or without what a batch asks for, nothing can be predicted
        return []
    notes = whatif.list_notes(run, model, Scenario())
    return [
        ReportEntry(
            "Steps", "What faster storage would buy", table, plots.plot_whatif(table),
            "Predicted from the run's own reads and steps by a model of loading thread, queue, step and "
            "barrier: all else stays. `no time` is storage that takes none. Utilisation is the "
            "accelerator's, as DLIO counts it; `saved` is of the whole run, and negative where it would take "
            "longer. `python -m analysis whatif` also changes latency, queue, chunks, compute and ranks."
            + "".join(f" {note}" for note in notes),
            "whatif",
        )
    ]  # fmt: skip


def _list_io(run: TracedRun, chosen: ChosenRanks) -> list[ReportEntry]:
    j = run.joined
    by_rank, systems = answers.sum_volume(j, "rank"), device.list_file_systems(j)
    files, epochs = answers.sum_files(j), answers.sum_volume(j, "epoch").drop_nulls("epoch")
    by_phase = device.sum_device(j, "phase")
    rates = device.describe_reads(j)
    return [
        ReportEntry(
            "I/O", "From a device or from memory", by_phase, plots_io.plot_device(by_phase),
            "What calls read (of mapped files: what spans say), all ranks, and how much of it the kernel "
            "fetched from a device for these processes meanwhile; what is beyond that came from memory. Its "
            "counters are read around epochs and evaluations and every 5 s, and are taken to grow evenly in "
            "between: of a short phase this is an estimate. A device can give more than is read: by "
            "read-ahead, mapped files, and programs. "
            "`device write bytes` will be sent to a device, now or later, the trace among them; a major "
            "fault waits for a device.",
            "device",
        ),
        *_list_device_of_ranks(j, chosen),
        ReportEntry(
            "I/O", "File systems", systems, None,
            "Where the run's folders are; of the mount options those that change reading, writing or "
            "caching. `reads are` says what reads count as: memory where there is no device, not known "
            "where the kernel may not count what comes from one.",
            "file_systems", shown=group_file_systems(systems) if chosen.ranks > MANY_RANKS else None,
        ),
        ReportEntry(
            "I/O", "By phase", answers.sum_volume(j, "phase"), None,
            "`seconds` is the sum over all operations and ranks, `MB per s` what one operation moves "
            "while it runs; sequential counts the requests that begin where the last one of their thread on "
            "the file ended, strided those that skip forward by a fixed distance (ranks that take turns in a "
            "file), random those that jump elsewhere. A request that moves nothing (at the end of a file) or "
            "whose offset is unknown, is none of the three. " + rates,
            "io_phases",
        ),
        ReportEntry(
            "I/O", "By interface", answers.sum_interfaces(j), None, "File calls, whole run.", "interfaces",
        ),
        ReportEntry(
            "I/O", "Shared and unique files", answers.sum_file_use(j), None,
            "Files that were read or written after the start-up, by how many ranks used them and for what. "
            "Misaligned are requests that skip into the middle of a block of 4,096 bytes.",
            "file_use",
        ),
        ReportEntry("I/O", "By rank", by_rank, None, "", "io_ranks", shown=chosen.show(by_rank)),
        ReportEntry("I/O", "By host", answers.sum_volume(j, "host"), None, "", "io_hosts"),
        ReportEntry("I/O", "By epoch", epochs, None, "", "io_epochs"),
        ReportEntry(
            "I/O", "Rank by time", None, plots_io.plot_heat(make_rate_heat(j), run.begin_us, "MB/s"),
            f"MB/s read and written. {rates}"
            + (" A row stands for several ranks: it shows their mean." if chosen.ranks > HEAT_ROWS else ""),
        ),
        ReportEntry(
            "I/O", "Files", files, plots.plot_files(files),
            "The files with the most time in them, start-up left out.", "files",
        ),
    ]  # fmt: skip


def _list_device_of_ranks(j: JoinedTables, chosen: ChosenRanks) -> list[ReportEntry]:
    """Of few ranks summary.json lists it."""
    if chosen.ranks <= LISTED_RANKS:
        return []
    table = device.sum_device(j, "rank", "phase")
    title = "From a device or from memory, by rank"
    return [ReportEntry("I/O", title, table, None, "", "device_ranks", shown=chosen.show(table))]


def _list_requests(run: TracedRun) -> list[ReportEntry]:
    j = run.joined
    sizes = answers.count_request_sizes(j, "phase").filter(pl.col("phase") != "startup")
    return [
        ReportEntry(
            "Requests", "Sizes", sizes, plots_io.plot_request_sizes(sizes),
            "Number of reads and writes by size, start-up left out.", "sizes",
        ),
        ReportEntry(
            "Requests", "Bytes by size", None, plots_io.plot_request_bytes(sizes), "Where the bytes go.",
        ),
        ReportEntry(
            "Requests", "Operations", answers.sum_operations(j),
            plots_io.plot_latency(j["latencies"].filter(pl.col("layer") != MAPPED)),
            "Time of one operation; in the table, `mapped` are copies from mapped files. Percentiles "
            "are exact below 256 us, else within 1%.",
            "operations", show=True,
        ),
        ReportEntry(
            "Requests", "Slowest operations", answers.list_slowest(j), None,
            f"`ts` is the time in the trace, in us. Start-up is left out. {SHOW}", "slowest",
            jump="dur", run=run.linked,
        ),
        ReportEntry(
            "Requests", "Slowest operations of the start-up", answers.list_slowest(j, startup=True), None,
            "And of Python's modules and libraries at any time.", "slowest_startup",
            jump="dur", run=run.linked,
            fold="the operations",
        ),
        ReportEntry(
            "Requests", "Asked and moved", answers.compare_declared(j), None,
            "Bytes that the loader declares it read or wrote, and bytes that the calls moved.", "asked",
        ),
    ]  # fmt: skip


def _list_special(run: TracedRun, chosen: ChosenRanks) -> list[ReportEntry]:
    j = run.joined
    start, saved, prep = progress.list_startup(j), progress.list_checkpoints(j), progress.sum_preprocessing(j)
    many = chosen.ranks > MANY_RANKS
    clocks = pl.DataFrame(list_clocks(j.processes, make_clocks(j.processes)), infer_schema_length=None)
    found = [
        ReportEntry(
            "Start-up", "To the end of the first step", start, plots.plot_startup(start, chosen),
            "Gaps are what no span covers." + chosen.describe(), "startup", shown=chosen.show(start),
        ),
        ReportEntry(
            "Checkpoints", "Saved and loaded", saved, None,
            f"`save` and `load` on the main thread is how long training stood still. {device.WRITE_RATES}"
            + (" The longest first." if many else ""),
            "checkpoints", shown=saved.sort("seconds", descending=True) if many else saved,
        ),
        ReportEntry(
            "Preprocessing", "Step by step", prep, plots.plot_preprocessing(prep),
            "Elapsed from the first worker's begin to the last one's end; work is the sum over workers. "
            + device.describe_reads(j, "preprocess"),
            "preprocessing",
        ),
        ReportEntry(
            "Clocks", "Hosts against the first one", clocks if len(clocks) > LISTED_NODES else None, None,
            "By how much the times of a host were moved, and how certain that is.", "clocks",
        ),
    ]  # fmt: skip
    return [entry for entry in found if entry.table is not None and len(entry.table)]
