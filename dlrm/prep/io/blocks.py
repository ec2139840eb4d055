"""Stream a byte range of a TSV file as blocks of rows; the memory used does not depend on its size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.odd_lines import LONGEST_LINE, BadRow, LineRules, read_line
from dlrm.prep.kernels import parse_line
from dlrm.runtime.errors import UserError

CHUNK = 1 << 19  # stays in the core's own cache between the copy from the file and the parser
BLOCK_ROWS = 2048  # larger writes cost ext4 more than fewer calls save


class TextBlock:
    """Rows in the file's order: 13 counts, 26 ids (of 4 or 8 bytes, below 2^32), a label, of 4 bytes each.

    The kernels see `spots`: where each of the three begins, and how many 4-byte words from row to row.
    """

    def __init__(self, dense: np.ndarray, sparse: np.ndarray, labels: np.ndarray, rows: int = 0) -> None:
        self.dense, self.sparse, self.labels, self.rows = dense, sparse, labels, rows
        numbers = [dense.ctypes.data, dense.strides[0] // 4]
        numbers += [sparse.ctypes.data, sparse.strides[0] // 4, sparse.strides[1] // 4]
        self.addresses = np.array([*numbers, labels.ctypes.data, labels.strides[0] // 4], np.int64)

    @classmethod
    def records(cls) -> "TextBlock":
        """Each row's numbers beside each other."""
        whole = np.empty((BLOCK_ROWS, NUM_DENSE + NUM_SPARSE + 1), np.int32)
        ids = whole[:, NUM_DENSE:-1].view(np.uint32)
        return cls(whole[:, :NUM_DENSE], ids, whole[:, -1])

    @classmethod
    def arrays(cls) -> "TextBlock":
        """As torchrec's files have them. Of an id only the low half is ever written: the high stays 0."""
        ids = np.zeros((BLOCK_ROWS, NUM_SPARSE), np.int64)
        return cls(np.empty((BLOCK_ROWS, NUM_DENSE), np.int32), ids, np.empty(BLOCK_ROWS, np.int32))


@dataclass
class InputPiece:
    """A byte range of a source that begins and ends where lines do."""

    source: int
    begin: int
    end: int
    first_line: int = 0  # lines of the file before it, and rows of the dataset before it: after counting
    first_row: int = 0
    rows: int = -1


def make_text_buffer() -> np.ndarray:
    return np.zeros(CHUNK + parse_line.PAD, np.uint8)


class LineScanner:
    """Blocks of one piece. Odd lines go through `read_line`; what that refuses is an error, or is skipped."""

    def __init__(
        self,
        file: OffsetFile,
        name: str,
        piece: InputPiece,
        rules: LineRules,
        skip_bad: bool,
        text: np.ndarray | None = None,
    ) -> None:
        self.file, self.name, self.piece, self.rules, self.skip_bad = file, name, piece, rules, skip_bad
        self.skipped = 0
        self.first_bad = ""
        self._lines = 0  # lines of the piece already taken
        self._text = make_text_buffer() if text is None else text
        self._waiting: list = []

    def blocks(self, block: TextBlock | None = None) -> Iterator[tuple[TextBlock, int]]:
        """(block, bytes consumed since the last one); the block is reused for the next."""
        block = block or TextBlock.records()
        kept, at, consumed = 0, self.piece.begin, 0
        while at < self.piece.end:
            room = len(self._text) - parse_line.PAD - kept
            if room == 0:
                if len(self._text) > LONGEST_LINE:
                    at, kept = self._pass_over(at), 0
                else:
                    self._grow()
                continue
            want = min(room, self.piece.end - at)
            got = self.file.read_into(self._text[kept : kept + want].data, at)
            if not got:
                raise UserError(f"{self.name}: ends at byte {at}, {self.piece.end} expected: has it changed?")
            at += got
            consumed += got
            end, begin = kept + got, 0
            while True:
                begin, why = self._fill(block, begin, end, at == self.piece.end)
                if block.rows == len(block.dense):
                    yield block, consumed
                    block.rows, consumed = 0, 0
                elif why == parse_line.NEED_MORE:
                    break
            kept = end - begin
            self._text[:kept] = self._text[begin:end].copy()
        if block.rows:
            yield block, consumed

    def _grow(self) -> None:
        self._text = np.concatenate([self._text, np.zeros(len(self._text), np.uint8)])

    def _pass_over(self, at: int) -> int:
        """A line that is too long: where the next one begins, or an error."""
        said = f"{self._where()}: a line of more than {LONGEST_LINE >> 20} MB"
        if not self.skip_bad:
            raise UserError(said)
        self.skipped += 1
        self.first_bad = self.first_bad or said
        self._lines += 1
        return find_line_end(self.file, at + 1, self.piece.end)

    def _fill(self, block: TextBlock, begin: int, end: int, last: bool) -> tuple[int, int]:
        """Parse into the block from text[begin:end]; returns where it stopped, and why."""
        if self._waiting:
            self._take(block)
            return begin, parse_line.BLOCK_FULL
        base = self._text.ctypes.data
        before = block.rows
        block.rows, stopped, why = parse_line.parse_lines(
            base + begin, base + end, self.rules.labelled, self.rules.empty_dense,
            block.addresses, block.rows, len(block.dense),
        )  # fmt: skip
        if self.rules.max_ind_range:
            block.sparse[before : block.rows] %= self.rules.max_ind_range
        self._lines += block.rows - before
        begin = stopped - base
        if why == parse_line.ODD_LINE or (why == parse_line.NEED_MORE and last and begin < end):
            begin = self._odd(block, begin, end)
            why = parse_line.ODD_LINE
        return begin, why

    def _odd(self, block: TextBlock, begin: int, end: int) -> int:
        """One line by the slow rules; returns where the next begins."""
        size = 1 << 12  # not all that has been read, because every line of a file may be odd
        while b"\n" not in (text := self._text[begin : min(end, begin + size)].tobytes()):
            if begin + size >= end:
                break
            size *= 2
        line = text[: text.find(b"\n") + 1] or text
        try:
            self._waiting = read_line(line, self.rules)
        except BadRow as error:
            if not self.skip_bad:
                raise UserError(f"{self._where()}: {error}") from None
            self.skipped += 1
            self.first_bad = self.first_bad or f"{self._where()}: {error}"
        self._lines += 1
        self._take(block)
        return begin + len(line)

    def _take(self, block: TextBlock) -> None:
        """Rows of an odd line into the block, as many as fit."""
        while self._waiting and block.rows < len(block.dense):
            dense, sparse, label = self._waiting.pop(0)
            block.dense[block.rows], block.sparse[block.rows], block.labels[block.rows] = dense, sparse, label
            block.rows += 1

    def _where(self) -> str:
        return f"{self.name}:{self.piece.first_line + self._lines + 1}"


def find_line_end(file: OffsetFile, at: int, size: int) -> int:
    """The first line end at or behind this offset (or the file's end)."""
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
    """(rows, lines) of a piece. Rows are its lines, unless lone CRs end rows too or bad lines are skipped."""
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
        rows = sum(block.rows for block, _ in LineScanner(file, name, piece, rules, skip_bad).blocks())
    return rows, lines
