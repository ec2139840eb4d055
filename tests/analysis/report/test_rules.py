"""Every rule finds something in one made run, and in another nearly; docs/report.md lists all rules."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.made_traces import Made, training

from analysis.perfetto.links import LinkedRun
from analysis.report.facts import Facts, Finding
from analysis.report.findings import RULES, find_all, list_rules
from analysis.report.report import render_findings, render_rules
from analysis.tables.gather import gather_tables

ROOT = Path(__file__).parents[3]
OURS = {"data": {"batch_size": 8}, "launch": {"world_size": 1}}
KIB, MIB = 1 << 10, 1 << 20


def find_in_runs(
    run: Path, *made: Made, config: dict | None = None, losses: list[float] | None = None
) -> list[Finding]:
    for one in made:
        one.write(run)
    metrics = pl.DataFrame({"step": [60 * i + 1 for i in range(len(losses or []))], "loss": losses or []})
    return find_all(Facts(gather_tables(run), OURS if config is None else config, metrics))


def at_random(n: int, size: int) -> Callable[[int], int]:
    places = random.Random(0).sample(range(n), n)
    return lambda i: places[i] * size


def make_waiting(**more: Any) -> Made:
    """A training whose I/O is not hidden: 3 of 12 ms of a step wait."""
    return training(**{"wait": 3_000, **more})


def last_step(dur: int) -> Made:
    made = training()
    end = 10_000 + 40 * 12_010
    made.span("train", "step", end, dur, epoch=0, step=40, batch=40)
    return made


def make_saves(*took: int) -> Made:
    """Checkpoints whose copies take 1 ms, and whose last bytes are written so many us later."""
    made = training()
    for i, dur in enumerate(took):
        made.span("checkpoint", "save", 20_000 + i * 100_000, 1_000)
        made.span("checkpoint", "write", 21_000 + i * 100_000, dur - 1_000, 7, file="rank00000.safetensors")
    return made


def make_load(dur: int) -> Made:
    made = training()
    made.span("checkpoint", "load", 300_000, dur)
    return made


def make_fragments(n: int) -> Made:
    made = training()
    made.span("checkpoint", "save", 300_000, 150_000)
    return made.requests("write", "/run/checkpoints/a", n, 4 * KIB, begin=300_000, every=100)


def make_opens(n: int, dur: int) -> Made:
    made = make_waiting()
    for i in range(n):
        made.posix("open64", 10_100 + i * 400, dur, f"/data/{i}", 3)
    return made


def make_both_ranks(make: Callable[[int], Made]) -> list[Made]:
    return [make(0), make(1)]


def make_uneven(rank: int, **other: Any) -> Made:
    """Rank 1 differs from rank 0, which shares its file."""
    return training(rank, 2, **{"wait": 3_000, **(other if rank else {})})


def now_and_then(rank: int, other: int) -> Made:
    """Every third step waits, 6 ms on rank 0 and `other` on rank 1; half of the steps do not tell."""
    late = (6_000, other)[rank]
    return training(rank, 2, wait=lambda step: 100 if step % 3 else late)


def make_mapped(read_us: int) -> Made:
    made = training(wait=6_000, read_us=read_us, calls=False)
    made.posix("open64", 9_900, 5, "/data/day_0_sparse.npy")
    return made


def slow_ones(dur: int) -> Made:
    made = training(wait=5_000)
    for i in range(2000):
        taken = dur if i % 110 == 0 else 100
        made.posix("pread64", 10_100 + i * 200, taken, "/x", 3, ret=MIB, offset=i * MIB)
    return made


def one_size_each(read_size: int) -> Made:
    made = make_waiting(reads=0).requests("pwrite64", "/out", 160, 4 * MIB)
    return made.requests("pread64", "/in", 1200, read_size, 100)


def make_shared_writes(rank: int, n: int) -> Made:
    made = training(rank, 2, wait=3_000)
    return made.requests("pwrite64", "/shared", n, 4 * KIB, place=lambda i: (2 * i + rank) * 8 * KIB)


def make_core_waits(us: int) -> Made:
    """The kernel says that the main thread had no core for so long while it trained."""
    made = training()
    for at, value in ((10_000, 5_000), (490_000, 5_000 + us)):
        made.span("counter", "proc/core_wait_us", at, 0, value=value)
    return made


def make_strides(size: int) -> Made:
    """Requests that skip into the middle of blocks."""
    return make_waiting().requests("pread64", "/data/x", 1100, size, 150, place=lambda i: 128 + i * 52_000)


# rule -> what it finds something in, and what it nearly does: a trace, or one per rank
PLANTED: dict[str, tuple[Made | list[Made], Made | list[Made]]] = {
    "no_learning": (training(), training()),
    "waiting": (training(wait=700), training(wait=500)),
    "persistent_pressure": (make_waiting(), training(wait=lambda step: 3_000 if step < 20 else 0)),
    "busy_cores": (make_core_waits(130_000), make_core_waits(70_000)),
    "waiting_for_ranks": (
        make_both_ranks(lambda rank: training(rank, 2, compute=(5_000, 11_500)[rank])),
        make_both_ranks(lambda rank: training(rank, 2, compute=(5_000, 6_000)[rank])),
    ),
    "transfer": (
        make_both_ranks(lambda r: training(r, 2)),
        make_both_ranks(lambda r: training(r, 2, compute=11_500)),
    ),
    "slow_rank": (
        make_both_ranks(lambda rank: training(rank, 2, compute=(5_000, 10_000)[rank])),
        make_both_ranks(lambda rank: training(rank, 2, compute=(5_000, 6_000)[rank])),
    ),
    "io_imbalance": (
        make_both_ranks(lambda r: now_and_then(r, 3_000)),
        make_both_ranks(lambda r: now_and_then(r, 4_500)),
    ),
    "startup": (training(steps=15), training(steps=20)),
    "late_steps": (last_step(300_000), last_step(35_000)),
    "checkpoint": (make_load(11_000), make_load(9_000)),
    "checkpoint_tail": (make_saves(6_000, 6_000, 6_000, 15_000), make_saves(6_000, 6_000, 6_000, 11_000)),
    "checkpoint_fragments": (make_fragments(1000), make_fragments(999)),
    "small_reads": (
        make_waiting().requests("pread64", "/data/x", 1000, 4 * KIB),
        make_waiting().requests("pread64", "/data/x", 999, 4 * KIB),
    ),
    "small_writes": (
        make_waiting().requests("pwrite64", "/out", 1000, 4 * KIB),
        make_waiting().requests("pwrite64", "/out", 1000, 64 * KIB),
    ),
    "random_access": (
        make_waiting().requests("pread64", "/data/x", 1100, 80_000, place=at_random(1100, 80_000)),
        make_waiting().requests("pread64", "/data/x", 990, 80_000, place=at_random(990, 80_000)),
    ),
    "random_writes": (
        make_waiting().requests("pwrite64", "/out", 1100, 80_000, place=at_random(1100, 80_000)),
        make_waiting().requests("pwrite64", "/out", 990, 80_000, place=at_random(990, 80_000)),
    ),
    "misaligned": (make_strides(4 * KIB), make_strides(26_000)),
    "operation_imbalance": (one_size_each(70_000), one_size_each(600_000)),
    "stdio": (
        make_waiting().requests("fread", "/data/s", 20, cat="STDIO"),
        make_waiting().requests("fread", "/data/s", 16, cat="STDIO"),
    ),
    "slow_tail": (slow_ones(9_000), slow_ones(900)),
    "shared_requests": (
        make_both_ranks(lambda r: make_shared_writes(r, 600)),
        make_both_ranks(lambda r: make_shared_writes(r, 400)),
    ),
    "stragglers": (
        make_both_ranks(lambda r: make_uneven(r, read_us=400)),
        make_both_ranks(lambda r: make_uneven(r, read_us=230)),
    ),
    "file_imbalance": (
        make_both_ranks(lambda r: make_uneven(r, reads=8)),
        make_both_ranks(lambda r: make_uneven(r, reads=5)),
    ),
    "redundant_reads": (
        training().requests("pread64", "/data/again", 40, place=lambda i: i % 10 * MIB),
        training().requests("pread64", "/data/again", 15, place=lambda i: i % 10 * MIB),
    ),
    "redundant_writes": (
        training().requests("pwrite64", "/out", 40, place=lambda i: i % 10 * MIB),
        training().requests("pwrite64", "/out", 15, place=lambda i: i % 10 * MIB),
    ),
    "amplified": (
        training(reads=2).requests("pread64", "/data/day_0_sparse.npy", 20),
        training(reads=2).requests("pread64", "/data/day_0_sparse.npy", 15),
    ),
    "mapped": (make_mapped(600), make_mapped(500)),
    "metadata": (make_opens(50, 300), make_opens(45, 300)),
    "metadata_time": (make_opens(31, 1_000_000), make_opens(30, 1_000_000)),
    "hints": (
        make_waiting().requests("posix_fadvise64", "/data/x", 200, dur=100, ret=0),
        make_waiting().requests("posix_fadvise64", "/data/x", 30, dur=100, ret=0),
    ),
    "sync": (
        make_waiting().requests("fsync", "/out", 1, dur=20_000, ret=0),
        make_waiting().requests("fsync", "/out", 1, dur=9_000, ret=0),
    ),
    "failed": (
        training().requests("write", "/out", 1, ret=-1),
        training().requests("write", "/out", 1, ret=0),
    ),
}
LOSSES = {"no_learning": ([0.7, 0.8, 0.9], [0.7, 0.8, 0.6])}


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_planted_problem_is_found_and_one_that_nearly_is_one_is_not(tmp_path: Path, rule: str) -> None:
    results = []
    for number, planted in enumerate(PLANTED[rule]):
        made = planted if isinstance(planted, list) else [planted]
        losses = LOSSES[rule][number] if rule in LOSSES else None
        results.append({f.rule: f for f in find_in_runs(tmp_path / str(number), *made, losses=losses)})
    assert rule in results[0] and rule not in results[1]
    finding = results[0][rule]
    assert finding.text.endswith(".") and finding.remedy.endswith(".") and "None" not in finding.text
    assert finding.severity in ("high", "medium", "low")
    wall = float(gather_tables(tmp_path / "0")["time"]["wall_us"].sum()) / 1e6
    assert 0 <= finding.seconds <= wall
    if rule != "no_learning":  # of the whole run; the others show a slice
        assert finding.evidence["dur_us"] >= 0 and "127.0.0.1" in render_findings(
            [finding], LinkedRun(1, "run")
        )


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    lines = (ROOT / "docs" / "report.md").read_text().splitlines()
    begin = lines.index("| rule | condition | also in |") + 2
    rows = [f"| `{rule.name}` | {rule.condition} | {rule.others} |" for rule in RULES]
    assert lines[begin : begin + len(rows)] == rows and not lines[begin + len(rows)].startswith("|")
    assert set(PLANTED) == {rule.name for rule in RULES}


def test_every_rule_is_listed_whether_it_found_something_or_not(tmp_path: Path) -> None:
    found = find_in_runs(tmp_path, training(wait=700))
    rules = list_rules(found)
    assert [each["rule"] for each in rules] == [rule.name for rule in RULES]
    assert {each["rule"] for each in rules if each["found"]} == {finding.rule for finding in found}
    page = render_rules(found)
    assert page.startswith("<details>") and all(rule.name in page for rule in RULES)


def test_hints_are_no_metadata(tmp_path: Path) -> None:
    """The rows of tables in files are announced to the kernel one by one; that is not an opening of files."""
    made = make_waiting().requests("posix_fadvise64", "/store/t_0.rows", 2000, 548, 100, ret=0)
    found = {f.rule: f for f in find_in_runs(tmp_path, made)}
    assert "metadata" not in found and "--cache_memory_budget_mb" in found["hints"].remedy


def test_a_file_of_a_table_is_told_once(tmp_path: Path) -> None:
    """Small rows at random, read and written: no advice about larger batches or larger files."""
    made = make_waiting(wait=0)
    for step in range(40):  # for rows of tables, inside of the forward pass
        made.span("ssd", "wait", 10_500 + step * 12_010, 3_000)
    for name in ("pread64", "pwrite64"):
        made.requests(name, "/store/t_0.rows", 2000, 548, 100, place=at_random(2000, 548))
    found = {f.rule: f for f in find_in_runs(tmp_path, made)}
    assert {"random_access", "random_writes"} <= set(found)
    assert not {"small_reads", "small_writes", "misaligned", "operation_imbalance"} & set(found)
    for rule in ("random_access", "random_writes", "waiting", "persistent_pressure"):
        assert "--cache_memory_budget_mb" in found[rule].remedy and "larger" not in found[rule].remedy


def test_waiting_and_transfer_of_a_planted_collective(tmp_path: Path) -> None:
    """Rank 1 comes 6 ms later each time: rank 0 waits so long, and both then need 0.9 ms."""
    made = make_both_ranks(lambda rank: training(rank, 2, compute=(5_000, 11_000)[rank]))
    finding = {f.rule: f for f in find_in_runs(tmp_path, *made)}["waiting_for_ranks"]
    assert finding.seconds == pytest.approx(40 * 0.006 / 2)
    assert finding.evidence["transfer_s"] == pytest.approx(40 * 0.0009)
    assert (
        finding.evidence["rank"] == 1
        and finding.evidence["share"] == 1
        and finding.evidence["clock_error_us"] == 0
    )


def test_a_rank_that_waits_though_its_reads_are_as_quick_is_not_blamed(tmp_path: Path) -> None:
    """The others' queues fill up while they wait for it; what is waited costs all ranks, at every step."""
    found = {}
    for read_us in (200, 900):  # of rank 1, which waits
        made = [training(0, 2, wait=100), training(1, 2, wait=6_000, read_us=read_us)]
        found[read_us] = {f.rule: f for f in find_in_runs(tmp_path / str(read_us), *made)}
    assert "no longer than the others'" in found[200]["slow_rank"].remedy
    assert "that host's storage" in found[900]["slow_rank"].remedy
    for each in found.values():
        assert "waits for its data" in each["waiting_for_ranks"].remedy
        assert each["waiting"].seconds == pytest.approx(40 * 0.006)
        assert each["persistent_pressure"].seconds == pytest.approx(40 * 0.006)
        assert "waits for data all the time: in 20 of its 20 ranges" in each["persistent_pressure"].text
    mostly = find_in_runs(tmp_path / "mostly", training(wait=lambda step: 3_000 if step < 30 else 0))
    text = next(finding.text for finding in mostly if finding.rule == "persistent_pressure")
    assert "waits for data most of the time: in 15 of its 20 ranges" in text


