"""The run folder: what was asked, what happened, step by step; and the same for a person who watches.

Rank 0 writes and speaks; on the other ranks everything here does nothing.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dlrm import config


class Records:
    """RUN/metrics.jsonl as it goes, JSON files whole; without a folder only words on stdout."""

    def __init__(self, folder: str | None, first: bool, tensorboard: bool = False) -> None:
        self.folder = Path(folder) if folder and first else None
        self._first = first
        self.launch: dict[str, Any] = {}
        self._bar: Any = None
        self._board: Any = None
        self._metrics: Any = None
        self._steps, self._done, self._begun = 0, 0, time.time()
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = open(self.folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"))

    def describe(self, cfg: Any) -> None:
        """Every option as it was understood. Not over an earlier run's, before it is known to go on."""
        if self.folder:
            config.dump(cfg, self.folder / "config.json", self.launch)

    def begin(self, steps: int, done: int, bar: bool) -> None:
        """Training starts: `steps` in all, some done before. A bar where a person looks on."""
        self._steps, self._done, self._begun = steps, done, time.time()
        if bar and self._first:
            size = shutil.get_terminal_size((100, 24))  # some terminals say 0 x 0: tqdm would hide the bar
            self._bar = tqdm(
                total=steps, unit="step", desc="train", disable=not sys.stderr.isatty(),
                ncols=size.columns, nrows=size.lines,
            )  # fmt: skip

    def report(self, **values: Any) -> None:
        """One line of metrics.jsonl, one line (or a step of the bar) for people."""
        if not self._first:
            return
        if self._metrics:
            clocks = {"time": time.time(), "cpu_seconds": time.process_time()}  # of this rank
            self._metrics.write(json.dumps({**values, **clocks}) + "\n")
        if self._board:
            split = values.get("split", "train")
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{split}/{name}", value, values.get("step", 0))
        if "split" in values:
            shown = {k: v for k, v in values.items() if k not in ("split", "step", "epoch") and v is not None}
            self.say(f"{values['split']}: " + ", ".join(f"{k} {v:.6g}" for k, v in shown.items()))
        else:
            self._show_step(values)

    def _show_step(self, values: dict[str, Any]) -> None:
        text = (
            f"loss {values['loss']:.5f}, lr {values['lr']:.4g}, {values['samples_per_second']:,.0f} samples/s"
        )
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text)
            self._bar.update(values["step"] - self._bar.n)
            return
        done = values["step"] - self._done
        left = (time.time() - self._begun) * (self._steps - values["step"]) / done if done > 0 else 0
        self.say(f"epoch {values['epoch']} step {values['step']}/{self._steps}: {text}, {left:.0f} s left")

    def warn(self, text: str) -> None:
        if self._first:
            print(f"dlrm: {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._first:
            if self._bar is not None and not self._bar.disable:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def save(self, name: str, values: Any) -> None:
        """RUN/name as JSON, published whole."""
        if self.folder:
            path = self.folder / name
            partial = path.with_name(name + ".partial")
            partial.write_text(json.dumps(values, indent=1) + "\n")
            os.replace(partial, path)

    def close(self) -> None:
        for each in (self._bar, self._metrics, self._board):
            if each is not None:
                each.close()
