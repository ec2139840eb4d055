"""Rules over time: waiting for data, slow ranks, start-up, late steps."""

import polars as pl

from analysis.report.facts import TRAIN, Facts, Finding, advise_mapped_files, show_longest
from analysis.report.page import format_seconds, format_size
from analysis.tables import progress
from analysis.tables.calls import MAPPED, TABLE_FILE, is_below

WAITING = 0.05  # of the training
PRESSURE, PRESSED_PART, PRESSED_IN_A_ROW, LEAST_RANGES = 0.2, 0.5, 4, 10
SLOW_RANK = 1.25  # times the others' part of a step
IO_UNEVEN = 0.3  # of the time in I/O of the rank with most
STARTUP = 0.1  # of the run
BUSY = 0.2  # of the training; the demo on a quiet machine has 6 to 10 %: its own other threads
OWN_CALLS = 0.2  # of what the main thread waits: then the sentence says how long its own file calls take
READING = 0.1  # of the time that is waited: if reading is less, something else keeps the data back
KIND_WORDS = {"wait": "waiting for data", "io": "I/O", "copy": "copying"}
MOVING = 1 << 20  # bytes: a larger read takes long for its bytes, not for being a call
LATE, LATE_PART, LEAST_STEPS = 3.0, 0.02, 20  # times the median step; of the training


def find_waiting(f: Facts) -> Finding | None:
    """The main thread waits for data: for the next batch, or reading itself."""
    wall = f.average_seconds("wall_s", *TRAIN)
    stall = f.average_seconds("wait_s", *TRAIN) + f.average_seconds("io_s", *TRAIN)
    if wall <= 0 or stall < WAITING * wall:
        return None
    evidence: dict[str, object] = {"stall_s": stall, "wall_s": wall}
    name, size_text = "its data", ""
    remedy = "Let the loader prefetch further ahead, or put the data on faster storage."
    reads = _list_waited_reads(f)
    if len(reads):
        name = str(reads["file"][0])
        is_mapped = name in f.mapped_files
        size_text, mean, small = _describe_read_sizes(f, reads["file"], is_mapped)
        evidence |= {"file": name, "mean_read_bytes": mean}
        if _reads_little(f, stall):
            read_s = float(reads["seconds"].sum()) / max(1, f.breakdown.height)
            size_text = f", though its reads take {format_seconds(read_s)} per rank only"
            remedy = _advise_loader(f)
        elif is_mapped:
            remedy = advise_mapped_files(f)
        elif name.endswith(TABLE_FILE):
            remedy = "These are tables in files: raise --cache_memory_budget_mb."
        elif small:
            remedy = f.advise_larger_reads(mean)
        elif f.is_own_dlrm and find_persistent_pressure(f):
            remedy = (
                "Stage the data on the node, or hold it in memory (--source memory): --prefetch_batches "
                "evens out single late reads only, and it waits most of the time."
            )
        elif f.is_own_run:
            remedy = "Raise --prefetch_batches, stage the data on the node, or hold it in memory."
    of = "training" if len(f.joined["steps"]) else "run"
    own = f.average_seconds("io_s", *TRAIN)
    calls = ""
    if OWN_CALLS * stall < own < stall:
        calls = f", or file calls of the main thread ({format_seconds(own)})"
    text = (
        f"{stall / wall:.0%} of the {of}'s time is waiting for data{calls}, most of all for "
        f"{name}{size_text}."
    )
    steps = f.joined["steps"].filter(pl.col("wait_us") + pl.col("io_us") > 0)
    evidence |= _show_step(steps, pl.col("wait_us") + pl.col("io_us"))
    return Finding("waiting", f.limit_waiting(*TRAIN), text, remedy, evidence)


def _describe_read_sizes(f: Facts, files: pl.Series, is_mapped: bool) -> tuple[str, float, bool]:
    """(a clause on how large the training's reads of these files are; bytes that one moves on average;
    whether reads below MOVING take most of the time), of copies from mapped files if these are mapped.
    """
    ops = f.joined["ops"].filter((pl.col("op") == "read") & pl.col("phase").is_in(TRAIN))
    own = ops.filter(pl.col("file").is_in(files.implode()) & ((pl.col("layer") == MAPPED) == is_mapped))
    below = own.filter(is_below(MOVING))
    share = float(below["us"].sum()) / max(1, int(own["us"].sum()))
    small = share >= 0.5
    chosen = below if small and not is_mapped else own
    mean = float(chosen["bytes"].sum()) / max(1, int(chosen["count"].sum()))
    if is_mapped:
        return f"; a copy from the mapped file moves {format_size(mean)} on average", mean, small
    if small:
        less = f"{share:.0%} of the time in its reads goes into those of less than {format_size(MOVING)}"
        return f"; {less}, {format_size(mean)} on average", mean, True
    return f"; a read moves {format_size(mean)} on average", mean, False


