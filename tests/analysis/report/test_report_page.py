"""report, summary and compare on the command line: what they write, how a browser shows it, odd input."""

import gzip
import json
import re
from pathlib import Path

import polars as pl
import pytest
from support.browser import chromium
from support.made_traces import Made, training
from support.reports import METRICS, ROOT, a_run, analysis
from support.trace_processor import open_trace

from analysis.__main__ import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = a_run(tmp_path_factory.mktemp("page") / "a<b>&run", wait=6_000)
    out, errors = analysis("report", folder)
    assert "waiting for data" in out and errors == ""
    return folder


def test_files(run: Path) -> None:
    told = json.loads((run / "summary.json").read_text())
    assert told["ranks"] == 2 and told["hosts"] == ["n0"]
    assert told["metrics"]["samples_per_second"] == told["headline"]["samples per second"] == 1000.0
    assert told["metrics"]["wait_share"] == pytest.approx(0.5, abs=0.01)
    assert told["metrics"]["read_bytes"] == told["headline"]["bytes read"] == 2 * 40 * 4 << 20
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in (*told, *told["metrics"]))
    documented = (ROOT / "docs" / "report.md").read_text()
    assert [key for key in (*told, *told["metrics"]) if f"`{key}`" not in documented] == []
    assert "waiting" in {f["rule"] for f in told["findings"]}
    assert {r["rule"] for r in told["rules"] if r["found"]} == {f["rule"] for f in told["findings"]}
    assert told["breakdown_s"][1]["wait"] == pytest.approx(0.24)
    steps = pl.read_csv(run / "tables" / "steps.csv")
    assert len(steps) == 40 and steps["wall_us"].to_list() == [12_000] * 40
    assert {"breakdown", "phases", "timeline", "files", "sizes", "operations", "startup"} <= {
        path.stem for path in (run / "tables").iterdir()
    }
    assert not list(run.glob("*.part"))


def test_a_model_that_ranks_items(tmp_path: Path) -> None:
    """BERT4Rec has no AUROC: its report shows Recall and NDCG, as tiles and beside the loss."""
    folder = a_run(tmp_path / "run")
    scores = {f"{kind}@{n}": n / 20 for kind in ("Recall", "NDCG") for n in (1, 10, 100)}
    (folder / "results.json").write_text(json.dumps({"score": "NDCG@10", "evaluations": {"val": scores}}))
    lines = [{"step": 40, "epoch": 1, "split": "val", **scores, "time": 1_795_252_102.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS[:2] + lines))
    out, _ = analysis("report", folder)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["val_ndcg_at_10"] == metrics["val_recall_at_10"] == 0.5
    assert "val NDCG@10" in out and "AUROC" not in out and not any("auroc" in name for name in metrics)
    page = (folder / "report.html").read_text()
    assert '"label":"NDCG@10"' in page and '"label":"Recall@10"' in page and '"label":"AUROC"' not in page


def test_gradients_summed_without_a_span_are_said(tmp_path: Path) -> None:
    """The time is communication where a span shows it; the page says so where none does."""
    sentence, seconds = "counts as compute", {}
    for name in ("without", "with"):
        folder = a_run(tmp_path / name)
        if name == "with":
            for rank in range(2):
                made = training(rank, 2)
                for step in range(40):  # inside its backward span
                    at = 10_000 + step * 12_010 + 3_000
                    made.span("communication", "all_reduce", at, 1_000, epoch=0, step=step)
                made.write(folder)
        analysis("report", folder)
        assert (sentence in (folder / "report.html").read_text()) == (name == "without")
        seconds[name] = json.loads((folder / "summary.json").read_text())["breakdown_s"][0]
    for kind, more in (("communication", 0.04), ("compute", -0.04)):
        assert seconds["with"][kind] - seconds["without"][kind] == pytest.approx(more, abs=0.001)


