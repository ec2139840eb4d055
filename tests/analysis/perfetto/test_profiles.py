"""Profiles of torch.profiler in Perfetto's trace processor: in our steps, on the same clock, with arrows."""

import gzip
import json
from pathlib import Path
from statistics import median

import pytest
from support.made_profiles import BASE_NS, MadeProfile, gpu_steps
from support.made_traces import BEGIN, training
from support.ranks import on_ranks
from support.reports import analysis
from support.trace_processor import Trace, open_trace

# DFTracer counts in us of the system's clock, Kineto in ticks of the processor; and on a busy machine a
# thread may lose its core between two marks.
TOLERANCE_NS = 5_000_000
FIRST, LAST = 3, 5
# slices with the process and the name of their thread
SLICES = """
(select s.*, t.upid, t.name as thread, t.tid from slice s join thread_track tt on s.track_id = tt.id
join thread t using (utid))
"""


def convert(run: Path, *words: object, code: int = 0) -> tuple[Path, str]:
    """The trace's path, and what was said on stderr."""
    _, said = analysis("perfetto", run, "-o", run / "out.pftrace", *words, code=code)
    return run / "out.pftrace", said


# --- of a real training


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, npy: Path) -> Path:
    """Two ranks on CPUs, eight steps."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    done = on_ranks(
        run, 2, "dlrm.train", "--preset", "toy", "--in_memory_binary_criteo_path", npy, "--batch_size", 128,
        "--max_steps", 8, "--trace", "--profile_steps", f"{FIRST}-{LAST}", timeout=180,
    )  # fmt: skip
    assert done.codes == [0, 0], done.err
    assert "rofile" not in "".join([*done.out, *done.err])
    return run


@pytest.fixture(scope="module")
def npy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dlrm.prep.__main__ import main

    folder = tmp_path_factory.mktemp("data")
    assert main(["toy", str(folder / "tsv"), "--days", "3", "--rows", "1500"]) == 0
    given = ["--input_dir", str(folder / "tsv"), "--output_dir", str(folder / "npy"), "--engine", "plain"]
    assert main(["run", *given]) == 0
    return folder / "npy"


@pytest.fixture(scope="module")
def profiled(run: Path):
    path, said = convert(run)
    assert "profile" not in said
    with open_trace(path) as trace:
        yield trace


def read_kineto(run: Path) -> list[dict]:
    """The files as torch wrote them, in the order of the ranks."""
    files = sorted((run / "profile").iterdir())
    assert [path.name[:19] for path in files] == [f"rank0000{rank}-steps3-5-" for rank in (0, 1)]
    return [json.loads(gzip.decompress(path.read_bytes())) for path in files]


@pytest.mark.mpi
def test_operators_lie_in_their_steps(run: Path, profiled: Trace) -> None:
    """Torch's own marks of the steps, and its operators, against the spans of the tracer."""
    assert profiled.complaints() == []
    steps = profiled.rows(f"""
        select mark.upid as upid, step.name as name, mark.ts - step.ts as begins,
               mark.ts + mark.dur - step.ts - step.dur as ends
        from {SLICES} mark join {SLICES} step using (upid)
        where step.category = 'train' and mark.name = 'ProfilerStep#' || substr(step.name, 6)
    """)
    assert len(steps) == 2 * (LAST - FIRST + 1)
    for *_, begins, ends in steps:
        # another program may have the core between torch's mark and the tracer's, but not at every step
        assert max(abs(begins), abs(ends)) < 40 * TOLERANCE_NS, steps
    assert median(abs(apart) for *_, begins, ends in steps for apart in (begins, ends)) < TOLERANCE_NS, steps
    lost = profiled.rows(f"""
        select op.name as name, op.ts as ts from {SLICES} op where op.category = 'cpu_op'
        and op.thread = 'main, profiled' and op.name like 'aten::%mm' and not exists (
          select 1 from {SLICES} pass where pass.upid = op.upid and pass.category = 'compute'
          and pass.name in ('forward', 'backward')
          and op.ts >= pass.ts - {TOLERANCE_NS} and op.ts + op.dur <= pass.ts + pass.dur + {TOLERANCE_NS})
    """)
    assert lost == []
    assert profiled.one(f"select count(*) from {SLICES} where name like 'aten::%mm'") > 0


