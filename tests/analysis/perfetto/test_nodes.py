"""Counters of nodes in Perfetto's trace processor: below their ranks; damaged and foreign files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.made_traces import BEGIN, training
from support.reports import analysis
from support.trace_processor import open_trace

from analysis.trace.nodes import read_node_file

SECOND = 1_000_000
BOOT = BEGIN // SECOND - 10_000
NODES = """
select p.name as process, t.name as counter, c.ts / 1000 as us, c.value
from counter c join process_counter_track t on c.track_id = t.id
join process p using (upid) where p.name glob 'node*' order by p.name, t.name, c.ts
"""


def record(kind: str, name: str, ts: int, **args: Any) -> dict[str, Any]:
    """A line as the service of DFTracer 2.2 writes it. ts: us after BEGIN."""
    return {
        "name": name, "cat": kind, "type": 7, "ts": BEGIN + ts, "ph": 2, "pid": 0, "tid": 0,
        "args": {"hhash": "6882804a826580cd", **args},
    }  # fmt: skip


def node_records(
    seconds: int = 4, begin: int = 0, disk: str = "vda", up: int = 10_000, before: float = 0.0
) -> list[dict[str, Any]]:
    """A node that was so busy before, for `up` seconds, and is 25 % busy now; 5 % it waits for a disk."""
    lines = []
    for second in range(seconds + 1):
        ts, share = begin + second * SECOND, 100 * (before * up + 0.25 * second) / (up + second)
        cpu = {
            "user_pct": share * 0.8, "nice_pct": 0, "system_pct": share * 0.2, "irq_pct": 0, "softirq_pct": 0,
            "steal_pct": 0, "idle_pct": 100 - share, "iowait_pct": 0, "guest_pct": 0, "guest_nice_pct": 0,
        }  # fmt: skip
        waited = 100 * 0.05 * second / (up + second)
        cpu["iowait_pct"], cpu["idle_pct"] = waited, 100 - share - waited
        cpu = {key: float(f"{value:.6g}") for key, value in cpu.items()}
        memory = {
            "MemAvailable": 16_000_000, "MemTotal": 125, "Cached": 50, "Buffers": 25, "Dirty": 1 + second,
            "Writeback": 0, "Slab": 3,
        }  # fmt: skip
        moved = second > 0
        lines += [
            record("sys", "cpu", ts, **cpu),
            record("sys", "cpu-0", ts, **cpu),
            record("sys", "memory", ts, **memory),
            record("io", disk, ts, ios_in_progress=0, reads_completed=1, writes_completed=1,
                   bytes_read=50_000_000 * moved, bytes_written=0),
            record("net", "net-  eth0", ts, bytes_recv=2_000_000 * moved, bytes_sent=1_000_000 * moved,
                   packets_recv=1, packets_sent=1, rx_errors=0, tx_errors=0, rx_dropped=0, tx_dropped=0,
                   collisions=0),
        ]  # fmt: skip
    return lines


def write_node(folder: Path, host: str, lines: list[dict[str, Any]], boot: float | None = BOOT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"service_{host}.pfw.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
    )
    if boot is not None:
        (folder / "node.json").write_text(json.dumps({"host": host, "boot_time": boot, "cores": 4}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A rank on each of two hosts; the second one's clock is 300 us ahead."""
    for rank in (0, 1):
        made = training(rank, 2, host=f"n{rank}", steps=200)
        made.span("clock", "barrier", 9_900 + 300 * rank, 0, when="start")
        if rank:
            made.span("clock", "offset", 9_900, 0, when="start", ahead_us=300, error_us=20)
        made.write(tmp_path)
    return tmp_path


def convert(run: Path, *words: object, code: int = 0) -> tuple[Path, str]:
    _, said = analysis("perfetto", run, "-o", run / "out.pftrace", *words, code=code)
    return run / "out.pftrace", said


def test_counters_below_their_ranks(run: Path) -> None:
    """Rates from the beginning of their interval on, shares of intervals, on the clock of the first rank."""
    for host in ("n0", "n1"):
        write_node(run / "node_counters" / host, host, node_records())
    path, said = convert(run)
    assert (
        "counters of node n1 by dftracer_service: once a second, on the clock of its ranks, which is right "
        in said
    )
    assert "within 20 us; shares of processors within 2 points" in said
    with open_trace(path) as trace:
        rows = trace.rows(NODES)
        processes = trace.rows("select name from process where pid != 0 order by upid")
        order = trace.rows("select p.name from process p join args a using (arg_set_id) where a.key like "
                           "'%sort%' order by a.int_value")  # fmt: skip
    assert {name for (name,) in processes} == {"rank 0 on n0", "rank 1 on n1", "node n0", "node n1"}
    assert not order or [name for (name,) in order] == ["rank 0 on n0", "node n0", "rank 1 on n1", "node n1"]
    for node, moved in (("node n0", 0), ("node n1", -300)):
        own: dict[str, list[tuple[int, float]]] = {}
        for _, counter, ts, value in (row for row in rows if row[0] == node):
            own.setdefault(counter, []).append((ts - BEGIN, value))
        at = [second * SECOND + moved for second in range(5)]
        assert own["disk vda read MB/s"] == [*((ts, 50.0) for ts in at[:4]), (at[4], 0.0)]
        assert own["net eth0 received MB/s"] == [*((ts, 2.0) for ts in at[:4]), (at[4], 0.0)]
        assert own["memory to be written GB"] == [
            (ts, pytest.approx((1 + second) / 100 * 16.384)) for second, ts in enumerate(at)
        ]
        assert own["memory used GB"] == [(ts, pytest.approx(0.25 * 16.384)) for ts in at]
        for name, share in (("busy", 25), ("system", 5), ("iowait", 5)):
            assert own[f"CPU {name} %"] == [(ts, pytest.approx(share, abs=2)) for ts in at[:4]]
        assert not {"disk vda write MB/s", "CPU steal %", "net eth0 errors and drops 1/s"} & set(own)


