"""The patches: they fit the pinned torchrec, go in once, refuse any other, and trace every marker."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "patches").glob("torchrec-*.patch"))
SHIM = "torchrec/dftracer_spans.py"


def sh(*words: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=180,
        env=os.environ | environment,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def changed(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.M)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.py")}


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    """The files that the patches touch, as torchrec ships them, in a folder of their own."""
    import torchrec

    assert torchrec.__file__
    installed = Path(torchrec.__file__).parents[1]
    site = tmp_path / "site packages"
    for name in [name for patch in PATCHES for name in changed(patch)]:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / name, site / name)
    [info] = installed.glob("torchrec-*.dist-info")
    (site / info.name).mkdir()
    for patch in reversed(PATCHES):  # the installed ones are patched; that they come off says they fit
        sh("git", "-C", site, "apply", "--reverse", patch)
    assert not (site / SHIM).exists()
    return site


def test_they_are_for_the_pinned_version() -> None:
    pin = (ROOT / "requirements/torchrec.txt").read_text()
    [version] = re.findall(r"^torchrec==(\S+)$", pin, re.M)
    assert PATCHES and all(patch.name.startswith(f"torchrec-{version}-") for patch in PATCHES)
    for patch in PATCHES:
        assert len(changed(patch)) == 1, f"{patch.name}: one upstream file each"
        assert not patch.read_text().startswith(("diff", "---")), f"{patch.name}: say why first"


def test_they_go_in_once(pristine: Path) -> None:
    before = contents(pristine)
    first = sh("patches/apply.sh", pristine)
    after = contents(pristine)
    assert first.stdout.count("patched:") == len(PATCHES)
    assert {path for path in after if after[path] != before.get(path)} == set(after)
    for path, text in before.items():  # one line differs, the import; in one file a call, too
        lines = zip(text.splitlines(), after[path].splitlines(), strict=True)
        new, *call = [new for old, new in lines if old != new]
        assert new.removesuffix(b", spanned") == b"from torchrec.dftracer_spans import record_function"
        assert [b"spanned(" in line for line in call] == [True] * new.endswith(b", spanned")
    assert sh("patches/apply.sh", pristine).stdout == ""
    assert contents(pristine) == after


def test_inside_a_work_tree_that_ignores_them(pristine: Path) -> None:
    """There git apply by itself skips every file and reports success."""
    sh("git", "init", "-q", pristine.parent)
    (pristine.parent / ".gitignore").write_text("*\n")
    sh("patches/apply.sh", pristine)
    assert (pristine / SHIM).exists()


def test_another_version_is_refused(pristine: Path) -> None:
    [info] = pristine.glob("*.dist-info")
    info.rename(pristine / "torchrec-9.9.9.dist-info")
    before = contents(pristine)
    done = sh("patches/apply.sh", pristine, check=False)
    assert done.returncode == 2 and PATCHES[0].name in done.stderr and "9.9.9" in done.stderr
    assert contents(pristine) == before


def test_moved_lines_are_refused(pristine: Path) -> None:
    path = pristine / "torchrec/distributed/types.py"
    path.write_text(path.read_text().replace("profiler import record_function", "profiler import moved"))
    text = path.read_text()
    done = sh("patches/apply.sh", pristine, check=False)
    [name] = [patch.name for patch in PATCHES if "torchrec/distributed/types.py" in changed(patch)]
    assert done.returncode == 2 and f"{name} does not fit" in done.stderr
    assert path.read_text() == text


def test_no_torchrec_is_refused(tmp_path: Path) -> None:
    done = sh("patches/apply.sh", tmp_path, check=False)
    assert done.returncode == 2 and "holds 0 torchrec" in done.stderr


@pytest.mark.parametrize(
    ("marker", "name", "args"),
    [
        ("## forward ##", "forward", {}),
        ("## forward 12 ##", "forward", {"batch": 12}),
        ("## load batch 3 from dataloader (host) ##", "load batch from dataloader (host)", {"batch": 3}),
        ("## Stage 2 : copy for batch 7 ##", "Stage : copy for batch", {"stage": 2, "batch": 7}),
        ("## optimizer -1 ##", "optimizer", {"batch": -1}),
        ("## 12 ##", "", {"batch": 12}),
        ("## two  blanks 3 ##", "two blanks", {"batch": 3}),
        ("## 2d_allgather ##", "2d_allgather", {}),
        ("[lookup]_[tables.t0]_[table_wise]", "[lookup]_[tables.t0]_[table_wise]", {}),
    ],
)  # fmt: skip
def test_numbers_become_arguments(marker: str, name: str, args: dict[str, int]) -> None:
    from torchrec.dftracer_spans import split_name

    assert split_name(marker) == (name, {key: (0, value) for key, value in args.items()})


def test_untraced_it_is_torchs_own_marker() -> None:
    code = """
