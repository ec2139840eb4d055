"""What an analysis does before it reads: compile, once and with a line that says so; import no pandas."""

import hashlib
import shutil
from pathlib import Path

from support.made_traces import training
from support.ranks import ROOT, python

LINE = "analysis: compiling the loops that read traces"
# As `python -m analysis summary`, but impatient: so the compiling of one loop is enough.
SUMMARY = """
import os, sys
from analysis.__main__ import main
from analysis.trace import compiling
compiling.PATIENCE = 0.1
code = main(["summary", sys.argv[1]])
print("pandas" in sys.modules, os.environ["NUMBA_CACHE_DIR"], sep="\\n")
sys.exit(code)
"""


def test_only_an_analysis_that_compiles_says_so(tmp_path: Path) -> None:
    """The usual cache; one that lacks a loop; then the same one."""
    run = tmp_path / "run"
    training(0, 1, steps=3).write(run)
    done = python("-c", SUMMARY, run, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, with_pandas, usual = done.stdout.splitlines()
    assert with_pandas == "False"  # pyarrow imports it unless it is given buffers
    cache = tmp_path / "numba"
    for folder in ROOT.glob("analysis/*"):
        kept = f"{folder.name}_{hashlib.sha1(str(folder).encode()).hexdigest()}"  # as numba names it
        if Path(usual, kept).is_dir():
            shutil.copytree(Path(usual, kept), cache / kept)
    for path in cache.rglob("columns._spread_arguments-*"):
        path.unlink()
    for lines in (1, 0):
        done = python("-c", SUMMARY, run, timeout=300, NUMBA_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(LINE) == lines, done.stderr
        assert (f"kept in {cache}" in done.stderr) == bool(lines)
