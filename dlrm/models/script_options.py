"""What 3_train.sh asks of a model: its variables and the user's words as options of python -m dlrm.train.

usage: python -m dlrm.models.script_options FOLDER RUN [OPTION...]
       FOLDER: of the call, for relative paths; RUN: the run folder, as far as known; OPTION...: the user's

Reads MODEL and the variables that the model's `ScriptOptions` name from the environment, and checks the
options: a mistake ends the script before anything is made. Prints, each ended by a NUL byte: the model's
title, what the demo trains on, the name of the demo's data folder, the options.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from common.errors import USAGE, UserError
from dlrm.config.parser import check_inputs, parse_options, take_model_name
from dlrm.models.registry import find_model, name_program
from dlrm.runtime.node_counters import wants_node_counters
from dlrm.runtime.script_answer import answer_script
from dlrm.runtime.tracer_variables import find_traced_folders, wants_trace
from dlrm.trainer.spec import ModelSpec

HELP = {"-h", "--help"}
DEMO_FOLDER = "{demo_data}"  # in options: the script puts the demo's folder there, once it is made


def list_options(spec: ModelSpec, environ: Mapping[str, str]) -> Iterator[str]:
    """The options of a run with these variables; those of the demo where there is no DATASET_DIR."""
    traced = wants_trace(environ)
    wants_node_counters(environ, traced)  # raises the mistakes, as the next one does
    if traced:
        find_traced_folders(environ)
        yield "--trace"
    if steps := environ.get("PROFILE_STEPS"):
        yield from ("--profile_steps", steps)
    yield from spec.script.always
    if not environ.get("DATASET_DIR"):
        yield from spec.script.demo
    for variable, words in spec.script.variables.items():
        if value := environ.get(variable):
            yield from (word.replace("{}", value) for word in words)


def refuse_output_dir(words: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--output_dir" for word in words):
        raise UserError(
            "--output_dir: this script names the run folder; RESULTS=FOLDER says where it goes, "
            "RESUME=FOLDER resumes a run in its own"
        )


def check_options(spec: ModelSpec, words: Sequence[str], environ: Mapping[str, str]) -> None:
    """UserError for a wrong option, or for input that is not there; the demo's is made afterwards."""
    options = parse_options(
        spec.options, words, name_program(spec.name), spec.description, spec.presets, ends=False
    )
    try:
        check_inputs(options)
    except UserError as error:
        if DEMO_FOLDER not in str(error):
            raise


def make_answer(folder: str, run: str, given: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What is printed. The user's words come after the variables', because the last one wins."""
    try:
        name, words = take_model_name(given, environ.get("MODEL") or "dlrm")
        spec = find_model(name)
    except UserError as error:
        raise UserError(f"MODEL: {error}") from None
    refuse_output_dir(words)
    options = [*list_options(spec, environ), *words, "--relative_to", folder]
    if not HELP & set(words):
        check_options(spec, [*options, "--output_dir", run], environ)
    model = [] if name == "dlrm" else ["--model", name]
    return [spec.title, spec.script.demo_title, spec.script.demo_data, *model, *options]


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] in HELP:
        print(__doc__)
        return 0 if HELP & set(sys.argv) else USAGE
    return answer_script(lambda: make_answer(sys.argv[1], sys.argv[2], sys.argv[3:], os.environ))


if __name__ == "__main__":
    sys.exit(main())
