"""Vectors of 64-bit words, each with the first eight bytes of a field of text: found by tabs, and aligned."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir

from dlrm.prep.kernels.intrinsics import I8, I32, I64

REACH = 64  # bytes in which tabs are searched
TAB = 9


class FieldWords:
    """Builds code for vectors of `count` 64-bit words. All its methods return LLVM values."""

    def __init__(self, builder: Any, count: int) -> None:
        self.builder, self.count, self.kind = builder, count, ir.VectorType(I64, count)

    def repeat_word(self, word: int) -> ir.Constant:
        return ir.Constant(self.kind, [word] * self.count)

    def repeat_byte(self, byte: int) -> ir.Constant:
        """A vector of this byte in all bytes of all words."""
        return self.repeat_word(byte * 0x0101010101010101)

    def all_true(self, conditions: Any) -> Any:
        bits = ir.IntType(self.count)
        return self.builder.icmp_unsigned("==", self.builder.bitcast(conditions, bits), bits(-1))

    def split_fields(self, at: Any, fields: int) -> tuple[Any, Any, Any]:
        """(first eight bytes of each field, length of each field, distance from `at` to the last field's
        tab).

        The distance is REACH if fewer than `fields` fields end within REACH bytes of address `at`.
        """
        builder, text = self.builder, ir.VectorType(I8, REACH)
        bytes = builder.load(builder.inttoptr(at, text.as_pointer()), align=1)
        tabs = builder.icmp_unsigned("==", bytes, ir.Constant(text, [TAB] * REACH))
        tabs = builder.bitcast(tabs, I64)
        words, lengths, begin, end = self.repeat_word(0), self.repeat_word(0), I64(0), I64(0)
        for field in range(fields):
            end = builder.cttz(tabs, ir.IntType(1)(0))
            tabs = builder.and_(tabs, builder.sub(tabs, I64(1)))
            where = builder.inttoptr(builder.add(at, begin), I64.as_pointer())
            words = builder.insert_element(words, builder.load(where, align=1), I32(field))
            lengths = builder.insert_element(lengths, builder.sub(end, begin), I32(field))
            begin = builder.add(end, I64(1))
        return words, lengths, end

    def fit_word(self, lengths: Any) -> Any:
        return self.builder.icmp_unsigned("<=", lengths, self.repeat_word(8))

    def align_right(self, words: Any, lengths: Any) -> Any:
        """Move the first `lengths` bytes of each word to its end, with zeros before them. For lengths above 8
        the result is undefined.
        """
        builder = self.builder
        half = builder.sub(self.repeat_word(32), builder.shl(lengths, self.repeat_word(2)))
        half = builder.and_(half, self.repeat_word(63))
        return builder.shl(builder.shl(words, half), half)  # two shifts because one by 64 is undefined

    def choose_end(self, at: Any, last: Any, canonical: Any) -> Any:
        """The address after the last tab, or -1 unless `canonical` is set and the tab is within REACH."""
        builder = self.builder
        canonical = builder.and_(canonical, builder.icmp_unsigned("<", last, I64(REACH)))
        return builder.select(canonical, builder.add(builder.add(at, last), I64(1)), I64(-1))
