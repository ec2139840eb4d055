"""The answer on top of the report: is I/O the bottleneck, what could storage save at most, what is it then.

In: the facts of a run. Out: an Answer, for the page, the terminal and summary.json alike.
"""

from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from analysis.report.facts import TRAIN, Facts
from analysis.report.page import format_seconds

CUT = (*TRAIN, "preprocess")  # phases that are cut by what the main thread did; the others count whole
WHOLE = {"startup": "startup", "evaluation": "evaluate", "checkpoints": "checkpoint"}
LABELS = {
    "startup": "start-up", "compute": "compute and copies", "communication": "communication",
    "waiting": "waiting for data", "evaluation": "evaluation", "checkpoints": "checkpoints",
    "other": "other",
}  # fmt: skip
WORTH_A_LOOK = 0.1  # of the wall time: what storage could save is not small from here on


@dataclass
class Answer:
    """What a run's time went to, and how much of it faster storage could save at most."""

    text: str  # one sentence
    bottleneck: str  # "storage", a key of parts_s, or nothing where the trace is too short
    io_is_bottleneck: bool
    storage_seconds: float  # that storage without any delay would save at most
    storage_share: float  # of the wall time
    wall_seconds: float
    parts_s: dict[str, float]  # seconds of a rank, on average

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_answer(f: Facts) -> Answer:
    wall, parts, storage = f.find_wall_seconds(), sum_parts(f), limit_storage(f)
    whole, saved = sum(parts.values()), min(sum(storage.values()), wall)
    share = saved / wall if wall else 0.0
    left = {name: max(0.0, seconds - storage.get(name, 0.0)) for name, seconds in parts.items()}
    if not whole:
        return Answer("The trace is too short to say where the time went.", "", False, 0.0, 0.0, wall, parts)
    is_io = saved > 0 and saved >= max(left.values())
    bottleneck = "storage" if is_io else max(parts, key=lambda name: parts[name])
    text = _make_sentence(f, parts, storage, bottleneck, saved, wall)
    return Answer(text, bottleneck, is_io, saved, share, wall, parts)


def sum_parts(f: Facts) -> dict[str, float]:
    """Seconds of a rank, on average: the phases of CUT by what the main thread did, the others whole."""
    parts = {name: f.average_seconds("wall_s", phase) for name, phase in WHOLE.items()}
    parts["waiting"] = f.average_seconds("wait_s", *CUT) + f.average_seconds("io_s", *CUT)
    parts["communication"] = f.average_seconds("communication_s", *CUT)
    parts["compute"] = f.average_seconds("compute_s", *CUT) + f.average_seconds("copy_s", *CUT)
    parts["other"] = f.average_seconds("other_s", *CUT) + f.average_seconds("wall_s", "other")
    return {name: parts[name] for name in LABELS}


def limit_storage(f: Facts) -> dict[str, float]:
    """Of each part the seconds that storage without any delay would save at most.

    A checkpoint's I/O counts on any thread, unless compute or communication hides it.
    """
    stall = pl.col("io_s") + pl.col("wait_s")
    found = {name: f.find_longest_rank(stall, phase) for name, phase in (*WHOLE.items(), ("other", "other"))}
    found["checkpoints"] = f.find_longest_rank(pl.max_horizontal("io_not_hidden_s", stall), "checkpoint")
    found["waiting"] = f.limit_waiting(*CUT)
    if _records_all_io(f):  # ranks also wait for a loader that computes: not for storage
        of_all_ranks = f.launched.filter(pl.col("phase").is_in(CUT))
        found["waiting"] = min(found["waiting"], float(of_all_ranks["io_all_s"].sum()))
    return found


def _records_all_io(f: Facts) -> bool:
    """Whether the trace has all I/O of the data as calls or spans: older ones lack what mapped files give."""
    data = f.config.get("data", {})
    mapped = data.get("mmap_mode") or data.get("source") == "mmap"
    return f.is_own_run and f.joined.calls > 0 and (not mapped or len(f.mapped_files) > 0)


def _make_sentence(
    f: Facts, parts: dict[str, float], storage: dict[str, float], bottleneck: str, saved: float, wall: float
) -> str:
    """The answer in a sentence.

    parts: seconds of the run by what they were spent on. storage: seconds that faster storage could save, by
    phase. bottleneck: "storage" or a key of `parts`. saved, wall: seconds, of all phases and of the run.
    """
    whole = sum(parts.values())
    share = f"{saved / wall:.0%}" if saved >= WORTH_A_LOOK * wall else f"{saved / wall:.1%}"
    amount = f"{format_seconds(saved)} of {format_seconds(wall)} ({share})"
    if bottleneck == "storage":
        most = max(storage, key=lambda name: storage[name])
        where = {"startup": "the start-up", "other": "the rest of the run"}.get(most, LABELS[most])
        text = f"I/O is the bottleneck: faster storage could save up to {amount}, most of it in {where}"
    else:
        verdict = "the bottleneck" if saved < WORTH_A_LOOK * wall else "the largest part"
        largest = _name_largest(parts, whole)
        text = f"I/O is not {verdict}: faster storage could save at most {amount}; {largest}"
    if f.joined.calls == 0:
        text += ", as far as the application's own spans show: the trace has no file calls"
    return text + "."


def _name_largest(parts: dict[str, float], whole: float) -> str:
    """The one or two parts that most of the time goes to."""
    if parts["other"] > whole / 2:
        return f"the trace does not name what {parts['other'] / whole:.0%} of the time went to"
    first, second = sorted((n for n in parts if n != "other"), key=lambda name: -parts[name])[:2]
    named = [first, second] if parts[second] >= WORTH_A_LOOK * whole else [first]
    texts = [f"{LABELS[name]} ({parts[name] / whole:.0%})" for name in named]
    cause = ": the loader's own work, not its reads" if first == "waiting" else ""
    return f"the largest part{'s are' if len(named) > 1 else ' is'} {' and '.join(texts)}{cause}"
