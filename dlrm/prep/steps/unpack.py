"""The step unpack: gzip input to plain text, because gzip can be read from its start only."""

import gzip
import os
import zlib
from pathlib import Path

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular
from common.owned import finish_file
from common.progress import StepProgress
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.inputs import InputFile
from dlrm.runtime import trace

BLOCK = 1 << 20


def find_text_path(source: InputFile, folder: Path) -> Path:
    """The plain text of an input file: the file itself, or its unpacked copy in `folder`."""
    return folder / f"{source.name}.text" if source.compressed else source.path


def unpack_file(source: InputFile, folder: Path, progress: StepProgress) -> None:
    """Unpack an input file into `folder`, unless it is not compressed or an earlier run has done it."""
    target = find_text_path(source, folder)
    if not source.compressed or target.exists():
        return
    partial, at = target.with_name(target.name + ".partial"), 0
    compressed = source.path.stat().st_size
    with os_errors_as_user_errors(source.path):
        try:
            with (
                trace.span("prep", "unpack", bytes=compressed),
                os.fdopen(open_regular(source.path), "rb", buffering=0) as raw,
                gzip.GzipFile(fileobj=raw) as text,
                OffsetFile(partial, "w") as out,
            ):
                out.resize(0)
                before = 0
                while data := text.read(BLOCK):
                    at = out.write(data, at)
                    progress.add(bytes=raw.tell() - before)
                    before = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{printable(source.path)}: byte {at} of its text: {error}: truncated or damaged gzip"
            ) from None
    finish_file(partial, target)
