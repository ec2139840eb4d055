"""Both ways of deflating give what zlib reads back."""

import random
import zlib

import pytest

from analysis import deflate


@pytest.mark.parametrize("way", [deflate.deflate, deflate.plain])
@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_000])
def test_reads_back(way, size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size // 2) + bytes(size - size // 2))
    before = bytes(data)
    squeezed = way(data)
    assert zlib.decompress(squeezed) == before
    data.clear()  # nothing holds on to the buffer


def test_without_dftracer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deflate.util, "find_spec", lambda name: None)
    deflate._best.cache_clear()
    assert deflate._best() is deflate.plain
    deflate._best.cache_clear()
