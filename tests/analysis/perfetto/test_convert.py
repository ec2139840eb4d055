"""The Perfetto file in Perfetto's own trace processor: complete, nested, without complaints."""

import gzip
import json
import os
from pathlib import Path

import pytest
from support import traced
from support.reports import analysis
from support.trace_processor import Trace, open_trace

from analysis.perfetto import chrome, convert, ui
from analysis.trace import events
from common.errors import UserError

INSIDE = """
select count(*) from slice child join slice parent on child.parent_id = parent.id
where child.ts < parent.ts or child.ts + child.dur > parent.ts + parent.dur
"""


def slices(trace: Trace) -> list[tuple]:
    return trace.rows("select category, name, ts, dur from slice order by 1, 2, 3, 4")


def expected(run: Path) -> list[tuple]:
    """Slices and instants; a step is named by its number."""
    table = events.load_events(run, columns=("cat", "name", "step", "ts", "dur")).filter(
        events.pl.col("cat") != "counter"
    )
    return sorted(
        (cat, f"step {step}" if (cat, name) == ("train", "step") else name, ts * 1000, dur * 1000)
        for cat, name, step, ts, dur in table.iter_rows()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real ranks, with a config and metrics as a training leaves them."""
    folder = traced.run(tmp_path_factory.mktemp("runs") / "run", traced.TRAINING, world=3)
    config = {
        "data": {"batch_size": 128}, "model": {"embedding_dim": 16}, "optim": {"learning_rate": 0.05},
        "run": {"epochs": 2},
        "launch": {"world_size": 3, "local_world_size": 3, "nodes": 1, "hosts": ["node7"], "device": "cpu"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    now = float(events.read_processes(folder)[0].barriers["end"]) / 1e6
    rows = [
        {"step": 1, "lr": 0.5, "loss": 0.7, "time": now - 1},
        {"step": 3, "split": "val", "auroc": 0.8, "time": now},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    return folder


@pytest.fixture(scope="module")
def full(run: Path):
    summary = convert.convert_to_pftrace(run)
    assert summary.path == run / "dlrm-n1-ppn3-gpu0-ep2-bs128-ed16-lr0.05.pftrace"
    assert not summary.lost and not summary.moved and not summary.unresolved
    with open_trace(summary.path) as trace:
        yield trace


def test_import_has_no_complaints(full: Trace) -> None:
    assert full.complaints() == []


def test_every_event_with_its_times(full: Trace, run: Path) -> None:
    assert slices(full) == expected(run)
    assert full.one("select count(*) from slice where dur < 0") == 0


def test_processes_by_rank_and_threads_by_name(full: Trace) -> None:
    assert [
        name for (name,) in full.rows("select name from process where name is not null order by upid")
    ] == [f"rank {rank} on node7" for rank in range(3)]
    rows = full.rows(
        "select p.name as process, t.name as thread, is_main_thread from thread t join process p using(upid) "
        "where p.name != ''"
    )
    assert sorted(rows) == sorted(
        (f"rank {r} on node7", n, m) for r in range(3) for n, m in (("main", 1), ("prefetch train", 0))
    )


def test_nesting(full: Trace) -> None:
    assert full.one(INSIDE) == 0
    depths = {
        (name, depth) for name, depth in full.rows("select name, depth from slice where category != 'POSIX'")
    }
    assert {
        ("ai_root", 0), ("epoch", 1), ("step 1", 2), ("forward", 3), ("backward", 3), ("read", 0)
    } <= depths  # fmt: skip
    parents = full.rows(
        "select distinct p.name from slice s join slice p on s.parent_id = p.id where s.name = 'pread64'"
    )
    assert parents == [("read",)]


def test_arguments(full: Trace, run: Path) -> None:
    rows = full.rows(
        "select extract_arg(arg_set_id, 'debug.file'), extract_arg(arg_set_id, 'debug.ret'), "
        "extract_arg(arg_set_id, 'debug.offset') from slice where name = 'pread64'"
    )
    assert sorted(rows) == sorted(
        (str(run / f"data{r}.bin"), 1000, 1000 * i) for r in range(3) for i in range(6)
    )
    rows = full.rows(
        "select extract_arg(arg_set_id, 'debug.step'), extract_arg(arg_set_id, 'debug.batch') "
        "from slice where name glob 'step *'"
    )
    assert sorted(rows) == sorted((i, i) for _ in range(3) for i in range(3))


def test_counters(full: Trace) -> None:
    """Those of the run are there once, below a track of their own."""
    rows = full.rows(
        "select up.name as above, c.value from counter c join track t on c.track_id = t.id "
        "join track up on t.parent_id = up.id where t.name = 'loss' order by c.ts"
    )
    assert [name for name, _ in rows] == ["run"] * 3
    assert [value for _, value in rows] == pytest.approx([0.5, 0.25, 1 / 6], rel=1e-5)
    below = full.rows(
        "select t.name from track t join track up on t.parent_id = up.id where up.name = 'run' order by 1"
    )
    names = ["loss", "lr", "read MB/s by calls, all ranks", "val auroc", "write MB/s by calls, all ranks"]
    assert [name for (name,) in below] == names
    of_ranks = full.rows(
        "select distinct name from process_counter_track where name not glob 'proc/*' order by 1"
    )
    assert of_ranks == [("read MB/s by calls",), ("write MB/s by calls",)]
    of_kernel = full.rows(
        "select up.name, count(*) from track t join track up on t.parent_id = up.id "
        "where t.id in (select id from process_counter_track where name glob 'proc/*') group by 1"
    )
    assert of_kernel == [("kernel", 3 * 8)]
    assert full.rows(
        "select t.name, c.value from counter c join track t on c.track_id = t.id where t.name = 'lr'"
    ) == [("lr", 0.5)]
    assert full.one("select count(*) from track where name = 'val auroc'") == 1


def test_bandwidth_adds_up_to_the_bytes(full: Trace) -> None:
    def moved(track: str) -> float:
        rows = full.rows(
            f"select c.ts, c.value from counter c join track t on c.track_id = t.id where t.name = '{track}' "
            "and t.type not like 'process%' order by c.ts"
        )
        return sum(
            value * (after - ts) / 1e3 for (ts, value), (after, _) in zip(rows, rows[1:], strict=False)
        )

    calls = "select sum(extract_arg(arg_set_id, 'debug.ret')) from slice where category = 'POSIX' and name "
    read = full.one(calls + "in ('read', 'pread64')")
    assert read >= 3 * 6000 and moved("read MB/s by calls, all ranks") == pytest.approx(read, rel=1e-6)
    written = full.one(calls + "= 'write'")
    assert written >= 3 * 5000 and moved("write MB/s by calls, all ranks") == pytest.approx(written, rel=1e-6)


def test_flows_from_reads_to_the_step_of_their_batch(full: Trace) -> None:
    rows = full.rows("""
        select a.category || '/' || a.name as source, b.category || '/' || substr(b.name, 1, 4) as sink,
               extract_arg(a.arg_set_id, 'debug.batch') as read,
               extract_arg(b.arg_set_id, 'debug.batch') as used,
               ta.upid as from_process, tb.upid as to_process
        from flow f join slice a on f.slice_out = a.id join slice b on f.slice_in = b.id
        join thread_track ka on a.track_id = ka.id join thread ta using(utid)
        join thread_track kb on b.track_id = kb.id join thread tb on kb.utid = tb.utid
    """)
    assert len(rows) == 3 * 6  # ranks x reads
    assert {row[:2] for row in rows} == {("data/read", "train/step")}
    assert all(read == used and source == sink for _, _, read, used, source, sink in rows)


def test_commands_of_the_interface_answer_in_the_trace_processor(full: Trace, run: Path) -> None:
    steps = full.rows(ui.QUERIES["Slowest steps"])
    assert {row[0] for row in steps} == {"step 0", "step 1", "step 2"} and len(steps) == 9
    assert [row[2] for row in steps] == sorted((row[2] for row in steps), reverse=True)
    files = {row[:2]: row[2:4] for row in full.rows(ui.QUERIES["I/O by file"])}
    assert all(files[str(run / f"data{rank}.bin"), "pread64"] == (6, 6000) for rank in range(3))
    assert all(files[str(run / f"out{rank}.bin"), "write"] == (1, 5000) for rank in range(3))
    assert full.rows(ui.QUERIES["Waiting for data"]) == []


def test_posix_only(run: Path) -> None:
    summary = convert.convert_to_pftrace(run, posix=True)
    assert summary.path.name == "dlrm-n1-ppn3-gpu0-ep2-bs128-ed16-lr0.05-posix.pftrace"
    with open_trace(summary.path) as trace:
        assert trace.complaints() == []
        assert slices(trace) == [row for row in expected(run) if row[0] in ("POSIX", "STDIO")]
        assert trace.one("select count(*) from track where name = 'loss'") == 0


def test_chrome_json(run: Path, tmp_path: Path) -> None:
    summary = chrome.convert_to_json(run, tmp_path / "t.json")
    assert json.loads(summary.path.read_text())["traceEvents"]
    with open_trace(summary.path) as trace:
        assert trace.complaints() == []
        assert [(cat, name.split(" ")[0]) for cat, name, _, _ in slices(trace)] == [
            (cat, name.split(" ")[0]) for cat, name, _, _ in expected(run)
        ]
        assert trace.one("select count(*) from process where name like 'rank % on node7'") == 3


def test_killed_rank(tmp_path: Path) -> None:
    body = traced.TRAINING.replace("thread.join()", "time.sleep(0.5); os.kill(os.getpid(), 9)").replace(
        'here, "train")', 'here, "train", flush_ms=100)'
    )
    traced.start(tmp_path / "run", body).wait(timeout=180)
    summary = convert.convert_to_pftrace(tmp_path / "run")
    assert summary.path.name == "run.pftrace"  # no config.json: named after the folder
    assert len(summary.lost) == 1 and "no end record" in summary.lost[0]
    with open_trace(summary.path) as trace:
        assert trace.complaints() == []
        assert trace.one("select count(*) from slice where name glob 'step *'") == 3
        assert trace.one(INSIDE) == 0


def write(path: Path, spans: list[tuple[str, int, int]], **more: object) -> Path:
    lines = [
        {"name": name, "cat": "train", "pid": 5, "tid": 5, "ts": ts, "dur": dur, "ph": 1, "args": {}, **more}
        for name, ts, dur in spans
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def test_overlaps_get_a_lane_and_nothing_is_lost(tmp_path: Path) -> None:
    spans = [
        ("a", 1000, 10),
        ("b", 1005, 10),
        ("c", 1007, 20),
        ("d", 1030, 0),
        ("e", 1030, 0),
        ("f", 1029, 5),
    ]
    summary = convert.convert_to_pftrace(write(tmp_path / "t.pfw.gz", spans), tmp_path / "t.pftrace")
    assert summary.moved == 2
    with open_trace(summary.path) as trace:
        assert trace.complaints() == []
        assert trace.rows("select name, ts / 1000, dur / 1000 from slice order by name") == spans
        assert trace.one("select count(*) from thread where name like 'main overlap%'") == 2


def test_parent_in_a_later_block_than_its_first_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.trace.lines.BLOCK", 2000)
    spans = [
        ("before", 900, 50),
        *((f"s{i}", 1000 + 10 * i, 10) for i in range(200)),
        ("epoch", 1000, 2000),
        ("after", 3000, 1),
    ]
    summary = convert.convert_to_pftrace(write(tmp_path / "t.pfw.gz", spans), tmp_path / "t.pftrace")
    assert summary.moved == 0
    with open_trace(summary.path) as trace:
        assert trace.complaints() == []
        assert trace.one("select count(*) from slice") == len(spans)
        assert (
            trace.one(
                "select count(*) from slice s join slice p on s.parent_id = p.id where p.name = 'epoch'"
            )
            == 200
        )
        assert trace.rows("select name from slice where depth = 0 order by ts") == [
            ("before",),
            ("epoch",),
            ("after",),
        ]
        assert trace.one("select dur from slice where name = 'epoch'") == 2_000_001


def test_same_pids_on_two_hosts_stay_apart(tmp_path: Path) -> None:
    for rank in range(2):
        about = [("rank", str(rank)), ("host", f"node{rank}")]
        records = [
            {"name": "CM", "cat": "dftracer", "pid": 5, "tid": 5, "ph": 4, "args": {"name": k, "value": v}}
            for k, v in about
        ]
        path = write(tmp_path / f"{1 - rank}.pfw.gz", [("step", 1000, 10 + rank)])
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(gzip.compress(lines.encode()) + path.read_bytes())
    with open_trace(convert.convert_to_pftrace(tmp_path, tmp_path / "t.pftrace").path) as trace:
        rows = trace.rows(
            "select p.name, s.dur from slice s join thread_track t on s.track_id = t.id "
            "join thread using(utid) join process p using(upid) order by p.upid"
        )
        assert rows == [("rank 0 on node0", 10_000), ("rank 1 on node1", 11_000)]


FOLLOWED = """
path = f"{run}/data.bin"
open(path, "wb").write(bytes(10_000))
trace.start_tracing(run, here, "train")
fd = os.open(path, os.O_RDONLY)
os.read(fd, 100); os.read(fd, 200)                     # 0, 100
os.lseek(fd, 5000, os.SEEK_SET); os.read(fd, 10)       # 5000
os.lseek(fd, -100, os.SEEK_END); os.read(fd, 1000); os.read(fd, 1000)   # 9900, of which 100 are there; 10000
os.lseek(fd, 50, os.SEEK_SET); os.lseek(fd, 50, os.SEEK_CUR); os.read(fd, 1)   # 100
other = os.open(path, os.O_RDONLY)
os.read(other, 7); os.read(fd, 7)                      # which of the two it is the trace does not say
os.close(other)
os.lseek(fd, 3000, os.SEEK_SET); os.read(fd, 5)        # 3000
os.pread(fd, 4, 42)                                    # 42, and moves nothing
os.read(fd, 5)                                         # 3005
os.close(fd)
fd = os.open(path, os.O_RDONLY)
os.read(fd, 9)                                         # 0
os.close(fd)
fd = os.open(path + ".log", os.O_WRONLY | os.O_CREAT)
os.write(fd, b"abc"); os.write(fd, b"def")             # 0, 3
os.close(fd)
fd = os.open(path + ".log", os.O_WRONLY | os.O_APPEND)
os.write(fd, b"ghi")                                   # at the end, wherever that is
os.close(fd)
trace.stop_tracing()
"""


def test_offsets_of_reads_that_do_not_say_them(tmp_path: Path) -> None:
    run = traced.run(tmp_path / "run", FOLLOWED)
    query = (
        "select extract_arg(arg_set_id, 'debug.offset') from slice where name in ('read', 'pread64') and "
        "extract_arg(arg_set_id, 'debug.file') glob '*/data.bin' order by ts, id"
    )
    written = query.replace("'read', 'pread64'", "'write'").replace("data.bin", "data.bin.log")
    expected_reads = [0, 100, 5000, 9900, 10000, 100, None, None, 3000, 42, 3005, 0]
    for summary in (
        convert.convert_to_pftrace(run),
        convert.convert_to_pftrace(run, posix=True),
    ):
        with open_trace(summary.path) as trace:
            assert trace.complaints() == []
            assert [offset for (offset,) in trace.rows(query)] == expected_reads
            assert [offset for (offset,) in trace.rows(written)] == [0, 3, None]
    chrome_json = json.loads(chrome.convert_to_json(run, tmp_path / "t.json").path.read_text())
    reads = [
        event["args"].get("offset")
        for event in sorted(chrome_json["traceEvents"], key=lambda event: event.get("ts", 0))
        if event["name"] in ("read", "pread64") and event["args"].get("file", "").endswith("/data.bin")
    ]
    assert reads == expected_reads


def test_the_view_by_hand_is_documented() -> None:
    assert ui.make_public_address() in (traced.ROOT / "docs" / "traces.md").read_text()


def test_command_line(run: Path, tmp_path: Path) -> None:
    out, _ = analysis("perfetto", run, "-o", tmp_path / "x.pftrace")
    assert str(tmp_path / "x.pftrace") in out
    assert (tmp_path / "x.pftrace").stat().st_size > 1000
    (tmp_path / "empty").mkdir()
    for words, text in (
        (("perfetto", tmp_path / "none"), "no such folder"),
        (("perfetto", tmp_path / "empty"), "no traces"),
        (("perfetto", run, "-o", tmp_path / "no" / "x"), "cannot write there"),
        (("view", tmp_path / "empty"), "no *.pftrace"),
        (("check", tmp_path / "empty"), "no traces"),
    ):
        _, errors = analysis(*words, code=2)
        assert text in errors and errors.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "x.pftrace"]  # no temporary file stays


def test_no_events(tmp_path: Path) -> None:
    write(tmp_path / "t.pfw.gz", [("a", 1, 1)])
    with pytest.raises(UserError, match="no events of POSIX calls"):
        convert.convert_to_pftrace(tmp_path, tmp_path / "t.pftrace", posix=True)
    assert not (tmp_path / "t.pftrace").exists()


def test_a_file_is_named_after_the_settings(tmp_path: Path) -> None:
    """BERT4Rec's options have other names; without ours the folder gives its name."""
    assert convert.name_trace(tmp_path, False) == tmp_path.name
    config = {
        "data": {"train_batch_size": 16}, "model": {"emb_dim": 32}, "optim": {"lr": 0.005},
        "run": {"epochs": 12}, "launch": {"world_size": 8, "nodes": 2, "device": "cuda"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.name_trace(tmp_path, True) == "bert4rec-n2-ppn4-gpu8-ep12-bs16-ed32-lr0.005-posix"
    (tmp_path / "config.json").write_text("[1]")
    assert convert.name_trace(tmp_path, True) == f"{tmp_path.name}-posix"