def test_shares_take_as_long_as_the_digits_need(tmp_path: Path) -> None:
    """A node that has been up for 50 days: six digits of its mean since then say nothing about one second."""
    up = 50 * 86_400
    path = write_node(tmp_path, "n0", node_records(1_000, up=up, before=0.5), boot=BEGIN // SECOND - up)
    busy, waited = (
        each for each in read_node_file(path).list_series() if each.name in ("CPU busy", "CPU iowait")
    )
    assert 2 <= len(busy.ts) <= 3 and min(busy.ts[1:] - busy.ts[:-1]) > 200 * SECOND
    assert busy.values.tolist() == pytest.approx([25] * len(busy.ts), abs=2)
    assert len(waited.ts) > 900 and waited.values.mean() == pytest.approx(5, abs=0.1)


def test_folder_from_elsewhere(run: Path, tmp_path: Path) -> None:
    """Without node.json: the host by the file's name, shares since the boot; other hosts below all ranks."""
    other = tmp_path / "elsewhere"
    write_node(other, "n1", node_records(), boot=None)
    write_node(other, "n9", node_records(), boot=None)
    path, said = convert(run, "--node_counters", other)
    assert "counters of node n1 by dftracer_service: once a second, on the clock of its ranks" in said
    assert (
        "node n9 by dftracer_service: none of the run's ranks was there, so its clock was not compared"
        in said
    )
    with open_trace(path) as trace:
        rows = trace.rows(NODES)
    assert {name for name, _, _, _ in rows} == {"node n1", "node n9"}
    assert "CPU busy, mean since boot %" in {name for _, name, _, _ in rows}
    _, said = convert(run, "--node_counters", run / "trace", code=2)
    assert "no files of dftracer_service" in said
    _, said = convert(run, "--node_counters", other, "--posix", code=2)
    assert "--node_counters: not with --posix" in said


def test_among_the_traces(run: Path) -> None:
    """They are no rank, and a folder that has nothing else is refused in one line."""
    path = write_node(run / "trace", "n0", node_records(), boot=None)
    with open_trace(convert(run)[0]) as trace:
        assert ("node n0",) in trace.rows("select name from process")
        assert len(trace.rows("select name from process where name glob 'rank*'")) == 2
    for each in (run / "trace").glob("train*"):
        each.unlink()
    _, said = convert(run, code=2)
    assert "only counters of dftracer_service are in it, no trace of a program" in said and path.exists()


def test_what_is_not_understood_is_named(run: Path) -> None:
    """By perfetto, check and the report: other records, damage, no records; and no name becomes markup."""
    mark = "<img src=x onerror=alert(1)>"
    odd = [
        record("power", mark, 0, watts=300), record("sys", "cpu", 2, user_pct="all"),
        {**record("sys", "cpu", 3), "ts": -1}, {"name": 1}, record("io", mark, 4, bytes_read=float("inf")),
    ]  # fmt: skip
    folder = run / "node_counters" / "n0"
    path = write_node(folder, "n0", [*node_records(disk=mark), *odd])
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1000))[:-20])
    (folder / "service_empty.pfw.gz").touch()
    (folder / "note_n0.pfw.gz").mkdir()
    (run / "results.json").write_text(
        json.dumps({"bytes_read": {"0": {"/data/day_0_sparse.npy": 800 << 20}}})
    )
    names = f"3 records not understood: io/{mark} (1), power/{mark} (1), sys/cpu (1)"
    _, said = convert(run)
    printed, _ = analysis("check", run)
    analysis("report", run)
    page = (run / "report.html").read_text()
    for text in (said, printed, page.replace("&lt;", "<").replace("&gt;", ">")):
        assert names in text
        assert "its gzip stream is cut; " in text and "2 lines not JSON or without time" in text
        assert "service_empty.pfw.gz: has no records" in text
        assert "note_n0.pfw.gz" in text
    assert mark not in page


def test_nothing_of_the_time_of_the_run(run: Path) -> None:
    write_node(run / "node_counters" / "n0", "n0", node_records(begin=-7_200 * SECOND), boot=BOOT - 86_400)
    path, said = convert(run)
    assert "n0: nothing of" not in said and "is of the time that is shown" in said
    with open_trace(path) as trace:
        assert trace.rows(NODES) == []


def test_json_says_what_it_leaves_out(run: Path) -> None:
    write_node(run / "node_counters" / "n0", "n0", node_records())
    _, said = analysis("perfetto", run, "-o", run / "out.json", "--format", "json")
    assert "--format json leaves out 1 node counter file: --format pftrace has them" in said
