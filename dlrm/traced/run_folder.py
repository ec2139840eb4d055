"""The run folder of a traced script: where it is, its lock, and config.json made of the script's words.

In: what was typed. Out: RUN/config.json with the same sections as a training's, so that `analysis` shows and
compares the settings; words that have no section there are in `script`.
"""

import atexit
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, os_errors_as_user_errors
from common.lock import FolderLock
from common.owned import OutputFolder, identify_folder, remove_made_folder
from dlrm.runtime.environment import describe_command, list_versions, mask_secrets
from dlrm.runtime.new_run_folder import FILES, make_run, refuse_other_model, update_environment
from dlrm.runtime.ranks import Ranks
from dlrm.traced.options import Chosen
from dlrm.traced.script import Program

# how scripts call what a training of this project has under data, model, optim and run
SECTIONS = {
    "batch_size": "data.batch_size", "batchsize": "data.batch_size", "bs": "data.batch_size",
    "train_batch_size": "data.batch_size", "per_device_train_batch_size": "data.batch_size",
    "num_workers": "data.num_workers", "workers": "data.num_workers",
    "data": "data.dataset_path", "data_dir": "data.dataset_path", "data_path": "data.dataset_path",
    "dataset": "data.dataset_name", "dataset_dir": "data.dataset_path", "dataset_path": "data.dataset_path",
    "in_memory_binary_criteo_path": "data.in_memory_binary_criteo_path",
    "synthetic_multi_hot_criteo_path": "data.synthetic_multi_hot_criteo_path",
    "embedding_dim": "model.embedding_dim", "interaction_type": "model.interaction_type",
    "epochs": "run.epochs", "num_epochs": "run.epochs", "num_train_epochs": "run.epochs",
    "lr": "optim.learning_rate", "learning_rate": "optim.learning_rate", "optimizer": "optim.optimizer",
}  # fmt: skip
_NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?|-?\.\d+")


@dataclass
class OpenedFolder:
    """The run folder of this process, and what is to be removed of it where the script refuses its words."""

    path: Path
    made: str = ""  # the folder's identity, where this process has made the folder
    lock: FolderLock | None = None  # of rank 0
    wrote_config: bool = False  # where there was no config.json

    def discard(self) -> None:
        """Remove what this process has made of it."""
        if self.lock is not None:
            self.lock.release()
        if self.made:
            remove_made_folder(self.path, self.made, FILES)
        elif self.wrote_config:
            OutputFolder(self.path).remove_file("config.json")


def choose_folder(chosen: Chosen, here: Ranks) -> OpenedFolder:
    """--output_dir, or for a single process a new folder in results/."""
    if chosen.output_dir:
        return OpenedFolder(Path(chosen.output_dir).absolute())
    if here.world_size > 1:
        error = UserError(
            f"--output_dir: name the run folder, the same for all {here.world_size} ranks "
            "(MODEL=SCRIPT ./3_train.sh chooses one)"
        )
        error.shared = True
        raise error
    path, made = make_run(Path("results"), None)
    return OpenedFolder(path.absolute(), made)


def open_run_folder(opened: OpenedFolder, program: Program, here: Ranks) -> None:
    """Lock the folder until the process ends, and write config.json; UserError where it is another's."""
    folder = opened.path
    with os_errors_as_user_errors(folder):
        missing = not os.path.lexists(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if missing:
            opened.made = identify_folder(os.lstat(folder))
    opened.lock = lock = FolderLock(folder, "tracing a script into it")
    lock.acquire()
    atexit.register(lock.release)
    refuse_other_model(folder, program.title)
    opened.wrote_config = not os.path.lexists(folder / "config.json")
    output = OutputFolder(folder)
    output.refuse_foreign(["config.json", "metrics.jsonl"], "move it away or name another --output_dir")
    output.write("config.json", json.dumps(make_config(folder, program, here), indent=1) + "\n")
    update_environment(folder)


def make_config(folder: Path, program: Program, here: Ranks) -> dict[str, Any]:
    """What config.json holds: the script's options by section, and where it was started."""
    config: dict[str, Any] = {"data": {}, "model": {}, "optim": {}, "run": {}, "script": {}}
    if dataset := os.environ.get("DATASET_DIR"):
        config["data"]["dataset_path"] = dataset
    for name, value in _read_options(program.words):
        section, _, key = SECTIONS.get(name, f"script.{name}").partition(".")
        config[section][key] = mask_secrets(value) if isinstance(value, str) else value
    config["run"]["output_dir"] = str(folder)
    config["launch"] = {
        "model": program.title, "world_size": here.world_size,
        "local_world_size": here.local_world_size, "nodes": here.nodes,
        "device": "cuda" if _has_gpu() else "cpu", "traced": True,
        "command": describe_command(), "directory": os.getcwd(), "versions": list_versions(),
    }  # fmt: skip
    return config


def _read_options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """--name value, --name=value, --flag and name=value as names and values; other words by their place."""
    place, at = 0, 0
    while at < len(words):
        word, at = words[at], at + 1
        if found := re.fullmatch(r"(?:--?|\+*)([A-Za-z][\w.-]*)=(.*)", word, re.DOTALL):
            yield _plain_name(found[1]), _read_value(found[2])
        elif re.fullmatch(r"--?[A-Za-z][\w.-]*", word):
            follows = at < len(words) and (not words[at].startswith("-") or _NUMBER.fullmatch(words[at]))
            yield _plain_name(word.lstrip("-")), _read_value(words[at]) if follows else True
            at += bool(follows)
        else:
            place += 1
            yield f"word_{place}", word


def _plain_name(name: str) -> str:
    return name.replace("-", "_")


def _read_value(text: str) -> str | int | float:
    if not _NUMBER.fullmatch(text) or len(text) > 18:
        return text
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _has_gpu() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and os.path.exists("/dev/nvidia0")
