"""Save a checkpoint while training continues: copy the tensors, write them in a thread, publish on all ranks.

The ranks' threads agree through the store and never through collectives. Collectives belong to the training's
thread: one from another thread would meet the wrong one on another rank, and both would wait forever.

For the save number N the store has, each with {"done": ...} or {"error": text} as its value:
    dlrm/checkpoint/N/begin   from rank 0: the folder to write into, and its final name
    dlrm/checkpoint/N/RANK    from each rank: what its file holds
    dlrm/checkpoint/N/end     from rank 0: the published checkpoint
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlrm.checkpoint import folder
from dlrm.runtime import trace
from dlrm.runtime.errors import UserError
from dlrm.runtime.ranks import Ranks

POLL_SECONDS = 0.02
# for the tensors of a training: `state.copy_pieces` and `shards.write_pieces`
CopyPieces = Callable[[list[Any], dict[Any, Any]], list[Any]]
WritePieces = Callable[[Path, str, list[Any]], dict[str, Any]]


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. All ranks make the same calls in the same order."""

    def __init__(
        self, root: Path, here: Ranks, store: Any, keep: int | None, timeout: float,
        lock_root: Callable[[], None] = lambda: None, *, copy_pieces: CopyPieces, write_pieces: WritePieces,
    ) -> None:  # fmt: skip
        """root          the folder of checkpoints
        store         a connection to the ranks' store that no other thread uses
        keep          how many checkpoints to keep, the newest ones; the best one besides. 0 or None: all
        timeout       seconds in which the slowest rank must have written its file
        lock_root     makes rank 0 the folder's only writer, or raises UserError
        copy_pieces   (pieces, memory of the last save, to be used again) -> copies, which do not change
        write_pieces  (folder, name of this rank's file, copies) -> what the description has of the file
        """
        self.root, self.here, self.store, self.keep = root, here, store, keep
        self.timeout, self.lock_root = timeout, lock_root
        self._copy_pieces, self._write_pieces = copy_pieces, write_pieces
        self.last_path: str | None = None  # the newest checkpoint that this run published
        self.failure_count = 0
        self._number = 0  # of the save; the same on all ranks
        self._description_bytes = 0
        self._staging: dict[Any, Any] = {}  # the copies' memory, used again for the next save
        self._thread: threading.Thread | None = None
        self._error: str | None = None  # of the last save

    def save(self, pieces: list[Any], values: dict[str, Any], step: int, description_bytes: int = 0) -> None:
        """Copy these pieces and start to write them; returns as soon as the copy is complete.

        Waits first for the checkpoint before, if that is still being written. `description_bytes`: at least
        so many for the description.
        """
        self.wait_for_save()
        with trace.span("checkpoint", "save", bytes=sum(piece.nbytes for piece in pieces)):
            copied = self._copy_pieces(pieces, self._staging)
        self._number += 1
        self._error = None
        self._description_bytes = description_bytes
        arguments = (self._number, copied, values, step)
        self._thread = threading.Thread(target=self._run_save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def error(self) -> str | None:
        """What went wrong with the last save, as far as this rank knows by now."""
        return self._error

    def wait_for_save(self) -> str | None:
        """None once the last save is published, else what went wrong: the same text on all ranks."""
        if self._thread is not None:
            with trace.span("checkpoint", "wait"):
                self._thread.join()
            self._thread = None
            self.failure_count += self._error is not None
        return self._error

    def _run_save(self, number: int, pieces: list[Any], values: dict[str, Any], step: int) -> None:
        """What the thread does; `save` says what the arguments are. number: of the save, the same on all
        ranks.
        """
        trace.name_thread("checkpoint")
        try:
            self._error = self._write_checkpoint(f"dlrm/checkpoint/{number}", pieces, values, step)
        except Exception as error:  # noqa: BLE001  # e.g. the store is lost: the heartbeat ends this rank
            self._error = f"{type(error).__name__}: {error}"

    def _write_checkpoint(self, key: str, pieces: list[Any], values: dict[str, Any], step: int) -> str | None:
        """Write this rank's file; on rank 0 also make the folder and publish it. Returns the error, or None.

        No rank learns that a checkpoint is good before rank 0 has published it.
        """
        first = self.here.first
        partial = final = None
        if first:
            begun = _catch_user_errors(lambda: self._begin_checkpoint(step))
            self.store.set(f"{key}/begin", json.dumps(begun))
        begun = json.loads(self._wait_for_key(f"{key}/begin", "rank 0 did not start to save"))
        if "error" not in begun:
            partial, final = (Path(path) for path in begun["done"])
            file = f"rank{self.here.rank:05d}.safetensors"
            written = _catch_user_errors(lambda: self._write_pieces(partial, file, pieces))
            self.store.set(f"{key}/{self.here.rank}", json.dumps(written))
        if first:
            outcome = begun if partial is None else self._publish_checkpoint(key, partial, final, values)
            self.store.set(f"{key}/end", json.dumps(outcome))
        outcome = json.loads(self._wait_for_key(f"{key}/end", "rank 0 did not publish the checkpoint"))
        if "error" in outcome:
            return outcome["error"]
        self.last_path = outcome["done"]
        return None

    def _begin_checkpoint(self, step: int) -> list[str]:
        """[folder to write into, its final name], on rank 0."""
        self.lock_root()
        return [str(path) for path in folder.begin_checkpoint(self.root, step)]

    def _publish_checkpoint(
        self, key: str, partial: Path, final: Path | None, values: dict[str, Any]
    ) -> dict[str, Any]:
        """Rank 0, once every rank's file is on the disk: write the description, rename the folder, remove old
        checkpoints. If one rank failed, nothing is published and the older checkpoints stay.
        """
        assert final is not None
        try:
            # wait for all ranks, also when one has failed: a folder that is written into cannot be removed
            written = [
                json.loads(self._wait_for_key(f"{key}/{rank}", f"rank {rank} did not write its file"))
                for rank in range(self.here.world_size)
            ]
            tensors, files = [], {}
            for rank, each in enumerate(written):
                if "error" in each:
                    raise UserError(f"rank {rank}: {each['error']}")
                tensors += each["done"]["tensors"]
                files |= each["done"]["file"]
            description = {"state": values, "tensors": tensors, "files": files}
            folder.publish_checkpoint(partial, final, description, self._description_bytes)
            if self.keep:
                folder.remove_old_checkpoints(self.root, self.keep)
            return {"done": str(final)}
        except (OSError, UserError, TimeoutError) as error:
            folder.discard_partial(partial)
            return {"error": str(error)}

    def _wait_for_key(self, key: str, failure: str) -> str:
        """The value that another rank sets; TimeoutError with the text `failure` after `timeout` seconds."""
        deadline = time.monotonic() + self.timeout
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{failure} within {self.timeout:.0f} s")
            time.sleep(POLL_SECONDS)
        return self.store.get(key).decode()


def _catch_user_errors(work: Callable[[], Any]) -> dict[str, Any]:
    """{"done": result} or {"error": one line}: what the other ranks are sent."""
    try:
        return {"done": work()}
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")}
