"""Takes the pictures of the README, report.png and perfetto.png, from a run of today: the demo's.

usage: ./3_train.sh && python docs/screenshots.py results/<the demo's run>

It needs chromium and what ./0_setup_env.sh --dev installs.
"""

import sys
import tempfile
import threading
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from support.browser import Browser, chromium  # noqa: E402

from analysis.perfetto import view  # noqa: E402
from analysis.perfetto.links import make_link  # noqa: E402
from analysis.report import report  # noqa: E402
from analysis.tables.gather import gather_tables  # noqa: E402

DRAWN_MS = 5000  # the UI draws tracks one after the other


def take_report(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.wait_for("document.querySelectorAll('figure svg').length > 3")
    browser.picture(DOCS / "report.png")


def take_trace(browser: Browser, run: Path) -> None:
    """A step in the middle of the training and its neighbours, as `analysis view` shows them."""
    steps = gather_tables(run)["steps"].sort("rank", "ts")
    step = steps.row(len(steps) // 4, named=True)  # of the first ranks
    server = view.make_server(view.find_trace(run, None), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        sight = make_link(step["ts"], step["wall_us"]).partition("#")[2]
        browser.open(f"{server.address}#{sight}")
        browser.wait_for("globalThis.app?.trace?.workspace?.pinnedTracks?.length > 2")
        browser.wait_for(f"(globalThis.since ??= Date.now()) < Date.now() - {DRAWN_MS}")
        browser.picture(DOCS / "perfetto.png")
    finally:
        server.shutdown()
        server.server_close()


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report.write_report(run, Path(folder) / "report.html")
        with chromium(Path(folder) / "narrow", "1280,1060") as browser:
            take_report(browser, Path(folder) / "report.html")
        with chromium(Path(folder) / "wide", "1600,1150") as browser:
            take_trace(browser, run)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
