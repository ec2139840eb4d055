"""Rules of the repository: imports go down, classes have names of their own, documents are true."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "dlrm", "analysis")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module, or a name in one
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: write absolute imports, so that this test sees them")


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all packages."""
    found = {}
    for package in PACKAGES:
        for path in sources(package):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


def folder_of(path: Path) -> str:
    """The folder that a file belongs to; an entry (python -m ...) stands for itself, above all folders."""
    is_entry = path.name == "__main__.py" or path.parent == ROOT / "dlrm"
    return str((path if is_entry else path.parent).relative_to(ROOT))


def arrows() -> Iterator[tuple[str, str]]:
    """(importing module, imported module) within the project, imports inside functions too."""
    known = modules()
    for name, path in known.items():
        for wanted in imported(path):
            target = wanted if wanted in known else wanted.rpartition(".")[0]
            if target in known and target != name and known[target].name != "__init__.py":
                yield name, target


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that reach each other, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return trail[trail.index(node) :]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if circle := visit(target, [*trail, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), [])


def test_imports_only_go_down() -> None:
    """Folders form layers: no folder imports, over any number of others, one that imports it."""
    known, graph = modules(), {}
    for name, target in arrows():
        if folder_of(known[name]) != folder_of(known[target]):
            graph.setdefault(folder_of(known[name]), set()).add(folder_of(known[target]))
    assert not find_circle(graph)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """The nodes that some arrows lead to from `start`."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - found:
            found.add(target)
            waiting.append(target)
    return found


def test_picture_of_the_imports() -> None:
    """ARCHITECTURE.md draws every folder and entry; its arrows are imports, and lead to all imports."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    picture = text.partition("```mermaid")[2].partition("```")[0]
    paths = dict(re.findall(r'^ *(\w+)\["([\w/.]+)', picture, flags=re.M))
    drawn: dict[str, set[str]] = {}
    for line in picture.splitlines():
        names = line.split(" --> ") if " --> " in line else []
        for name, target in zip(names, names[1:], strict=False):
            drawn.setdefault(paths[name.strip()], set()).add(paths[target.strip()])

    known, real = modules(), {}
    for name, target in arrows():
        if known[name].name != "__init__.py" and folder_of(known[name]) != folder_of(known[target]):
            real.setdefault(folder_of(known[name]), set()).add(folder_of(known[target]))
    assert set(paths.values()) == real.keys() | set().union(*real.values())
    untrue = {(name, target) for name in drawn for target in drawn[name] - real.get(name, set())}
    assert not untrue, "arrows that are not imports"
    missing = {(name, target) for name in real for target in real[name] - reachable(drawn, name)}
    assert not missing, "imports without an arrow, or a way over several"


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {}
    for name, target in arrows():
        graph.setdefault(name, set()).add(target)
    assert not find_circle(graph)


def test_the_packages_talk_through_files() -> None:
    """The common floor knows nothing of the two packages, and they nothing of each other; but the replay
    and the emulator read traces.
    """
    allowed = {
        "common": {"common"}, "dlrm": {"common", "dlrm"}, "analysis": {"common", "analysis"},
        "both": {"common", "dlrm", "analysis"},
    }  # fmt: skip
    for name, target in arrows():
        top = "both" if name.startswith(("dlrm.replay.", "dlrm.emulate.")) else name.partition(".")[0]
        assert target.partition(".")[0] in allowed[top], f"{name} imports {target}"


def test_no_two_classes_of_one_name() -> None:
    """A reader who finds a class by its name has found the one that is meant."""
    places: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_readme_lists_every_folder() -> None:
    """ "Where things are" has each folder of the packages, indented below its package, and no other."""
    text = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    listed, package = [], ""
    for line in text.splitlines():
        names = re.findall(r"(\w+)/", line[:26])  # what is behind that column says what they are for
        if line.startswith("  "):
            listed += [f"{package}/{name}" for name in names]
        elif names:
            package = names[-1]
    found = [path.parent.relative_to(ROOT) for path in ROOT.glob("*/*/__init__.py")]
    assert sorted(listed) == sorted(str(path) for path in found if path.parts[0] in PACKAGES)


def test_every_folder_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert 2 <= len(text.splitlines()) <= 6, (
                f"{path}: 2 to 5 lines: what for, what comes in, what goes out"
            )


def test_analysis_and_replay_need_no_torch() -> None:
    assert not {name.split(".")[0] for path in sources("dlrm/replay") for name in imported(path)} & {"torch"}
    for path in sources("analysis"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "torchrec", "mpi4py"}, path


def test_other_trainings_need_nothing_of_ours() -> None:
    """What runs and traces a script of somebody else's shares the runtime, and no more."""
    for name, target in arrows():
        if name.startswith("dlrm.traced."):
            assert target.startswith(("common.", "dlrm.runtime.", "dlrm.traced.")), f"{name} imports {target}"


def test_only_trace_imports_dftracer() -> None:
    for path in sources("dlrm"):
        if path.name != "trace.py":
            assert not any(name.split(".")[0] == "dftracer" for name in imported(path)), path


LIBRARIES = {"torch", "torchrec", "fbgemm_gpu", "numpy", "numba", "polars"}
CHANGES_LIBRARIES = ("dlrm/cpu/", "dlrm/embeddings/ssd/", "dlrm/traced/", "dlrm/embeddings/row_adam.py")


def test_libraries_are_changed_in_few_places() -> None:
    """No other file assigns to a name of a library, also not through an alias; settings of backends are meant
    to be assigned to.
    """
    for path in [path for package in PACKAGES for path in sources(package)]:
        if str(path.relative_to(ROOT)).startswith(CHANGES_LIBRARIES):
            continue
        tree, names = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = {alias.asname or alias.name: node.module for alias in node.names}
            else:
                continue
            names |= {name for name, module in found.items() if module.split(".")[0] in LIBRARIES}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            if isinstance(value, ast.Name) and value.id in names:
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                text = ast.unparse(node)
                assert text.split(".")[0] not in names or ".backends." in text, f"{path}: {text} = ..."


DOCUMENTS = [path for folder in (".", "docs", "patches") for path in sorted((ROOT / folder).glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: broken link {target}"


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings: lower case, hyphens for spaces, punctuation left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_in_documents(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text()):
        if "://" not in target:
            there = path.parent / target if target else path
            assert anchor in anchors(there), f"{path.name}: {target}#{anchor} is not a heading"


HISTORY = ("CHANGELOG.md", "BENCHMARKS.md")  # they may name files of earlier versions
OF_THE_PROJECT = re.compile(
    r"`((?:analysis|benchmarks|common|dlrm|docs|patches|requirements|scripts|sites|tests)/[\w./-]+|test_\w+\.py)`"
)


@pytest.mark.parametrize(
    "path", [each for each in DOCUMENTS if each.name not in HISTORY], ids=lambda path: path.name
)
def test_files_named_in_documents(path: Path) -> None:
    tests = {test.name for test in (ROOT / "tests").rglob("test_*.py")}
    named = set(OF_THE_PROJECT.findall(path.read_text()))
    gone = [name for name in sorted(named) if name not in tests and not (ROOT / name).exists()]
    assert not gone, f"{path.name} names files that are not there"