def _list_waited_reads(f: Facts) -> pl.DataFrame:
    """The reads that the training waits for, by file, those that take longest first: of tables in files, or
    of the dataset.
    """
    reads = f.pick_data_reads(*TRAIN).sort("seconds", descending=True)
    waits = f.joined["spans"].filter(pl.col("kind") == "wait")
    if not len(waits):
        return reads
    for_tables = pl.col("cat") == "ssd"
    of_tables = waits.filter(for_tables)["us"].sum() > waits.filter(~for_tables)["us"].sum()
    return reads.filter(pl.col("file").str.ends_with(TABLE_FILE) == of_tables)


def _reads_little(f: Facts, stall: float) -> bool:
    """Whether reading is a small part of what the training waits for: then faster storage wins nothing."""
    reads = _list_waited_reads(f)
    return 0 < float(reads["seconds"].sum()) / max(1, f.breakdown.height) < READING * stall


def _advise_loader(f: Facts) -> str:
    if f.is_own_run:
        return (
            "The loading thread decodes and assembles more slowly than the training takes: give it a core "
            "(DLRM_THREADS, fewer ranks), or raise --prefetch_batches."
        )
    return "Decoding or assembling the data takes the time, not reading: use more loading threads."


def find_busy_cores(f: Facts) -> Finding | None:
    """The main thread of a rank is ready to run, and other threads have the cores."""
    waits, wall = f.core_waits, f.average_seconds("wall_s", *TRAIN)
    if not len(waits) or wall <= 0 or waits["seconds"][0] < BUSY * wall:
        return None
    rank, seconds = waits.row(0)
    text = (
        f"For {seconds / wall:.0%} of the training, {format_seconds(seconds)}, the main thread of rank "
        f"{rank} is ready to run and has no core: other programs or other threads of this job have them. "
        "Whatever it does takes longer by as much, and the other ranks wait for it."
    )
    remedy = "Give each rank cores of its own."
    if f.is_own_run:
        remedy += " Where the job is alone on its node: fewer ranks (NPROC) or threads (DLRM_THREADS)."
    steps = f.joined["steps"].filter(pl.col("rank") == rank)
    evidence = {"rank": rank, "core_wait_s": seconds, **_show_step(steps, pl.col("wall_us"))}
    return Finding("busy_cores", seconds, text, remedy, evidence)


def _show_step(steps: pl.DataFrame, by: pl.Expr) -> dict[str, object]:
    """The step with most of this, as evidence."""
    if not len(steps):
        return {}
    top = steps.sort(by, "ts").row(-1, named=True)
    return {"ts": int(top["ts"]), "dur_us": int(top["wall_us"])}


def find_persistent_pressure(f: Facts) -> Finding | None:
    """The training waits for data from its begin to its end, not now and then."""
    ranges = progress.sum_step_ranges(f.joined)
    if ranges.height < LEAST_RANGES:
        return None
    stall = pl.col("wait_s") + pl.col("io_s")
    pressed = ranges.select(stall >= PRESSURE * pl.col("wall_s")).to_series()
    longest = max([0, *(len(run) for run in "".join("x" if each else " " for each in pressed).split())])
    if pressed.sum() <= PRESSED_PART * len(pressed) or longest < PRESSED_IN_A_ROW:
        return None
    found = ranges.select("from_step", pressed.alias("pressed"))
    steps = f.waited_in_steps.sort("step").join_asof(found, left_on="step", right_on="from_step")
    seconds = float(steps.filter("pressed")["us"].sum()) / 1e6
    always = "all the time" if pressed.all() else "most of the time"
    text = (
        f"The training waits for data {always}: in {pressed.sum()} of its {len(pressed)} ranges of steps "
        f"for {PRESSURE:.0%} or more. Data come in more slowly than they are used, so no queue can hide it."
    )
    remedy = "Raise what comes in: larger reads, faster storage, or data held in memory."
    if _reads_little(f, seconds):
        remedy = _advise_loader(f)
    elif f.is_own_dlrm:
        remedy = "Raise what comes in: hold the dataset in memory (--source memory), or stage it on the node."
        reads = _list_waited_reads(f)
        if len(reads) and str(reads["file"][0]).endswith(TABLE_FILE):
            remedy = "The rows of tables in files come in too slowly: raise --cache_memory_budget_mb."
    evidence: dict[str, object] = {"ranges": len(pressed), "pressed": int(pressed.sum()), "in_a_row": longest}
    steps = f.joined["steps"]
    return Finding(
        "persistent_pressure", seconds, text, remedy,
        evidence | _show_step(steps, pl.col("wait_us") + pl.col("io_us")),
    )  # fmt: skip


