"""DFTracer's own variables, as a user may have exported them, and what they mean here.

DFTRACER_ENABLE    1 or 0: with or without a trace, as TRACE=yes or no of 3_train.sh
DFTRACER_DATA_DIR  folders, with colons between them: only I/O below them is recorded; "all", the default
DFTRACER_LOG_FILE  refused: traces are in the run folder, where the analysis finds them
Those in `PINNED` and `UNSET` are the same in all traced runs, whatever is exported: with other values calls
would be missing in the trace, or be sums without files.
"""

from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError, printable

PINNED = {"DFTRACER_TIME_METRIC": "US", "DFTRACER_ENABLE_AGGREGATION": "0", "DFTRACER_TRACE_COMPRESSION": "1"}
# DFTracer takes some of them as set whatever their value is; the last one names a file with all of these
UNSET = (
    "DFTRACER_DISABLE_IO", "DFTRACER_DISABLE_POSIX", "DFTRACER_DISABLE_STDIO", "DFTRACER_DISABLE_TIDS",
    "DFTRACER_CONFIGURATION",
)  # fmt: skip


def wants_trace(environ: Mapping[str, str]) -> bool:
    """Whether 3_train.sh traces its run; UserError where the variables contradict each other."""
    asked, enable = environ.get("TRACE", ""), environ.get("DFTRACER_ENABLE", "")
    if enable not in ("", "0", "1"):
        raise UserError(f"DFTRACER_ENABLE={printable(enable)}: wanted 1 or 0")
    if asked and enable and (asked != "no") != (enable == "1"):
        raise UserError(f"TRACE={printable(asked)} contradicts DFTRACER_ENABLE={enable}: unset one of them")
    return enable == "1" if enable else asked != "no"


def find_traced_folders(environ: Mapping[str, str]) -> str:
    """DFTRACER_DATA_DIR for a traced process; UserError for what DFTracer would ignore in silence."""
    if log_file := environ.get("DFTRACER_LOG_FILE"):
        raise UserError(
            f"DFTRACER_LOG_FILE={printable(log_file)}: traces are in the trace folder of the run, where the "
            "analysis finds them: unset it, and choose the run folder (RESULTS, --output_dir)"
        )
    folders = environ.get("DFTRACER_DATA_DIR") or "all"
    for folder in folders.split(":"):
        if folders != "all" and not (folder.startswith("/") and Path(folder).is_dir()):
            raise UserError(
                f"DFTRACER_DATA_DIR={printable(folders)}: {printable(folder)!r} is not a folder with its "
                "whole path: only I/O below it would be traced; name it in full, or unset the variable"
            )
    return folders
