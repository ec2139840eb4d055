"""How a command starts and ends: one line for what goes wrong, one exit code, no rank left waiting."""

import atexit
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from common.memory import is_out_of_memory
from dlrm.runtime import ranks, trace
from dlrm.runtime.errors import STOPPED, USAGE, LostRank, NotSaved, Stopped, UserError, missing_environment
from dlrm.runtime.ranks import Ranks


def print_error(here: Ranks, text: str) -> None:
    where = f"rank {here.rank} on {here.host}: " if here.world_size > 1 else ""
    print(f"dlrm: {where}{text}", file=sys.stderr, flush=True)


def run_entry(main: Callable[[Ranks], None]) -> NoReturn:
    """Run `main` on this rank and leave the process with its exit code."""
    here = ranks.find_ranks()
    _quieten_libraries()
    code = _run_for_exit_code(main, here)
    trace.stop_tracing()
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # threads and collectives that still wait for a peer must not hold this rank; and a thread of C++ which
    # lets go of a tensor while the interpreter is taken down would abort it
    os._exit(code)


def _quieten_libraries() -> None:
    """Libraries' notes to their own developers would bury what a user must read."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _run_for_exit_code(main: Callable[[Ranks], None], here: Ranks) -> int:
    try:
        main(here)
        return 0
    except UserError as error:
        _print_once(error, here)
        return USAGE
    except Stopped as error:
        _print_once(error, here)
        return STOPPED
    except NotSaved as error:
        _print_once(error, here)
        return 1
    except LostRank as error:
        if not error.told:
            print_error(here, str(error))
        return error.code
    except KeyboardInterrupt:
        print_error(here, "interrupted")
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (lacking := missing_environment(error)):
            _print_once(lacking, here)
            return USAGE
        if isinstance(error, OSError) and error.strerror:  # the disk's or the network's fault, not the code's
            print_error(here, f"{error.filename or 'a file'}: {error.strerror}")
            return 1
        first_line = (str(error).splitlines() or [""])[0][:200]
        if is_out_of_memory(error):
            print_error(here, f"out of memory: {first_line}: lower --batch_size or the model's sizes")
            return USAGE
        if "KeyboardInterrupt" in first_line:  # in C++, which makes it an error of its own
            print_error(here, "interrupted")
            return 130
        traceback.print_exc()
        print_error(here, f"{type(error).__name__}: {first_line}")
        return 1


def _print_once(error: UserError | Stopped | NotSaved, here: Ranks) -> None:
    if getattr(error, "told", False):
        return
    if not error.shared:
        print_error(here, str(error))
    elif here.first:
        print_error(Ranks(), str(error))
    else:
        time.sleep(1)  # a launcher may end the first rank as soon as this one is gone: let it speak