import sys
from torch.autograd.profiler import record_function
from torchrec.distributed import train_pipeline
from torchrec.distributed.train_pipeline import train_pipelines
assert type(train_pipelines.record_function("## forward 1 ##")) is record_function
assert not [name for name in sys.modules if name.startswith(("dftracer", "dlrm"))]
"""
    sh(sys.executable, "-c", code)


def spans(folder: Path) -> list[dict]:
    files = [gzip.decompress(path.read_bytes()) for path in sorted((folder / "trace").glob("*.pfw.gz"))]
    # DFTracer records a long command line cut short, with whatever bytes lay behind it
    lines = b"\n".join(files).decode(errors="replace").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event for event in events if event.get("cat") in ("torchrec", "compute", "comm")]


def test_a_span_closes_on_exceptions(tmp_path: Path) -> None:
    code = """
import sys, time
from dlrm.runtime import ranks, trace
trace.start_tracing(sys.argv[1], ranks.find_ranks(), "check")
from torchrec.dftracer_spans import record_function
try:
    with record_function("## outer 4 ##"):
        time.sleep(0.02)
        raise KeyError
except KeyError:
    pass
trace.stop_tracing()
with record_function("## after the end ##"):
    pass
"""
    sh(sys.executable, "-c", code, tmp_path)
    [event] = spans(tmp_path)
    assert event["name"] == "outer" and event["args"]["batch"] == 4
    assert 20_000 <= event["dur"] < 2_000_000


def test_torchs_profiler_sees_its_markers_only_while_it_runs(tmp_path: Path) -> None:
    """torch's marker costs more than the span: it is entered only while its profiler runs."""
    code = """
import sys, torch
from dlrm.runtime import ranks, trace
trace.start_tracing(sys.argv[1], ranks.find_ranks(), "check")
from torchrec.dftracer_spans import record_function, spanned
from torch.autograd.profiler import record_function as torchs
entered = []
torchs.__enter__ = lambda self, enter=torchs.__enter__: (entered.append(self.name), enter(self))[1]
def step(number):
    with record_function(f"## forward {number} ##"):
        return spanned("## inside ##", max)(number, 2)
assert step(1) == 2 and entered == []
with torch.profiler.profile() as profile:
    assert step(7) == 7
assert step(3) == 3
assert entered == ["## forward 7 ##"]
assert [event.name for event in profile.events() if "forward" in event.name] == entered
trace.stop_tracing()
"""
    sh(sys.executable, "-c", code, tmp_path)
    batches = [event["args"].get("batch") for event in spans(tmp_path)]
    assert sorted(batches, key=str) == [1, 3, 7, None, None, None]


@pytest.mark.mpi
def test_every_marker_of_a_training_step_is_a_span(tmp_path: Path) -> None:
    """torch's own profiler is the witness: the same markers, as often, on both ranks."""
    sh("./launcher.sh", sys.executable, "tests/support/torchrec_marks.py", tmp_path, NPROC="2")
    markers = [json.loads((tmp_path / f"markers-{rank}.json").read_text()) for rank in range(2)]
    numbers = re.compile(r" \d+(?= |$)")
    seen = Counter(numbers.sub("", name.strip("# ")) for rank in markers for name in rank)
    events = spans(tmp_path)
    assert Counter(event["name"] for event in events) == seen
    stages = {"copy_batch_to_gpu", "start_sparse_data_dist", "wait_sparse_data_dist", "wait_for_batch"}
    dense = {"zero_grad", "forward", "backward", "optimizer"}
    exchanges = {"all2all_data:kjt values", "All2All_Pooled_fwd", "All2All_Pooled_bwd"}
    assert stages | dense | exchanges | {"dist_init:recat_values"} <= set(seen)
    assert seen["forward"] == 10  # five steps on two ranks
    assert {event["args"]["batch"] for event in events if event["name"] == "forward"} == set(range(5))
    by_category = {cat: {e["name"] for e in events if e["cat"] == cat} for cat in ("compute", "comm")}
    assert by_category["compute"] == {"forward", "backward", "optimizer"}
    assert by_category["comm"] >= exchanges and "wait_sparse_data_dist" not in by_category["comm"]