def find_slow_rank(f: Facts) -> Finding | None:
    """One rank's own part of a step is longer than the others', who wait for it in communication."""
    if f.ranks.height < 2:
        return None
    late = f.ranks.sort("own_ms", descending=True).row(0, named=True)
    others = f.ranks.filter(pl.col("rank") != late["rank"])
    usual = {c: float(others[c].to_numpy().mean()) for c in ("compute_s", "wait_s", "io_s", "copy_s")}
    own = float(others["own_ms"].quantile(0.5) or 0.0)
    if own <= 0 or late["own_ms"] < SLOW_RANK * own:
        return None
    steps = progress.list_steps(f.joined)
    lost = float((steps["own_us"] - steps["own_mean_us"]).sum()) / 1e6
    if not f.matters(lost):
        return None
    what = max(usual, key=lambda c: late[c] - usual[c]).removesuffix("_s")
    host = next((p.host for p in f.joined.processes if p.rank == late["rank"]), "")
    text = (
        f"Rank {late['rank']}{f' on {host}' if host else ''} needs {late['own_ms']:.3g} ms for its own part "
        f"of a step (median), the others {own:.3g} ms: mostly more {KIND_WORDS.get(what, what)}. The others "
        "wait for it in communication."
    )
    remedy = "Look at that host's processor and neighbours; balance the plan if it gives this rank more."
    if f.on_one_host:
        remedy = "All ranks share that host's cores: give each its own, or balance the plan."
    if what in ("wait", "io"):
        remedy = _advise_late_reader(
            f, late["rank"], "Look at that host's storage and at which files this rank reads."
        )
    evidence = {"rank": late["rank"], "own_ms": late["own_ms"], "others_ms": own, "mostly": what}
    steps = f.joined["steps"].filter(pl.col("rank") == late["rank"])
    evidence |= _show_step(steps, pl.col("wall_us") - pl.col("communication_us"))
    return Finding("slow_rank", lost, text, remedy, evidence)


def _advise_late_reader(f: Facts, rank: int, remedy: str) -> str:
    """The remedy, if this rank's reads take longer. If not, data come in as slowly for all ranks: the one
    whose queue is empty waits, and the others' fill up meanwhile.
    """
    if f.reads_longer(rank, SLOW_RANK):
        return remedy
    return (
        "Its reads take no longer than the others': data come in as slowly for all ranks, and those that "
        "wait for this one find theirs ready meanwhile. Make data come in faster for all."
    )


def find_io_imbalance(f: Facts) -> Finding | None:
    """One rank waits for I/O much longer than another, and they wait for it."""
    ranks = f.sum_rank_exposed().sort("seconds", "rank", descending=[True, False])
    if ranks.height < 2:
        return None
    top, least = ranks.row(0, named=True), float(ranks["seconds"][-1])
    gain = top["seconds"] - float(ranks["seconds"].to_numpy().mean())
    if top["seconds"] - least <= IO_UNEVEN * top["seconds"] or not f.matters(gain):
        return None
    slow = find_slow_rank(f)
    if slow and slow.evidence["rank"] == top["rank"] and slow.evidence["mostly"] in ("wait", "io"):
        return None  # it says the same
    text = (
        f"Rank {top['rank']} is {format_seconds(top['seconds'])} in I/O and waiting for data that nothing "
        f"hides, the rank with the least {format_seconds(least)}."
    )
    where = "files" if f.on_one_host else "host and files"
    remedy = f"Give the ranks equal parts of the data and of the writing; look at that rank's {where}."
    waited = dict(f.ranks.select("rank", "wait_s").iter_rows())
    if waited and 2 * (waited.get(top["rank"], 0.0) - min(waited.values())) > top["seconds"] - least:
        remedy = _advise_late_reader(f, top["rank"], remedy)
    evidence = {"rank": top["rank"], "most_s": top["seconds"], "least_s": least}
    requests = f.requests.filter(pl.col("rank") == top["rank"])
    return Finding("io_imbalance", gain, text, remedy, evidence | show_longest(requests))


