"""The report's numbers against plain Python over the raw lines, us by us, and SQL in Perfetto's engine."""

import gzip
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support import trace_processor, traced
from support.made_traces import BEGIN, Made, training

from analysis.perfetto import convert
from analysis.report.answer import find_answer
from analysis.report.facts import Facts
from analysis.report.findings import find_all
from analysis.report.run import open_run
from analysis.report.summary import list_headlines
from analysis.tables import answers, progress
from analysis.tables.gather import JoinedTables, gather_tables
from analysis.trace.classify import CALLS, KINDS, find_kind, find_operation


def read_all_events(run: Path) -> list[dict[str, Any]]:
    """Every event by Python's own gzip and json, file hashes resolved."""
    found = []
    for path in sorted((run / "trace").glob("*.pfw.gz")):
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        names = {line["args"]["value"]: line["args"]["name"] for line in lines if line["name"] == "FH"}
        rank = next((int(x["args"]["value"]) for x in lines if x["args"].get("name") == "rank"), 0)
        for line in lines:
            if line["ph"] == 1 and line["cat"] != "dftracer":
                args = line["args"]
                found.append(
                    line | {"rank": rank, "file": names.get(args.get("fhash", ""), args.get("file"))}
                )
    return found


def make_random_training(seed: int) -> Made:
    """Random spans and calls on two threads, epochs, evaluations and checkpoints in between."""
    rng = random.Random(seed)
    made = Made()
    made.span("startup", "imports", 5, 300)
    names = [
        ("data", "wait"), ("data", "read"), ("torchrec", "forward"), ("torchrec", "Request wait()"),
        ("torchrec", "copy_batch_to_gpu"), ("checkpoint", "write"), ("strange", "thing"),
    ]  # fmt: skip
    for epoch in range(2):
        base = 500 + epoch * 2500
        made.span("train", "epoch", base, 2000, epoch=epoch)
        for step in range(8):
            made.span("train", "step", base + step * 240, 200, epoch=epoch, step=epoch * 8 + step)
        made.span("eval", "evaluate", base + 1500, 200)
        made.span("checkpoint", "save", base + 1000, 150)
    for _ in range(120):
        cat, name = rng.choice(names[:5] + names[6:])
        made.span(cat, name, rng.randrange(5400), rng.randrange(1, 60), rng.choice((0, 3)))
    for _ in range(60):
        made.posix("read", rng.randrange(5400), rng.randrange(0, 40), "/x", rng.choice((0, 3)), ret=7)
    return made


def paint_each_us(events: list[dict[str, Any]]) -> tuple[list[str], list[int | None], dict[str, np.ndarray]]:
    """For each us: the phase, the epoch, and which sets it is in."""
    begin = min(e["ts"] for e in events)
    n = max(e["ts"] + e["dur"] for e in events) - begin
    main = next(e["tid"] for e in events if e["name"] == "step")
    layers = {name: np.zeros(n, bool) for name in (*KINDS, "io_all", "eval", "checkpoint", "train")}
    epoch = np.full(n, -1)
    calls = [e for e in events if e["cat"] == "POSIX"]
    for e in events:
        here = slice(e["ts"] - begin, e["ts"] - begin + e["dur"])
        kind = find_kind(e["cat"], e["name"])
        if (
            kind == "io"
            and e not in calls
            and any(call["tid"] == e["tid"] and e["ts"] <= call["ts"] <= e["ts"] + e["dur"] for call in calls)
        ):
            kind = None
        if kind == "io":
            layers["io_all"][here] = True
        if e["tid"] == main:
            if kind:
                layers[kind][here] = True
            if e["cat"] in ("eval", "checkpoint"):
                layers[e["cat"]][here] = True
            if e["cat"] == "train" and e["name"] == "epoch":
                layers["train"][here] = True
                epoch[here] = e["args"]["epoch"]
    first_train = int(np.argmax(layers["train"] | layers["eval"]))
    phases, epochs = [], []
    for t in range(n):
        if layers["checkpoint"][t]:
            phases.append("checkpoint")
        elif layers["eval"][t]:
            phases.append("evaluate")
        elif layers["train"][t]:
            phases.append("train")
        else:
            phases.append("startup" if t < first_train else "other")
        epochs.append(int(epoch[t]) if phases[-1] == "train" else None)
    return phases, epochs, layers


