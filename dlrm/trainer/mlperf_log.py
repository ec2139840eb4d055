"""MLPerf's `:::MLLOG` lines, in the order and with the keys that its compliance checker requires.

Rank 0 alone writes them, to stdout and to mlperf.log in the run folder; without --mllog nothing is written.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MLPerfLog:
    """The log of one run. Its methods are called in this order: init_start, run_start, evaluations,
    run_stop.
    """

    def __init__(self, enabled: bool, folder: Path | None = None) -> None:
        """`folder`: the run folder, where mlperf.log is appended to."""
        self._logger: Any = None  # None: every method does nothing
        self._evaluated, self._global_batch_size = False, 0
        if enabled:
            from mlperf_logging.mllog.mllog import MLLogger

            logger = logging.Logger("mlperf", logging.INFO)  # not the global one: its handlers are this run's
            logger.addHandler(logging.StreamHandler(sys.stdout))
            if folder:
                logger.addHandler(logging.FileHandler(folder / "mlperf.log"))
            self._logger = MLLogger(logger)

    def _log_event(self, key: str, value: Any = None, **metadata: Any) -> None:
        if self._logger:
            self._logger.event(key, value, metadata, stack_offset=2)

    def _log_start(self, key: str, **metadata: Any) -> None:
        if self._logger:
            self._logger.start(key, None, metadata, stack_offset=2)

    def _log_end(self, key: str, **metadata: Any) -> None:
        if self._logger:
            self._logger.end(key, None, metadata, stack_offset=2)

    def log_init_start(self, settings: Mapping[str, Any]) -> None:
        """The run starts: its submitter, benchmark and hyperparameters (`settings`, by MLPerf's keys)."""
        self._global_batch_size = settings.get("global_batch_size", 0)
        # clearing the page cache needs root: who starts a run for submission does it before
        self._log_event("cache_clear", False)
        self._log_start("init_start")
        for key, value in settings.items():
            self._log_event(key, value)

    def log_run_start(self, epoch_steps: int) -> None:
        """Everything is built; MLPerf's rules allow no training row to be read before this line."""
        self._log_end("init_stop")
        self._log_start("run_start")
        self._log_event("train_samples", epoch_steps * self._global_batch_size)

    @contextmanager
    def log_epoch(self, number: int) -> Iterator[None]:
        self._log_start("epoch_start", epoch_num=number)
        yield
        self._log_end("epoch_stop", epoch_num=number)

    @contextmanager
    def log_evaluation(self, epoch: float) -> Iterator[dict[str, Any]]:
        """Around an evaluation; the block puts the evaluation's metrics into the dict that it is given."""
        result: dict[str, Any] = {}
        self._log_start("eval_start", epoch_num=epoch)
        yield result
        if result.get("auroc") is not None:
            self._log_event("eval_accuracy", result["auroc"], epoch_num=epoch)
        self._log_end("eval_stop", epoch_num=epoch)
        if not self._evaluated:  # the checker requires it exactly once
            self._log_event("eval_samples", result.get("samples"), epoch_num=epoch)
            self._evaluated = True

    def log_run_stop(self, success: bool, epoch: float) -> None:
        """`success`: a validation reached the target."""
        self._log_end("run_stop", status="success" if success else "aborted", epoch_num=epoch)
