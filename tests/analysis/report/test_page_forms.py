"""The report's page as people see it: narrow, wide, dark, printed, read aloud, and used by keyboard."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from support.browser import Browser, chromium
from support.made_traces import training
from support.reports import METRICS, analysis

LONG = "/a/file/system/with/long/paths/of/a/project/data/criteo/npy"
SAVED = f"{LONG}/step_40/0a7f216a54072e7f216a54072e_rank"
PAPER = 1032  # pixels between the margins of A4, landscape
FORMS = [(width, scheme) for width in (800, 1280, 1920) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks with all that a page can show: start-up files, seeks, a checkpoint, an evaluation."""
    folder = tmp_path_factory.mktemp("forms") / "a run"
    for rank in range(2):
        made = training(rank, 2, wait=3_000)
        made.posix("read", 200, 900, "/env/lib/python3.11/site-packages/torch/__pycache__/nn.cpython-311.pyc",
                   ret=4096)  # fmt: skip
        made.posix("lseek64", 20_500, 700, f"{LONG}/day_0_dense.npy", 7, ret=1 << 40)
        made.posix("read", 22_000, 800, f"{LONG}/day_0_dense.npy", 7, ret=1 << 20)
        made.posix("write", 505_000, 4_000, f"{SAVED}_{rank}.safetensors", ret=50 << 20, cat="STDIO")
        made.span("checkpoint", "save", 504_000, 6_000, step=40, bytes=50 << 20)
        made.span("eval", "evaluate", 511_000, 9_000, split="val")
        made.write(folder)
    config = {
        "data": {"batch_size": 256, "in_memory_binary_criteo_path": LONG},
        "model": {"embedding_dim": 16},
        "launch": {
            "device": "cpu", "model": "DLRM", "versions": {"torch": "2.13.0"},
            "command": ["python", "-m", "dlrm.train", "--in_memory_binary_criteo_path", f"{LONG}/a b"],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"samples_per_second": 1000.0, "test_auroc": 0.81}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    analysis("report", folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile"), "1280,900") as opened:
        yield opened


def show(browser: Browser, run: Path, width: int, scheme: str = "light", media: str = "") -> None:
    """The page as wide as this, with every folded table open."""
    browser.call(
        "Emulation.setEmulatedMedia",
        media=media,
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
    )
    browser.open((run / "report.html").as_uri())
    browser.wait_for(f"document.readyState === 'complete' && innerWidth === {width}")
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")


# Every visible text with its contrast to what is behind it, where that is less than 4.5.
FAINT = """(() => {
  const parse = s => s.match(/[0-9.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((a, v, i) => a + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const ground = e => { for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; }
    return [255, 255, 255]; };
  const behind = t => {
    const r = t.getBoundingClientRect(), x = (r.left + r.right) / 2, y = (r.top + r.bottom) / 2;
    const shapes = [...t.ownerSVGElement.querySelectorAll('rect')].filter(s => {
      const b = s.getBoundingClientRect(), c = getComputedStyle(s);
      return x > b.left && x < b.right && y > b.top && y < b.bottom && c.fill !== 'rgba(0, 0, 0, 0)'
        && +c.fillOpacity === 1 && s.compareDocumentPosition(t) & 4; });
    return shapes.length ? parse(getComputedStyle(shapes.at(-1)).fill) : ground(t.ownerSVGElement); };
  const found = [], seen = [];
  for (const walk = document.createTreeWalker(document.querySelector('main'), 4); walk.nextNode();) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !e.getClientRects().length) continue;
    const c = getComputedStyle(e), svg = e.ownerSVGElement;
    const value = svg ? ratio(parse(c.fill), behind(e)) : ratio(parse(c.color), ground(e));
    seen.push(text);
    if (value < 4.5) found.push(text + ': ' + value.toFixed(2));
  }
  return [seen.length, found]; })()"""

# Texts that leave their figure, cells that do not show all of their text, tables wider than their frame.
CUT_OFF = """(() => {
  const found = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const b = svg.getBoundingClientRect();
    for (const t of svg.querySelectorAll('text')) { const r = t.getBoundingClientRect();
      if (r.left < b.left - 1 || r.right > b.right + 1 || r.top < b.top - 1 || r.bottom > b.bottom + 1)
        found.push(t.textContent); } }
  for (const e of document.querySelectorAll('main *:not(svg *)')) {
    if (e.matches('td.path, .scroll') || !e.getClientRects().length) continue;
    if (getComputedStyle(e).display !== 'inline' && e.scrollWidth > e.clientWidth + 1)
      found.push(e.tagName + ' ' + e.textContent.slice(0, 60)); }
  return found; })()"""
WIDE_TABLES = """[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => e.getAttribute('aria-label'))"""
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), FORMS)
def test_on_a_screen(browser: Browser, run: Path, width: int, scheme: str) -> None:
    show(browser, run, width, scheme)
    assert browser.run(OVERFLOW) <= 0
    assert browser.run(CUT_OFF) == []
    if width >= 1280:  # a narrower window scrolls a table inside its frame
        assert browser.run(WIDE_TABLES) == []
    seen, faint = browser.run(FAINT)
    assert seen > 300 and faint == []
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.browser
def test_on_paper(browser: Browser, run: Path) -> None:
    """Also from a dark browser: light, nothing scrolls, legends stay with figures, tables repeat headers."""
    show(browser, run, PAPER, "dark", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(OVERFLOW) <= 0
    assert browser.run(CUT_OFF) == [] and browser.run(WIDE_TABLES) == []
    cut = "[...document.querySelectorAll('%s')].filter(e => e.scroll%s > e.client%s + 1).length"
    assert browser.run(cut % (".scroll", "Height", "Height")) == 0
    assert browser.run(cut % ("td.path", "Width", "Width")) == 0
    assert browser.run(FAINT)[1] == []
    styles = "[...new Set([...document.querySelectorAll('%s')].map(e => getComputedStyle(e).%s))]"
    assert browser.run(styles % ("figure", "breakInside")) == ["avoid"]
    assert browser.run(styles % ("thead", "display")) == ["table-header-group"]


@pytest.mark.browser
def test_the_printed_pages(browser: Browser, run: Path, tmp_path: Path) -> None:
    """No sentence or heading is missing or alone, tables have heads on each page, and words are whole."""
    program = shutil.which("pdftotext")
    if program is None:
        pytest.skip("needs pdftotext (poppler-utils)")
    show(browser, run, PAPER)
    browser.print_page(tmp_path / "report.pdf")
    command = [program, "-raw", tmp_path / "report.pdf", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pages = [" ".join(page.split()) for page in text.split("\f")[:-1]]
    summary = json.loads((run / "summary.json").read_text())
    said = [summary["answer"]["text"], *(finding["text"] for finding in summary["findings"])]
    bare = "".join(text.split())
    assert len(said) > 2 and [each for each in said if "".join(each.split()) not in bare] == []
    titles = browser.run("[...document.querySelectorAll('h2, section > h3')].map(h => h.textContent)")
    assert len(titles) > 20 and [title for title in titles if title not in " ".join(pages)] == []
    alone = [page for page in pages[:-1] if len(page) < 60]
    assert alone == []
    # a table that goes on has its head on the next page, too
    head = "rank phase name file size time at tid ts in Perfetto"
    slowest = [page for page in pages if re.search(r"train pread64 /data/day_0_sparse.npy 1.05 MB", page)]
    assert len(slowest) > 1 and all(head in page for page in slowest)


@pytest.mark.browser
def test_read_aloud(browser: Browser, run: Path) -> None:
    """Every figure says what it shows, every table has a name, and headings do not skip a level."""
    show(browser, run, 1280)
    labels = browser.run("""[...document.querySelectorAll('figure[data-spec]')].map(f => {
        const s = f.querySelector('svg[role=img]'); return s && s.getAttribute('aria-label') })""")
    assert len(labels) >= 12 and len(set(labels)) == len(labels)
    assert all(label and ": " in label and len(label) > 30 for label in labels)
    titled = """[...document.querySelectorAll('main section > h3 + figure svg')].every(s =>
        s.getAttribute('aria-label').startsWith(s.closest('section').querySelector('h3').textContent))"""
    assert browser.run(titled)
    by_rank = next(label for label in labels if label.startswith("Where each rank's time went"))
    assert "2 rows" in by_rank and "compute 400 ms" in by_rank
    assert browser.run("[...document.querySelectorAll('.scroll')].every(e => e.getAttribute('aria-label'))")
    assert browser.run("document.querySelectorAll('th:not([scope=col])').length") == 0
    levels = browser.run("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.browser
def test_tables_sort_by_keyboard(browser: Browser, run: Path) -> None:
    show(browser, run, 1280)
    table = "document.querySelector('[aria-label=\"Slowest operations\"] table')"
    column = f"[...{table}.tHead.rows[0].cells].findIndex(c => c.textContent === 'time')"
    values = f"(i => [...{table}.tBodies[0].rows].map(r => +r.cells[i].dataset.v))({column})"
    for direction in ("ascending", "descending"):
        browser.run(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').focus()")
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                         windowsVirtualKeyCode=13)  # fmt: skip
        shown = browser.run(values)
        assert len(shown) > 10 and shown == sorted(shown, reverse=direction == "descending")
        assert browser.run(f"{table}.tHead.rows[0].cells[{column}].getAttribute('aria-sort')") == direction


def test_what_was_run_is_on_the_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    answer = json.loads((run / "summary.json").read_text())["answer"]
    marks = (answer["text"], 'id="findings"', 'id="numbers"', 'id="therun"', "<h3>Where each rank")
    order = [page.index(mark) for mark in marks]
    assert order == sorted(order)
    assert f"python -m dlrm.train --in_memory_binary_criteo_path &#x27;{LONG}/a b&#x27;" in page
    assert "torch 2.13.0" in page and "2026-11-21 09:08:22 UTC" in page
    assert f"{LONG}: 2 files" in page


def test_a_seek_has_no_size_and_start_up_is_apart(run: Path) -> None:
    slowest = pl.read_csv(run / "tables" / "slowest.csv")
    seeks = slowest.filter(pl.col("name") == "lseek64")
    assert len(seeks) == 2 and seeks["size"].null_count() == 2
    assert slowest.filter(pl.col("name") == "write")["size"].to_list() == [50 << 20] * 2
    assert not slowest["file"].str.ends_with(".pyc").any()
    assert pl.read_csv(run / "tables" / "slowest_startup.csv")["dur"].to_list() == [900, 900]


def test_rates_are_no_times_and_a_save_has_none(run: Path) -> None:
    """A save on the main thread is over before its bytes are written."""
    page = (run / "report.html").read_text()
    assert ">read MB per s<" in page and ">write MB per s<" in page
    timeline = pl.read_csv(run / "tables" / "timeline.csv")["read_MB_per_s"].to_list()
    fastest = max(timeline[:60])
    assert f">{fastest:.4g}<" in page or f">{fastest:,.0f}<" in page
    assert not re.search(r">[\d.]+e[+-]?\d+<", page)  # 15,920, not 1.592e+04
    saves = pl.read_csv(run / "tables" / "checkpoints.csv")
    assert saves["bytes"].to_list() == [50 << 20] * 2 and saves["MB_per_s"].null_count() == 2


def test_no_epoch_is_longer_than_the_run(run: Path) -> None:
    wall = json.loads((run / "summary.json").read_text())["metrics"]["wall_seconds"]
    for name in ("epochs", "step_ranges"):
        assert 0.4 < pl.read_csv(run / "tables" / f"{name}.csv")["wall_s"].sum() < wall


def test_files_by_use_and_calls_by_interface(run: Path) -> None:
    use = pl.read_csv(run / "tables" / "file_use.csv").sort("used_by", "access").to_dicts()
    assert use == [
        {"used_by": "one rank", "access": "write only", "files": 2, "requests": 2, "misaligned": 0,
         "bytes_read": 0, "bytes_written": 100 << 20},
        {"used_by": "several ranks", "access": "read only", "files": 2, "requests": 322, "misaligned": 0,
         "bytes_read": (320 + 2) << 20, "bytes_written": 0},
    ]  # fmt: skip
    calls = {row["interface"]: row for row in pl.read_csv(run / "tables" / "interfaces.csv").to_dicts()}
    assert calls["STDIO"]["writes"] == 2 and calls["STDIO"]["bytes_written"] == 100 << 20
    assert calls["POSIX"]["seeks"] == 2 and calls["POSIX"]["bytes_read"] == (322 << 20) + 2 * 4096