def test_waits_within_the_error_of_the_clocks_are_neither(tmp_path: Path) -> None:
    """Two hosts; the ranks of one leave a barrier 8 ms apart, so nobody knows who came 6 ms late."""
    ranks = [
        training(rank, 3, compute=(5_000, 11_000, 5_000)[rank], host=("n0", "n1", "n0")[rank])
        for rank in range(3)
    ]
    for rank, made in enumerate(ranks):
        made.span("clock", "barrier", (0, 4_000, 8_000)[rank], 0, when="start")
    found = {f.rule: f for f in find_in_runs(tmp_path, *ranks)}
    assert "waiting_for_ranks" not in found
    assert found["transfer"].evidence["clock_error_us"] >= 8_000 and "may be either" in found["transfer"].text


@pytest.mark.parametrize(
    "config", [{}, {"data": {"train_batch_size": 8, "prefetch_batches": 4}, "launch": {}}]
)
def test_no_remedy_names_an_option_that_the_program_does_not_have(tmp_path: Path, config: dict) -> None:
    known = {"--prefetch_batches", "--train_batch_size"} if config else set()
    known |= (
        {"--checkpoint_every_steps", "--checkpoint_dir", "--stop_before_walltime", "--sharding_file"}
        if config
        else set()
    )
    chosen = random.Random(0).sample(sorted(set(PLANTED) - {"no_learning"}), 12)
    for rule in {*chosen, "waiting", "small_reads", "transfer", "redundant_reads", "random_access"}:
        planted = PLANTED[rule][0]
        for finding in find_in_runs(
            tmp_path / rule, *(planted if isinstance(planted, list) else [planted]), config=config
        ):
            named = {
                word.strip(".,;()") for word in finding.remedy.split() if word.strip("(").startswith("--")
            }
            assert named <= known, finding


