"""Reports of more ranks than a person can read: which are shown, nodes, heat maps, bounded JSON."""

import csv
import json
import re
from pathlib import Path

import polars as pl
import pytest
from support.browser import chromium
from support.made_traces import training
from support.reports import analysis

from analysis.report.many_ranks import HEAT_ROWS, LISTED_RANKS, MANY_RANKS, group_heat_rows
from analysis.tables.gather import gather_tables

RANKS, STEPS, SLOW, A_NODE = 80, 6, 37, 4


def make_run(folder: Path, ranks: int) -> Path:
    """The ranks from SLOW on compute longer, each of the next ones a little less; SLOW waits for its data."""
    for rank in range(ranks):
        more = max(0, 5 - abs(rank - SLOW)) * 500 if rank >= SLOW else 0
        made = training(
            rank, ranks, STEPS, host=f"node{rank // A_NODE:04d}", reads=2, compute=5_000 + more,
            wait=3_000 if rank == SLOW else 100,
        )  # fmt: skip
        for number in range(50):  # the same modules on each rank
            made.posix("read", 100 + number, 1, f"/env/lib/python3.11/module{number}.py", ret=1000)
        made.posix("read", 200, 5, "/env/settings.json", ret=10)
        made.write(folder)
    return folder


def read_specs(page: str) -> list[dict]:
    found = re.findall(r'<script type="application/json" id="f\d+">(.*)</script>', page)
    return [json.loads(text) for text in found]


def read_csv(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("many") / "run", RANKS)
    out, _ = analysis("report", folder)
    assert f"Of {RANKS} ranks the 5 slowest ones (37 on node0009, 38 on node0009, 39 on" in out
    assert "rank 37" in out and "rank 38" in out and "rank 50" not in out
    return folder


def test_the_page_shows_the_slowest_ranks_and_the_files_all(run: Path) -> None:
    page = (run / "report.html").read_text()
    shown = [spec for spec in read_specs(page) if "where each rank's time went" in spec["label"].lower()]
    (bars,) = shown
    labels = [row["label"] for row in bars["rows"]]
    assert labels[:5] == [f"rank {rank}" for rank in range(SLOW, SLOW + 5)]
    assert labels[5].startswith("typical: ") and labels[6] == f"mean of {RANKS}" and len(labels) == 7
    columns = next(
        spec for spec in read_specs(page) if spec["type"] == "columns" and "rank 37" in spec["labels"]
    )
    assert len(columns["labels"]) == 6
    for name in ("breakdown", "ranks"):
        assert [int(row["rank"]) for row in read_csv(run, name)] == list(range(RANKS))
    assert {int(row["rank"]) for row in read_csv(run, "phases")} == set(range(RANKS))
    assert f"6 of {RANKS} rows; all are in tables/" in page


def test_nodes(run: Path) -> None:
    nodes = read_csv(run, "nodes")
    assert len(nodes) == RANKS // A_NODE and sum(int(row["ranks"]) for row in nodes) == RANKS
    assert nodes[0]["host"] == "node0009" and int(nodes[0]["slowest_rank"]) == SLOW
    breakdown = read_csv(run, "breakdown")
    own = [float(row["compute"]) for row in breakdown if 36 <= int(row["rank"]) < 40]
    assert float(nodes[0]["compute_s"]) == pytest.approx(sum(own) / 4)


def test_heat_maps_have_a_row_for_each_rank(run: Path) -> None:
    maps = [spec for spec in read_specs((run / "report.html").read_text()) if spec["type"] == "heat"]
    waiting, talking, moved = maps
    assert waiting["rows"][SLOW] == f"rank {SLOW} node0009" and len(waiting["rows"]) == RANKS
    means = [sum(row) / len(row) for row in waiting["values"]]
    assert max(range(RANKS), key=means.__getitem__) == SLOW
    means = [sum(row) / len(row) for row in talking["values"]]
    assert min(range(RANKS), key=means.__getitem__) == SLOW
    assert 0 < max(map(max, waiting["values"])) <= 100
    # bytes of all ranks: what the calls of all traces moved
    total = sum(map(sum, moved["values"])) * moved["width"] * 1e6
    assert total == pytest.approx(RANKS * (STEPS * 2 * (1 << 20) + 50_010), rel=0.01)


