"""Traces made to harm, one by one: none ends a command by a signal or a traceback, or takes its memory."""

import gzip
import json
import os
import socket
from pathlib import Path

import pytest
from support.analysis_command import run_hostile
from support.fuzzing import Outcome, check
from support.made_traces import BEGIN, Made, training

from analysis.tables import check as coverage
from analysis.trace import events


def event(**more: object) -> str:
    return json.dumps(
        {"name": "read", "cat": "POSIX", "ph": 1, "pid": 7, "tid": 7, "ts": BEGIN, "dur": 5} | more
    )


def line(args: str, **more: str) -> str:
    fields = {"name": '"n"', "cat": '"c"', "ph": '"X"', "ts": "5"} | more
    return "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + ',"args":' + args + "}"


def cm(key: str, value: str) -> str:
    return (
        f'{{"name":"CM","cat":"dftracer","pid":7,"tid":7,"ph":4,"args":{{"name":"{key}","value":{value}}}}}'
    )


GOOD = event(args={"ret": 10})
HOSTILE = {
    "arguments of three bytes": '{"name":"n","cat":"c","ph":"X","args":{' + '"",' * 78 + "}}",
    "a hundred thousand arguments": line("{" + '"":1,' * 100_000 + "}"),
    "a key that does not close": '{"name\n' + " " * 2_000_000 + '"A\n' + GOOD,
    "an argument that does not close": '{"ph":1,"args":{"a\n' + " " * 100_000 + '"A":1}}',
    "a hash that does not close": '{"ph":1,"args":{"hhash":"\n' + '"' * 1000,
    "times at both ends": "\n".join(event(ts=ts, args={"ret": 9}) for ts in (9 * 10**18, -9 * 10**18)),
    "a time with digits too many": event(ts=BEGIN * 1000, args={"ret": 9}) + "\n" + GOOD,
    "a duration with digits too many": event(dur=10**15, args={"ret": 9}) + "\n" + GOOD,
    "two events years apart": "\n".join(
        event(ts=ts, dur=dur, args={"ret": 9}) for ts, dur in ((1, 5), (2**53, 2**46))
    ),
    "a world of many ranks": cm("world_size", '"99999999999"') + "\n" + GOOD,
    "a rank that is a word": cm("rank", '"abc"') + "\n" + GOOD,
    "a rank that is a list": cm("rank", "[1,[2]]") + "\n" + GOOD,
    "a rank of many digits": cm("rank", "9" * 5000) + "\n" + GOOD,
    "a thread beyond 32 bits": event(pid=1 << 40, tid=-3) + "\n" + GOOD,
    "half of a surrogate pair": GOOD + "\n" + line('{"file":"\\ud800"}', name='"\\ud800"', cat='"\\udfff"'),
    "names that are numbers": line("{}", name="6001", cat="6002") + "\n" + GOOD,
    "nested arguments": line('{"a":' * 100_000 + "}" * 100_000) + "\n" + GOOD,
    "arguments that are not JSON": line('{"a":tru,"b":1+1,"c":"\\q"}') + "\n" + GOOD,
    "numbers without end": line('{"value":1e999,"ret":' + "9" * 5000 + ',"k":0e999}', cat='"counter"'),
    "files that are numbers": event(args={"fhash": 48576, "file": 1 << 40, "fname": 1.5, "ret": 9}),
    "metadata of other types": (
        '{"name":"HH","ph":4,"args":{"name":[1],"value":{}}}\n{"name":"FH","ph":4}\n' + GOOD
    ),
    "an end of another type": line('{"num_events":"x"}', name='"end"', cat='"dftracer"') + "\n" + GOOD,
    "phases of other types": "\n".join(line("{}", ph=ph) for ph in ('"B"', "257", "-1", "1e9", "[]", '""')),
    "a thousand lanes": "\n".join(event(ts=BEGIN + n, dur=10**6 + n) for n in range(3000)),
    "a thread for each event": "\n".join(event(tid=n) for n in range(20_000)),
    "a counter for each event": "\n".join(
        line('{"value":1}', cat='"counter"', name=f'"{n}"') for n in range(20_000)
    ),
    "an epoch for each event": "\n".join(
        event(cat="train", name="step", ts=BEGIN + n, args={"epoch": n}) for n in range(5000)
    ),
    "bytes that are not UTF-8": GOOD + "\n" + line('{"k":[\0"\xff"]}'),
    "empty lines": "\n" * 5_000_000 + GOOD,
}  # fmt: skip