# --- what a mean over all calls of a file, or of a rank, would hide or invent


def find_by_rule(run: Path, *made: Made) -> dict[str, Finding]:
    return {finding.rule: finding for finding in find_in_runs(run, *made)}


def test_calls_of_one_rank_cost_the_run_what_they_cost_that_rank(tmp_path: Path) -> None:
    """The other three have nothing of it, and wait: no fourth of it is lost."""
    made = [training(rank, 4, wait=3_000) for rank in range(4)]
    made[2].requests("pread64", "/data/x", 1000, 4 * KIB, dur=100)
    found = find_by_rule(tmp_path, *made)["small_reads"]
    assert (
        found.seconds == pytest.approx(1000 * 100e-6 * 0.999) and found.evidence["seconds_all_ranks"] == 0.1
    )
    made = [training(rank, 4, wait=3_000) for rank in range(4)]
    made[2].requests("pread64", "/data/x", 1000, 4 * KIB, dur=4)  # less than 1 % of the run
    assert "small_reads" not in find_by_rule(tmp_path / "nearly", *made)


def test_large_reads_are_no_slow_ones(tmp_path: Path) -> None:
    """Ten large reads take most of the time, for their bytes; late are two of the small ones."""

    def make(late: int) -> Made:
        made = training(wait=5_000, reads=0).requests("pread64", "/x", 1200, 4 * KIB, 20)
        made.requests(
            "pread64",
            "/x",
            2,
            4 * KIB,
            late,
            place=lambda i: (1200 + i) * 4 * KIB,
            begin=300_000,
            every=80_000,
        )
        return made.requests("pread64", "/y", 10, 8 * MIB, 4_000, begin=20_000, every=9_000)

    found = find_by_rule(tmp_path / "late", make(60_000))["slow_tail"]
    assert found.evidence["reads"] == 2 and found.evidence["usual_us"] == 20
    share = 120_000 / (120_000 + 1200 * 20 + 10 * 4_000)
    assert found.evidence["share"] == pytest.approx(share, rel=0.01)
    assert found.seconds == pytest.approx(2 * (60_000 - 20) / 1e6, rel=0.01)
    assert "2 of 1,212 reads take 65% of the reading time: 60 ms each on average" in found.text
    assert "slow_tail" not in find_by_rule(tmp_path / "large", make(20))


