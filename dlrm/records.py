"""The run folder: what was asked, what happened, step by step. Rank 0 writes it."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Records:
    """Writes RUN/metrics.jsonl as it goes and the JSON files; without a folder it keeps nothing."""

    def __init__(self, folder: str | None, first: bool, tensorboard: bool = False) -> None:
        self._folder = Path(folder) if folder and first else None
        self._board: Any = None
        self._metrics = None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._metrics = open(self._folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self._folder / "tensorboard"))

    def report(self, **values: Any) -> None:
        """One line of metrics.jsonl: step, epoch and whatever was measured."""
        if self._metrics:
            self._metrics.write(json.dumps({**values, "time": time.time()}) + "\n")
        if self._board:
            split = values.get("split", "train")
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{split}/{name}", value, values.get("step", 0))

    def save(self, name: str, values: Any) -> None:
        """RUN/name as JSON, published whole."""
        if self._folder:
            path = self._folder / name
            partial = path.with_name(name + ".partial")
            partial.write_text(json.dumps(values, indent=1) + "\n")
            os.replace(partial, path)

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
        if self._board:
            self._board.close()
