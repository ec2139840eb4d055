"""CPU fast path and tables in files: switched off, neither is imported and training is the same."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ranks import ROOT, Train

from dlrm.runtime import accelerate

OPTIONAL = ("dlrm.cpu", "dlrm.embeddings.ssd")
SHORT = ["--preset", "toy", "--report_every", 1, "--batch_size", 128, "--limit_train_batches", 20]


def loaded_optional(out: str) -> list[str]:
    """The last line of each rank's stdout, see support/loaded_modules.py."""
    return json.loads(out.splitlines()[-1])


def run_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.mpi
def test_both_switched_off(toy: Path, train: Train, run_ranks: Train) -> None:
    options = [*SHORT, "--in_memory_binary_criteo_path", toy]
    on = train(2, *options)
    off = run_ranks(2, "tests.support.loaded_modules", *options, "--no-cpu_fast_path")
    assert off.codes == on.codes == [0, 0], (off.err, on.err)
    assert [loaded_optional(out) for out in off.out] == [[], []]
    assert len(off.losses) == 20
    assert off.losses == pytest.approx(on.losses, rel=1e-6)
    assert run_settings(off.folder)["run"]["cpu_fast_path"] is False
    assert run_settings(on.folder)["run"]["cpu_fast_path"] is True
    assert run_settings(off.folder)["launch"]["tuned"] == []


@pytest.mark.mpi
def test_both_switched_on(toy: Path, run_ranks: Train) -> None:
    """The check of the test above finds what it looks for."""
    run = run_ranks(
        2, "tests.support.loaded_modules", *SHORT, "--in_memory_binary_criteo_path", toy,
        "--store_type", "cached_ssd", "--cache_memory_budget_mb", 50,
    )  # fmt: skip
    assert run.codes == [0, 0], run.err
    for out in run.out:
        loaded = loaded_optional(out)
        assert all(any(name.startswith(f"{package}.") for name in loaded) for package in OPTIONAL), loaded


def test_the_old_option_switches_off_with_a_warning(run_ranks: Train) -> None:
    run = run_ranks(1, "tests.support.loaded_modules", *SHORT, "--exchange", "gloo")
    assert run.codes == [0], run.err
    assert "--exchange gloo is deprecated: use --no-cpu_fast_path" in run.err[0] + run.out[0]
    assert loaded_optional(run.out[0]) == []


def test_cuda_imports_no_cpu_fast_path() -> None:
    code = (
        "import sys, torch; from dlrm.runtime import accelerate; from dlrm.trainer.device import *;"
        "assert enable_fast_path(torch.device('cuda'), True) == [];"
        "assert accelerate.hooks is accelerate.PLAIN;"
        "assert accelerate.hooks.choose_backend(torch.device('cuda')) == 'nccl';"
        "assert not [name for name in sys.modules if name.startswith('dlrm.cpu')]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LIBRARIES = {"torch", "torchrec", "np", "numpy", "dist", "nn", "F", "comm_ops"}
SETTINGS = "torch.backends."  # switches that torch documents


WRAPPERS = ("dlrm.traced",)  # wraps a foreign script's libraries, which is what it is for; nothing imports it


def test_no_global_of_a_library_is_rebound_outside_optional_packages() -> None:
    for path in (ROOT / "dlrm").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.startswith((*OPTIONAL, *WRAPPERS)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                targets = node.args[:1]
            for text in map(ast.unparse, targets):
                assert text.partition(".")[0] not in LIBRARIES or text.startswith(SETTINGS), f"{path}: {text}"


def test_each_hook_is_called_by_name() -> None:
    """Every field of FastPath has a caller, and no module copies a hook before it is set."""
    sources = {path: path.read_text() for path in (ROOT / "dlrm").rglob("*.py")}
    for name in accelerate.FastPath.__dataclass_fields__:
        assert any(f"accelerate.hooks.{name}(" in text for text in sources.values()), name
    assert not [path for path, text in sources.items() if "accelerate import hooks" in text]
