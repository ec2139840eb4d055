"""Traces as columns: the scanner against Python's json, damaged files, foreign files, clocks of hosts."""

import gzip
import json
import random
from pathlib import Path

import pytest
from support import trace_processor, traced
from support.made_traces import Made

from analysis.perfetto import convert
from analysis.tables.gather import gather_tables
from analysis.trace import clocks, events
from analysis.trace.process import TracedProcess
from common.errors import UserError


def make_event(**fields: object) -> dict:
    known = {
        "id": 1,
        "name": "read",
        "cat": "data",
        "type": 6,
        "pid": 11,
        "tid": 12,
        "ts": 1000,
        "dur": 5,
        "ph": 1,
    }
    return {**known, "args": {}, **fields}


def write(path: Path, records: list[dict], **style: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, **style) + "\n" for record in records)  # type: ignore[arg-type]
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def random_records(count: int) -> list[dict]:
    rng = random.Random(0)

    def value() -> object:
        texts = ["", 'q"uote', "back\\slash", "tab\t", "é☃", "x" * rng.randrange(40)]
        numbers = [
            rng.randrange(-(10**17), 10**17),
            rng.randrange(99),
            rng.random() * 10 ** rng.randrange(-9, 9),
        ]
        return rng.choice([*texts, *numbers, True, None, {"a": [1, {"b": "}"}]}, [1, 2]])

    keys = ["alpha", "beta", "offset", "epoch", "value", "split", "a key", "k" * 30]
    return [
        make_event(
            name=rng.choice(["a", "b" * 9, 'n"', "é"]), cat=rng.choice(["data", "train", "x" * 20]),
            ts=rng.randrange(10**16), dur=rng.randrange(10**6), tid=rng.randrange(2**31),
            args={key: value() for key in rng.sample(keys, rng.randrange(len(keys)))},
        )
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("style", [{"separators": (",", ":")}, {"ensure_ascii": False}])
def test_same_as_python_json(tmp_path: Path, style: dict) -> None:
    records = random_records(3000)
    table = events.load_events(write(tmp_path / "t.pfw.gz", records, **style))
    records.sort(key=lambda record: record["ts"])
    assert len(table) == len(records)
    for row, record in zip(table.iter_rows(named=True), records, strict=True):
        assert [row[k] for k in ("name", "cat", "tid", "ts", "dur")] == [
            record[k] for k in ("name", "cat", "tid", "ts", "dur")
        ]
        found = json.loads(row["args"]) if row["args"] else {}
        for key in ("offset", "epoch", "value", "split"):
            if row[key] is not None:
                assert key not in found
                found[key] = row[key]
        expected = record["args"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key in ("offset", "epoch") and isinstance(value, float):
                assert found[key] == int(value)
            elif isinstance(value, float) or (key == "value" and isinstance(value, int)):
                assert found[key] == pytest.approx(value, rel=1e-12)
            else:
                assert found[key] == value


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.pfw.gz", random_records(2000))
    whole = events.load_events(path)
    monkeypatch.setattr("analysis.trace.lines.BLOCK", 5000)
    assert len(list(events.read_batches(path))) > 20
    assert events.load_events(path).equals(whole)


def test_real_ranks(tmp_path: Path) -> None:
    run = traced.run(tmp_path, traced.TRAINING, world=3)
    found = events.read_processes(run)
    assert [(p.rank, p.local_rank, p.world_size, p.host, p.role) for p in found] == [
        (rank, rank, 3, "node7", "train") for rank in range(3)
    ]
    assert all(sorted(p.threads.values()) == ["main", "prefetch train"] for p in found)
    assert all(set(p.barriers) == {"start", "end"} and not p.lost for p in found)
    assert all(p.events == p.expected for p in found)
    table = events.load_events(run)
    preads = table.filter((table["name"] == "pread64") & (table["rank"] == 2))
    assert preads["ret"].to_list() == [1000] * 6
    assert sorted(preads["offset"].to_list()) == [0, 1000, 2000, 3000, 4000, 5000]
    assert set(preads["file"].cast(str)) == {str(run / "data2.bin")}
    steps = table.filter((table["name"] == "step") & (table["cat"] == "train"))
    assert sorted(zip(steps["rank"], steps["batch"], strict=True)) == [
        (r, b) for r in range(3) for b in range(3)
    ]
    losses = table.filter((table["name"] == "loss") & (table["rank"] == 0))["value"].to_list()
    assert losses == pytest.approx([0.5, 0.25, 1 / 6], rel=1e-5)


def test_cut_at_every_place(tmp_path: Path) -> None:
    """Whatever is left of a file is read as far as it goes, and the loss is told."""
    run = traced.run(tmp_path / "run", traced.TRAINING)
    (path,) = events.find_trace_files(run)
    raw = path.read_bytes()
    whole = len(events.load_events(path))
    last = -1
    for size in range(0, len(raw), max(1, len(raw) // 40)):
        cut = tmp_path / "cut.pfw.gz"
        cut.write_bytes(raw[:size])
        (process,) = events.read_processes(cut)
        tail = process.loss.cut and size > len(raw) - 20  # only gzip's own checksum is missing
        assert tail or "no end record" in process.lost
        assert process.events >= last, size
        last = process.events
    assert 0 < last <= whole + 5


def test_damage_in_the_middle_costs_one_member(tmp_path: Path) -> None:
    records = [make_event(ts=1000 + i) for i in range(300)]
    members = [
        gzip.compress("".join(json.dumps(r) + "\n" for r in records[i : i + 100]).encode())
        for i in (0, 100, 200)
    ]
    half = len(members[1]) // 2
    broken = members[1][:half] + bytes(8) + members[1][half + 8 :]
    path = tmp_path / "t.pfw.gz"
    path.write_bytes(members[0] + broken + members[2] + b"\0" * 512)
    table = events.load_events(path)
    assert table["ts"].to_list()[:100] == list(range(1000, 1100))
    assert table["ts"].to_list()[-100:] == list(range(1200, 1300))
    (process,) = events.read_processes(path)
    assert process.loss.bytes > 0 and "unreadable" in process.lost


def test_lines_that_are_not_json_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.pfw"
    good = json.dumps(make_event())
    path.write_text(
        f'[\n{good},\n{{"name":"x\n{good}\nnonsense\n{{"ph":1,"name":3}}\n{good}\n{{"name":"cut", "ca'
    )
    (process,) = events.read_processes(path)
    assert process.events == 4  # a name that is a number is still an event
    assert process.bad_lines == 2 and process.loss.partial == len('{"name":"cut", "ca')


def test_path_with_a_quote(tmp_path: Path) -> None:
    """DFTracer writes such a record as it is: no JSON, but all there."""
    path = tmp_path / "t.pfw"
    about = '"name":"FH","cat":"dftracer","type":1,"pid":1,"tid":1,"ph":4'
    text = f'{{{about},"args":{{"hhash":"a","name":"/d/o"dd.bin","value":"ff"}}}}\n'
    path.write_text(text + json.dumps(make_event(cat="POSIX", args={"fhash": "ff", "ret": 3})) + "\n")
    assert events.load_events(path)["file"].to_list() == ['/d/o"dd.bin']
    assert events.read_processes(path)[0].bad_lines == 0


def test_dftracer_1_files(tmp_path: Path) -> None:
    """Other people's traces: ph is a letter, numbers stand between quotes, nobody says a rank."""
    for number in range(2):
        write(
            tmp_path / f"app-{number}.pfw.gz",
            [
                make_event(ph="M", name="FH", cat="dftracer", args={"name": "/d/x", "value": "ff"}),
                make_event(ph="X", cat="POSIX", pid=7, args={"fhash": "ff", "ret": "512", "offset": "-1"}),
            ],
        )
    table = events.load_events(tmp_path)
    assert table["ret"].to_list() == [512, 512] and table["offset"].to_list() == [-1, -1]
    assert sorted(table["rank"]) == [0, 1] and set(table["file"].cast(str)) == {"/d/x"}


def test_times_in_ns_and_numbers_in_quotes(tmp_path: Path) -> None:
    """DFTRACER_TIME_METRIC=NS gives thousandfold times; DFTracer 1 wrote some numbers between quotes."""
    at = 1_795_729_008_798_435
    records = [
        make_event(ts=at * 1000, dur=8_000),
        make_event(ts=(at + 1) * 1000, dur=1_000),
        make_event(ph="X", ts=str(at + 2), dur="5", pid="11", tid="12", cat="POSIX", args={"ret": "512"}),
        make_event(ph=2, cat="sys", name="cpu", ts=at, dur=0, args={"user_pct": 3.5}),
        make_event(ph="C", cat="sys", name="cpu", ts=at, dur=0, args={"user_pct": 3.5}),
    ]
    path = write(tmp_path / "t.pfw.gz", records)
    table = events.load_events(path)
    assert table["ts"].to_list() == [at, at + 1, at + 2] and table["dur"].to_list() == [8, 1, 5]
    (process,) = events.read_processes(path)
    assert process.bad_lines == 0 and "2 counters of DFTracer (ph 2) are not shown" in process.lost
    assert "killed or" not in process.lost  # nobody knows that


def test_sums_of_calls_are_refused(tmp_path: Path) -> None:
    sums = [make_event(ph=3, name="read", cat="POSIX", args={"dft_cnt": 9, "ret_sum": 900}) for _ in range(5)]
    with pytest.raises(UserError, match="DFTRACER_ENABLE_AGGREGATION=1.: record the trace without"):
        events.load_events(write(tmp_path / "t.pfw.gz", sums))
    mixed = write(tmp_path / "mixed.pfw.gz", [*[make_event(ts=1000 + i) for i in range(9)], *sums])
    (process,) = events.read_processes(mixed)
    assert process.events == 9
    assert (
        "5 sums of many calls (DFTRACER_ENABLE_AGGREGATION) are not shown: 45 calls of POSIX/read"
        in process.lost
    )


def test_sums_of_calls_are_counted_and_named(tmp_path: Path) -> None:
    """As DFTracer's documentation shows them; earlier versions wrote them as counters."""
    varied = {"dft_cnt": 2, "dur_min": 379, "dur_max": 444, "dur_sum": 1232, "flags_sum": 130}
    sums = [
        make_event(ph=3, name="openat", cat="POSIX", args=varied),
        make_event(ph=3, name="creat64", cat="POSIX", args={"dft_cnt": 1, "dur": 185, "mode": 2}),
        make_event(ph="C", name="openat", cat="POSIX", args=varied),
        make_event(ph=2, name="cpu", cat="sys", args={"user_pct": 12.5}),
        *(make_event(ph=3, name=f"n{n}<b>", cat="C_APP", args={}) for n in range(2)),
    ]
    path = write(tmp_path / "t.pfw.gz", [*[make_event(ts=1000 + i) for i in range(9)], *sums])
    (process,) = events.read_processes(path)
    assert (process.events, process.sums, process.counters) == (9, 5, 1)
    assert process.summed == {"POSIX/openat": 4, "POSIX/creat64": 1, "C_APP/n0<b>": 1, "C_APP/n1<b>": 1}
    assert (
        "4 calls of POSIX/openat, 1 call of C_APP/n0<b>, 1 call of C_APP/n1<b> and 1 more names"
        in process.lost
    )


def test_forks_and_services_are_no_ranks(tmp_path: Path) -> None:
    def begin(pid: int, parent: int) -> dict:
        return make_event(cat="dftracer", name="start", pid=pid, args={"ppid": parent})

    for name, pid, parent in (("app-1.pfw", 11, 1), ("app-2.pfw", 12, 1), ("app-1-fork.x.pfw", 13, 11)):
        write(tmp_path / "other" / name, [begin(pid, parent), make_event(pid=pid)])
    found = events.read_processes(tmp_path / "other")
    assert [(p.pid, p.rank) for p in found] == [(11, 0), (13, 0), (12, 1)]

    for rank in range(2):
        Made(rank, 2).write(tmp_path / "ours")
    write(tmp_path / "ours/trace/service.pfw.gz", [make_event(cat="sys", pid=77, ts=1_795_252_103_000_000)])
    (job,) = clocks.group_launches(events.read_processes(tmp_path / "ours"))
    assert len(job) == 3


def test_hosts_meet_at_the_barrier(tmp_path: Path) -> None:
    for rank, host, late in ((0, "a", 0), (1, "a", 3), (2, "b", 5000), (3, "b", 5004)):
        name = {"ph": 4, "name": "CM", "cat": "dftracer"}
        write(
            tmp_path / f"r{rank}.pfw.gz",
            [
                make_event(**name, args={"name": "rank", "value": str(rank)}),
                make_event(**name, args={"name": "host", "value": host}),
                make_event(cat="clock", name="barrier", ts=10_000 + late, args={"when": "start"}),
                make_event(ts=20_000 + late),
                make_event(cat="clock", name="barrier", ts=30_000 + late, args={"when": "end"}),
            ],
        )
    found = events.read_processes(tmp_path)
    assert clocks.measure_clock_skew(found) == {"start": 5004, "end": 5004}
    known = clocks.make_clocks(found)  # one offset per host: its ranks share a clock
    assert [known[p.path].shift for p in found] == [0, 0, -5000, -5000]
    assert [known[p.path].drift for p in found] == [0, 0, 0, 0]
    table = events.load_events(tmp_path).filter(events.pl.col("name") == "read")
    assert table["ts"].to_list() == [20_000, 20_000, 20_003, 20_004]


def test_a_clock_that_goes_wrong_is_set_right_along_the_way(tmp_path: Path) -> None:
    """Host b is 40 ms ahead and gains 20 us a second; ten steps that both ranks take at the same moments."""
    for rank, host, ahead, gain in ((0, "a", 0, 0), (1, "b", 40_000, 20)):
        made = Made(rank, 2, host)

        def told(at: int, ahead: int = ahead, gain: int = gain) -> int:
            return at + ahead + at * gain // 1_000_000

        if ahead:  # 30 and 10 us: what the round trips leave uncertain
            made.span("clock", "offset", told(999_000), 0, when="start", ahead_us=ahead + 30, error_us=40)
        made.span("clock", "barrier", told(1_000_000), 0, when="start")
        begin, end = told(1_200_000), told(10_950_000)
        for step in range(10):
            at, until = told(1_000_000 * step + 1_500_000), told(1_000_000 * step + 1_900_000)
            made.span("torchrec", "forward", at + 5, until - at - 5, step=step)
            made.span("train", "step", at, until - at, epoch=0, step=step)
        made.span("train", "epoch", begin, end - begin, epoch=0)
        if ahead:
            at = told(10_999_000)
            made.span("clock", "offset", at, 0, when="end", ahead_us=ahead + 230, error_us=40)
        made.span("clock", "barrier", told(11_000_000 + 3_000 * rank), 0, when="end")
        made.write(tmp_path)
    known = {clock.drift: clock for clock in clocks.make_clocks(events.read_heads(tmp_path)).values()}
    assert set(known) == {0, -200} and known[-200].rate == pytest.approx(-20e-6, rel=1e-3)
    begun = {}
    for table in (events.load_events(tmp_path), gather_tables(tmp_path)["steps"].rename({"wall_us": "dur"})):
        if "name" in table.columns:
            table = table.filter((table["cat"] == "train") & (table["name"] == "step"))
        one, two = (table.filter(table["rank"] == rank).sort("ts") for rank in (0, 1))
        assert len(one) == 10 and (one["ts"] - two["ts"]).abs().max() <= 12  # type: ignore[operator]
        assert (one["dur"] - two["dur"]).abs().max() <= 2  # type: ignore[operator]
        begun[len(begun)] = two["ts"].to_list()
    assert begun[0] == begun[1]
    summary = convert.convert_to_pftrace(tmp_path)
    assert summary.moved == 0  # what was inside another slice still is
    assert summary.clocks == [
        "clock of b: moved by -40030 us, right within 40 us (by round trips); "
        "it gains 20 us per s, give or take 8: corrected"
    ]
    with trace_processor.open_trace(summary.path) as trace:
        sql = "select ts from slice join thread_track t on track_id = t.id join thread using (utid) "
        sql += "join process using (upid) where slice.name glob 'step *' and process.name like '{}%' "
        sql += "order by ts"
        one, two = (trace.rows(sql.format(name)) for name in ("rank 0", "rank 1"))
        assert len(one) == 10
        assert all(abs(a - b) <= 12_000 for (a,), (b,) in zip(one, two, strict=True))


def test_the_barrier_at_the_end_is_found_from_the_file_s_end_alone(tmp_path: Path) -> None:
    """Members as DFTracer writes them, more than is looked at; and bytes that look like a header."""
    noise = random.Random(1).randbytes(3000).replace(b"\n", b"").hex()
    members = [
        gzip.compress((json.dumps(make_event(ts=number, args={"x": noise + str(number)})) + "\n").encode(), 0)
        for number in range(400)
    ]
    end = json.dumps(make_event(cat="clock", name="barrier", ts=77_000, args={"when": "end"})) + "\n"
    path = tmp_path / "t.pfw.gz"
    path.write_bytes(b"".join(members) + gzip.compress(b"\x1f\x8b\x08\n" + end.encode(), 0))
    assert path.stat().st_size > 2 << 20
    process = TracedProcess(path)
    events.read_end_marks(process)
    assert process.barriers == {"end": 77_000}
    path.write_bytes(b"".join(members))
    process = TracedProcess(path)
    events.read_end_marks(process)
    assert process.barriers == {}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        events.load_events(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no traces"):
        events.load_events(tmp_path)


def test_a_run_that_went_on_has_several_jobs() -> None:
    """Stopped, and run again on other machines ten minutes later: a barrier for each job."""

    def began(rank: int, host: str, at: int, name: str) -> TracedProcess:
        return TracedProcess(Path(name), rank, world_size=2, host=host, first=at - 5, barriers={"start": at})

    one = [began(0, "a", 1000, "one0"), began(1, "b", 1030, "one1")]
    two = [began(0, "c", 600_001_000, "two0"), began(1, "d", 600_001_007, "two1")]
    worker = TracedProcess(Path("worker"), 1, world_size=2, host="d", role="worker", first=600_002_000)
    found = [two[1], one[0], worker, two[0], one[1]]
    jobs = [{p.path.name for p in job} for job in clocks.group_launches(found)]
    assert jobs == [{"one0", "one1"}, {"two0", "two1", "worker"}]
    shifts = {path.name: clock.shift for path, clock in clocks.make_clocks(found).items()}
    assert shifts == {"one0": 0, "one1": -30, "two0": 0, "two1": -7, "worker": -7}
    assert clocks.measure_clock_skew(found) == {"start": 30}
    told = clocks.describe_moves(found, clocks.make_clocks(found))
    assert told[0] == (
        "clock of b in launch 1: moved by -30 us, right within 5000 us (by barriers); "
        "its drift is not known: no mark at the end"
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_drift_is_made_of_late_ranks(seed: int) -> None:
    """Host b is 3 s ahead and drifts not at all, but ranks leave the barriers up to 3 ms apart."""
    rng = random.Random(seed)
    ranks = []
    for rank in range(4):
        ahead = 3_000_000 * (rank > 1)
        at = {"start": 10_000_000 + ahead, "end": 20_000_000 + ahead}
        ranks.append(
            TracedProcess(
                Path(str(rank)), rank, world_size=4, host="ab"[rank > 1], first=1,
                barriers={when: us + rng.randrange(3000) for when, us in at.items()},
            )
        )  # fmt: skip
    found = clocks.make_clocks(ranks)
    assert all(clock.drift == 0 for clock in found.values())
    assert abs(found[Path("2")].shift + 3_000_000) <= found[Path("2")].error <= 11_000
    for when, us in (("start", 13_000_000), ("end", 23_000_000)):  # with round trips: far better
        ranks[2].offsets[when] = (us, 3_000_000 + rng.randrange(-60, 60), 60)
    better = clocks.make_clocks(ranks)[Path("3")]
    assert better.drift == 0 and abs(better.shift + 3_000_000) <= 60 and better.error <= 60


@pytest.mark.parametrize("by", ["round trips", "barriers"])
def test_an_absurd_drift_is_reported(by: str) -> None:
    """2,000 us per s: round trips prove it, barriers do not; the report says both."""
    one, two = (
        TracedProcess(Path(h), r, world_size=2, host=h, first=1, barriers={"start": 10_000_000, "end": end})
        for r, h, end in ((0, "a", 110_000_000), (1, "b", 110_200_000))
    )
    if by == "round trips":
        two.offsets = {"start": (10_000_000, 0, 50), "end": (110_200_000, 200_000, 50)}
    known = clocks.make_clocks([one, two])
    (sentence,) = clocks.describe_moves([one, two], known)
    assert "it gains 2e+03 us per s" in sentence
    if by == "barriers":
        assert known[two.path].rate == 0 and "NOT corrected" in sentence
    else:
        assert known[two.path].correct_time(110_200_000) == pytest.approx(110_000_000, abs=1)
        assert "corrected, though a clock is seldom that wrong" in sentence
