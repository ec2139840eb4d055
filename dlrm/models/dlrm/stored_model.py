"""The model of a checkpoint: its options, from the description that the checkpoint has of its run.

A test or a benchmark takes them, so that the training's options need not be repeated.
"""

import re
from dataclasses import fields, replace
from typing import Any

from dlrm.checkpoint.folder import Checkpoint
from dlrm.models.dlrm.options import Config, ModelOptions, keep_model_options
from dlrm.runtime.errors import UserError

FIRST_LAYER = re.compile(r"model/.*dense_arch\.model\._mlp\.0\._linear\.weight")
TABLE = re.compile(r"model/.*t_cat_([0-9]{1,9})\.weight")
SIZES = ("num_embeddings", "num_embeddings_per_feature", "max_table_size")


def read_trained_options(found: Checkpoint) -> ModelOptions:
    """The model options of the checkpoint's run, as they were given."""
    options = found.state.get("config", {}).get("model", {})
    if "embedding_dim" not in options or not read_table_sizes(found):
        raise UserError(f"--load_checkpoint_path {found.path}: not a DLRM's checkpoint")
    return ModelOptions(**keep_model_options(options))


def read_table_sizes(found: Checkpoint) -> tuple[int, ...]:
    """Rows of each table."""
    sizes = {int(m[1]): each.shape[0] for each in found.tensors if (m := TABLE.fullmatch(each.name))}
    return tuple(size for _, size in sorted(sizes.items()))


def read_numerical(found: Checkpoint) -> int:
    """The numerical columns: those that the run was given, else the inputs of the first dense layer (one
    constant where there are none).
    """
    given = found.state.get("config", {}).get("data", {}).get("num_numerical")
    if isinstance(given, int):
        return given
    return next(each.shape[1] for each in found.tensors if FIRST_LAYER.fullmatch(each.name))


def read_model_options(found: Checkpoint) -> ModelOptions:
    """The model options of the checkpoint's run, with the real sizes of its tables."""
    sizes = dict.fromkeys(SIZES) | {"num_embeddings_per_feature": read_table_sizes(found)}
    return replace(read_trained_options(found), **sizes)


def adopt_model(cfg: Config, found: Checkpoint) -> Config:
    """The same options with the checkpoint's model. UserError where one was given that it contradicts.

    Table sizes are found as the training found them: those that it was given, or else the dataset's. On
    random data they are those of the checkpoint's tables, and the columns those of its model.
    """
    trained, default = read_trained_options(found), ModelOptions()
    for name in (each.name for each in fields(ModelOptions)):
        given, stored = getattr(cfg.model, name), getattr(trained, name)
        if given not in (getattr(default, name), stored):
            raise UserError(
                f"--{name} {_as_word(given)}: the model in {found.path} has {_as_word(stored)}; leave out "
                "--preset and the model's options, they come from the checkpoint"
            )
    if cfg.data.folder:
        return replace(cfg, model=trained)
    data = cfg.data
    if data.num_numerical is None:
        data = replace(data, num_numerical=read_numerical(found))
    return replace(cfg, model=read_model_options(found), data=data)


def _as_word(value: Any) -> str:
    """As on a command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
