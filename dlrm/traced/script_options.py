"""What 3_train.sh asks where MODEL is a script: its variables and words as those of python -m dlrm.traced.

usage: python -m dlrm.traced.script_options FOLDER [WORD...]
       FOLDER: of the call, in which the script runs; WORD...: the script's own

Prints what `dlrm.models.script_options` prints, each ended by a NUL byte: the title, two empty texts (there
is no demo), the words.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import USAGE, UserError, printable
from dlrm.runtime.tracer_variables import find_traced_folders, wants_trace

OPTIONS = ("BATCH_SIZE", "EMBEDDING_DIM", "EPOCHS", "LEARNING_RATE")  # of the models of this project


def make_answer(folder: str, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """UserError for a script that is not there, or a variable that would have no effect."""
    script = environ["MODEL"]
    if not Path(folder, script).is_file():
        raise UserError(f"MODEL={printable(script)}: no such script in {printable(folder)}")
    for name in OPTIONS:
        if environ.get(name):
            raise UserError(
                f"{name}: MODEL is a script, which has options of its own: give them after 3_train.sh"
            )
    if environ.get("RESUME"):
        raise UserError("RESUME: MODEL is a script, which resumes in its own way: give its own option")
    if wants_trace(environ):
        find_traced_folders(environ)  # raises the mistakes
    return [os.path.basename(script), "", "", "--directory", folder, script, *words]


def main() -> int:
    try:
        words = make_answer(sys.argv[1], sys.argv[2:], os.environ)
    except UserError as error:
        print(f"3_train.sh: {printable(error)}", file=sys.stderr)
        return USAGE
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
