"""What 3_train.sh asks where MODEL is a script, or mlcommons: its variables and words for dlrm.traced.

usage: python -m dlrm.traced.script_options FOLDER [WORD...]
       FOLDER: of the call, in which the script runs; WORD...: the script's own

Prints what `dlrm.models.script_options` prints, each ended by a NUL byte: the title, two empty texts (there
is no demo), the words.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError, printable
from common.inputs import read_json_object
from dlrm.runtime.node_counters import wants_node_counters
from dlrm.runtime.script_answer import answer_script
from dlrm.runtime.step_profiler import parse_steps
from dlrm.runtime.tracer_variables import find_traced_folders, wants_trace

OPTIONS = ("BATCH_SIZE", "EMBEDDING_DIM", "EPOCHS", "LEARNING_RATE")  # of the models of this project


# MLCommons' reference, where scripts/mlcommons.sh has put it; and which of its options the variables are
MLCOMMONS = Path(__file__).parents[2] / ".cache/mlcommons/recommendation_v2/torchrec_dlrm/dlrm_main.py"
MLCOMMONS_OPTIONS = {
    "DATASET_DIR": ("--in_memory_binary_criteo_path", "{}"),
    "BATCH_SIZE": ("--batch_size", "{}"),
    "EMBEDDING_DIM": ("--embedding_dim", "{}", "--dense_arch_layer_sizes", "512,256,{}"),
    "EPOCHS": ("--epochs", "{}"),
    "LEARNING_RATE": ("--learning_rate", "{}"),
}


def make_answer(folder: str, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What is printed. UserError for a script that is not there, or a variable that would have no effect."""
    if environ.get("RESUME"):
        raise UserError("RESUME: MODEL is a script, which resumes in its own way: give its own option")
    traced = wants_trace(environ)
    wants_node_counters(environ, traced)  # raises the mistakes, as the next one does
    if traced:
        find_traced_folders(environ)
    own = ["--directory", folder]
    if steps := environ.get("PROFILE_STEPS"):
        parse_steps(steps)
        own += ["--profile_steps", steps]
    if environ["MODEL"] == "mlcommons":
        script = ["--title", "MLCommons DLRM", str(MLCOMMONS), *list_mlcommons_words(words, environ)]
        return ["MLCommons DLRM", "", "", *own, *script, *words]
    check_script(folder, environ)
    script = environ["MODEL"]
    return [os.path.basename(script), "", "", *own, script, *words]


def list_mlcommons_words(words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The variables as options of MLCommons' program; the tables' sizes are the dataset's."""
    if not MLCOMMONS.is_file():
        raise UserError(
            "MODEL=mlcommons: MLCommons' program is not here: ./0_setup_env.sh --mlcommons fetches it, or "
            "name a checkout of github.com/mlcommons/training: MLCOMMONS_DIR=FOLDER"
        )
    made = ["--evaluate_on_epoch_end", "--evaluate_on_training_end"]
    for variable, option in MLCOMMONS_OPTIONS.items():
        if value := environ.get(variable):
            made += [word.replace("{}", value) for word in option]
    if (dataset := environ.get("DATASET_DIR")) and not any("--num_embeddings" in word for word in words):
        sizes = read_json_object(Path(dataset, "meta.json")).get("table_sizes")
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise UserError(f"DATASET_DIR={printable(dataset)}: its meta.json has no table_sizes")
        made += ["--num_embeddings_per_feature", ",".join(map(str, sizes))]
    return made


def check_script(folder: str, environ: Mapping[str, str]) -> None:
    """UserError for a script that is not there, or a variable of this project's models."""
    script = environ["MODEL"]
    if not Path(folder, script).is_file():
        raise UserError(f"MODEL={printable(script)}: no such script in {printable(folder)}")
    for name in OPTIONS:
        if environ.get(name):
            raise UserError(
                f"{name}: MODEL is a script, which has options of its own: give them after 3_train.sh"
            )


def main() -> int:
    return answer_script(lambda: make_answer(sys.argv[1], sys.argv[2:], os.environ))


if __name__ == "__main__":
    sys.exit(main())