@pytest.mark.mpi
def test_all_operators_are_there_with_their_times(run: Path, profiled: Trace) -> None:
    """Against the files, which Python's own reader takes apart; and nested as they were."""
    for number, (upid,) in enumerate(
        profiled.rows("select upid from process where name like 'rank %' order by 1")
    ):
        kineto = read_kineto(run)[number]
        base = kineto["baseTimeNanoseconds"]
        expected = sorted(
            (each["name"], base + round(each["ts"] * 1000), round(each["dur"] * 1000))
            for each in kineto["traceEvents"] if each["ph"] == "X" and isinstance(each["pid"], int)
        )  # fmt: skip
        found = profiled.rows(
            f"select name, ts, dur from {SLICES} where upid = {upid} and thread like '%, profiled' "
            "order by 1, 2, 3"
        )
        assert [name for name, *_ in found] == [name[:300] for name, *_ in expected]
        apart = [abs(a[1] - b[1]) + abs(a[2] - b[2]) for a, b in zip(found, expected, strict=True)]
        assert max(apart) <= 2  # ns: Python's floats
        arrows = sum(each["ph"] == "s" for each in kineto["traceEvents"])
        shown = profiled.rows(f"""
            select one.ts as begins, other.ts as ends, other.name as name from flow
            join {SLICES} one on flow.slice_out = one.id join {SLICES} other on flow.slice_in = other.id
            where one.upid = {upid} and one.category = 'cpu_op'
        """)
        assert len(shown) == arrows > 0
        assert all(
            begins < ends and "Backward" in name or "::CppNode" in name for begins, ends, name in shown
        )


@pytest.mark.mpi
def test_part_of_the_steps(run: Path) -> None:
    path, _ = convert(run, "--steps", f"{LAST}-{LAST}", "--ranks", "1")
    with open_trace(path) as trace:
        marks = trace.rows("select distinct name from slice where name like 'ProfilerStep%'")
        assert (f"ProfilerStep#{LAST}",) in marks and ("ProfilerStep#3",) not in marks
        assert trace.rows("select count(*) as n from process where name like 'rank %'") == [(1,)]


# --- of GPUs, as Kineto describes them


