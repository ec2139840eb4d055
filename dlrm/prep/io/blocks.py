"""Stream a byte range of a TSV file as blocks of rows. The memory used does not depend on the file's size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dlrm.data.criteo import Columns
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.odd_lines import LONGEST_LINE, BadRow, LineRules, read_line
from dlrm.prep.kernels import parse_line
from dlrm.runtime.errors import UserError

CHUNK = 1 << 19  # bytes of one read: still in the core's own cache when the parser gets to them
BLOCK_ROWS = 2048  # measured on ext4: with more rows the writes cost more than the fewer calls save


class TextBlock:
    """A buffer for up to BLOCK_ROWS rows, in the file's order; the first `rows` of them are valid.

    `dense`: int32 [BLOCK_ROWS, numerical]. `sparse`: ids below 2^32, uint32 or int64 [BLOCK_ROWS,
    categorical]. `labels`: int32 [BLOCK_ROWS]. `addresses` describes the three for the kernels, as int64:
    address and row step of dense; address, row step and column step of sparse; address and row step of
    labels. Steps are in 4-byte words.
    """

    def __init__(self, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray, rows: int = 0) -> None:
        self.dense, self.sparse, self.labels, self.rows = dense, sparse, labels, rows
        numbers = [dense.ctypes.data, dense.strides[0] // 4]
        numbers += [sparse.ctypes.data, sparse.strides[0] // 4, sparse.strides[1] // 4]
        self.addresses = np.array([*numbers, labels.ctypes.data, labels.strides[0] // 4], np.int64)

    @classmethod
    def make_records(cls, columns: Columns) -> "TextBlock":
        """A block whose rows are records: the numbers of a row are adjacent."""
        whole = np.empty((BLOCK_ROWS, columns.total), np.int32)
        ids = whole[:, columns.numerical : -1].view(np.uint32)
        return cls(whole[:, : columns.numerical], ids, whole[:, -1])

    @classmethod
    def make_arrays(cls, columns: Columns) -> "TextBlock":
        """A block of three arrays like those in torchrec's files. The kernels write only the low 4 bytes of
        an id, so the array must be zeros at the start.
        """
        dense = np.empty((BLOCK_ROWS, columns.numerical), np.int32)
        ids = np.zeros((BLOCK_ROWS, columns.categorical), np.int64)
        return cls(dense, ids, np.empty(BLOCK_ROWS, np.int32))


@dataclass
class InputPiece:
    """A byte range of an input file that begins and ends at line ends."""

    source: int  # index of the input file
    begin: int
    end: int
    # known after counting:
    first_line: int = 0  # lines of the file before this piece
    first_row: int = 0  # rows of the whole input before this piece
    rows: int = -1


def make_text_buffer() -> np.ndarray:
    return np.zeros(CHUNK + parse_line.PAD, np.uint8)


class LineScanner:
    """Reads one piece as blocks of rows.

    The compiled parser takes the common lines; every other line goes through `odd_lines.read_line`. A line
    that it refuses is a UserError, or with `skip_bad` is counted in `skipped`. `name` is the file's name in
    messages.
    """

    def __init__(
        self,
        file: OffsetFile,
        name: str,
        piece: InputPiece,
        rules: LineRules,
        skip_bad: bool,
        text: np.ndarray | None = None,
    ) -> None:
        """`text`: uint8, as `make_text_buffer` makes it, to be used again for several pieces; None: a new
        one.
        """
        self.file, self.name, self.piece, self.rules, self.skip_bad = file, name, piece, rules, skip_bad
        self.skipped = 0
        self.first_bad = ""
        self._lines = 0  # lines of the piece that were parsed or skipped
        self._text = make_text_buffer() if text is None else text
        self._parse_lines = parse_line.make_parser(rules.columns)
        self._waiting_rows: list = []  # rows of an odd line for which the block had no space left

    def read_blocks(self, block: TextBlock | None = None) -> Iterator[tuple[TextBlock, int]]:
        """(block, bytes consumed since the last one). The same block object is filled again each time."""
        block = block or TextBlock.make_records(self.rules.columns)
        kept, at, consumed = 0, self.piece.begin, 0
        while at < self.piece.end:
            space = len(self._text) - parse_line.PAD - kept
            if space == 0:  # the buffer holds the beginning of one line
                if len(self._text) > LONGEST_LINE:
                    at, kept = self._skip_long_line(at), 0
                else:
                    self._grow_buffer()
                continue
            want = min(space, self.piece.end - at)
            got = self.file.read_into(self._text[kept : kept + want].data, at)
            if not got:
                raise UserError(f"{self.name}: ends at byte {at}, {self.piece.end} expected: has it changed?")
            at += got
            consumed += got
            end, begin = kept + got, 0
            while True:
                begin, why = self._parse_into(block, begin, end, at == self.piece.end)
                if block.rows == len(block.dense):
                    yield block, consumed
                    block.rows, consumed = 0, 0
                elif why == parse_line.NEED_MORE:
                    break
            kept = end - begin
            self._text[:kept] = self._text[begin:end].copy()
        if block.rows:
            yield block, consumed

    def _grow_buffer(self) -> None:
        self._text = np.concatenate([self._text, np.zeros(len(self._text), np.uint8)])

    def _skip_long_line(self, at: int) -> int:
        """A line is longer than LONGEST_LINE: UserError, or with `skip_bad` the offset of the next line."""
        message = f"{self._describe_position()}: a line of more than {LONGEST_LINE >> 20} MB"
        if not self.skip_bad:
            raise UserError(message)
        self.skipped += 1
        self.first_bad = self.first_bad or message
        self._lines += 1
        return find_line_end(self.file, at + 1, self.piece.end)

    def _parse_into(self, block: TextBlock, begin: int, end: int, last: bool) -> tuple[int, int]:
        """Parse text[begin:end] into the block; `last`: no more text follows. Returns where it stopped, and
        why (BLOCK_FULL, NEED_MORE or ODD_LINE).
        """
        if self._waiting_rows:
            self._append_waiting_rows(block)
            return begin, parse_line.BLOCK_FULL
        base = self._text.ctypes.data
        before = block.rows
        block.rows, stopped, why = self._parse_lines(
            base + begin, base + end, self.rules.labelled, self.rules.empty_dense,
            block.addresses, block.rows, len(block.dense),
        )  # fmt: skip
        if self.rules.max_ind_range:
            block.sparse[before : block.rows] %= self.rules.max_ind_range
        self._lines += block.rows - before
        begin = stopped - base
        if why == parse_line.ODD_LINE or (why == parse_line.NEED_MORE and last and begin < end):
            begin = self._read_odd_line(block, begin, end)
            why = parse_line.ODD_LINE
        return begin, why

    def _read_odd_line(self, block: TextBlock, begin: int, end: int) -> int:
        """Read one line by the slow rules; returns where the next begins."""
        size = 1 << 12  # copy little of the buffer at first: every line of a file may be odd
        while b"\n" not in (text := self._text[begin : min(end, begin + size)].tobytes()):
            if begin + size >= end:
                break
            size *= 2
        line = text[: text.find(b"\n") + 1] or text
        try:
            self._waiting_rows = read_line(line, self.rules)
        except BadRow as error:
            if not self.skip_bad:
                raise UserError(f"{self._describe_position()}: {error}") from None
            self.skipped += 1
            self.first_bad = self.first_bad or f"{self._describe_position()}: {error.reason}"
        self._lines += 1
        self._append_waiting_rows(block)
        return begin + len(line)

    def _append_waiting_rows(self, block: TextBlock) -> None:
        """Move waiting rows into the block, as many as fit."""
        while self._waiting_rows and block.rows < len(block.dense):
            dense, sparse, label = self._waiting_rows.pop(0)
            block.dense[block.rows], block.sparse[block.rows], block.labels[block.rows] = dense, sparse, label
            block.rows += 1

    def _describe_position(self) -> str:
        """File and line number of the next line, for messages."""
        return f"{self.name}:{self.piece.first_line + self._lines + 1}"


def find_line_end(file: OffsetFile, at: int, size: int) -> int:
    """The offset after the first newline at or after offset `at` - 1; `size` if there is none before it."""
    at = max(at, 1) - 1
    while at < size:
        data = file.read(1 << 16, at)
        found = data.find(b"\n")
        if found >= 0:
            return min(at + found + 1, size)
        at += max(len(data), 1)
    return size


def count_rows(
    file: OffsetFile, piece: InputPiece, name: str, rules: LineRules, skip_bad: bool
) -> tuple[int, int]:
    """(rows, lines) of a piece. They differ where lone CRs end rows, too, and where bad lines are skipped."""
    lines = returns = pairs = 0
    last, text = b"", np.empty(CHUNK, np.uint8)
    at = piece.begin
    while at < piece.end:
        got = file.read_into(text[: min(CHUNK, piece.end - at)].data, at)
        if not got:
            raise UserError(f"{name}: ends at byte {at}, {piece.end} expected: has it changed?")
        found = parse_line.count_ends(text, got)
        lines += int(found[0])
        if rules.lenient and (found[1] or last == b"\r"):
            data = text[:got].tobytes()
            returns += int(found[1])
            pairs += data.count(b"\r\n") + (last + data[:1] == b"\r\n")
        last = text[got - 1 : got].tobytes()
        at += got
    rows = lines + returns - pairs
    if last not in (b"\n", b"\r", b"") or (last == b"\r" and not rules.lenient):
        rows += 1
    if skip_bad:
        rows = sum(block.rows for block, _ in LineScanner(file, name, piece, rules, skip_bad).read_blocks())
    return rows, lines
