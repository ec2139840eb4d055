"""Saving while training goes on: a copy is taken, a thread writes it, all ranks publish it together.

The ranks talk through the store, not through collectives: those belong to the training.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlrm.checkpoint import folder, shards, state
from dlrm.checkpoint.shards import TensorPiece
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

POLL = 0.02  # seconds


class CheckpointWriter:
    """`save` returns once the copy is taken; `wait` when it is published, or says why it is not."""

    def __init__(
        self, root: Path, here: Ranks, store: Any, keep: int | None, patience: float,
        claim: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.claim = claim  # makes the first rank the folder's only writer
        self.root, self.here, self.store, self.keep = root, here, store, keep
        self.patience = patience  # seconds for the slowest rank's disk
        self.last: str | None = None  # the newest published one of this run
        self.failures = 0
        self._number = 0
        self._staging: dict[Any, Any] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(self, parts: list[TensorPiece], values: dict[str, Any], step: int) -> None:
        """Save these tensors and values. Waits for the checkpoint before, if that is still being written."""
        self.wait()
        with trace.span("checkpoint", "save", bytes=sum(piece.tensor.nbytes for piece in parts)):
            copied = state.copy_pieces(parts, self._staging)
        self._number += 1
        self._error = None
        arguments = (self._number, copied, values, step)
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> str | None:
        """None when the last save is published, else what went wrong: the same on all ranks."""
        if self._thread is not None:
            with trace.span("checkpoint", "wait"):
                self._thread.join()
            self._thread = None
            self.failures += self._error is not None
        return self._error

    def _work(self, number: int, parts: list[TensorPiece], values: dict[str, Any], step: int) -> None:
        trace.name_thread("checkpoint")
        try:
            self._error = self._write(f"dlrm/checkpoint/{number}", parts, values, step)
        except Exception as error:  # noqa: BLE001  # a lost store: the session ends for that reason
            self._error = f"{type(error).__name__}: {error}"

    def _write(self, key: str, parts: list[TensorPiece], values: dict[str, Any], step: int) -> str | None:
        first = self.here.first
        partial = final = None
        if first:
            begun = _run_catching_os_errors(lambda: self._begin(step))
            self.store.set(f"{key}/begin", json.dumps(begun))
        begun = json.loads(self._get(f"{key}/begin"))
        if "error" not in begun:
            partial, final = (Path(path) for path in begun["done"])
            file = f"rank{self.here.rank:05d}.safetensors"
            mine = _run_catching_os_errors(lambda: shards.write_pieces(partial, file, parts))
            self.store.set(f"{key}/{self.here.rank}", json.dumps(mine))
        if first:
            outcome = begun if partial is None else self._publish(key, partial, final, values)
            self.store.set(f"{key}/end", json.dumps(outcome))
        outcome = json.loads(self._get(f"{key}/end"))
        if "error" in outcome:
            return outcome["error"]
        self.last = outcome["done"]
        return None

    def _begin(self, step: int) -> list[str]:
        self.claim()
        return [str(path) for path in folder.begin_checkpoint(self.root, step)]

    def _publish(self, key: str, partial: Path, final: Path | None, values: dict[str, Any]) -> dict[str, Any]:
        assert final is not None
        tensors, files = [], {}
        try:
            for rank in range(self.here.world_size):
                theirs = json.loads(self._get(f"{key}/{rank}"))
                if "error" in theirs:
                    raise UserError(f"rank {rank}: {theirs['error']}")
                tensors += theirs["done"]["tensors"]
                files |= theirs["done"]["file"]
            folder.publish_checkpoint(partial, final, {"state": values, "tensors": tensors, "files": files})
            if self.keep:
                folder.remove_old_checkpoints(self.root, self.keep)
            return {"done": str(final)}
        except (OSError, UserError, TimeoutError) as error:
            folder.discard_partial(partial)
            return {"error": str(error)}

    def _get(self, key: str) -> str:
        given_up = time.monotonic() + self.patience
        while not self.store.check([key]):
            if time.monotonic() > given_up:
                raise TimeoutError(f"a rank did not finish writing within {self.patience:.0f} s")
            time.sleep(POLL)
        return self.store.get(key).decode()


def _run_catching_os_errors(work: Any) -> dict[str, Any]:
    try:
        return {"done": work()}
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")}
