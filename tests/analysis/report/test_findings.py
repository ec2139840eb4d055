"""Runs with planted problems: the findings name them and the time to be saved, and nothing else."""

import math
from pathlib import Path

import polars as pl
import pytest
from support.made_traces import Made, training

from analysis.report.facts import Facts, Finding
from analysis.report.findings import find_all
from analysis.tables import answers
from analysis.tables.gather import gather_tables

OURS = {"data": {"batch_size": 8}, "launch": {"world_size": 1}}


def find_by_rule(run: Path, *made: Made, config: dict | None = None) -> dict[str, Finding]:
    for one in made:
        one.write(run)
    return {f.rule: f for f in find_all(Facts(gather_tables(run), OURS if config is None else config))}


def leave_out_startup(found: dict[str, Finding]) -> set[str]:
    """Made runs are so short that start-up is always a finding."""
    return set(found) - {"startup"}


def test_healthy(tmp_path: Path) -> None:
    assert (
        leave_out_startup(find_by_rule(tmp_path, *(training(rank, 2, compute=11_500) for rank in range(2))))
        == set()
    )


def test_waiting_for_data(tmp_path: Path) -> None:
    made = training(wait=6_000, compute=5_000, read_size=4 << 20)
    finding = find_by_rule(tmp_path, made)["waiting"]
    assert finding.seconds == pytest.approx(40 * 0.006)
    assert finding.text.startswith(
        "50% of the training's time is waiting for data, most of all for /data/day_0_sparse"
    )
    assert "--prefetch_batches" in finding.remedy
    assert finding.evidence["mean_read_bytes"] == 4 << 20


def test_waiting_names_data_and_not_what_python_imports(tmp_path: Path) -> None:
    made = training(wait=6_000, compute=5_000, read_size=4 << 20)
    for step in range(40):
        made.posix("read", 10_500 + step * 12_010, 9_000, "/env/lib/site-packages/late.pyc", ret=100)
    finding = find_by_rule(tmp_path / "ours", made)["waiting"]
    assert "most of all for /data/day_0_sparse.npy" in finding.text
    assert finding.evidence["mean_read_bytes"] == 4 << 20 and "--read_chunk_mb" not in finding.remedy

    made = Made(None)  # of another program: nothing names its data
    for i in range(40):
        made.posix("read", i * 2_000, 1_000, "/env/lib/python3.11/late.pyc", ret=100)
        made.posix("read", i * 2_000 + 1_000, 500, "/data/images.tar", ret=4 << 20)
    assert (
        "most of all for /data/images.tar"
        in find_by_rule(tmp_path / "other", made, config={})["waiting"].text
    )


def test_tiny_reads_are_named_with_their_file(tmp_path: Path) -> None:
    made = training(wait=9_000, compute=2_000, reads=40, read_size=4096, read_us=200)
    result = find_by_rule(tmp_path, made)
    finding = result["small_reads"]
    assert (
        "1,600 reads are smaller than 65.5 KB: 4.1 KB on average, most of them of /data/day_0_sparse.npy"
        in finding.text
    )
    assert finding.remedy == "Raise --read_chunk_mb." == result["waiting"].remedy
    assert finding.seconds == pytest.approx(1600 * 200e-6 * (1 - 1 / 1600))
    assert finding.evidence["bytes"] == 1600 * 4096


def test_remedy_for_tiny_reads_is_one_that_can_help(tmp_path: Path) -> None:
    """The option is large already: what ends a read is the batch or the file."""
    config = {"data": {"read_chunk_mb": 8.0}, "launch": {}}
    made = training(wait=9_000, compute=2_000, reads=40, read_size=4096, read_us=200)
    result = find_by_rule(tmp_path, made, config=config)
    assert "larger batches" in result["small_reads"].remedy and "larger batches" in result["waiting"].remedy
    assert "larger pieces" in find_by_rule(tmp_path, config={})["small_reads"].remedy


