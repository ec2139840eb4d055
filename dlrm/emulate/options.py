"""Options of the emulator: all those of a DLRM training, with the emulated run's values as defaults; its own.

In: the command line, RUN/config.json. Out: an `EmulateConfig`.
"""

import itertools
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.inputs import read_json_object
from dlrm.config.parser import check_at_least, check_at_most, list_flags, option, path_option
from dlrm.models.dlrm.options import Config

GROUPS = ("data", "model", "optim", "plan", "run", "checkpoint")  # of options, in config.json
# of the emulated run, and not of this one
NOT_INHERITED = {
    "output_dir", "checkpoint_dir", "load_checkpoint_path", "persistent_path", "sharding_file", "mode",
    "resume", "mllog", "mlcommons_log", "tensorboard", "load_model_only", "profile_steps",
}  # fmt: skip
# where there is nothing to compute
NO_EFFECT = {
    "validation_auroc", "mllog", "mlcommons_log", "tensorboard", "compile", "allow_tf32", "print_lr",
    "collect_multi_hot_freqs_stats", "checkpoint_every_minutes", "stop_before_walltime",
    "load_checkpoint_path", "load_model_only", "pin_memory", "profile_steps",
}  # fmt: skip
COMPUTE = re.compile(r"x(?P<factor>[0-9]*\.?[0-9]+)|(?P<time>[0-9]*\.?[0-9]+)(?P<unit>us|ms|s)")
MOST_SECONDS = 86_400  # of a step
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class EmulateOptions:
    source_run: str | None = path_option("the run folder to emulate, with its trace", flag="from")
    ranks: int | None = option(None, "ranks to start, without a launcher (default: as many as the run had)")
    compute: str = option(
        "traced",
        "what a step takes besides its data: traced; x0.1, a tenth of it; or 5ms, the same for all",
    )
    communication: str = option(
        "barrier", "what ends a step: nothing, a barrier, or an exchange of the traced size",
        ("none", "barrier", "traced"),
    )  # fmt: skip
    make_data: str | None = option(
        None, "make the dataset's files where they are missing: of holes that read as zeros, or real bytes",
        ("sparse", "real"), "sparse",
    )  # fmt: skip
    data_scale: float = option(1.0, "files that are made have X times as many rows as the run's")

    def __post_init__(self) -> None:
        check_at_least(1, self, "ranks")
        check_at_least(1e-9, self, "data_scale")
        check_at_most(1e9, self, "data_scale")
        if self.data_scale != 1 and not self.make_data:
            raise UserError("--data_scale: says how large made files are: give --make_data, too")
        if not self.source_run:
            raise UserError("--from RUN is needed: the folder of the run to emulate")
        if self.compute != "traced" and not COMPUTE.fullmatch(self.compute):
            raise UserError(
                f"--compute {printable(self.compute)}: wanted traced, a factor (x0.1) or a time (5ms)"
            )
        factor, seconds = self.compute_factor, self.compute_seconds
        if factor is not None and not 1e-6 <= factor <= 1e6:
            raise UserError(
                f"--compute {self.compute}: wanted a factor from x0.000001 to x1000000; 0ms: no computing"
            )
        if seconds is not None and seconds > MOST_SECONDS:
            raise UserError(f"--compute {self.compute}: a step of more than {MOST_SECONDS} s; give less")

    @property
    def run(self) -> Path:
        return Path(os.path.abspath(str(self.source_run)))

    @property
    def compute_factor(self) -> float | None:
        """What the traced times are multiplied by; None where all steps take `compute_seconds`."""
        found = COMPUTE.fullmatch(self.compute)
        if found is None:
            return 1.0
        return float(found["factor"]) if found["factor"] else None

    @property
    def compute_seconds(self) -> float | None:
        found = COMPUTE.fullmatch(self.compute)
        return float(found["time"]) * UNITS[found["unit"]] if found and found["time"] else None


@dataclass(frozen=True)
class EmulateConfig(Config):
    emulate: EmulateOptions = field(default_factory=EmulateOptions)

    def check_inputs(self) -> None:
        self.check_folder()
        if not self.emulate.make_data:
            super().check_inputs()

    def check_folder(self) -> None:
        """UserError where the dataset's folder is neither there nor made."""
        folder = self.data.folder
        if folder and not self.emulate.make_data and not Path(folder).is_dir():
            raise UserError(
                f"{printable(folder)} is not a folder: name the dataset's, or let --make_data make one there"
            )

    @classmethod
    def read_defaults(cls, source_run: str | None) -> Mapping[str, Any]:
        """The values of the options of the run that --from names, by their names."""
        if source_run is None:
            return {}
        config = read_config(Path(source_run))
        groups = _list_groups(cls)
        known = {each.name: each for group in groups for each in list_flags(group)}
        hints = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
        found = {}
        for name, value in itertools.chain.from_iterable(config[group].items() for group in GROUPS):
            if name in known and name not in NOT_INHERITED:
                if not _fits(value, hints[name]):
                    raise UserError(
                        f"{printable(source_run)}/config.json: {name} has an impossible value; give a run "
                        "folder as a training leaves it"
                    )
                found[name] = tuple(value) if isinstance(value, list) else value
        base = str(config["launch"].get("directory") or "")
        for name, value in found.items():
            if known[name].metadata.get("path") and value:
                found[name] = os.path.normpath(os.path.join(base, str(value)))
        return found


def _list_groups(kind: type) -> list[Any]:
    return [each.default_factory for each in fields(kind)]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of config.json can be one of an option of this type; lists stand for tuples."""
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for arm in arms:
        if typing.get_origin(arm) is tuple:
            inner = typing.get_args(arm)[0]
            if isinstance(value, list) and all(type(each) is inner for each in value):
                return True
        elif type(value) is arm or (arm is float and type(value) is int):
            return True
    return False


def read_config(run: Path) -> dict[str, Any]:
    """The run's config.json; UserError where it is none of a DLRM training."""
    path = run / "config.json"
    if not path.exists():
        raise UserError(
            f"--from {printable(run)}: has no config.json: name the run folder of a traced training; of a "
            "trace alone python -m analysis replay makes the calls again"
        )
    config = read_json_object(path)
    whole = all(isinstance(config.get(group), dict) for group in (*GROUPS, "launch"))
    if not whole or "in_memory_binary_criteo_path" not in config["data"]:
        model = str(config["launch"].get("model", "?")) if isinstance(config.get("launch"), dict) else "?"
        raise UserError(
            f"{printable(path)}: is a run of {printable(model)}, and the emulator reads the data of DLRM "
            "alone: python -m analysis replay makes the calls of any trace again"
        )
    return config


def count_ranks(options: EmulateConfig) -> int:
    """How many ranks to start: --ranks, else as many as the run had."""
    world = read_config(options.emulate.run)["launch"].get("world_size")
    return options.emulate.ranks or (world if type(world) is int and 1 <= world <= 1 << 16 else 1)


def list_unused_options(given: Sequence[str]) -> list[str]:
    """One line for the options of the command line that have no effect here."""
    found = sorted(NO_EFFECT & set(given))
    return [f"--{', --'.join(found)}: ignored, nothing is computed here"] if found else []
