"""The house rules: imports go down, documents point at things that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "common": [["errors", "numba_cache"], ["inputs", "lock"], ["owned"]],
    "dlrm": [
        ["errors", "ranks", "segments", "environment", "peers", "rendezvous"],
        ["exchange", "criteo", "config", "presets", "trace", "signals", "walltime", "runfolder"],
        ["bert_config"],
        ["entry"],
        ["watch"],
        ["dist", "records", "startup", "prep", "data"],
        ["model"],
        ["auroc", "checkpoint", "mlperf", "sets", "bert_sets", "advice", "amp"],
        ["loop"],
        ["keeper", "resume", "assembly"],
        ["job"],
        ["bert_job"],
        ["train", "bench", "bert4rec"],
    ],
    "analysis": [
        ["settings", "strings", "lines", "intervals", "stages", "records", "outputs"],
        ["scan", "process"],
        ["columns", "clocks"],
        ["events"],
        ["derive", "nest", "wire"],
        ["tracks"],
        ["perfetto", "tables", "check", "view"],
        ["chrome"],
        ["facts", "run", "page", "cluster"],
        ["rules_time", "rules_io", "plots"],
        ["findings", "plots_io"],
        ["summary", "sections"],
        ["report"],
        ["compare"],
        ["__main__"],
    ],
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def floor(package: str, room: str) -> int:
    for number, rooms in enumerate(FLOORS[package]):
        if room in rooms:
            return number
    raise AssertionError(f"{package}/{room} has no floor: give it one here and in README")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in FLOORS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: write absolute imports, so that this test sees them")


@pytest.mark.parametrize("package", FLOORS)
def test_imports_only_go_down(package: str) -> None:
    for path in sources(package):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] not in set(FLOORS) - {package, "common"}, (
                f"{path}: the packages talk through files"
            )
            if parts[0] == package and len(parts) > 1 and parts[1] != room:
                assert floor(package, parts[1]) < floor(package, room), f"{path}: {room} imports {name}"


def test_analysis_needs_no_torch() -> None:
    for path in sources("analysis"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "torchrec", "mpi4py"}, path


def test_only_trace_imports_dftracer() -> None:
    for path in sources("dlrm"):
        if path.name != "trace.py":
            assert not any(name.split(".")[0] == "dftracer" for name in imported(path)), path


DOCUMENTS = [path for folder in (".", "docs", "patches") for path in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: broken link {target}"
