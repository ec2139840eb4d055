"""compare: settings that differ come first, then what changed; what cannot be compared gets no verdict."""

import json
import re
from pathlib import Path

import pytest
from support.reports import a_run, analysis


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("compare") / "run", wait=6_000)


def test_compare(run: Path, tmp_path: Path) -> None:
    other = a_run(tmp_path / "other", wait=100)
    config = json.loads((other / "config.json").read_text())
    config["data"]["batch_size"] = 512
    (other / "config.json").write_text(json.dumps(config))
    out, _ = analysis("compare", run, other, "-o", tmp_path / "c.html")
    line = next(line for line in out.splitlines() if line.startswith("waiting for data"))
    assert line.split()[-1] == "better" and "-98" in line
    assert out.splitlines()[:2] == ["The runs differ in 1 setting:", "  batch size of a rank: 256 -> 512"]
    page = (tmp_path / "c.html").read_text()
    assert page.count("<figure") >= 12 and "batch size of a rank" in page


def test_compare_says_first_what_is_not_alike(run: Path, tmp_path: Path) -> None:
    """Rows of the tables are the plan's, not an option; of different models nothing is better or worse."""

    def tables(folder: Path, rows: int) -> None:
        shards = [{"offset": [0, 0], "size": [rows, 16]}, {"offset": [rows, 0], "size": [5, 16]}]
        (folder / "plan.json").write_text(json.dumps({"t_cat_0": {"shards": shards}}))

    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two")
    assert analysis("compare", one, two)[0].startswith("The settings are the same.\n")
    for folder, samples in ((one, 1000), (two, 4000)):  # more was done in more time
        (folder / "results.json").write_text(json.dumps({"samples": samples, "samples_per_second": samples}))
    lines = {line[:20].strip(): line for line in analysis("compare", run, two)[0].splitlines()}
    assert lines["samples per second"].endswith("better") and not lines["wall time"].endswith("better")
    tables(one, 95)
    tables(two, 995)
    assert analysis("compare", one, two)[0].splitlines()[1] == "  tables: 1 of 100 rows -> 1 of 1,000 rows"
    other = {"data": {"train_batch_size": 16}, "model": {"emb_dim": 16}, "launch": {"device": "cpu"}}
    (two / "config.json").write_text(json.dumps(other))
    out, _ = analysis("compare", run, two)
    assert out.startswith("These are different models, DLRM and BERT4Rec:")
    assert "  batch size of a rank: 256 -> 16\n" in out and "embedding dimension" not in out
    page = (two / "compare.html").read_text()
    assert "These are different models" in page and 'class="n better' not in page
    assert not re.search(r" (better|worse)$", out.partition("change\n")[2], re.M)
    (two / "config.json").unlink()
    assert analysis("compare", one, two)[0].startswith("two: no config.json")
