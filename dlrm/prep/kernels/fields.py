"""Vectors of 64-bit words, each the beginning of a field of text: found by their tabs, and aligned."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir

from dlrm.prep.kernels.intrinsics import I8, I32, I64

REACH = 64  # bytes in which the tabs are looked for
TAB = 9


class FieldWords:
    """So many words, and the constants that go with them."""

    def __init__(self, builder: Any, count: int) -> None:
        self.builder, self.count, self.kind = builder, count, ir.VectorType(I64, count)

    def each(self, word: int) -> ir.Constant:
        return ir.Constant(self.kind, [word] * self.count)

    def bytes(self, byte: int) -> ir.Constant:
        """Such a byte in all places of all words."""
        return self.each(byte * 0x0101010101010101)

    def all(self, conditions: Any) -> Any:
        bits = ir.IntType(self.count)
        return self.builder.icmp_unsigned("==", self.builder.bitcast(conditions, bits), bits(-1))

    def fields(self, at: Any, fields: int) -> tuple[Any, Any, Any]:
        """(first eight bytes, length) of each of so many fields from `at`, and how far the last one's tab is:
        REACH when there are not so many within it."""
        builder, text = self.builder, ir.VectorType(I8, REACH)
        bytes = builder.load(builder.inttoptr(at, text.as_pointer()), align=1)
        tabs = builder.icmp_unsigned("==", bytes, ir.Constant(text, [TAB] * REACH))
        tabs = builder.bitcast(tabs, I64)
        words, lengths, begin, end = self.each(0), self.each(0), I64(0), I64(0)
        for field in range(fields):
            end = builder.cttz(tabs, ir.IntType(1)(0))
            tabs = builder.and_(tabs, builder.sub(tabs, I64(1)))
            where = builder.inttoptr(builder.add(at, begin), I64.as_pointer())
            words = builder.insert_element(words, builder.load(where, align=1), I32(field))
            lengths = builder.insert_element(lengths, builder.sub(end, begin), I32(field))
            begin = builder.add(end, I64(1))
        return words, lengths, end

    def short(self, lengths: Any) -> Any:
        return self.builder.icmp_unsigned("<=", lengths, self.each(8))

    def right_aligned(self, words: Any, lengths: Any) -> Any:
        """The first bytes of each word move to its end, zeros before them. Lengths above 8 give anything."""
        builder = self.builder
        half = builder.sub(self.each(32), builder.shl(lengths, self.each(2)))
        half = builder.and_(half, self.each(63))
        return builder.shl(builder.shl(words, half), half)  # two shifts because one by 64 is undefined

    def behind(self, at: Any, last: Any, good: Any) -> Any:
        """The address behind the last tab, or -1 when not all is good."""
        builder = self.builder
        good = builder.and_(good, builder.icmp_unsigned("<", last, I64(REACH)))
        return builder.select(good, builder.add(builder.add(at, last), I64(1)), I64(-1))