def find_slow_startup(f: Facts) -> Finding | None:
    """The first step comes late."""
    table, wall = progress.list_startup(f.joined), f.average_seconds("wall_s")
    if not len(table):
        return None
    jobs = table["launch"].n_unique()  # a launch that ended earlier has no first step
    first = _sum_slowest(table.group_by("launch", "rank").agg(pl.col("seconds").sum()))
    slowest = table.group_by("launch", "part").agg(pl.col("seconds").max())
    parts = slowest.group_by("part").agg(pl.col("seconds").sum())
    if first < STARTUP * wall or not len(parts):
        return None
    part, long = parts.sort("seconds", "part", descending=[True, False]).row(0)
    calls = (
        f"; file calls are {format_seconds(f.average_seconds('io_s', 'startup'))} per rank"
        if f.joined.calls
        else ""
    )
    name = {"first step": "the first step itself", "between": "what no span covers"}.get(part, part)
    their = "its" if jobs == 1 else "their"
    text = (
        f"{'The first step ends' if jobs == 1 else f'The first steps of {jobs} launches end'} after "
        f"{format_seconds(first)}{'' if jobs == 1 else ' in all'}, {first / wall:.0%} of the run; {their} "
        f"longest part is {name}, {format_seconds(long)}{calls}."
    )
    remedy = "It is paid once per job: run longer jobs."
    if (
        part == "imports" and f.average_seconds("io_s", "startup") > 0.2 * long
    ):  # else it is Python's own work
        remedy = "Put the environment on node-local storage; it is paid once per job, so run longer jobs."
    evidence = {"first_step_s": first, "part": part, "part_s": long}
    marks = f.joined["marks"].filter((pl.col("cat") == "startup") & (pl.col("name") == part))
    if part == "first step":
        steps = f.joined["steps"].sort("ts").group_by("launch", "rank").first()
        evidence |= _show_step(steps, pl.col("wall_us"))
    elif len(marks):
        top = marks.sort("dur", "ts").row(-1, named=True)
        evidence |= {"ts": int(top["ts"]), "dur_us": int(top["dur"])}
    return Finding("startup", long, text, remedy, evidence, "low")


def _sum_slowest(table: pl.DataFrame) -> float:
    """Of each launch the rank that took longest, added up."""
    return float(table.group_by("launch").agg(pl.col("seconds").max())["seconds"].sum())


def find_late_steps(f: Facts) -> Finding | None:
    """Few steps that take much longer than the others."""
    table = f.joined["steps"]
    if len(table) < LEAST_STEPS:
        return None
    late = progress.find_late_steps(f.joined, times=LATE, n=len(table))
    first = table.group_by("launch", "rank").agg(pl.col("ts").min())["ts"]
    late = late.filter(~pl.col("ts").is_in(first.to_list()))  # a first step warms up
    if not len(late):
        return None
    by_step = late.group_by("launch", "epoch", "step").agg(pl.col("excess_us").max(), pl.col("why").first())
    lost = float(by_step["excess_us"].sum()) / 1e6
    if lost < LATE_PART * f.average_seconds("wall_s", *TRAIN):
        return None
    why = by_step.group_by("why").agg(pl.col("excess_us").sum()).sort("excess_us", descending=True)["why"][0]
    worst = late.row(0, named=True)
    many = f"{len(by_step)} steps take" if len(by_step) > 1 else "One step takes"
    text = (
        f"{many} more than three times the median, {format_seconds(lost)} beyond it in all; "
        f"the extra time is mostly {why}. The longest is step {worst['step']} on rank {worst['rank']}, "
        f"{format_seconds(worst['wall_us'] / 1e6)}."
    )
    evidence = {"steps": len(by_step), "mostly": why, "longest": worst["step"], "rank": worst["rank"]}
    evidence |= {"ts": int(worst["ts"]), "dur_us": int(worst["wall_us"])}
    return Finding(
        "late_steps", lost, text, "The table of late steps has links that show them in Perfetto.", evidence
    )