@pytest.mark.parametrize("seed", range(6))
def test_time_us_by_us(tmp_path: Path, seed: int) -> None:
    make_random_training(seed).write(tmp_path)
    phases, epochs, layers = paint_each_us(read_all_events(tmp_path))
    expected: dict[tuple[str, int | None], Counter[str]] = defaultdict(Counter)
    for t, key in enumerate(zip(phases, epochs, strict=True)):
        kind = next((k for k in KINDS if layers[k][t]), "other")
        expected[key]["wall_us"] += 1
        expected[key][f"{kind}_us"] += 1
        if layers["io_all"][t]:
            expected[key]["io_all_us"] += 1
            if kind == "compute":
                expected[key]["io_behind_compute_us"] += 1
            elif kind in ("communication", "copy"):
                expected[key]["io_behind_communication_us"] += 1
            else:
                expected[key]["io_not_hidden_us"] += 1
    table = gather_tables(tmp_path)["time"]
    assert len(table) == len(expected)
    for row in table.iter_rows(named=True):
        for measure, us in row.items():
            if measure.endswith("_us"):
                assert us == expected[row["phase"], row["epoch"]][measure], (
                    row["phase"],
                    row["epoch"],
                    measure,
                )


def test_steps_and_timeline_add_up(tmp_path: Path) -> None:
    make_random_training(3).write(tmp_path)
    joined = gather_tables(tmp_path)
    begin = BEGIN + 5
    _, _, layers = paint_each_us(read_all_events(tmp_path))
    for row in joined["steps"].iter_rows(named=True):
        here = slice(row["ts"] - begin, row["ts"] - begin + row["wall_us"])
        assert row["wall_us"] == 200 and row["io_all_us"] == layers["io_all"][here].sum()
        assert sum(row[f"{kind}_us"] for kind in (*KINDS, "other")) == 200
    for measure in ("wall_us", "io_all_us", *(f"{kind}_us" for kind in KINDS)):
        assert joined["busy"][measure].sum() == joined["time"][measure].sum(), measure


def test_operations_by_plain_python(run: Path, joined: JoinedTables) -> None:
    expected: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    expected_sizes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for e in read_all_events(run):
        if e["cat"] in CALLS:
            op = find_operation(e["name"])
            moved = max(0, e["args"].get("ret", 0)) if op in ("read", "write") else 0
            cell = expected[e["rank"], e["name"], op, e["file"]]
            cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + moved, cell[2] + e["dur"]
            if op == "write":
                size = expected_sizes[moved.bit_length() - 1]
                size[0], size[1] = size[0] + 1, size[1] + moved
    assert expected
    ops = joined["ops"].filter(pl.col("layer") == "calls")
    sums = ops.group_by("rank", "name", "op", "file").agg(pl.col("count", "bytes", "us").sum())
    assert {row[:4]: list(row[4:]) for row in sums.iter_rows()} == expected
    moved = joined["rates"].filter(pl.col("layer") == "calls")["bytes"].sum()
    assert moved == pytest.approx(sum(cell[1] for cell in expected.values()))
    assert expected_sizes
    sizes = answers.count_request_sizes(joined).filter(pl.col("op") == "write")
    assert {
        row[0]: list(row[1:]) for row in sizes.select("bucket", "count", "bytes").iter_rows()
    } == expected_sizes