def test_hidden_tiny_reads_win_nothing(tmp_path: Path) -> None:
    """The same reads, but the main thread computes meanwhile: there is no time to be saved."""
    made = training(wait=0, compute=11_000, reads=40, read_size=4096, read_us=200)
    assert find_by_rule(tmp_path, made)["small_reads"].seconds == 0.0


def test_slow_rank(tmp_path: Path) -> None:
    made = [training(rank, 4, compute=10_000 if rank == 2 else 5_000, host=f"n{rank}") for rank in range(4)]
    finding = find_by_rule(tmp_path, *made)["slow_rank"]
    assert finding.text.startswith(
        "Rank 2 on n2 needs 10.1 ms for its own part of a step (median), the others 5"
    )
    assert finding.evidence["mostly"] == "compute"
    assert finding.seconds == pytest.approx(40 * (0.0101 - (0.0101 + 3 * 0.0051) / 4))


def test_slow_rank_on_the_only_host(tmp_path: Path) -> None:
    made = [training(rank, 2, compute=10_000 if rank else 5_000) for rank in range(2)]
    assert "All ranks share that host's cores" in find_by_rule(tmp_path, *made)["slow_rank"].remedy


def test_slow_rank_that_waits_for_its_storage(tmp_path: Path) -> None:
    made = [training(0, 2, wait=5_000, read_us=900), training(1, 2)]
    finding = find_by_rule(tmp_path, *made)["slow_rank"]
    assert finding.evidence["rank"] == 0 and finding.evidence["mostly"] == "wait"
    assert "storage" in finding.remedy


def test_cold_mapped_file(tmp_path: Path) -> None:
    made = training(wait=6_000, read_size=100_000, read_us=1_400, calls=False)
    made.posix("open64", 9_900, 5, "/data/day_0_sparse.npy")
    finding = find_by_rule(tmp_path, made)["mapped"]
    assert "16 MB are read without any call, at 71 MB/s" in finding.text
    assert "/data/day_0_sparse.npy" in finding.text and "--mmap_mode" in finding.remedy
    other = find_by_rule(tmp_path, config={})["mapped"]
    assert "--" not in other.remedy  # not our trainer: its options mean nothing


def test_mapped_source_of_our_own(tmp_path: Path) -> None:
    """Its copies count though calls have read the files' headers; they are not requests, small or large."""
    made = training(wait=6_000, reads=0)
    for i in range(1200):
        at = 10_100 + i * 400
        made.posix("pread64", at, 1, "/data/day_0_sparse.npy", 7, ret=128, offset=0)
        made.span(
            "data", "read", at, 300, 7, file="/data/day_0_sparse.npy", bytes=20_000, offset=128, mapped=1
        )
    made.write(tmp_path)
    joined = gather_tables(tmp_path)
    finding = {f.rule: f for f in find_all(Facts(joined, {"data": {"mmap_mode": True}, "launch": {}}))}
    assert "24 MB are read without any call, at 67 MB/s" in finding["mapped"].text
    assert "it is not known what came from a device" in finding["mapped"].text
    assert "--mmap_mode" in finding["mapped"].remedy
    assert "a copy from the mapped file moves 20 KB on average" in finding["waiting"].text
    assert "--mmap_mode" in finding["waiting"].remedy
    assert not set(finding) & {"small_reads", "random_access", "amplified"}
    assert not len(answers.compare_declared(joined))
    volume = answers.sum_operations(joined).filter(pl.col("op") == "read").sort("layer")
    assert volume.select("layer", "count", "bytes").rows() == [
        ("calls", 1200, 153_600), ("mapped", 1200, 24_000_000),
    ]  # fmt: skip


def test_warm_mapped_file_is_fine(tmp_path: Path) -> None:
    made = training(wait=0, read_size=1 << 20, read_us=100, calls=False)
    made.posix("open64", 9_900, 5, "/data/day_0_sparse.npy")
    assert leave_out_startup(find_by_rule(tmp_path, made)) == set()


