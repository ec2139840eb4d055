"""How a program answers 3_train.sh, which calls it: words on stdout, each ended by a NUL byte.

In: a function that makes the words. Out: the exit code; for a mistake of the user one line on stderr.
"""

import os
import sys
from collections.abc import Callable, Sequence

from common.errors import USAGE, UserError, printable


def answer_script(make_words: Callable[[], Sequence[str]]) -> int:
    """Print the words as bytes: names of files may hold any but NUL."""
    try:
        words = make_words()
    except UserError as error:
        print(f"3_train.sh: {printable(error)}", file=sys.stderr)
        return USAGE
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0
