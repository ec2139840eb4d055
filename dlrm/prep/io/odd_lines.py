"""Reads one line by torchrec's own rules: csv.reader, int(), 0 for an empty field. Slow, and the definition.

The compiled parser (`kernels/parse_line.py`) takes canonical lines only and leaves every other one to
`read_line`.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from dlrm.data.criteo import CRITEO, Columns

INT32 = range(-(1 << 31), 1 << 31)
UINT32 = range(1 << 32)
LONGEST_LINE = 64 << 20
COLUMNS_REMEDY = "give --num_numerical N --num_categorical M"

Row = tuple[list[int], list[int], int]  # dense, sparse, label


class BadRow(Exception):
    """Why a line cannot be read; the caller adds the file and the line number.

    reason  the same without the remedy, for a line that is skipped: there is nothing to mend
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason + remedy)
        self.reason = reason


@dataclass(frozen=True)
class LineRules:
    """How to read the lines of one input file."""

    lenient: bool = False  # as torchrec, accept CRLF, lone CR, extra columns, a last line without newline
    labelled: bool = True  # False for Kaggle's test.txt, which has no label column: the label is then -1
    max_ind_range: int = 0  # ids are taken modulo this, unless it is 0
    empty_dense: int = 0  # value of an empty count
    columns: Columns = CRITEO

    @property
    def fields(self) -> int:
        """Fields of a line."""
        return self.columns.total - (not self.labelled)


def read_line(line: bytes, rules: LineRules) -> list[Row]:
    """The rows of one physical line with its newline: one row, or several where lone CRs end rows."""
    if not rules.lenient:
        if b"\r" in line:
            raise BadRow("a carriage return: the lines must end in LF alone (dos2unix converts CRLF)")
        if not line.endswith(b"\n"):
            raise BadRow("no newline at the end: is the file cut short? add one if it is whole")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text: {error.reason}") from None
    return [read_fields(fields, rules) for fields in split_fields(text)]


def split_fields(text: str) -> Iterator[list[str]]:
    """The fields of each row, by csv.reader. A quote that is not closed is a BadRow: csv.reader would
    continue the field on the next line.
    """
    lines = list(io.StringIO(text, newline=None))
    given = 0

    def count_lines() -> Iterator[str]:
        nonlocal given
        for line in lines:
            given += 1
            yield line

    try:
        for row, fields in enumerate(csv.reader(count_lines(), delimiter="\t", strict=False), 1):
            if given != row or (row == len(lines) and find_open_quote(lines[-1])):
                raise BadRow("a quote is left open")
            yield fields
    except csv.Error as error:
        raise BadRow(str(error)) from None


def find_open_quote(line: str) -> bool:
    """Whether csv.reader would continue a field past the end of this line."""
    taken = iter([line, "\n"])
    next(csv.reader(taken, delimiter="\t"))
    return next(taken, None) is None


def read_fields(fields: list[str], rules: LineRules) -> Row:
    """The row of a line that is split into fields; BadRow with the reason where it is not one."""
    expected, numerical = rules.fields, rules.columns.numerical
    if not fields:
        raise BadRow("a blank line")
    if len(fields) < expected or (len(fields) > expected and not rules.lenient):
        if len(fields) == 1:
            remedy = ": separate the fields by tabs, without a header line"
            raise BadRow(f"1 column, {expected} expected", remedy)
        remedy = f"; for other data {COLUMNS_REMEDY}"
        raise BadRow(f"{len(fields)} columns, {expected} expected", remedy)
    label = parse_number(fields[0], "the label", 0) if rules.labelled else -1
    first = 1 if rules.labelled else 0
    dense = [parse_number(fields[first + i], f"I{i + 1}", rules.empty_dense) for i in range(numerical)]
    hashes = fields[first + numerical : expected]
    sparse = [parse_hash(field, f"C{i + 1}", rules) for i, field in enumerate(hashes)]
    return dense, sparse, label


def parse_number(field: str, name: str, empty: int) -> int:
    """A label or count. `name`: of the column, for messages. `empty`: the value of an empty field."""
    if not field:
        return empty
    try:
        value = int(field)
    except ValueError:
        raise BadRow(f"{name} is {show_text(field)}, not an integer") from None
    if value not in INT32:
        raise BadRow(f"{name} is {show_text(field)}, which does not fit 32 bits")
    if empty and value == empty:
        raise BadRow(f"{name} is {show_text(field)}, which is reserved for an empty field")
    return value


def parse_hash(field: str, name: str, rules: LineRules) -> int:
    """An id of up to eight hexadecimal digits; with --max_ind_range, its remainder. `name`: of the column."""
    try:
        value = int(field or "0", 16)
    except ValueError:
        raise BadRow(f"{name} is {show_text(field)}, not hexadecimal") from None
    if rules.max_ind_range:
        return value % rules.max_ind_range
    if value not in UINT32:
        raise BadRow(f"{name} is {show_text(field)}, which is not an id of 32 bits")
    return value


def show_text(field: str) -> str:
    return ascii(field if len(field) <= 24 else field[:21] + "...")
