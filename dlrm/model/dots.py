"""Dot products of all pairs of a row's embeddings, and their gradient, in machine code for one shape.

Libraries take small products one by one, at a quarter of the processor's speed, and all of a symmetric
matrix; here the upper triangle goes from the embeddings straight into the output row, and back.
"""

import functools
from typing import Any

import torch

from dlrm.model import machine
from dlrm.model.machine import FLOAT, FLOATS, INT, INTS, LANES, ZERO, Code
from dlrm.model.tower import ALIGNED

ROWS, COLUMNS = 3, 4  # of the products that are summed at once, in registers
WIDE = 3  # vectors of a gradient, likewise
MOST = 128  # entries: their products lie on the stack
FUNCTIONS = {
    # rows, dense, sparse, place, out
    "forward": [INT, FLOATS, FLOATS, INTS, FLOATS],
    # rows, gradient, dense, sparse, place, gradients of the two
    "backward": [INT, FLOATS, FLOATS, FLOATS, INTS, FLOATS, FLOATS],
}


@functools.cache
def dots(entries: int, dim: int, diagonal: bool) -> "Dots | None":
    """For rows of so many embeddings; nothing where there is no such code."""
    if dim % LANES or not 1 < entries <= MOST or machine.host() is None:
        return None
    return Dots(entries, dim, diagonal)