@pytest.fixture
def made(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for rank in (0, 1):
        training(rank, 2, wait=3_000).write(run)
        gpu_steps(rank, 2).write(run / "profile" / f"rank0000{rank}-steps3-5-{1000 + rank}.json.gz")
    return run


def test_kernels_and_their_launches(made: Path) -> None:
    path, said = convert(made)
    assert "profile" not in said
    with open_trace(path) as trace:
        assert trace.complaints() == []
        threads = trace.rows(
            "select name from thread where name like 'GPU%' or name like '%profiled' order by name"
        )
        assert threads == [
            (name,) for name in ("GPU 0 stream 20", "GPU 0 stream 7", "main, profiled") for _ in (0, 1)
        ]
        arrows = trace.rows("""
            select one.name as launch, other.category as kind, count(*) as n, min(other.ts - one.ts) as least,
            extract_arg(other.arg_set_id, 'debug.grid') as grid
            from flow join slice one on flow.slice_out = one.id join slice other on flow.slice_in = other.id
            where one.category = 'cuda_runtime' group by 1, 2 order by 1, 2
        """)
        assert arrows == [
            ("cudaLaunchKernel", "kernel", 12, 180_000, "[24, 1, 1]"),
            ("cudaMemcpyAsync", "gpu_memcpy", 6, 900_000, None),
        ]
        times = trace.rows("select ts, dur from slice where name like 'void gemm%' order by ts limit 1")
        assert times == [((BEGIN + 10_000 + 3 * 12_010 + 3_200) * 1000, 2_300_000)]


def test_profiles_from_elsewhere(tmp_path: Path) -> None:
    """Ranks by distributedInfo or by pid; one line each for what has no place."""
    run = tmp_path / "run"
    for rank in (0, 1):
        training(rank, 2).write(run)
    files = [gpu_steps(1, 2).write(tmp_path / "named.json"), tmp_path / "by_pid.json.gz"]
    by_pid = gpu_steps(0, 2)
    del by_pid.head["distributedInfo"]
    by_pid.write(files[1])
    nobody = MadeProfile(rank=None, pid=77)
    nobody.operator("aten::mm", 20_000, 5)
    files.append(nobody.write(tmp_path / "nobody.json"))
    files.append(gpu_steps(5, 8).write(tmp_path / "other_rank.json"))
    late = MadeProfile(1, 2, 1001)
    late.operator("aten::mm", 3_600_000_000, 5)
    files.append(late.write(tmp_path / "late.json"))
    no_clock = MadeProfile(0, 2)
    no_clock.operator("aten::mm", 20_000, 5)
    del no_clock.head["baseTimeNanoseconds"]
    files.append(no_clock.write(tmp_path / "no_clock.json"))
    path, said = convert(run, "--kineto", *files)
    lines = [line for line in said.splitlines() if "not placed" in line]
    for name, why in (
        ("nobody", "it names no rank (distributedInfo), and its pid 77 is none of the run's"),
        ("other_rank", "it is of rank 5, which the run does not have"),
        ("late", "it was recorded 3,600 s after the rank's trace begins, and not while the run was traced"),
        ("no_clock", "it has no baseTimeNanoseconds, so its time is unknown"),
    ):
        assert f"analysis: {tmp_path}/{name}.json: not placed: {why}" in lines
    assert len(lines) == 4
    with open_trace(path) as trace:
        kernels = trace.rows(f"select upid, count(*) as n from {SLICES} where category = 'kernel' group by 1")
        assert len(kernels) == 2 and {count for _, count in kernels} == {6}


def test_absolute_times_of_older_versions(tmp_path: Path) -> None:
    training().write(tmp_path / "run")
    made = MadeProfile()
    made.operator("aten::mm", 20_000, 5)
    for event in made.events:
        if "ts" in event:
            event["ts"] += BASE_NS // 1000
    del made.head["baseTimeNanoseconds"]
    path, _ = convert(tmp_path / "run", "--kineto", made.write(tmp_path / "old.json"))
    with open_trace(path) as trace:
        assert trace.rows("select ts, dur from slice where name = 'aten::mm'") == [
            ((BEGIN + 20_000) * 1000, 5_000)
        ]


def test_host_whose_clock_is_ahead(tmp_path: Path) -> None:
    """A profile is moved as the trace of its rank is."""
    run, ahead = tmp_path / "run", 250_000
    for rank in (0, 1):
        made = training(rank, 2, host=f"n{rank}")
        for line in made.lines:
            if "ts" in line and rank:
                line["ts"] += ahead
        made.span("clock", "barrier", 9_000 + rank * ahead, 0, when="start")
        made.write(run)
    profile = MadeProfile(1, 2, 1001)
    profile.operator("aten::mm", 20_000 + ahead, 5)
    path, _ = convert(run, "--kineto", profile.write(tmp_path / "one.json"))
    with open_trace(path) as trace:
        assert trace.one("select ts from slice where name = 'aten::mm'") == (BEGIN + 20_000) * 1000


def test_names_are_text_and_overlaps_have_lanes(tmp_path: Path) -> None:
    training().write(tmp_path / "run")
    made = MadeProfile()
    odd = "<script>alert(1)</script>\u2028\ud800"
    made.operator(odd, 20_000, 100)
    made.operator("straddles", 20_050, 100)
    path, _ = convert(tmp_path / "run", "--kineto", made.write(tmp_path / "odd.json"))
    with open_trace(path) as trace:
        rows = trace.rows(f"select name, thread, depth from {SLICES} where category = 'cpu_op' order by ts")
        assert rows == [
            (odd.replace("\ud800", "?"), "main, profiled", 0), ("straddles", "main, profiled overlap 1", 0),
        ]  # fmt: skip


def test_too_many_slices_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis.perfetto import convert as conversion
    from analysis.perfetto import profiles
    from analysis.trace import kineto

    training().write(tmp_path / "run")
    made = MadeProfile()
    for number in range(50):
        made.operator("aten::mm", 20_000 + 10 * number, 5)
    file = made.write(tmp_path / "many.json")
    monkeypatch.setattr(profiles, "MAX_SLICES", 40)
    summary = conversion.convert_to_pftrace(tmp_path / "run", tmp_path / "a.pftrace", kineto=[file])
    assert summary.notes == ["10 slices of profiles left out, beyond 40: choose --ranks or --steps"]
    monkeypatch.setattr(kineto, "MAX_ELEMENTS", 30)
    summary = conversion.convert_to_pftrace(tmp_path / "run", tmp_path / "b.pftrace", kineto=[file])
    assert summary.notes == ["many.json: more than 30 events: only the first are shown; profile fewer steps"]


def test_mistakes(made: Path, tmp_path: Path) -> None:
    """One line, exit code 2, and no file; but a damaged profile of the run's own is only said."""
    texts = {
        "empty.json": b"", "list.json": b"[]", "no_events.json": b"{}", "text.json": b"hello",
        "cut.json": b'{"traceEvents": [{"ph": "X"', "deep.json": b'{"traceEvents": [' + b"[" * 100_000,
        "cut.json.gz": gzip.compress(gpu_steps().text().encode())[:-200],
        "bad.json.gz": b"\x1f\x8b\x08" + bytes(100),
    }  # fmt: skip
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.json").mkdir()
    for name in (*texts, "folder.json", "missing.json"):
        _, said = convert(made, "--kineto", tmp_path / name, code=2)
        assert len(said.splitlines()) == 1 and f"{tmp_path}/{name}: " in said
        assert not (made / "out.pftrace").exists()
    for more in (["--posix"], ["--format", "json"]):
        _, said = convert(made, *more, "--kineto", tmp_path / "x.json", code=2)
        assert "leave one of them out" in said
    next((made / "profile").iterdir()).write_bytes(b"{")
    _, said = convert(made)
    assert said.count("the trace is without it") == 1
