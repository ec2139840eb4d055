"""Models by name: those of this package, and those of modules that DLRM_MODELS names.

A new model inside the package is a folder and a line in MODULES. A model outside it is a module with a
`SPEC`, found by DLRM_MODELS="my_package.two_towers another.module" in the environment.
"""

import importlib
import os
from collections.abc import Mapping

from common.errors import UserError, printable
from dlrm.trainer.spec import ModelSpec

MODULES = {
    "dlrm": "dlrm.models.dlrm.spec",
    "bert4rec": "dlrm.models.bert4rec.spec",
    "emulate": "dlrm.emulate.spec",
}
PROGRAMS = {
    "dlrm": "python -m dlrm.train",
    "bert4rec": "python -m dlrm.bert4rec",
    "emulate": "python -m dlrm.emulate",
}
VARIABLE = "DLRM_MODELS"


def find_model(name: str, environ: Mapping[str, str] = os.environ) -> ModelSpec:
    """The spec of the model of this name; UserError names those that there are."""
    if name in MODULES:
        return importlib.import_module(MODULES[name]).SPEC
    others = [_load_spec(module) for module in environ.get(VARIABLE, "").split()]
    for spec in others:
        if spec.name == name:
            return spec
    known = ", ".join([*MODULES, *(spec.name for spec in others)])
    unknown = f"model {printable(name)} is unknown; there are {known}"
    raise UserError(f"{unknown} ({VARIABLE} names modules with more)")


def name_program(name: str) -> str:
    """The command that trains this model, for --help and messages."""
    return PROGRAMS.get(name, f"python -m dlrm.train --model {name}")


def _load_spec(module: str) -> ModelSpec:
    try:
        spec = importlib.import_module(module).SPEC
    except (ImportError, AttributeError) as error:
        raise UserError(f"{VARIABLE}: {module} cannot be loaded: {error}") from None
    if not isinstance(spec, ModelSpec):
        raise UserError(f"{VARIABLE}: {module}.SPEC is not a ModelSpec")
    return spec
