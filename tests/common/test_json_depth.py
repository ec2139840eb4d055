"""How deep JSON text is nested, without parsing it: only brackets outside of strings count."""

import random

import pytest

from common import inputs
from common.errors import UserError

DEEP = b"[" * (inputs.MAX_JSON_DEPTH + 1)


def is_too_deep(data: bytes) -> bool:
    """Byte by byte, as the grammar says, up to the first byte at which every parser gives up."""
    depth, in_string, escaped = 0, False, False
    for byte in data:
        if in_string:
            in_string = escaped or byte != 0x22
            escaped = not escaped and byte == 0x5C
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > inputs.MAX_JSON_DEPTH:
                return True
        elif byte in b"]}":
            depth -= 1
        elif byte == 0x5C:  # no escape outside of a string
            return False
    return False


def is_refused_as_deep(data: bytes) -> bool:
    try:
        inputs.parse_json(data, "some.json")
    except UserError as error:
        return "nested more than" in str(error)
    return False


@pytest.mark.parametrize(
    ("data", "deep"),
    [
        (DEEP, True),
        (DEEP[1:] + b"]" * len(DEEP[1:]), False),
        (b'{"a":' * 65, True),
        (b'["' + DEEP + b'"]', False),
        (b'["\\"' + DEEP + b'"]', False),
        (b'["\\\\"' + DEEP, True),
        (b'["\n\\\n' + DEEP + b'"]', False),
        (b'["' + DEEP, False),  # the string never ends
        (b'["' + DEEP + b"\\", False),
        (b"[" + b"[]," * 10_000 + b"1]", False),
        (b"]" * 100 + DEEP, False),
        (b"\xff" + DEEP + b"\x00", True),
    ],
)
def test_depth(data: bytes, deep: bool) -> None:
    assert is_refused_as_deep(data) == is_too_deep(data) == deep


def test_depth_of_random_text() -> None:
    chance = random.Random(5)
    found = set()
    for _ in range(2000):
        words = chance.choices([b"[" * 9, b"{" * 7, b"]", b"}", b'"', b"\\", b"x", b'"a"'], k=60)
        data = b"".join(words)
        found.add(is_too_deep(data))
        assert is_refused_as_deep(data) or not is_too_deep(data), data
        if b"\\" not in data:
            assert is_refused_as_deep(data) == is_too_deep(data), data
    assert found == {True, False}
