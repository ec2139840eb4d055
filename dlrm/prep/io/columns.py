"""Finds out how many numerical and categorical columns the input has, from its first lines.

Criteo's data has 13 and 26. Of another number of columns it is certain which are categorical only where the
two kinds of text differ: decimal numbers, and then ids of eight hexadecimal digits.
"""

import re
import zlib

from common.errors import UserError, printable
from common.words import format_number
from dlrm.data.criteo import CRITEO, MOST_COLUMNS, Columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.inputs import InputFile
from dlrm.prep.io.odd_lines import COLUMNS_REMEDY
from dlrm.prep.job.options import PrepOptions

LOOKED_AT = 1 << 18  # bytes of the first file
MOST_LINES = 1000
DECIMAL = re.compile(rb"-?[0-9]*")
ID = re.compile(rb"[0-9a-fA-F]{8}|")


def choose_columns(options: PrepOptions, sources: list[InputFile]) -> PrepOptions:
    """The options with both numbers of columns: as given, else as the first input file has them."""
    return options.with_columns(
        find_columns(sources[0], options.num_numerical, options.num_categorical, options.lenient)
    )


def find_columns(source: InputFile, numerical: int | None, categorical: int | None, lenient: bool) -> Columns:
    """The columns of an input file. `numerical`, `categorical`: what the user has given of them.

    `lenient`: lines may have more columns than are read, so that 40 or more may be Criteo's.
    """
    if numerical is not None and categorical is not None:
        return Columns(numerical, categorical)
    rows = [line.split(b"\t") for line in read_first_lines(source)]
    width = find_width(rows) + (not source.labelled)
    if numerical is not None or categorical is not None:
        given = numerical if categorical is None else categorical
        if width - 1 - (given or 0) < (categorical is None):
            raise UserError(
                f"{printable(source.path)}: its first lines do not have more columns: {COLUMNS_REMEDY}"
            )
        rest = width - 1 - (given or 0)
        return Columns(given or 0, rest) if categorical is None else Columns(rest, categorical)
    if any(len(row) + (not source.labelled) == CRITEO.total for row in rows) or width < 3:
        return CRITEO  # also for text that is not a table: the parser says what is wrong with it
    if lenient and width > CRITEO.total:
        return CRITEO
    columns = tell_apart([row[source.labelled :] for row in rows])
    if columns is None:
        raise UserError(
            f"{printable(source.path)}:1: {width - (not source.labelled)} columns, "
            f"{CRITEO.total - (not source.labelled)} expected as in Criteo's data, and it is not certain "
            f"which are categorical: for other data {COLUMNS_REMEDY}"
        )
    print(f"{printable(source.path)}: {columns}, by its first {format_number(len(rows), 'line')}")
    return columns


def read_first_lines(source: InputFile) -> list[bytes]:
    """The first whole lines; none where the file cannot be unpacked."""
    with OffsetFile(source.path) as file:
        text = file.read(LOOKED_AT, 0)
    if source.compressed:
        try:
            text = zlib.decompressobj(wbits=31).decompress(text, LOOKED_AT)
        except zlib.error:
            return []
    lines = text.split(b"\n")
    whole = lines[:-1] or lines
    return [line.removesuffix(b"\r") for line in whole[:MOST_LINES]]


def find_width(rows: list[list[bytes]]) -> int:
    """The number of fields that all rows have; 0 if they differ."""
    widths = {len(row) for row in rows}
    return widths.pop() if len(widths) == 1 else 0


def tell_apart(rows: list[list[bytes]]) -> Columns | None:
    """Decimal columns, then columns of eight hexadecimal digits; None where a column may be either."""
    kinds = []
    for fields in zip(*rows, strict=True):
        decimal = all(DECIMAL.fullmatch(field) for field in fields)
        hexadecimal = all(ID.fullmatch(field) for field in fields)
        if decimal == hexadecimal:
            return None
        kinds.append(hexadecimal)
    numerical = kinds.count(False)
    if not any(kinds) or any(kinds[:numerical]) or max(numerical, len(kinds) - numerical) > MOST_COLUMNS:
        return None
    return Columns(numerical, len(kinds) - numerical)
