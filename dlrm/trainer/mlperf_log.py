"""MLPerf's `:::MLLOG` lines, in the order and with the keys that its compliance checker wants.

Written by rank 0 alone, to stdout and to mlperf.log in the run folder; does nothing unless asked for.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlrm.config.options import Config

NAMES = {"dcn": "dlrm_dcnv2"}  # interaction -> benchmark; the others were MLPerf's "dlrm"
PRECISIONS = {"off": "fp32", "bf16": "bfloat16", "fp16": "fp16"}


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

    def begin(self, cfg: Config, world_size: int) -> None:
        """Initialising starts: who, what, with which settings."""
        optim, run = cfg.optim, cfg.run
        self._batch = world_size * cfg.data.batch_size
        # who starts a submission's run clears the caches before it; this program cannot
        self.event("cache_clear", False)
        self.start("init_start")
        settings = {
            "submission_benchmark": NAMES.get(cfg.model.interaction_type, "dlrm"),
            "submission_org": run.mllog_submitter,
            "submission_division": "closed",
            "submission_status": "onprem",
            "submission_platform": run.mllog_platform,
            "global_batch_size": self._batch,
            "gradient_accumulation_steps": 1,
            "seed": run.seed or 0,
            "opt_name": optim.name,
            "opt_base_learning_rate": optim.learning_rate,
            "opt_weight_decay": 0,
            "opt_learning_rate_warmup_steps": optim.lr_warmup_steps,
            "opt_learning_rate_decay_start_step": optim.lr_decay_start,
            "opt_learning_rate_decay_steps": optim.lr_decay_steps,
            "lowest_numerical_precision_in_linear": "tf32"
            if run.allow_tf32 and optim.amp == "off"
            else PRECISIONS[optim.amp],
        }
        if "adagrad" in optim.name:
            settings |= {
                "opt_adagrad_learning_rate_decay": 0,
                "opt_adagrad_initial_accumulator_value": 0,
                "opt_adagrad_epsilon": optim.eps,
            }
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
