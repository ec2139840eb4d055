"""What was run, in words, from config.json and plan.json: for headings, names of files and comparisons."""

import os
import re
from contextlib import suppress
from typing import Any

from common.errors import printable

Config = dict[str, Any]
LONGEST = 500  # characters of a setting

# name in reports -> the option of DLRM, and of BERT4Rec
OPTIONS = {
    "interaction": ("model.interaction_type",),
    "batch size of a rank": ("data.batch_size", "data.train_batch_size"),
    "embedding dimension": ("model.embedding_dim", "model.emb_dim"),
    "ranks": ("launch.world_size",),
    "hosts": ("launch.nodes",),
    "device": ("launch.device",),
    "epochs": ("run.epochs",),
    "optimizer": ("optim.optimizer",),
    "learning rate": ("optim.learning_rate", "optim.lr"),
}
DATASET_PATHS = (
    "data.in_memory_binary_criteo_path", "data.synthetic_multi_hot_criteo_path", "data.dataset_path",
)  # fmt: skip
_DATA = ("data.in_memory_binary_criteo_path", "data.dataset_path", "data.dataset_name")
_NOT_SETTINGS = (
    "run.output_dir", "run.num_epochs", "run.given_options", "launch.local_world_size", "launch.hosts",
    "launch.chosen", "launch.command", "launch.directory",
)  # fmt: skip


def find_model_title(config: Config) -> str:
    """The model's title, or nothing where there is no config.json of ours."""
    launch = config.get("launch")
    if isinstance(launch, dict) and isinstance(launch.get("model"), str):
        return launch["model"]
    # runs of an earlier release do not name their model: its options tell
    sizes = config.get("model")
    if not isinstance(sizes, dict):
        return ""
    return "DLRM" if "embedding_dim" in sizes else "BERT4Rec" if "emb_dim" in sizes else ""


def flatten_options(config: Config, before: str = "") -> dict[str, Any]:
    """{"data": {"batch_size": 256}} -> {"data.batch_size": 256}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            found.update(flatten_options(value, f"{name}."))
        else:
            found[name] = value
    return found


def read_option(config: Config, called: str) -> Any:
    options = flatten_options(config)
    return next((options[name] for name in OPTIONS[called] if options.get(name) is not None), None)


def list_dataset_paths(config: Config) -> list[str]:
    """Where the run's data was: what its options name, absolute as in the traces."""
    options = flatten_options(config)
    base = options.get("launch.directory")
    paths = [str(options[name]) for name in DATASET_PATHS if options.get(name)]
    if isinstance(base, str):
        paths = [os.path.normpath(os.path.join(base, path)) for path in paths]
    return [path.rstrip("/") for path in paths]


def list_tables(plan: Config) -> str:
    """How many embedding tables, and rows in all of them: those of the data, not of the options."""
    rows = 0
    for table in plan.values():
        with suppress(KeyError, IndexError, TypeError, ValueError, AttributeError):  # not a plan of ours
            rows += max((_find_end(shard) for shard in table["shards"]), default=0)
    return f"{len(plan)} of {rows:,} rows" if rows else ""


def _find_end(shard: Any) -> int:
    offset, size = shard["offset"][0], shard["size"][0]
    if type(offset) is not int or type(size) is not int or not 0 <= offset + size < 1 << 62:
        raise ValueError
    return offset + size


def run_settings(config: Config, plan: Config) -> dict[str, str]:
    """What two runs must share to be compared, by the names used in reports."""
    options = flatten_options(config)
    data = [str(options[name]) for name in _DATA if options.get(name) is not None]
    known = {"model": find_model_title(config), "data": data[0] if data else "", "tables": list_tables(plan)}
    known |= {called: read_option(config, called) for called in OPTIONS}
    return {called: format_setting(value) for called, value in known.items() if value not in (None, "")}


def list_settings(config: Config, plan: Config) -> dict[str, str]:
    """All that was chosen for a run, what matters most first: the names used in reports, then options."""
    options = flatten_options(config)
    known = {*_NOT_SETTINGS, *_DATA, *sum(OPTIONS.values(), ())}
    rest = {printable(name): format_setting(options[name]) for name in sorted({*options} - known)}
    return run_settings(config, plan) | rest


def find_setting(config: Config, called: str) -> Any:
    """The value of an option by its name (batch_size, data.batch_size) or by its name in reports."""
    for name, keys in OPTIONS.items():
        if called == name or called in (part for key in keys for part in (key, key.rpartition(".")[2])):
            return read_option(config, name)
    options = flatten_options(config)
    return next((value for key, value in options.items() if called in (key, key.rpartition(".")[2])), None)


def format_setting(value: Any) -> str:
    """A setting on one line; a text as long as a file is cut."""
    text = "not set" if value is None else printable(str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def to_number(value: Any) -> float:
    """0 where it is none."""
    return float(value) if isinstance(value, int | float) else 0.0


def trace_file_name(config: Config) -> str:
    """MODEL-n<nodes>-ppn<ranks of a node>-gpu<n>-ep<epochs>-bs<batch>-ed<dimension>-lr<rate>; or nothing."""
    try:
        launch = config["launch"]
        world, nodes = int(launch["world_size"]), int(launch["nodes"])
        ppn = int(launch.get("local_world_size") or world // max(1, nodes))
        gpus = world if launch["device"] == "cuda" else 0
        epochs, batch = int(read_option(config, "epochs")), int(read_option(config, "batch size of a rank"))
        dimension = int(read_option(config, "embedding dimension"))
        rate = float(read_option(config, "learning rate"))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return ""
    name = re.sub(r"[^a-z0-9]+", "-", find_model_title(config).lower()).strip("-") or "run"
    return f"{name}-n{nodes}-ppn{ppn}-gpu{gpus}-ep{epochs}-bs{batch}-ed{dimension}-lr{rate:g}"