def test_summary_is_bounded_and_the_files_have_all(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())
    assert told["ranks"] == RANKS > LISTED_RANKS and len(told["hosts"]) == RANKS // A_NODE
    assert told["slowest_ranks"] == list(range(SLOW, SLOW + 5))
    assert told["ranks_listed"] == sorted([*told["slowest_ranks"], told["typical_rank"]])
    for key in ("breakdown_s", "phases_s", "io_by_rank", "startup_s"):
        assert {row["rank"] for row in told[key]} == set(told["ranks_listed"]), key
    for name in ("startup", "io_ranks"):
        assert {int(row["rank"]) for row in read_csv(run, name)} == set(range(RANKS))
    assert told["nodes"][0]["host"] == "node0009"
    phases = [row for row in read_csv(run, "phases") if row["phase"] == "train"]
    mean = sum(float(row["io_not_hidden_s"]) for row in phases) / RANKS
    assert told["metrics"]["io_not_hidden_seconds"] == pytest.approx(mean)


def test_few_ranks_are_all_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MANY_RANKS)
    out, _ = analysis("report", run)
    assert f"rank {MANY_RANKS - 1}" in out and "slowest ones" not in out
    page = (run / "report.html").read_text()
    bars = next(
        spec for spec in read_specs(page) if spec["type"] == "rows" and spec["rows"][0]["label"] == "rank 0"
    )
    assert [row["label"] for row in bars["rows"]] == [f"rank {rank}" for rank in range(MANY_RANKS)]
    assert len([spec for spec in read_specs(page) if spec["type"] == "heat"]) == 1
    assert not (run / "tables" / "nodes.csv").exists()
    told = json.loads((run / "summary.json").read_text())
    assert told["ranks_listed"] == list(range(MANY_RANKS)) and len(told["breakdown_s"]) == MANY_RANKS


def test_modules_of_the_start_up_are_counted_once_for_all_ranks(run: Path) -> None:
    joined = gather_tables(run)
    assert len(joined["programs"]) == 50
    early = joined["ops"].filter(pl.col("phase") == "startup")
    by_rank = early.group_by("rank").agg(pl.len().alias("rows"), pl.col("bytes", "count").sum())
    # one row for the modules, one for settings.json
    assert set(by_rank["rows"]) == {2} and set(by_rank["bytes"]) == {50_010} and set(by_rank["count"]) == {51}
    (interface,) = [row for row in read_csv(run, "interfaces") if row["interface"] == "POSIX"]
    assert int(interface["files"]) == 52  # modules, settings.json, day_0_sparse.npy


@pytest.mark.parametrize(
    ("nodes", "of_node", "rows"),
    [(1, 16, 16), (64, 4, 256), (512, 4, 256), (2000, 1, 250), (16, 125, 240), (1, 1000, 250), (400, 5, 200)],
)
def test_rows_of_a_heat_map_hold_each_rank_once(nodes: int, of_node: int, rows: int) -> None:
    hosts = {rank: f"n{rank // of_node:04d}.example" for rank in range(nodes * of_node)}
    found = group_heat_rows(hosts, hosts)
    assert len(found) == rows <= HEAT_ROWS
    assert [rank for row in found for rank in row.ranks] == list(hosts)
    for row in found:  # whole nodes, or a part of one
        held = {hosts[rank] for rank in row.ranks}
        assert len(held) == 1 or len(row.ranks) == len(held) * of_node
        assert "example" not in row.label


@pytest.mark.browser
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", "1280,900") as browser:
        browser.open_report(run / "report.html")
        assert browser.run("document.querySelectorAll('svg path.heat').length") > 3
        assert "NaN" not in browser.run("document.body.innerHTML")
