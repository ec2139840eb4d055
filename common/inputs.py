"""Read files that another program may have written: type, size and nesting are checked before the contents.

In: a path. Out: an open descriptor of a regular file, or a JSON value within limits. A FIFO (which would
block forever), a device, a socket, a folder, a dangling link, a file that is too large or nested too
deeply: each is a UserError of one line.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from common.descriptors import close_descriptor, open_descriptor
from common.errors import UserError, os_errors_as_user_errors, printable

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64
ESCAPE = re.compile(rb"\\.", re.DOTALL)
STRING = re.compile(rb'"[^"]*(?:"|\Z)')  # where no escape is left
BRACKETS = re.compile(rb"[\[{]+|[\]}]+")  # a run of opening or of closing ones
SURROGATE_ESCAPES = "".join(map(chr, range(0xDC80, 0xDD00)))  # what os.fsdecode makes of bytes from 128 on
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file, or a UserError. Never blocks; links are followed."""
    with os_errors_as_user_errors(path):
        return open_regular_file(path, flags)


def open_regular_file(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """The same with an OSError: to be used as `opener` of Python's open()."""
    descriptor = open_descriptor(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        close_descriptor(descriptor)
        kind = KINDS.get(stat.S_IFMT(mode), "not a file")
        raise OSError(errno.EINVAL, f"is {kind}, a file is expected", path)
    return descriptor


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file, or a UserError; for a file that a library is going to open."""
    with os_errors_as_user_errors(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "not a file")
        raise UserError(f"{printable(path)}: is {kind}, a file is expected")
    return status


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole content of a regular file of at most `limit` bytes."""
    descriptor = open_regular(path)
    try:
        with os_errors_as_user_errors(path), os.fdopen(descriptor, "rb", closefd=False) as file:
            # the buffer is as large as the file, not as the limit
            data = file.read(min(limit, os.fstat(descriptor).st_size) + 1)
    finally:
        close_descriptor(descriptor)
    if len(data) > limit:
        raise UserError(f"{printable(path)}: larger than {limit:,} bytes, the limit for such a file")
    return data


def read_json(
    path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES, nan: bool = False, paths: bool = False
) -> Any:
    """A JSON file's value. It must be UTF-8, of limited size and depth, without lone surrogates (which no
    file can be written with again), and without NaN and infinity unless `nan`. `paths`: texts may be paths
    that are not UTF-8, as os.fsdecode gives them.
    """
    return parse_json(read_bytes(path, limit), printable(path), nan, paths)


def parse_json(data: bytes, name: str, nan: bool = False, paths: bool = False) -> Any:
    """The value of JSON text; `name` is the file's name in messages."""
    _check_depth(data, name)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=float if nan else _refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except ValueError as error:
        raise UserError(f"{name}: is not JSON: {str(error)[:100]}") from None
    if "\\u" in text and _has_surrogate(value, allowed=SURROGATE_ESCAPES if paths else ""):
        raise UserError(f"{name}: is not JSON: half of a surrogate pair")
    return value


def read_json_object(
    path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES, nan: bool = False, paths: bool = False
) -> dict[str, Any]:
    """The same for a file whose value must be an object."""
    value = read_json(path, limit, nan, paths)
    if not isinstance(value, dict):
        raise UserError(f"{printable(path)}: a JSON object is expected, found {type(value).__name__}")
    return value


def _check_depth(data: bytes, name: str) -> None:
    """Check the depth before the parser, which recurses, sees the text. Brackets inside strings do not
    count. After a string that never ends nothing counts: the parser fails there.
    """
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for brackets in BRACKETS.finditer(STRING.sub(b"", ESCAPE.sub(b"", data))):
        count = brackets.end() - brackets.start()
        depth += count if brackets[0][:1] in b"[{" else -count
        if depth > MAX_JSON_DEPTH:
            raise UserError(f"{name}: nested more than {MAX_JSON_DEPTH} deep")


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _parse_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:30]} is out of range")
    return value


def _has_surrogate(value: Any, allowed: str) -> bool:
    """Whether a text in a JSON value has half of a surrogate pair that is not one of `allowed`."""
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" and c not in allowed for c in value)
    if isinstance(value, dict):
        return any(
            _has_surrogate(key, allowed) or _has_surrogate(each, allowed) for key, each in value.items()
        )
    return isinstance(value, list) and any(_has_surrogate(each, allowed) for each in value)


def is_regular(path: Path) -> bool:
    """Whether the path is a regular file; links are followed, nothing is opened."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
