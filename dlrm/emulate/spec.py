"""The emulator, as the scripts and `python -m dlrm.train --model emulate` know it."""

from collections.abc import Callable
from typing import Any

from dlrm.emulate.options import EmulateConfig
from dlrm.trainer.spec import ModelSpec, ScriptOptions

DESCRIPTION = """Emulate a run of DLRM: the same reads, checkpoints and evaluations; a step is a wait.

Takes every option of the run from its config.json; options on the command line win. Those that concern
computing alone have no effect. Needs neither a GPU nor torch.
"""


def load_program() -> Callable[..., None]:
    from dlrm.emulate.emulator import emulate

    return emulate


def load_parts() -> Any:
    raise NotImplementedError("the emulator has no model")


SPEC = ModelSpec(
    name="emulate",
    title="DLRM (emulated)",
    description=DESCRIPTION,
    options=EmulateConfig,
    presets={},
    script=ScriptOptions(
        variables={
            "DATASET_DIR": ("--in_memory_binary_criteo_path", "{}"),
            "BATCH_SIZE": ("--batch_size", "{}"),
            "EPOCHS": ("--epochs", "{}"),
        },
        demo_title="",
    ),
    load_parts=load_parts,
    load_program=load_program,
)