class Dots:
    """Dense [rows, dim] and sparse [rows, (entries - 1) * dim] -> dense and all pairs [rows, dim + pairs].

    And zeros, until the columns are a multiple of ALIGNED.
    `place`: where each entry stands among those of a row, the dense one being the first.
    """

    def __init__(self, entries: int, dim: int, diagonal: bool) -> None:
        self.entries, self.dim = entries, dim
        self.first = int(not diagonal)  # from an entry to the first that it is paired with
        self.width = dim + entries * (entries + 1 - 2 * self.first) // 2
        self.columns = -(-self.width // ALIGNED) * ALIGNED
        self.padded = entries + 2 * COLUMNS  # blocks may begin with the last one
        key = f"{__name__} {entries} {dim} {diagonal}"
        self._code = machine.compiled(key, FUNCTIONS, self._write)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        out = dense.new_empty(len(dense), self.columns)
        tensors = (dense, sparse, place, out)
        self._call("forward", tensors)
        return out

    def backward(
        self, gradient: torch.Tensor, dense: torch.Tensor, sparse: torch.Tensor, place: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert gradient.shape == (len(dense), self.columns)
        found = torch.empty_like(dense), torch.empty_like(sparse)
        tensors = (gradient, dense, sparse, place, *found)
        self._call("backward", tensors)
        return found

    def _call(self, name: str, tensors: tuple[torch.Tensor, ...]) -> None:
        rows = len(tensors[0])
        if rows:
            self._code[name](rows, *(tensor.data_ptr() for tensor in tensors))

    def _write(self, codes: dict[str, Code]) -> None:
        self._write_forward(codes["forward"])
        self._write_backward(codes["backward"])

    def _find(self, code: Code, table: Any, sample: Any, dense: Any, sparse: Any, place: Any) -> None:
        """Where the entries of one row are; the last one again and again, so that blocks are whole."""
        row = code.at(sparse, code.times(sample, (self.entries - 1) * self.dim))

        def one(entry: Any, _: Any) -> list[Any]:
            found = code.at(row, code.times(code.plus(code.get(place, entry), -1), self.dim))
            code.put(found, table, entry)
            return [found]

        code.put(code.at(dense, code.times(sample, self.dim)), table)
        (last,) = code.loop(1, self.entries, 1, one, [row])
        for entry in range(self.entries, self.padded):
            code.put(last, table, entry)

    def _write_forward(self, code: Code) -> None:
        rows, dense, sparse, place, out = code.arguments
        table, tile = code.room(FLOATS, self.padded), code.room(FLOAT, self.padded * self.padded)

        def products(row: Any, column: Any) -> None:
            left = [code.get(table, row, i) for i in range(ROWS)]
            right = [code.get(table, column, j) for j in range(COLUMNS)]
            sums = {(i, j): ZERO for i in range(ROWS) for j in range(COLUMNS)}
            for at in range(0, self.dim, LANES):
                held = [code.vector(pointer, at) for pointer in left]
                for j, pointer in enumerate(right):
                    other = code.vector(pointer, at)
                    for i in range(ROWS):
                        sums[i, j] = code.multiply_add(held[i], other, sums[i, j])
            for i in range(ROWS):
                line = code.at(tile, code.times(code.plus(row, i), self.padded))
                code.put(code.sums([sums[i, j] for j in range(COLUMNS)]), line, column)

        def one(sample: Any) -> None:
            def line(row: Any) -> None:
                begin = code.times(code.over(code.plus(row, self.first), COLUMNS), COLUMNS)
                code.loop(begin, self.entries, COLUMNS, lambda column: products(row, column))

            self._find(code, table, sample, dense, sparse, place)
            code.loop(0, self.entries, ROWS, line)
            target, source = code.at(out, code.times(sample, self.columns)), code.get(table)
            for at in range(0, self.dim, LANES):
                code.put(code.vector(source, at), target, at)
            self._write_pairs(code, tile, target)

        code.loop(0, rows, 1, one)

    def _write_pairs(self, code: Code, tile: Any, target: Any) -> None:
        """The upper triangle, line after line: a vector may run over what the next line writes again."""
        place = self.dim
        for line in range(self.entries - self.first):
            source, end = line * (self.padded + 1) + self.first, place + self.entries - self.first - line
            while place < end:
                wide = place + LANES <= self.columns
                code.put((code.vector if wide else code.get)(tile, source), target, place)
                source, place = source + (LANES if wide else 1), place + (LANES if wide else 1)
            place = end
        for column in range(self.width, self.columns):
            code.put(FLOAT(0), target, column)

    def _write_backward(self, code: Code) -> None:
        rows, gradient, dense, sparse, place, of_dense, of_sparse = code.arguments
        table, targets = code.room(FLOATS, self.padded), code.room(FLOATS, self.padded)
        square = code.room(FLOAT, self.padded * self.entries)  # the pairs' gradients, mirrored
        code.loop(0, self.padded * self.entries, 1, lambda place: code.put(FLOAT(0), square, place))

        def products(row: Any) -> None:
            lines = [code.at(square, code.times(code.plus(row, i), self.entries)) for i in range(ROWS)]
            for begin in range(0, self.dim, WIDE * LANES):
                columns = range(begin, min(self.dim, begin + WIDE * LANES), LANES)

                def add(j: Any, *sums: Any, columns: range = columns) -> list[Any]:
                    source = code.get(table, j)
                    vectors = [code.vector(source, column) for column in columns]
                    factors = [code.everywhere(code.get(line, j)) for line in lines for _ in columns]
                    each = zip(factors, vectors * ROWS, sums, strict=True)
                    return [code.multiply_add(*three) for three in each]

                sums = code.loop(0, self.entries, 1, add, [ZERO] * (ROWS * len(columns)))
                for i in reversed(range(ROWS)):  # what stands for the last entry again goes first
                    target = code.get(targets, row, i)
                    for number, column in enumerate(columns):
                        code.put(sums[i * len(columns) + number], target, column)

        def one(sample: Any) -> None:
            line = code.at(gradient, code.times(sample, self.columns))
            self._find(code, table, sample, dense, sparse, place)
            self._find(code, targets, sample, of_dense, of_sparse, place)
            self._mirror(code, code.at(line, self.dim), square)
            code.loop(0, self.entries, ROWS, products)
            target = code.get(targets)
            for at in range(0, self.dim, LANES):
                code.put(code.add(code.vector(target, at), code.vector(line, at)), target, at)

        code.loop(0, rows, 1, one)

    def _mirror(self, code: Code, pairs: Any, square: Any) -> None:
        def line(i: Any, place: Any) -> list[Any]:
            def each(j: Any, place: Any) -> list[Any]:
                value = code.get(pairs, place)
                code.put(value, square, code.plus(code.times(i, self.entries), j))
                code.put(value, square, code.plus(code.times(j, self.entries), i))
                return [code.plus(place, 1)]

            return code.loop(code.plus(i, self.first), self.entries, 1, each, [place])

        code.loop(0, self.entries - self.first, 1, line, [INT(0)])
        if not self.first:  # an entry by itself: twice
            for place in range(0, self.entries**2, self.entries + 1):
                value = code.get(square, place)
                code.put(code.add(value, value), square, place)
