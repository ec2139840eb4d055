"""A trace file -> blocks of whole lines, whatever state the file is in, and what could not be read of it.

A killed process leaves a gzip stream without an end and a last line without one; both are read as far as
they go. A damaged stretch is skipped up to the next gzip member. What is skipped is counted, never silent.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 4 << 20
_CHUNK = 64 << 10
_MAGIC = b"\x1f\x8b\x08"
_TAIL = 1 << 20


@dataclass
class Loss:
    """What was not read of one file."""

    skipped: int = 0  # bytes of the file that are no gzip or that do not inflate
    partial: int = 0  # bytes of text after the last whole line
    cut: bool = False  # the gzip stream has no end: the process was killed, or is still running

    @property
    def bytes(self) -> int:
        return self.skipped + self.partial


def blocks(path: Path, loss: Loss) -> Iterator[bytearray]:
    """Whole lines, about BLOCK bytes at a time."""
    with path.open("rb") as file:
        pieces = _inflated(file, loss) if path.suffix == ".gz" else iter(lambda: file.read(_CHUNK), b"")
        text = bytearray()
        for piece in pieces:
            text += piece
            if len(text) >= BLOCK and (end := text.rfind(b"\n") + 1):
                rest = text[end:]
                del text[end:]
                yield text
                text = rest
        end = text.rfind(b"\n") + 1
        rest = text[end:].strip()
        if rest.endswith(
            b"}"
        ):  # a last line that only lacks its newline, or an event that was cut at a brace:
            text, end = text + b"\n", len(text) + 1  # the scanner will say
        elif rest != b"]":  # how DFTracer 1 ends a file
            loss.partial += len(rest)
        del text[end:]
        if text:
            yield text


def _inflated(file: BinaryIO, loss: Loss) -> Iterator[bytes]:
    data = file.read(_CHUNK)
    while data:
        data, skipped = _to_member(data, file)
        loss.skipped += skipped
        if not data:
            return
        stream, before = zlib.decompressobj(31), zlib.decompressobj(31)
        while not stream.eof:
            try:
                yield stream.decompress(data, BLOCK)
            except zlib.error:
                good, used = _salvage(before, data)
                yield good + b"\n"  # what follows the damage begins a line
                data = data[used + 1 :] or file.read(_CHUNK)
                loss.skipped += 1
                loss.cut = True
                break
            data = stream.unconsumed_tail or stream.unused_data or file.read(_CHUNK)
            if not stream.eof:
                if not data:
                    loss.cut = True
                    return
                before = stream.copy()  # should the next stretch be damaged


def _to_member(data: bytes, file: BinaryIO) -> tuple[bytes, int]:
    """From the next gzip header on, and how many bytes were passed over; padding of zeros is no loss."""
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


def _salvage(stream: "zlib._Decompress", data: bytes) -> tuple[bytes, int]:  # type: ignore[name-defined]
    """Inflate up to the damage: the text, and how many bytes of data were good."""
    good, used = b"", 0
    try:
        while used < len(data):
            good += stream.decompress(data[used : used + 1])
            used += 1
    except zlib.error:
        pass
    return good, used


def tail(path: Path) -> bytes:
    """The end of the text: what the whole gzip members in the file's last stretch hold."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        data = file.read()
    if path.suffix != ".gz":
        return data
    text, at = b"", data.find(_MAGIC)
    while at >= 0:
        stream = zlib.decompressobj(31)
        try:
            text += stream.decompress(data[at:])
            at = data.find(_MAGIC, len(data) - len(stream.unused_data)) if stream.eof else -1
        except zlib.error:  # these three bytes were no header
            at = data.find(_MAGIC, at + 1)
    return text
