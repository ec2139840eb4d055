"""A first analysis compiles: it says so in one line; one whose code is in the cache says nothing."""

from pathlib import Path

from support.made_traces import training
from support.ranks import python

LINE = "analysis: compiling the loops that read traces"


def test_only_the_first_analysis_says_that_it_compiles(tmp_path: Path) -> None:
    training(0, 1, steps=3).write(tmp_path / "run")
    cache = tmp_path / "numba"
    words = ("-m", "analysis", "summary", tmp_path / "run")
    for lines in (1, 0):
        done = python(*words, timeout=300, NUMBA_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(LINE) == lines, done.stderr
        assert (f"kept in {cache}" in done.stderr) == bool(lines)