def test_jumps_beside_large_reads_of_the_same_file(tmp_path: Path) -> None:
    """Its mean read is larger than 1 MiB; the jumps are small, and theirs is the time to be won."""

    def make(jump: int, other: int) -> Made:
        made = make_waiting(reads=0).requests("pread64", "/x", 1100, jump, 60, place=at_random(1100, 4 * MIB))
        return made.requests(
            "pread64", "/x", 1000, other, 100, begin=240_000, place=lambda i: (5000 + i) * other
        )

    found = find_by_rule(tmp_path / "small", make(4 * KIB, 4 * MIB))["random_access"]
    assert found.evidence["bytes"] == found.evidence["random"] * 4 * KIB and found.evidence["random"] > 1090
    assert found.seconds == pytest.approx(found.evidence["random"] * 60e-6)
    assert (
        "4.1 KB at a time" in found.text
        and f"{found.evidence['random'] / 2100:.0%} of the reads" in found.text
    )
    # the mean is below 1 MiB; those that jump are as large
    assert "random_access" not in find_by_rule(tmp_path / "large", make(MIB, 4 * KIB))


def test_pieces_of_a_checkpoint_beside_its_large_writes(tmp_path: Path) -> None:
    def make(dur: int) -> Made:
        made = training()
        made.span("checkpoint", "save", 300_000, 150_000)
        made.requests("write", "/run/checkpoints/a", 20, 200 * MIB, 5_000, begin=300_000, every=6_000)
        return made.requests("write", "/run/checkpoints/b", 1000, 4 * KIB, dur, begin=300_000, every=140)

    found = find_by_rule(tmp_path / "pieces", make(100))["checkpoint_fragments"]
    assert found.seconds == pytest.approx(0.1 * 0.999) and found.evidence["bytes"] == 1000 * 4 * KIB
    assert "1,000 pieces of less than 1.05 MB, 4.1 KB on average, to 1 file" in found.text
    assert "checkpoint_fragments" not in find_by_rule(tmp_path / "nearly", make(20))  # 17 % of the time