def test_steps_by_sql(run: Path, joined: JoinedTables, tmp_path: Path) -> None:
    made = convert.convert_to_pftrace(run, tmp_path / "x.pftrace")
    with trace_processor.open_trace(made.path) as trace:
        steps = trace.rows(
            "select count(*), sum(dur), max(dur) from slice where category='train' and name glob 'step *'"
        )
        preads = trace.rows(
            "select count(*), sum(dur) from slice where category='POSIX' and name glob 'pread*'"
        )
        name = "iif(category = 'train' and name glob 'step *', 'step', name)"
        spans = trace.rows(f"select category, {name} as name, count(*), sum(dur) from slice group by 1, 2")
    found = joined["steps"]["wall_us"]
    assert steps == [(len(found), found.sum() * 1000, found.to_numpy().max() * 1000)]
    reads = joined["ops"].filter(pl.col("name").str.starts_with("pread"))
    assert preads == [(reads["count"].sum(), reads["us"].sum() * 1000)]
    by_name = {(c, n): (k, us // 1000) for c, n, k, us in spans}
    for cat, name, count, us in answers.sum_spans(joined).select("cat", "name", "count", "us").iter_rows():
        assert by_name[cat, name] == (count, us), (cat, name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real ranks, traced by dftracer."""
    return traced.run(tmp_path_factory.mktemp("report") / "run", traced.TRAINING, world=2)


@pytest.fixture(scope="module")
def joined(run: Path) -> JoinedTables:
    return gather_tables(run)


def test_sequential_and_random(tmp_path: Path) -> None:
    made = Made()
    made.posix("pread64", 0, 1, "/a", ret=10, offset=100)  # the first counts as sequential
    made.posix("pread64", 2, 1, "/a", ret=10, offset=110)
    made.posix("pread64", 4, 1, "/a", ret=10, offset=50)  # random
    made.posix("open64", 6, 1, "/b")
    made.posix("read", 8, 1, "/b", ret=10)
    made.posix("read", 10, 1, "/b", ret=10)
    made.posix("lseek64", 12, 1, "/b", ret=20, offset=20, whence=0)  # to where it is already
    made.posix("read", 14, 1, "/b", ret=10)
    made.posix("lseek64", 16, 1, "/b", ret=500, offset=500, whence=0)
    made.posix("read", 18, 1, "/b", ret=10)  # random
    made.posix("read", 20, 1, "/b", ret=0)  # the end of the file is neither
    made.posix("read", 22, 1, "/b", ret=-1)
    made.write(tmp_path)
    joined = gather_tables(tmp_path)
    found = {r["file"]: (r["sequential"], r["random"], r["failed"], r["bytes"])
             for r in answers.sum_volume(joined, "file").iter_rows(named=True)}  # fmt: skip
    assert found == {"/a": (2, 1, 0, 30), "/b": (3, 1, 1, 40)}
    assert dict(joined["extents"].select("file", "reach").iter_rows()) == {"/a": 120, "/b": 510}


def test_percentiles_over_ranks_are_those_of_all_events(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    all_us = []
    for rank in range(3):
        made = Made(rank, 3)
        for i, us in enumerate(rng.lognormal(5 + rank, 1.2, 400).astype(int).tolist()):
            made.posix("pread64", i * 100_000, us, "/a", ret=1, offset=i)
            all_us.append(us)
        made.write(tmp_path)
    row = answers.sum_operations(gather_tables(tmp_path)).row(0, named=True)
    for q in (50, 90, 99):
        exact = np.quantile(all_us, q / 100, method="inverted_cdf")
        assert row[f"p{q}_us"] == pytest.approx(exact, rel=0.01)
    assert row["max_us"] == max(all_us)


def test_bytes_that_no_call_shows_count_once(tmp_path: Path) -> None:
    made = Made()
    made.posix("pread64", 0, 5, "/seen", ret=100, offset=0)
    made.span("data", "read", 0, 6, file="/seen", bytes=100)
    made.posix("open64", 10, 5, "/mapped")
    made.span("data", "read", 20, 9, file="/mapped", bytes=70)
    made.write(tmp_path)
    found = answers.sum_volume(gather_tables(tmp_path), "file")
    assert dict(found.select("file", "bytes").iter_rows()) == {"/seen": 100, "/mapped": 70}


def test_a_merged_file_counts_nothing_twice(tmp_path: Path) -> None:
    """Two processes in one file are one rank, which is said: its start-up is that of one of them."""
    one, other = (Made(None, pid=pid) for pid in (500, 600))
    for made, steps in ((one, 20), (other, 10)):
        made.span("startup", "imports", 0, 1_000_000)
        made.posix("read", 1_000, 500, "/data", ret=100)
        for step in range(steps):
            made.span("train", "step", 1_000_000 + step * 10_000, 10_000, step=step, epoch=0)
    one.lines += other.lines
    one.write(tmp_path)
    run = open_run(tmp_path)
    parts = progress.list_startup(run.joined)
    assert float(parts["seconds"].sum()) == pytest.approx(1.01)  # to the end of the first step, once
    assert len(run.joined["steps"]) == 20
    volume = answers.sum_volume(run.joined, "file")
    assert dict(volume.select("file", "bytes").iter_rows()) == {"/data": 200}
    assert any("holds the events of 2 processes, which count as one rank" in note for note in run.notes)


def test_imports_are_no_waiting_for_data(tmp_path: Path) -> None:
    """A trace without steps does not tell its start-up from the rest."""
    made = Made(None)
    for i in range(50):
        made.posix("read", i * 1_000, 900, f"/env/lib/python3.11/site-packages/a/{i}.pyc", ret=100)
    made.posix("read", 60_000, 5_000, "/data/day_0", ret=100)
    made.posix("close", 99_999, 1, "/data/day_0")
    made.write(tmp_path)
    run = open_run(tmp_path)
    facts = Facts(run.joined, {})
    wait = next(each for each in list_headlines(run, facts) if each.key == "wait_share")
    assert wait.value == pytest.approx(0.05, abs=0.001) and wait.label == "waiting for data, of the run"
    assert find_answer(facts).storage_seconds == pytest.approx(0.005, abs=1e-4)
    assert "of the run's time is waiting for data" in find_all(facts)[0].text


def test_spans_without_a_file_count_when_no_call_did_the_work(tmp_path: Path) -> None:
    made = Made()
    made.span("checkpoint", "write", 0, 100, bytes=1000)
    made.posix("write", 10, 50, "/ckpt/a", 5, ret=1000)
    made.span("checkpoint", "write", 0, 100, bytes=1000, file="a")  # its last component only
    made.span("checkpoint", "write", 0, 100, bytes=50, file="b")
    made.span("checkpoint", "write", 200, 100, bytes=600)
    made.posix("write", 210, 50, "/log", ret=7)
    made.write(tmp_path)
    found = answers.sum_volume(gather_tables(tmp_path), "file")
    assert dict(found.select("file", "bytes").iter_rows()) == {"/ckpt/a": 1000, None: 600, "b": 50, "/log": 7}


def test_hosts_whose_clocks_disagree(tmp_path: Path) -> None:
    for rank, shift in ((0, 0), (1, 7_000_000)):
        made = training(rank, 2, host=f"n{rank}")
        made.span("clock", "barrier", 9_400, 0, when="start")
        for line in made.lines:
            if line["ph"] == 1:
                line["ts"] += shift
        made.write(tmp_path)
    table = progress.list_steps(gather_tables(tmp_path))
    assert len(table) == 40 and table["ts"][0] == BEGIN + 10_000
    firsts = gather_tables(tmp_path)["steps"].group_by("rank").agg(pl.col("ts").min())["ts"].to_list()
    assert firsts == [BEGIN + 10_000] * 2


def test_forked_worker_without_hashes_of_its_own(tmp_path: Path) -> None:
    parent, child = training(0, 1), Made(0, 1, pid=500, role="worker")
    child.files = dict(parent.files)
    child.posix("pread64", 20_000, 10, "/data/day_0_sparse.npy", ret=5, offset=0)
    child.write(tmp_path)
    parent.write(tmp_path)
    joined = gather_tables(tmp_path)
    assert joined["time"]["rank"].unique().to_list() == [0]
    assert answers.sum_volume(joined, "file")["file"].to_list() == ["/data/day_0_sparse.npy"]


def test_killed_before_the_epoch_ended(tmp_path: Path) -> None:
    made = training(steps=10)
    made.lines.pop()  # the epoch's span is written at its end
    made.write(tmp_path, end=False)
    table = answers.sum_phases(gather_tables(tmp_path))
    assert dict(table.select("phase", "wall_s").iter_rows())["train"] == pytest.approx(10 * 0.01201 - 1e-5)


def test_step_ranges_hold_all_steps(tmp_path: Path) -> None:
    training(steps=47).write(tmp_path)
    joined = gather_tables(tmp_path)
    table = progress.sum_step_ranges(joined)
    assert table["steps"].sum() == 47 and table["from_step"].to_list() == list(range(0, 47, 3))
    assert table["wall_s"].sum() == pytest.approx(float(joined["steps"]["wall_us"].sum()) / 1e6)