def run(folder: Path, *words: str) -> Outcome:
    command, *rest = words
    done = run_hostile(command, folder, *rest, seconds=60)
    check(done)
    return done


@pytest.mark.parametrize("what", HOSTILE)
def test_no_line_breaks_a_command(tmp_path: Path, what: str) -> None:
    """By the commands that read traces in ways of their own."""
    (tmp_path / "a.pfw.gz").write_bytes(gzip.compress(HOSTILE[what].encode("latin-1", "replace") + b"\n", 1))
    for command in ("perfetto", "summary"):
        run(tmp_path, command)


def test_what_is_out_of_range_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.pfw"
    bad = [event(ts=1 << 56), event(dur=1 << 60), event(pid=1 << 32), event(ts=-1), line("[" * 99)]
    path.write_text("\n".join([GOOD, *bad, GOOD]) + "\n")
    (process,) = events.read_processes(path)
    assert (process.events, process.bad_lines) == (2, 5)


def test_a_gzip_bomb_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pfw.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD.encode() + b"\n")
        for _ in range(1000):
            file.write(bytes(1 << 20))
    done = run(path, "perfetto", "-o", str(tmp_path / "out"))
    assert "unreadable" in done.err and "(1 events" in done.out


def test_a_long_line_is_left_out_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pfw"
    path.write_text(
        GOOD + "\n" + " " * (12 << 20) + "\n" + GOOD + "\n" + "x" * (3 << 20) + "\n" + GOOD + "\n"
    )
    (process,) = events.read_processes(path)
    assert process.events == 3
    assert process.loss.long + process.bad_lines > 0


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "dangling link", "loop", "empty", "another's"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    training(0, 1, steps=2).write(tmp_path)
    path = tmp_path / "trace" / "x.pfw.gz"
    with socket.socket(socket.AF_UNIX) as one:
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            one.bind(os.path.relpath(path))
        elif kind == "dangling link":
            path.symlink_to(tmp_path / "nothing")
        elif kind == "loop":
            path.symlink_to(path)
        else:
            path.touch()
        if kind == "another's":
            path.chmod(0)
        done = run(tmp_path, "check")
        readable = kind == "empty" or (kind == "another's" and os.geteuid() == 0)
        assert readable or (done.code == 2 and "x.pfw.gz" in done.err)


@pytest.mark.parametrize(
    "name", ['q"uote', "back\\slash", "new\nline", b"\xff\xfe".decode(errors="surrogateescape")]
)
def test_a_trace_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    training(0, 1, steps=2).write(folder)
    assert run(folder, "perfetto").code == 0


@pytest.mark.parametrize(
    "file", ['/d/q"uote', "/d/back\\slash", "/d/back\\nx", "/d/new\nline", "/d/é", "/d/\udcff"]
)
def test_check_knows_a_file_by_any_name(tmp_path: Path, file: str) -> None:
    """As DFTracer 4 writes it, and as JSON."""
    raw = os.fsencode(file)
    written = bytes(32 if c in b'"\\' or c < 32 else c for c in raw)
    for number, name in enumerate((written, json.dumps(file)[1:-1].encode())):
        run_dir = tmp_path / str(number)
        made = Made(0, 1)
        made.posix("read", 5, 3, "PATH", ret=100)
        path = made.write(run_dir)
        text = gzip.decompress(path.read_bytes()).replace(b'"PATH"', b'"' + name + b'"')
        path.write_bytes(gzip.compress(text))
        (run_dir / "results.json").write_text(
            json.dumps({"bytes_read": {"0": {file: 100}}, "bytes_written": {"0": {}}})
        )
        if number == 0 or "\udcff" not in file:
            rows, *_ = coverage.check_run(run_dir)
            assert [row.missed for row in rows] == [0]