def test_checkpoint_stall(tmp_path: Path) -> None:
    made = training()
    made.span("checkpoint", "save", 300_000, 100_000, step=25)
    made.span("checkpoint", "write", 310_000, 80_000, bytes=400_000_000)
    finding = find_by_rule(tmp_path, made)["checkpoint"]
    assert finding.seconds == pytest.approx(0.1)
    assert "400 MB written at 5000 MB/s" in finding.text


def test_metadata(tmp_path: Path) -> None:
    made = training(wait=8_000)
    for i in range(900):
        made.posix("open64", 10_100 + i * 400, 300, f"/data/{i}")
    finding = find_by_rule(tmp_path, made)["metadata"]
    assert "goes into calls that move no byte: 900 opens 270 ms" in finding.text
    assert finding.seconds == pytest.approx(0.27)


def test_random_access(tmp_path: Path) -> None:
    made = training(wait=3_000)
    for i in range(2000):
        made.posix(
            "pread64",
            10_100 + i * 200,
            50,
            "/data/shuffled",
            3,
            ret=80_000,
            offset=(i * 7919) % 2000 * 80_000,
        )
    finding = find_by_rule(tmp_path, made)["random_access"]
    assert finding.evidence["file"] == "/data/shuffled" and finding.evidence["random"] > 1900
    assert "80 KB at a time on average" in finding.text


def test_ranks_that_take_turns_read_in_strides(tmp_path: Path) -> None:
    """Each reads its rows of each batch, seeking over the other's: forward, always as far. Two files."""
    ranks = []
    for rank in range(2):
        made = training(rank, 2, wait=6_000, reads=0)
        for i in range(1500):
            place, file = ((i % 750) * 2 + rank) * 26_000, f"/data/day_{i // 750}_sparse.npy"
            made.posix("lseek64", 10_000 + i * 250, 1, file, 7, ret=place, offset=place)
            made.posix("read", 10_002 + i * 250, 150, file, 7, ret=26_000, count=26_000)
        ranks.append(made)
    result = find_by_rule(tmp_path, *ranks, config={"data": {"read_chunk_mb": 0.03}, "launch": {}})
    assert "random_access" not in result
    reads = answers.sum_volume(gather_tables(tmp_path), "rank").filter(pl.col("op") == "read")
    assert reads.select("sequential", "strided", "random").rows() == [(2, 1498, 0)] * 2
    for rule in ("small_reads", "waiting"):
        assert "--batch_size" in result[rule].remedy and "--read_chunk_mb" not in result[rule].remedy


def test_random_rows_of_tables_in_files(tmp_path: Path) -> None:
    made = training(wait=3_000)
    for i in range(2000):
        place = (i * 7919) % 2000 * 256
        made.posix("pread64", 10_100 + i * 200, 50, "/store/t_0.rows", 3, ret=256, offset=place)
    assert "--cache_memory_budget_mb" in find_by_rule(tmp_path, made)["random_access"].remedy


def test_late_steps(tmp_path: Path) -> None:
    made = training(steps=60)
    end = max(line["ts"] + line["dur"] for line in made.lines if line["ph"] == 1) - min(
        line["ts"] for line in made.lines if line["ph"] == 1
    )
    made.span("train", "step", end, 300_000, epoch=0, step=60, batch=60)
    made.span("data", "wait", end, 280_000, epoch=0, step=60, batch=60)
    finding = find_by_rule(tmp_path, made)["late_steps"]
    assert finding.evidence.items() >= {"steps": 1, "mostly": "wait", "longest": 60, "rank": 0}.items()
    assert finding.evidence["dur_us"] == 300_000  # the slice that its link shows
    assert finding.seconds == pytest.approx(0.288, rel=0.01)


