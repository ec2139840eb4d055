"""MLPerf's `:::MLLOG` lines, in the order and with the keys that its compliance checker wants.

Written by rank 0 alone, to stdout and to mlperf.log in the run folder; does nothing unless asked for.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MLPerfLog:
    def __init__(self, on: bool, folder: Path | None = None) -> None:
        self._to: Any = None
        self._evaluated, self._batch = False, 0
        if on:
            from mlperf_logging.mllog.mllog import MLLogger

            logger = logging.Logger("mlperf", logging.INFO)  # of this run alone
            logger.addHandler(logging.StreamHandler(sys.stdout))
            if folder:
                logger.addHandler(logging.FileHandler(folder / "mlperf.log"))
            self._to = MLLogger(logger)

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        if self._to:
            self._to.event(key, value, metadata, stack_offset=2)

    def start(self, key: str, **metadata: Any) -> None:
        if self._to:
            self._to.start(key, None, metadata, stack_offset=2)

    def end(self, key: str, **metadata: Any) -> None:
        if self._to:
            self._to.end(key, None, metadata, stack_offset=2)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Initialising starts: who, what, with which settings."""
        self._batch = settings.get("global_batch_size", 0)
        # who starts a submission's run clears the caches before it; this program cannot
        self.event("cache_clear", False)
        self.start("init_start")
        for key, value in settings.items():
            self.event(key, value)

    def run(self, epoch_steps: int) -> None:
        """Everything is built, no row has been read yet."""
        self.end("init_stop")
        self.start("run_start")
        self.event("train_samples", epoch_steps * self._batch)

    @contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        self.start("epoch_start", epoch_num=number)
        yield
        self.end("epoch_stop", epoch_num=number)

    @contextmanager
    def evaluation(self, epoch: float) -> Iterator[dict[str, Any]]:
        """The block fills in the result."""
        result: dict[str, Any] = {}
        self.start("eval_start", epoch_num=epoch)
        yield result
        if result.get("auroc") is not None:
            self.event("eval_accuracy", result["auroc"], epoch_num=epoch)
        self.end("eval_stop", epoch_num=epoch)
        if not self._evaluated:  # the checker wants it exactly once
            self.event("eval_samples", result.get("samples"), epoch_num=epoch)
            self._evaluated = True

    def finish(self, success: bool, epoch: float) -> None:
        self.end("run_stop", status="success" if success else "aborted", epoch_num=epoch)