def test_one_large_write_makes_no_read_too_small(tmp_path: Path) -> None:
    """Half of the writes are smaller than the reads; one moves all their bytes."""

    def make(large: int) -> Made:
        made = make_waiting(reads=0).requests("pread64", "/in", 1200, 70_000, 100)
        made.requests("pread64", "/in2", 10, 8 * MIB, 900, begin=250_000, every=2_000)
        made.requests("pwrite64", "/out", 20, 32 * KIB)
        return made.requests("pwrite64", "/out2", large, 64 * MIB)

    found = find_by_rule(tmp_path / "many", make(25))["operation_imbalance"]
    assert "half of them move less than 131 KB, half of the writes 67.1 MB or more" in found.text
    small = 1200 * 100e-6 + 10 * 900e-6  # all reads are smaller than those writes
    assert found.seconds == pytest.approx(min(small, 40 * 0.003), rel=0.01)
    assert "operation_imbalance" not in find_by_rule(tmp_path / "one", make(15))


def test_blocks_touched_in_vain_are_counted_call_by_call(tmp_path: Path) -> None:
    """4 KiB at a third of a block touch two; 2 KiB there touch one, and none of those in vain."""

    def make(size: int) -> Made:
        made = make_waiting(reads=0)
        return made.requests("pread64", "/x", 1200, size, 60, place=lambda i: 1024 + i * 68 * KIB)

    found = find_by_rule(tmp_path / "two", make(4 * KIB))["misaligned"]
    number = found.evidence["requests"]
    assert found.evidence["blocks"] == 2 * number and found.evidence["needless"] == number >= 1199
    assert found.seconds == pytest.approx(number * 30e-6) and "50% of them only because" in found.text
    assert "misaligned" not in find_by_rule(tmp_path / "one", make(2 * KIB))