def test_slow_tail(tmp_path: Path) -> None:
    made = training(wait=5_000)
    for i in range(2000):
        slow = i % 110 == 0
        made.posix("pread64", 10_100 + i * 200, 9_000 if slow else 100, "/x", 3, ret=1 << 20, offset=i << 20)
    finding = find_by_rule(tmp_path, made)["slow_tail"]
    assert finding.evidence["usual_us"] == 100 and finding.evidence["reads"] == 19
    assert "8.99 ms each on average, where half of all reads of their size are done in 100 us" in finding.text
    assert finding.evidence["share"] == pytest.approx(19 * 9 / (19 * 9 + 1981 * 0.1 + 160 * 0.2), rel=0.02)


def test_read_amplification(tmp_path: Path) -> None:
    made = training(wait=3_000, reads=2)
    for i in range(100):
        made.posix("pread64", 10_100 + i * 300, 100, "/data/day_0_sparse.npy", 7, ret=1 << 20, offset=i << 20)
    finding = find_by_rule(tmp_path, made)["amplified"]
    assert "/data/day_0_sparse.npy is read 2.2 times over" in finding.text
    assert finding.evidence["bytes"] == 100 << 20


def test_failed_calls(tmp_path: Path) -> None:
    made = training()
    made.posix("write", 20_000, 5, "/full/disk", ret=-1, count=10)
    finding = find_by_rule(tmp_path, made)["failed"]
    assert finding.seconds == 0 and finding.severity == "high"
    assert finding.text == "A read or write failed: write of /full/disk."


def test_order_and_start_up(tmp_path: Path) -> None:
    made = training(wait=6_000, steps=10)
    result = find_by_rule(tmp_path, made)
    assert list(result) == sorted(result, key=lambda rule: -result[rule].seconds)
    startup = result["startup"]
    assert startup.evidence["part"] == "first step" and startup.seconds == pytest.approx(0.012)
    assert startup.evidence["first_step_s"] == pytest.approx(0.022)


def test_no_finding_promises_more_than_the_wall(tmp_path: Path) -> None:
    made = training(wait=9_000, compute=2_000, reads=40, read_size=4096, read_us=200)
    result = find_by_rule(tmp_path, made)
    wall = float(gather_tables(tmp_path)["time"]["wall_us"].sum()) / 1e6
    assert all(0 <= f.seconds <= wall for f in result.values())
    assert not pl.Series([f.seconds for f in result.values()]).is_nan().any()


def metrics(losses: list[float], share: float | None = 0.5) -> pl.DataFrame:
    """Reports of step 1 and every 20 steps, as `records.read_metrics` reads them."""
    steps = [1, *range(20, 20 * len(losses), 20)]
    return pl.DataFrame({"step": steps, "loss": losses, "click_share": [share] * len(losses)})


@pytest.mark.parametrize(
    ("losses", "share", "says"),
    [
        ([0.7, 0.6, math.nan], 0.5, "The loss became nan at step 40"),
        ([0.697, 0.69, *[1.7] * 9], 0.5, "above its first value, 0.6970, for the last 180 steps"),
        (
            [0.7, *[0.6931] * 20],
            0.5,
            "the loss is 0.6931, and the same prediction for every row would have 0.6931",
        ),
        ([0.7, *[0.1350] * 20], 0.03, "no more than the share of clicks"),
        ([0.7, *[0.6] * 20], 0.5, None),
        ([0.7, 0.9, 0.8, *[0.6] * 20], 0.5, None),
        ([0.7, *[0.6931] * 20], None, None),  # labels are not clicks
        ([0.4, 0.41], 0.5, None),
    ],
)
def test_a_training_that_learned_nothing(
    tmp_path: Path, losses: list[float], share: float | None, says: str | None
) -> None:
    training().write(tmp_path)
    facts = Facts(gather_tables(tmp_path), OURS, metrics(losses, share))
    findings = {finding.rule: finding for finding in find_all(facts)}
    if says is None:
        assert "no_learning" not in findings
    else:
        assert says in findings["no_learning"].text and "--defaults dataset" in findings["no_learning"].remedy
        assert find_all(facts)[0].rule == "no_learning"  # all of the training's time was for nothing
