"""A label and 13 counts in one go: their tabs are found first, then all of them become numbers at once."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir
from numba import types

from dlrm.prep.kernels.fields import FieldWords
from dlrm.prep.kernels.intrinsics import I32, intrinsic

MINUS = 45
LANES = 16  # two vectors of eight; where no field is, all is 0
FIELDS = 14
VALUES = ir.VectorType(I32, LANES)


def parse_numbers(words: FieldWords, digits: Any) -> Any:
    """Digits of 0 to 9, the first in the lowest byte, to numbers."""
    builder = words.builder
    for bits, times, keep in (
        (8, 10, 0x00FF00FF00FF00FF),
        (16, 100, 0x0000FFFF0000FFFF),
        (32, 10000, 0x00000000FFFFFFFF),
    ):
        higher, lower = builder.mul(digits, words.each(times)), builder.lshr(digits, words.each(bits))
        digits = builder.and_(builder.add(higher, lower), words.each(keep))
    return builder.trunc(digits, VALUES)


def store_counts(builder: Any, values: Any, label: Any, dense: Any) -> None:
    builder.store(builder.extract_element(values, I32(0)), builder.inttoptr(label, I32.as_pointer()))
    order = ir.Constant(ir.VectorType(I32, FIELDS - 1), list(range(1, FIELDS)))
    counts = builder.shuffle_vector(values, values, order)
    builder.store(counts, builder.inttoptr(dense, counts.type.as_pointer()), align=4)


def fill_empty(builder: Any, empty: Any) -> Any:
    """What stands for a gap: 0 for a label, the same number for all counts."""
    gaps = builder.insert_element(ir.Constant(VALUES, ir.Undefined), builder.trunc(empty, I32), I32(0))
    gaps = builder.shuffle_vector(gaps, gaps, ir.Constant(VALUES, [0] * LANES))
    return builder.insert_element(gaps, I32(0), I32(0))


@intrinsic
def parse_label_and_counts(typing: Any, at: Any, label: Any, dense: Any, empty: Any) -> Any:
    """Where the ids begin, or -1: something is odd or far away, and nothing that was stored is to be used."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, label, dense, empty = args
        words = FieldWords(builder, LANES)
        first, lengths, last = words.fields(at, FIELDS)
        good = words.short(lengths)
        present = builder.icmp_unsigned("!=", lengths, words.each(0))
        below = builder.icmp_unsigned("==", builder.and_(first, words.each(0xFF)), words.each(MINUS))
        below = builder.and_(below, present)
        lone = builder.and_(below, builder.icmp_unsigned("==", lengths, words.each(1)))
        good = builder.and_(good, builder.not_(lone))
        lengths = builder.sub(lengths, builder.zext(below, words.kind))
        first = builder.select(below, builder.lshr(first, words.each(8)), first)
        digits = words.right_aligned(builder.xor(first, words.bytes(ord("0"))), lengths)
        over = builder.or_(builder.add(digits, words.bytes(0x76)), digits)  # past 9 the top bit is set
        over = builder.and_(over, words.bytes(0x80))
        good = builder.and_(good, builder.icmp_unsigned("==", over, words.each(0)))
        values = parse_numbers(words, digits)
        values = builder.select(below, builder.neg(values), values)
        values = builder.select(present, values, fill_empty(builder, empty))
        store_counts(builder, values, label, dense)
        return words.behind(at, last, words.all(good))

    return types.int64(types.int64, types.int64, types.int64, types.int64), build