def test_a_rank_is_no_straggler_for_one_call(tmp_path: Path) -> None:
    made = make_both_ranks(lambda rank: training(rank, 2, wait=3_000))
    made[1].posix("pread64", 100_000, 40_000, "/data/day_0_sparse.npy", 5, ret=MIB, offset=0)
    found = find_by_rule(tmp_path, *made)["stragglers"]
    assert "One call makes the difference, of 40 ms." in found.text and "that call" in found.remedy
    assert found.evidence["dur_us"] == 40_000


def test_what_is_waited_for_is_said_of_the_reads_that_take_the_time(tmp_path: Path) -> None:
    """A few large reads lift the mean above 1 MiB; nearly all the time is in small ones."""
    made = training(wait=6_000, reads=30, read_size=16 * KIB, read_us=150)
    made.requests(
        "pread64", "/data/day_0_sparse.npy", 40, 128 * MIB, 500, place=lambda i: i * 128 * MIB, every=9_000
    )
    found = find_by_rule(tmp_path, made)["waiting"]
    assert (
        "90% of the time in its reads goes into those of less than 1.05 MB, 16.4 KB on average" in found.text
    )
    assert found.remedy == "Raise --read_chunk_mb."
    # the same reads, but the large ones take the time
    made = training(wait=6_000, reads=30, read_size=16 * KIB, read_us=5)
    made.requests(
        "pread64", "/data/day_0_sparse.npy", 40, 128 * MIB, 5_000, place=lambda i: i * 128 * MIB, every=9_000
    )
    found = find_by_rule(tmp_path / "large", made)["waiting"]
    assert "a read moves" in found.text and "--read_chunk_mb" not in found.remedy
