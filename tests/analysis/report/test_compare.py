"""compare: settings that differ come first; a verdict only beyond the noise of repeated runs; one axis."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.browser import chromium
from support.made_traces import training
from support.reports import a_run, analysis


def change(run: Path, file: str, **values: Any) -> None:
    """Set values in a JSON file of a run; a key with a dot is one of a group."""
    found = json.loads((run / file).read_text())
    for name, value in values.items():
        group, _, key = name.partition("__")
        (found[group] if key else found)[key or group] = value
    (run / file).write_text(json.dumps(found))


def make_run(folder: Path, wait: int = 100, batch: int = 256, speed: float = 1000.0) -> Path:
    run = a_run(folder, wait=wait)
    change(run, "config.json", data__batch_size=batch, launch__world_size=2)
    change(run, "results.json", samples_per_second=speed, samples=100_000)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return {
        "slow": make_run(folder / "slow", wait=6_000),
        "slow2": make_run(folder / "slow2", wait=6_100, speed=1010.0),
        "fast": make_run(folder / "fast", wait=100, batch=512, speed=2000.0),
        "fast2": make_run(folder / "fast2", wait=110, batch=512, speed=2010.0),
        "near": make_run(folder / "near", wait=6_040, batch=512, speed=1004.0),
    }


def read_line(out: str, label: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(f"{label} "))


def test_one_run_each_has_no_verdict(runs: dict[str, Path], tmp_path: Path) -> None:
    out, _ = analysis("compare", runs["slow"], runs["fast"], "-o", tmp_path / "c.html")
    assert out.startswith("The runs differ in 1 setting. One run each:")
    assert "  A: slow\n     batch size of a rank: 256\n  B: fast\n     batch size of a rank: 512\n" in out
    assert "-98." in read_line(out, "waiting for data")
    assert "points" in read_line(out, "waiting for data, of training")
    assert not re.search(r"\b(better|worse)$", out, re.M)
    page = (tmp_path / "c.html").read_text()
    assert 'class="n better' not in page and "batch size of a rank" in page


def test_an_option_without_a_value_is_not_set(tmp_path: Path) -> None:
    whole, limited = (make_run(tmp_path / name, wait=6_000) for name in ("whole", "limited"))
    for run, batches in ((whole, None), (limited, 5)):
        change(run, "config.json", data__limit_train_batches=batches)
    out, _ = analysis("compare", whole, limited, "-o", tmp_path / "c.html")
    assert "limit_train_batches: not set\n" in out and "limit_train_batches: 5\n" in out
    assert "None" not in out + (tmp_path / "c.html").read_text()


def test_verdicts_beyond_the_noise_only(runs: dict[str, Path], tmp_path: Path) -> None:
    """By hand: waits of 6,000 and 6,100, 100 and 110 us: s of the ratios, t with 2 degrees of freedom."""
    four = [runs[name] for name in ("slow", "fast", "slow2", "fast2")]
    out, _ = analysis("compare", *four, "-o", tmp_path / "c.json")
    assert "  A: slow, slow2\n" in out and "  B: fast, fast2\n" in out
    assert read_line(out, "waiting for data").endswith("better")
    assert read_line(out, "samples per second").endswith("better")
    found = json.loads((tmp_path / "c.json").read_text())
    wait = found["metrics"]["wait_seconds"]
    a, b = wait["values"]
    assert wait["mean"][0] == pytest.approx(sum(a) / 2)
    squares = sum((v / (sum(group) / 2) - 1) ** 2 for group in (a, b) for v in group)
    assert wait["noise"] == [pytest.approx(4.30 * (squares / 2) ** 0.5)]
    assert wait["verdict"] == ["better"] and found["metrics"]["wait_share"]["verdict"] == [""]
    near, _ = analysis("compare", runs["slow"], runs["slow2"], runs["near"], "-o", tmp_path / "n.html")
    assert not re.search(r"\b(better|worse)$", read_line(near, "waiting for data"))
    assert not re.search(r"\b(better|worse)$", read_line(near, "samples per second"))
    copied, _ = analysis("compare", runs["slow"], runs["slow"], runs["fast"], "-o", tmp_path / "d.html")
    assert "One run each" in copied  # a run and itself say nothing about the noise


def test_per_sample_where_a_step_has_more_samples(runs: dict[str, Path], tmp_path: Path) -> None:
    four = [runs[name] for name in ("slow", "slow2", "near")]
    out, _ = analysis("compare", *four, "-o", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())["metrics"]
    step, of_sample = found["step_median_seconds"], found["step_median_seconds_per_sample"]
    assert step["verdict"] == [""] and of_sample["verdict"] == ["better"]
    assert of_sample["mean"][0] == pytest.approx(step["mean"][0] / 512)
    assert of_sample["mean"][1] == pytest.approx(step["mean"][1] / 1024)
    assert "step, of a sample" in out


def test_over_a_setting(runs: dict[str, Path], tmp_path: Path) -> None:
    all_runs = [runs[name] for name in ("fast", "slow", "slow2", "fast2")]
    out, _ = analysis("compare", *all_runs, "--vs", "batch_size", "-o", tmp_path / "c.json")
    lines = out.partition("batch_size ")[2].splitlines()
    assert lines[1].split() == ["256", "2", "1,005", "1.00", "100%"]
    assert lines[2].split() == ["512", "2", "2,005", "2.00", "100%"]
    points = json.loads((tmp_path / "c.json").read_text())["scaling"]["points"]
    assert [point["value"] for point in points] == [256, 512]
    for name, says in (("nothing", "slow has no such setting"), ("embedding_dim", "it is 16 in all")):
        _, errors = analysis("compare", *all_runs[1:], "--vs", name, code=2)
        assert errors.startswith(f"analysis: --vs {name}: ") and says in errors and errors.count("\n") == 1


def test_the_terminal_has_80_columns(runs: dict[str, Path], tmp_path: Path) -> None:
    others = [make_run(tmp_path / f"{'long' * 30}{n}", batch=32 << n) for n in range(4)]
    for chosen in ([runs["slow"], runs["slow2"], runs["fast"]], [*runs.values(), *others]):
        out, _ = analysis("compare", *chosen, "--vs", "batch_size", "-o", tmp_path / "c.html")
        text = out.rpartition("\n\n")[0]
        assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^ +A +B +C +D$", out, re.M) and "F against A" not in out


def test_compare_says_first_what_is_not_alike(runs: dict[str, Path], tmp_path: Path) -> None:
    """Rows of the tables are the plan's, not an option; of different models nothing is better or worse."""

    def tables(folder: Path, rows: int) -> None:
        shards = [{"offset": [0, 0], "size": [rows, 16]}, {"offset": [rows, 0], "size": [5, 16]}]
        (folder / "plan.json").write_text(json.dumps({"t_cat_0": {"shards": shards}}))

    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two", wait=200)
    out, _ = analysis("compare", one, two)
    assert out.startswith("2 runs with the same settings: how far they lie apart is the noise.")
    assert re.search(r"^ +mean +lowest +highest$", out, re.M)
    waited = next(line for line in out.splitlines() if line.startswith("waiting for data  "))
    mean, low, high = (float(text) for text in re.findall(r"([\d.]+) (?:us|ms)", waited))
    assert low < mean < high
    assert json.loads((two / "compare.json").read_text())["settings"][0]["runs"] == ["one", "two"]
    for folder, samples in ((one, 1000), (two, 4000)):  # more was done in more time
        change(folder, "results.json", samples=samples, samples_per_second=samples)
    found = json.loads((two / "compare.json").read_text())
    assert "training_seconds_per_sample" not in found["metrics"]
    tables(one, 95)
    tables(two, 995)
    out, _ = analysis("compare", one, two)
    assert "     tables: 1 of 100 rows\n" in out and "     tables: 1 of 1,000 rows\n" in out
    found = json.loads((two / "compare.json").read_text())["metrics"]
    assert found["training_seconds_per_sample"]["mean"][0] == pytest.approx(
        found["training_seconds"]["mean"][0] / 1000
    )
    other = {"data": {"train_batch_size": 16}, "model": {"emb_dim": 16}, "launch": {"device": "cpu"}}
    (two / "config.json").write_text(json.dumps(other))
    out, _ = analysis("compare", runs["slow"], runs["slow2"], two)
    assert out.startswith("These are different models, DLRM and BERT4Rec:")
    assert "batch size of a rank: 16\n" in out and "embedding dimension" not in out
    page = (two / "compare.html").read_text()
    assert "These are different models" in page and 'class="n better' not in page
    assert not re.search(r"\b(better|worse)$", out, re.M)
    (two / "config.json").unlink()
    assert analysis("compare", one, two)[0].startswith("two: no config.json")


