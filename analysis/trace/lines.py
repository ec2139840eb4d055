"""A trace file -> blocks of whole lines, whatever state the file is in, and what could not be read of it.

A killed process leaves a gzip stream without an end and a last line without one; both are read as far as
they go. A damaged stretch is skipped up to the next gzip member. What is skipped is counted, never silent.

Memory is constant, whatever inflates out of the file: a line that gets longer than MAX_LINE is passed over, a
file that inflates to more than MAX_RATIO times its size is read no further, nor is one with MAX_DAMAGES.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isal import isal_zlib

from analysis.trace.scan import MAX_LINE
from common.errors import os_errors_as_user_errors
from common.inputs import open_regular

BLOCK = 4 << 20
_CHUNK = 64 << 10
_MAGIC = b"\x1f\x8b\x08"
# Events with their times deflate to a tenth or a twentieth; a thousandth is what zlib can do to zeros.
MAX_RATIO = 100
_RATIO_FROM = 64 << 20  # bytes of text: below that no file is a danger
MAX_DAMAGES = 1000  # stretches that do not inflate
Opener = Callable[[Path], BinaryIO]


@dataclass
class ReadLoss:
    """What was not read of one file."""

    skipped: int = 0  # bytes of the file that are not gzip or that do not inflate
    partial: int = 0  # bytes of text after the last whole line
    cut: bool = False  # the gzip stream has no end: the process was killed, or is still running
    long: int = 0  # bytes of text in lines that are longer than any event
    bomb: bool = False  # it inflates to so much that reading on was given up

    @property
    def bytes(self) -> int:
        return self.skipped + self.partial + self.long


def open_trace(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path), "rb")


def read_blocks(
    path: Path, loss: ReadLoss, opened: Opener = open_trace, least: int = 0
) -> Iterator[bytearray]:
    """Whole lines, about `least` bytes at a time (0: BLOCK)."""
    least = least or BLOCK
    with opened(path) as file, os_errors_as_user_errors(path):
        pieces = _inflate(file, loss) if path.suffix == ".gz" else iter(lambda: file.read(_CHUNK), b"")
        text = bytearray()
        skipping = False  # inside a line that is too long
        for piece in pieces:
            if skipping:
                end = piece.find(b"\n") + 1
                loss.long += end or len(piece)
                if not end:
                    continue
                piece, skipping = piece[end:], False
            text += piece
            if len(text) >= least:
                end = text.rfind(b"\n") + 1
                if len(text) - end > MAX_LINE:
                    loss.long += len(text) - end
                    skipping = True
                rest = text[end:] if not skipping else bytearray()
                del text[end:]
                if text:
                    yield text
                text = rest
        end = text.rfind(b"\n") + 1
        rest = text[end:].strip()
        if rest.endswith(b"}"):
            # a last line without its newline, or an event that was cut at a brace: the scanner sees which
            text, end = text + b"\n", len(text) + 1
        elif rest != b"]":  # how DFTracer 1 ends a file
            loss.partial += len(rest)
        del text[end:]
        if text:
            yield text


def _inflate(file: BinaryIO, loss: ReadLoss) -> Iterator[bytes]:
    """The text of all gzip members, piece by piece; what does not inflate is added to `loss`."""
    data = file.read(_CHUNK)
    made = damages = 0
    while data:
        if damages > MAX_DAMAGES:
            loss.skipped += len(data) + _size_left(file)
            return
        data, skipped = _to_member(data, file)
        loss.skipped += skipped
        if not data:
            return
        begin, given, stream = file.tell() - len(data), 0, isal_zlib.decompressobj(31)
        with contextlib.suppress(isal_zlib.error):  # type: ignore[arg-type]  # its stub calls the class an instance
            while data and not stream.eof:
                piece = stream.decompress(data, BLOCK)
                yield piece
                given += len(piece)
                if _is_bomb(made + given, stream.unconsumed_tail, file, loss):
                    return
                data = stream.unconsumed_tail or stream.unused_data or file.read(_CHUNK)
        made += given
        if not stream.eof:
            loss.cut = True
            damages += 1
            file.seek(begin)
            data = yield from _inflate_damaged(file, given, loss)


def _inflate_damaged(file: BinaryIO, given: int, loss: ReadLoss) -> Generator[bytes, None, bytes]:
    """A member without an end, or with a damaged stretch, after its first `given` bytes of text, as far as it
    goes; returns what was read of the file and belongs to no member.

    ISA-L inflates three times as fast as zlib, but does not say where a damage is.
    """
    data, made = file.read(_CHUNK), 0
    stream, before = zlib.decompressobj(31), zlib.decompressobj(31)
    while data:
        try:
            piece = stream.decompress(data, BLOCK)
        except zlib.error:
            text, used = _salvage_text(before, data)
            yield text[given:] + b"\n"  # what follows the damage begins a line
            loss.skipped += 1
            return data[used + 1 :] or file.read(_CHUNK)
        yield piece[given:]
        given = max(0, given - len(piece))
        made += len(piece)
        if _is_bomb(made, stream.unconsumed_tail, file, loss):
            return b""
        data = stream.unconsumed_tail or stream.unused_data or file.read(_CHUNK)
        if stream.eof:  # ISA-L is the stricter one
            break
        before = stream.copy()  # should the next stretch be damaged
    return data


def _is_bomb(made: int, unread: bytes, file: BinaryIO, loss: ReadLoss) -> bool:
    """Whether the file has inflated to too much text; then the rest of it is skipped, and counted."""
    if made <= _RATIO_FROM or made <= MAX_RATIO * file.tell():
        return False
    loss.skipped += len(unread) + _size_left(file)
    loss.bomb = True
    return True


def _to_member(data: bytes, file: BinaryIO) -> tuple[bytes, int]:
    """From the next gzip header on, and how many bytes were passed over; padding of zeros is not a loss."""
    skipped = 0
    while True:
        found = data.find(_MAGIC)
        if found >= 0:
            return data[found:], skipped + len(data[:found].strip(b"\0"))
        keep = data[-2:]
        more = file.read(_CHUNK)
        if not more:
            return b"", skipped + len(data.strip(b"\0"))
        skipped += len(data[:-2].strip(b"\0"))
        data = keep + more


def _salvage_text(stream: "zlib._Decompress", data: bytes) -> tuple[bytes, int]:  # type: ignore[name-defined]
    """Inflate up to the damage: the text, and how many bytes of data were read."""
    text, used = bytearray(), 0
    try:
        while used < len(data):
            text += stream.decompress(data[used : used + 1])
            used += 1
    except zlib.error:
        pass
    return bytes(text), used


def _size_left(file: BinaryIO) -> int:
    return max(0, os.fstat(file.fileno()).st_size - file.tell())


def read_tail(path: Path, size: int, opened: Opener = open_trace) -> bytearray:
    """The end of the text: what the whole gzip members in the file's last `size` bytes hold, or the last of
    it.
    """
    with opened(path) as file, os_errors_as_user_errors(path):
        whole = file.seek(0, 2)
        file.seek(max(0, whole - size))
        data = file.read(size)
    if path.suffix != ".gz":
        return bytearray(data)
    text, at = bytearray(), data.find(_MAGIC)
    made = damages = 0
    while at >= 0 and damages < MAX_DAMAGES and made < _RATIO_FROM:
        stream, rest = zlib.decompressobj(31), data[at:]
        try:
            while rest and not stream.eof and made < _RATIO_FROM:
                piece = stream.decompress(rest, BLOCK)
                text += piece
                made += len(piece)
                rest = stream.unconsumed_tail
            at = data.find(_MAGIC, len(data) - len(stream.unused_data)) if stream.eof else -1
        except zlib.error:  # these three bytes were not a header
            damages += 1
            at = data.find(_MAGIC, at + 1)
    return text
