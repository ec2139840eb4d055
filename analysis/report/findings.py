"""Findings in words, each from one rule over the tables, ordered by the time there is to win."""

from collections.abc import Callable

from analysis.report import rules_io, rules_time
from analysis.report.facts import Facts, Finding

Rule = Callable[[Facts], Finding | None]

RULES: tuple[Rule, ...] = (
    rules_time.waiting, rules_time.slow_rank, rules_time.startup, rules_time.checkpoint,
    rules_time.late_steps,
    rules_io.small_reads, rules_io.mapped, rules_io.metadata, rules_io.random_access, rules_io.slow_tail,
    rules_io.amplified, rules_io.failed,
)  # fmt: skip


def findings(facts: Facts) -> list[Finding]:
    found = [finding for rule in RULES if (finding := rule(facts))]
    return sorted(found, key=lambda finding: -finding.seconds)
