"""Findings in words, each from one rule over the tables, ordered by the time there is to win.

RULES is the list of all rules; docs/report.md shows it as a table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from analysis.report import rules_checkpoints as checkpoints
from analysis.report import rules_communication as communication
from analysis.report import rules_files as files
from analysis.report import rules_requests as requests
from analysis.report import rules_time as time
from analysis.report import rules_training as training
from analysis.report.facts import JUMPING, JUMPS, LARGE_JUMP, MATTERS, MATTERS_HIDDEN, Facts, Finding
from analysis.report.page import format_size
from analysis.tables.calls import BLOCK, SMALL_REQUEST

HIGH, MEDIUM = 0.1, 0.02  # of the run: what can be won makes a finding severe


class Rule(NamedTuple):
    """A rule; in words, under what condition it makes a finding; which other programs have such a rule."""

    name: str
    find: Callable[[Facts], Finding | None]
    condition: str
    others: str


SMALL = (
    f"{requests.SMALL_COUNT:,} or more of less than {format_size(SMALL_REQUEST)} take "
    f"{requests.SMALL_TIME:.0%} of the time of all"
)
RANDOM = (
    f"{JUMPS:,} or more requests of a file, and {JUMPING:.0%} of its reads or writes, jump for less than "
    f"{format_size(LARGE_JUMP)} each"
)
SHARED = (
    f"{files.SHARED_COUNT:,} or more requests and {files.SHARED_PART:.0%} of a file that ranks share and "
    "write"
)
AGAIN = f"more than {files.AGAIN} times the file's size, and {format_size(files.AGAIN_BYTES)}"
PRESSED = f"more than {time.PRESSED_PART:.0%} of the ranges of steps, {time.PRESSED_IN_A_ROW} in a row"

RULES: tuple[Rule, ...] = (
    Rule("no_learning", training.find_no_learning, "the loss is not a number, stays above its first value "
         f"for {training.ABOVE_STEPS} steps, or at what a constant prediction has", "-"),
    Rule("waiting", time.find_waiting, f"{time.WAITING:.0%} of the training waits for data or is I/O",
         "DFAnalyzer: fetch_pressure"),
    Rule("persistent_pressure", time.find_persistent_pressure, f"{time.PRESSURE:.0%} of the time waits for "
         f"data in {PRESSED}", "DFDiagnoser: persistent_pressure"),
    Rule("busy_cores", time.find_busy_cores, f"{time.BUSY:.0%} of the training the main thread of a rank is "
         "ready to run and has no core", "-"),
    Rule("waiting_for_ranks", communication.find_waiting_for_ranks, f"{communication.COMMUNICATION:.0%} of "
         "the training waits in collectives for the last rank, beyond the clocks' error", "-"),
    Rule("transfer", communication.find_transfer, f"{communication.COMMUNICATION:.0%} of the training is "
         "communication after the last rank has come", "-"),
    Rule("slow_rank", time.find_slow_rank, f"a rank's own part of a step is {time.SLOW_RANK} times the "
         "others'",
         "DFDiagnoser: epoch_straggler"),
    Rule("io_imbalance", time.find_io_imbalance, "the ranks' times in I/O that nothing hides differ by more "
         f"than {time.IO_UNEVEN:.0%}", "DFAnalyzer: fetch_rank_imbalance"),
    Rule("startup", time.find_slow_startup, f"the first step ends after {time.STARTUP:.0%} of the run", "-"),
    Rule("late_steps", time.find_late_steps, f"steps of {time.LATE:.0f} times the median take "
         f"{time.LATE_PART:.0%} of the training", "-"),
    Rule("checkpoint", checkpoints.find_checkpoint_cost, f"checkpoints pause {checkpoints.PAUSE:.0%} of the "
         "run", "-"),
    Rule("checkpoint_tail", checkpoints.find_checkpoint_tail, f"of {checkpoints.LEAST_CHECKPOINTS} or more "
         f"the slowest takes {checkpoints.TAIL:.0f} times the median", "DFDiagnoser: checkpoint_tail_risk"),
    Rule("checkpoint_fragments", checkpoints.find_checkpoint_fragments, f"{checkpoints.PIECES:,} or more "
         f"writes of less than {format_size(checkpoints.PIECE)} take {checkpoints.PIECES_TIME:.0%} of the "
         "time of all",
         "DFDiagnoser: checkpoint_fragmentation"),
    Rule("small_reads", requests.find_small_reads, SMALL,
         "Drishti: P05, P15; WisIO: small_reads; DFAnalyzer: small_read_dominance"),
    Rule("small_writes", requests.find_small_writes, SMALL,
         "Drishti: P06; WisIO: small_writes; DFAnalyzer: small_write_dominance"),
    Rule("random_access", requests.find_random_access, RANDOM, "Drishti: P11; WisIO: random_operations"),
    Rule("random_writes", requests.find_random_writes, RANDOM, "Drishti: P13; WisIO: random_operations"),
    Rule("misaligned", requests.find_misaligned, f"{requests.MISALIGNED:.0%} of the requests skip into the "
         f"middle of a block of {BLOCK:,} bytes, and {requests.MISALIGNED:.0%} of the blocks that they touch "
         "are touched for nothing", "Drishti: P08"),
    Rule("operation_imbalance", requests.find_operation_imbalance, f"{requests.MORE_CALLS:.0%} more calls of "
         "one kind, which move less than half of their share of the bytes; the middle one is smaller, too",
         "Drishti: P01 to P04; WisIO: operation_imbalance; DFAnalyzer: operation_imbalance, size_imbalance"),
    Rule("stdio", requests.find_stdio, f"more than {requests.STDIO_SHARE:.0%} of the bytes, and "
         f"{format_size(requests.STDIO_BYTES)}, by buffered calls of the C library", "Drishti: S01"),
    Rule("slow_tail", requests.find_slow_tail, f"the {requests.SLOW_PART:.0%} of reads that are slowest for "
         f"their size take {requests.SLOW_TIME:.0%} of the time, {requests.SLOW_TIMES} times the median of "
         "that size each", "DFAnalyzer: read_contention"),
    Rule("shared_requests", files.find_shared_requests, f"{SHARED} are small or misaligned", "Drishti: P16, "
         "P08"),
    Rule("stragglers", files.find_stragglers, f"ranks differ by more than {files.STRAGGLES:.0%} in a shared "
         "file's time, or bytes", "Drishti: P18, P19"),
    Rule("file_imbalance", files.find_file_imbalance, f"ranks differ by more than {files.UNEVEN:.0%} in a "
         "shared file's bytes", "Drishti: P21, P22"),
    Rule("redundant_reads", files.find_redundant_reads, f"{AGAIN}, are read in one epoch", "Drishti: P09"),
    Rule("redundant_writes", files.find_redundant_writes, f"{AGAIN}, are written in one "
         "opening", "Drishti: P10"),
    Rule("amplified", files.find_amplified_reads, f"{files.AMPLIFIED} times the bytes that the loader asked "
         "for", "-"),
    Rule("mapped", files.find_mapped_files, f"{files.MAPPED_PART:.0%} of the training reads mapped files, at "
         f"less than {files.MAPPED_RATE / 1e9:.0f} GB/s", "-"),
    Rule("metadata", files.find_metadata_load, f"{files.METADATA_PART:.0%} of the time in file calls moves "
         "no byte; hints and syncs are left out",
         "Drishti: P17; WisIO: excessive_metadata_access; DFAnalyzer: excessive_metadata_access"),
    Rule("metadata_time", files.find_metadata_time, f"more than {files.METADATA_RANK_S:.0f} s on a rank, "
         "start-up included", "Drishti: P17"),
    Rule("hints", files.find_hint_cost, f"hints (fadvise) take {files.HINTS_PART:.0%} of the time in file "
         "calls", "-"),
    Rule("sync", files.find_sync_cost, f"fsync and the like take {files.SYNC_PART:.0%} of the run", "-"),
    Rule("failed", files.find_failed_calls, "a read or write failed", "-"),
)  # fmt: skip

# Beyond its own condition, a rule over requests or files says something only where it matters.
WORTH_SAYING = (
    f"At least {MATTERS:.0%} of the run is to be won; or, of small and random requests, {MATTERS_HIDDEN:.0%} "
    "of a rank's time is in them, though all of it is hidden."
)


def find_all(facts: Facts) -> list[Finding]:
    """What the rules find, most seconds first."""
    found = [finding for rule in RULES if (finding := rule.find(facts))]
    wall = facts.find_wall_seconds()
    for finding in found:
        finding.severity = finding.severity or _judge(finding.seconds, wall)
    return sorted(found, key=lambda finding: -finding.seconds)


def _judge(seconds: float, wall: float) -> str:
    return "high" if seconds >= HIGH * wall else "medium" if seconds >= MEDIUM * wall else "low"


def list_rules(found: list[Finding]) -> list[dict[str, Any]]:
    """All rules that were looked at, and whether each made a finding: for summary.json and the report."""
    made = {finding.rule for finding in found}
    return [
        {"rule": rule.name, "found": rule.name in made, "condition": rule.condition, "others": rule.others}
        for rule in RULES
    ]
