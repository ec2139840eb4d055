"""The lines that MLCommons' dlrm_main.py prints, word for word, for programs that look for them in a log.

In: what the trainer knows at each of those moments. Out: lines on rank 0's stdout, beside this program's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pprint import pformat
from typing import Any


class MLCommonsLog:
    """Prints the reference's lines; without --mlcommons_log its methods do nothing."""

    def __init__(self, enabled: bool, print_line: Callable[[str], None]) -> None:
        self.enabled, self._print_line = enabled, print_line

    def _print_if_enabled(self, text: str) -> None:
        if self.enabled:
            self._print_line(text)

    def log_options(self, options: Any) -> None:
        """All options as one dict, as the reference prints its arguments."""
        self._print_if_enabled(
            pformat({name: value for group in asdict(options).values() for name, value in group.items()})
        )

    def log_rates(self, step: int, rates: Sequence[float]) -> None:
        """The learning rate of each parameter group. step: within the epoch, from 1."""
        for group, rate in enumerate(rates):
            self._print_if_enabled(f"lr: {step} {group} {rate:.6f}")

    def log_evaluation(self, result: Mapping[str, Any]) -> None:
        split = result["split"]
        self._print_if_enabled(f"AUROC over {split} set: {result.get('auroc')}.")
        self._print_if_enabled(f"Number of {split} samples: {result.get('samples')}")

    def log_epoch_end(self, steps: int) -> None:
        """steps: of the epoch that ends, in this launch."""
        self._print_if_enabled(f"Total number of iterations: {steps}")