def test_one_file_that_needs_no_network(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert set(re.findall(r"(?:src|href)=[\"']?(#|http)?", page)) == {"#", "http"}
    found = re.findall(r"https?://[^\"' ]+", page)
    assert found.pop() == "http://www.w3.org/2000/svg"  # a name, not an address
    assert found and all(each.startswith("http://127.0.0.1:9001/?1795252102") for each in found)  # clicks
    assert "a&lt;b&gt;&amp;run" in page and "<b>&run" not in page
    assert len(page) < 1_000_000


def test_names_in_sentences_and_colours(run: Path) -> None:
    """Names stand out as code; no two lines of a figure over time can be taken for each other."""
    page = (run / "report.html").read_text()
    words, _, scripts = page.partition('<div id="tip">')
    assert "`" not in words and "<code>rest</code>" in words and "<code>ts</code>" in words
    specs = re.findall(r'<script type="application/json" id="f\d+">(.*)</script>', scripts)
    panels = next(s["panels"] for s in map(json.loads, specs) if s["type"] == "time" and len(s["panels"]) > 3)
    series = {s["name"]: s["color"] for panel in panels if len(panel["series"]) > 1 for s in panel["series"]}
    assert {"compute", "read", "write"} <= series.keys() and len(set(series.values())) == len(series)


@pytest.mark.browser
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", "1280,900") as browser:
        assert browser.open_report(run / "report.html") >= 10
        off = """[...document.querySelectorAll('svg')].flatMap(svg => { const b = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
            return r.left < b.left - 1 || r.right > b.right + 1; }).map(t => t.textContent) })"""
        assert browser.run(off) == []
        assert browser.run(OVERLAPS) == []
        assert "NaN" not in browser.run("document.body.innerHTML")
        # a drag over the timeline zooms in, a double click out again
        ticks = "[...document.querySelectorAll('figure svg')][3].textContent"
        before = browser.run(ticks)
        browser.run(DRAG)
        assert browser.run(ticks) != before
        browser.run(
            "[...document.querySelectorAll('figure svg')][3].dispatchEvent(new MouseEvent('dblclick'))"
        )
        assert browser.run(ticks) == before


OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const both = (r, s) => [Math.min(r.right, s.right) - Math.max(r.left, s.left),
                          Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top)];
  return boxes.flatMap(([a, r], i) => boxes.slice(i + 1)
    .filter(([b, s]) => both(r, s)[0] > 1 && both(r, s)[1] > 3).map(([b]) => a + ' | ' + b)); })"""
DRAG = """(() => {
  const svg = [...document.querySelectorAll('figure svg')][3], b = svg.getBoundingClientRect();
  for (const [name, f] of [['mousedown', 0.3], ['mousemove', 0.4], ['mouseup', 0.5]])
    svg.dispatchEvent(new MouseEvent(name, {clientX: b.left + f * b.width, clientY: b.top + 40})); })()"""


def test_summary_writes_nothing(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    before = sorted(folder.rglob("*"))
    out, _ = analysis("summary", folder)
    assert "rank 1" in out and "I/O hidden while training" in out
    assert sorted(folder.rglob("*")) == before


def test_preprocessing_run(tmp_path: Path) -> None:
    made = Made(0, 1, role="prep")
    made.span("prep", "scan", 0, 50_000, bytes=1_000_000)
    made.span("prep", "write", 50_000, 50_000, bytes=2_000_000)
    made.posix("write", 60_000, 20_000, "/out/day_0.npy", ret=2_000_000)
    made.write(tmp_path)
    out, _ = analysis("report", tmp_path)
    table = pl.read_csv(tmp_path / "tables" / "preprocessing.csv")
    assert table["name"].to_list() == ["scan", "write"] and table["MB_per_s"].to_list() == [20.0, 40.0]
    assert "preprocess" in out


def test_foreign_traces(tmp_path: Path) -> None:
    """As DFTracer writes for anyone: no ranks, no spans that we know."""
    for pid in (7, 9):
        made = Made(None, pid=pid)
        made.span("reader", "read_sample", 0, 500)
        made.span("compute", "train", 500, 1000)
        made.posix("read", 10, 90, "/data/x", ret=1000)
        made.write(tmp_path / "x", end=False)
    out, _ = analysis("report", tmp_path / "x" / "trace")
    assert "do not name their ranks" in out and "rank 1" in out
    assert "No training steps" in (tmp_path / "x" / "trace" / "report.html").read_text()


def test_no_traces(tmp_path: Path) -> None:
    for command in ("report", "summary"):
        _, errors = analysis(command, tmp_path, code=2)
        assert "no traces" in errors and errors.count("\n") == 1
    _, errors = analysis("report", tmp_path / "nowhere", code=2)
    assert "no such folder" in errors


def test_empty_and_useless_traces(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / "a.pfw.gz").write_bytes(b"")
    (folder / "b.pfw").write_text("hello\n{not json\n")
    _, errors = analysis("report", tmp_path, code=2)
    assert "no events" in errors and errors.count("\n") == 1


def test_truncated_and_missing_rank(tmp_path: Path) -> None:
    path = training(1, 3).write(tmp_path)
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data)[: len(gzip.compress(data)) * 2 // 3])
    training(0, 3).write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 0.5, "time": 1795252102.1}\n{"loss": 0.4, "ti')
    (tmp_path / "results.json").write_text("{")
    out, _ = analysis("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in (
        "there is no trace of rank 2",
        "the gzip stream is cut",
        "results.json: is not JSON",
        "1 lines could",
    ):
        assert text in out and text in page


@pytest.mark.parametrize("what", ["nothing but metadata", "one instant", "counters only", "calls only"])
def test_almost_nothing(tmp_path: Path, what: str) -> None:
    made = Made()
    if what == "one instant":
        made.span("clock", "barrier", 5, 0, when="start")
    elif what == "counters only":
        made.span("counter", "loss", 5, 0, value=0.5)
    elif what == "calls only":
        made.posix("open64", 5, 2, "/x")
    made.write(tmp_path)
    code = 2 if what == "nothing but metadata" else 0
    analysis("report", tmp_path, code=code)


def test_read_only_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "tables").write_text("in the way")
    _, errors = analysis("report", run, code=2)
    assert "tables" in errors and errors.count("\n") == 1


def test_dask_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two")
    analysis("report", one)
    analysis("report", two, "--dask", "local")
    for table in ("breakdown", "steps", "timeline", "operations", "files"):
        assert (one / "tables" / f"{table}.csv").read_text() == (two / "tables" / f"{table}.csv").read_text()


def test_links_lead_to_one_slice(tmp_path: Path) -> None:
    """ts and dur of late steps and slow calls are those of the converted trace, for a moved clock too."""
    for rank, shift in ((0, 0), (1, 7_000_000)):
        made = training(rank, 2, host=f"n{rank}")
        [line for line in made.lines if line["name"] == "step"][-1]["dur"] *= 3
        made.span("clock", "barrier", 9_400, 0, when="start")
        made.span("clock", "barrier", 600_000 + 20 * rank, 0, when="end")  # this clock is faster, too
        for line in made.lines:
            if line["ph"] == 1:
                line["ts"] += shift
        made.write(tmp_path)
    analysis("report", tmp_path)
    analysis("perfetto", tmp_path, "-o", tmp_path / "x.pftrace")
    page = (tmp_path / "report.html").read_text()
    links = re.findall(r"#!/\?ts=(\d+)&amp;dur=(\d+)&amp;visStart=(\d+)&amp;visEnd=(\d+)\"", page)
    with open_trace(tmp_path / "x.pftrace") as trace:
        for ts, dur, begin, end in links:
            assert int(begin) < int(ts) and int(ts) + int(dur) < int(end)
            assert trace.rows(f"select count(*) from slice where ts = {ts} and dur = {dur}")[0][0] >= 1
    assert len(links) > 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("reprt RUN", "invalid choice: 'reprt'"),
        ("compare RUN", "required: ANOTHER_RUN (python -m analysis compare --help lists the options)"),
        ("view RUN/x.pftrace --port 80000", "--port 80000: not a port's number"),
        ("view RUN/report.html", "not a trace for the Perfetto UI"),
        ("report RUN --dask foo", "--dask foo: local, pbs, slurm, or the host:port"),
        ("summary RUN/report.html", "end in .pfw.gz or .pfw; give one, or a run folder"),
        ("perfetto RUN -o /nowhere/x", "name another file with -o"),
    ],
)
def test_mistakes_in_one_line(
    words: str, says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "x.pftrace").write_bytes(b"\n\0")  # one packet without content
    assert main([word.replace("RUN", str(run)) for word in words.split()]) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.startswith("analysis: ") and errors.count("\n") == 1


def test_a_single_trace_is_converted_beside_itself(tmp_path: Path) -> None:
    path = training(0, 1).write(tmp_path)
    out, _ = analysis("perfetto", path)
    assert out.startswith(f"{path.parent}/{path.name.split('.')[0]}.pftrace (")
