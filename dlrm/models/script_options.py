"""What 3_train.sh asks of a model: its variables as options of python -m dlrm.train.

usage: python -m dlrm.models.script_options

Reads MODEL and the variables that the model's `ScriptOptions` name from the environment. Prints, each ended
by a NUL byte: the model's title, what the demo trains on, the name of the demo's data folder, the options.
"""

import os
import sys
from collections.abc import Iterator, Mapping

from common.errors import USAGE, UserError
from dlrm.models.registry import find_model
from dlrm.runtime.tracer_variables import find_traced_folders, wants_trace
from dlrm.trainer.spec import ModelSpec


def list_options(spec: ModelSpec, environ: Mapping[str, str]) -> Iterator[str]:
    """The options of a run with these variables; those of the demo where there is no DATASET_DIR."""
    if spec.name != "dlrm":
        yield from ("--model", spec.name)
    if wants_trace(environ):
        find_traced_folders(environ)  # raises the mistakes
        yield "--trace"
    yield from spec.script.always
    if not environ.get("DATASET_DIR"):
        yield from spec.script.demo
    for variable, words in spec.script.variables.items():
        if value := environ.get(variable):
            yield from (word.replace("{}", value) for word in words)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        spec = find_model(os.environ.get("MODEL") or "dlrm")
    except UserError as error:
        print(f"3_train.sh: MODEL: {error}", file=sys.stderr)
        return USAGE
    script = spec.script
    try:
        words = [spec.title, script.demo_title, script.demo_data, *list_options(spec, os.environ)]
    except UserError as error:
        print(f"3_train.sh: {error}", file=sys.stderr)
        return USAGE
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
