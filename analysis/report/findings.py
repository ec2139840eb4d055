"""Findings in words, each from one rule over the tables, ordered by the time there is to win."""

from collections.abc import Callable

from analysis.report import rules_io, rules_time, rules_training
from analysis.report.facts import Facts, Finding

Rule = Callable[[Facts], Finding | None]

RULES: tuple[Rule, ...] = (
    rules_training.find_no_learning,
    rules_time.find_waiting,
    rules_time.find_slow_rank,
    rules_time.find_slow_startup,
    rules_time.find_checkpoint_cost,
    rules_time.find_late_steps,
    rules_io.find_small_reads,
    rules_io.find_mapped_files,
    rules_io.find_metadata_load,
    rules_io.find_random_access,
    rules_io.find_slow_tail,
    rules_io.find_amplified_reads,
    rules_io.find_failed_calls,
)


def find_all(facts: Facts) -> list[Finding]:
    found = [finding for rule in RULES if (finding := rule(facts))]
    return sorted(found, key=lambda finding: -finding.seconds)
