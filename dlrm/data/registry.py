"""Sources of rows by name: the values of --source.

A new source is a file and a line here. Sources are named, not imported: options are parsed before the trace
begins and before a library is loaded.
"""

import pkgutil
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from dlrm.data.rows import SourceKind

# name -> module:SourceKind
SOURCES = {
    "stream": "dlrm.data.stream:STREAM",
    "memory": "dlrm.data.memory:MEMORY",
    "mmap": "dlrm.data.memory:MAPPED",
    "parquet": "dlrm.data.parquet:PARQUET",
    "random": "dlrm.data.synthetic:RANDOM",
    "multi_hot": "dlrm.data.multihot:MULTI_HOT",
}
# multi_hot is selected by --synthetic_multi_hot_criteo_path
CHOICES = tuple(name for name in SOURCES if name != "multi_hot")


def find_source(name: str) -> "SourceKind":
    if name not in SOURCES:
        raise UserError(f"unknown kind of data {name}: choose from {', '.join(SOURCES)}")
    return pkgutil.resolve_name(SOURCES[name])
