"""Work in a process of its own, so that neither its I/O nor its memory are the emulated run's.

In: a module of this folder with a function of its arguments. Out: the function's value, by JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from common.errors import UserError


def run_apart(module: str, *words: str) -> Any:
    """Run `python -m MODULE WORD...`, which calls `print_value`; its UserError is raised here."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"python -m {module} {' '.join(words)}: exit code {done.returncode}, see above")
    found = json.loads(done.stdout)
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def print_value(make: Callable[..., Any]) -> None:
    """What the process prints: the value of `make` for the words of its command line, or the mistake."""
    try:
        found = {"value": make(*sys.argv[1:])}
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