def test_no_share_of_almost_nothing(tmp_path: Path) -> None:
    """I/O of less than 10 ms has no part that is hidden."""
    little, much = tmp_path / "little", tmp_path / "much"
    training(reads=1, read_us=20).write(little)
    training(reads=4, read_us=200).write(much)
    assert "I/O hidden" not in analysis("summary", little)[0]
    assert "I/O hidden" in analysis("summary", much)[0]


@pytest.mark.browser
def test_all_runs_in_each_figure(runs: dict[str, Path], tmp_path: Path) -> None:
    chosen = [runs[name] for name in ("slow", "slow2", "fast")]
    page = tmp_path / "c.html"
    analysis("compare", *chosen, "--vs", "batch_size", "-o", page)
    with chromium(tmp_path / "profile", "1280,1000") as browser:
        browser.open(page.as_uri())
        browser.wait_for("document.querySelectorAll('figure svg').length >= 7")
        figures = browser.run("[...document.querySelectorAll('figure')].map(f => f.textContent)")
        bars = next(text for text in figures if "A1 rank 0" in text)
        assert all(f"{label} rank {rank}" in bars for label in ("A1", "A2", "B") for rank in (0, 1))
        legends = [text for text in figures if "loss" in text]
        assert legends and all(label in legends[0] for label in ("A1", "A2", "B"))
        # one axis: the same second is as long in every bar
        widths = browser.run("""(() => {
            const all = [...document.querySelectorAll('figure')];
            const figure = all.find(f => /A1 rank 0/.test(f.textContent));
            const spec = JSON.parse(document.getElementById(figure.dataset.spec).textContent);
            const bars = [...figure.querySelectorAll('svg rect')].map(r => +r.getAttribute('width'));
            const parts = spec.rows.flatMap(row => row.parts.map(part => part[2]));
            return parts.map((seconds, i) => bars[i] / seconds);
        })()""")
        long = [width for width in widths if width]
        assert max(long) == pytest.approx(min(long), rel=0.02)
