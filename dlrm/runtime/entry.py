"""How a command starts and ends on each rank: one line for what goes wrong, one exit code.

Exit codes: 0 success, 1 a failure, 2 a mistake of the user's (UserError), 75 stopped and resumable (Stopped),
130 Ctrl-C; and the code of another rank that failed (LostRank).
"""

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
from dlrm.runtime.errors import STOPPED, USAGE, LostRank, NotSaved, Stopped, UserError, explain_missing_module
from dlrm.runtime.ranks import Ranks


def print_error(here: Ranks, text: str) -> None:
    """One line on stderr; it names the rank, unless `here` is the plain Ranks() of an error of all ranks."""
    where = f"rank {here.rank} on {here.host}: " if here.world_size > 1 else ""
    print(f"dlrm: {where}{text}", file=sys.stderr, flush=True)


def run_entry(main: Callable[[Ranks], None]) -> NoReturn:
    """Run `main` on this rank and end the process with its exit code."""
    here = ranks.find_ranks()
    code = run_for_exit_code(main, here)
    trace.stop_tracing()
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules:
        # MPICH signs off from mpiexec only in an exit handler of C: without it mpiexec kills the other ranks
        sys.exit(code)
    # Otherwise not sys.exit, for two reasons. Threads that still wait for a peer in a collective would keep
    # this process alive. And a C++ thread of torch that frees a tensor while the interpreter shuts down
    # aborts the process. Everything that must be closed is closed before: the run folder and TensorBoard in
    # `trainer.train`, the trace above.
    os._exit(code)


def _quieten_libraries() -> None:
    """Warnings meant for the libraries' own developers would hide the one line that the user must read."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _set_threads() -> None:
    """DLRM_THREADS, as launcher.sh takes it, where a rank was started without it; torch is not loaded yet."""
    threads = os.environ.get("DLRM_THREADS", "")
    if threads.isdecimal() and int(threads):
        os.environ["OMP_NUM_THREADS"] = threads


def run_for_exit_code(main: Callable[[Ranks], None], here: Ranks) -> int:
    """Run `main`, print the line of an error that it ends with, and return the exit code that it means."""
    _quieten_libraries()
    _set_threads()
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
        if not error.is_printed:
            print_error(here, str(error))
        return error.code
    except KeyboardInterrupt:
        print_error(here, "interrupted")
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (explained := explain_missing_module(error)):
            _print_once(explained, here)
            return USAGE
        if isinstance(error, OSError) and error.strerror:  # the disk or the network, not the code
            print_error(here, f"{error.filename or 'a file'}: {error.strerror}")
            return 1
        first_line = (str(error).splitlines() or [""])[0][:200]
        if is_out_of_memory(error):
            print_error(here, f"out of memory: {first_line}: lower --batch_size or the model's sizes")
            return USAGE
        if "KeyboardInterrupt" in first_line:  # C++ code turns it into a RuntimeError
            print_error(here, "interrupted")
            return 130
        traceback.print_exc()
        print_error(here, f"{type(error).__name__}: {first_line}")
        return 1


def _print_once(error: UserError | Stopped | NotSaved, here: Ranks) -> None:
    if getattr(error, "is_printed", False):  # by `session.open_session`
        return
    if not error.shared:
        print_error(here, str(error))
    elif here.first:
        print_error(Ranks(), str(error))
    else:
        time.sleep(1)  # a launcher may kill rank 0 as soon as this rank is gone: let it print first
