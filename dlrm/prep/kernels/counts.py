"""Parses a label and up to 15 counts at once: finds their tabs, then converts all of them in one vector."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir
from numba import types

from dlrm.prep.kernels.fields import FieldWords
from dlrm.prep.kernels.intrinsics import I32, literal_intrinsic

MINUS = 45
LANES = 16  # two vectors of eight words; the words behind the fields are 0
MOST_COUNTS = LANES - 1  # besides the label
VALUES = ir.VectorType(I32, LANES)


def parse_numbers(words: FieldWords, digits: Any) -> Any:
    """Words of eight digits (bytes 0 to 9, the first in the lowest byte) to int32 numbers."""
    builder = words.builder
    for bits, times, keep in (
        (8, 10, 0x00FF00FF00FF00FF),
        (16, 100, 0x0000FFFF0000FFFF),
        (32, 10000, 0x00000000FFFFFFFF),
    ):
        higher, lower = (
            builder.mul(digits, words.repeat_word(times)),
            builder.lshr(digits, words.repeat_word(bits)),
        )
        digits = builder.and_(builder.add(higher, lower), words.repeat_word(keep))
    return builder.trunc(digits, VALUES)


def store_counts(builder: Any, values: Any, count: int, label: Any, dense: Any) -> None:
    """Emit the stores of a parsed line: the first of `values` (i32 lanes) to address `label`, the next
    `count` to address `dense`.
    """
    builder.store(builder.extract_element(values, I32(0)), builder.inttoptr(label, I32.as_pointer()))
    if not count:
        return
    order = ir.Constant(ir.VectorType(I32, count), list(range(1, count + 1)))
    counts = builder.shuffle_vector(values, values, order)
    builder.store(counts, builder.inttoptr(dense, counts.type.as_pointer()), align=4)


def fill_empty(builder: Any, empty: Any) -> Any:
    """The values of empty fields: 0 for the label, `empty` for every count."""
    gaps = builder.insert_element(ir.Constant(VALUES, ir.Undefined), builder.trunc(empty, I32), I32(0))
    gaps = builder.shuffle_vector(gaps, gaps, ir.Constant(VALUES, [0] * LANES))
    return builder.insert_element(gaps, I32(0), I32(0))


@literal_intrinsic
def parse_label_and_counts(typing: Any, at: Any, label: Any, dense: Any, empty: Any, count: Any) -> Any:
    """Parse a label and `count` counts of text from address `at`, and store them at `label` and `dense` as
    int32. `count` is a constant, at most MOST_COUNTS.

    Returns the address of the first id, or -1 if a field is not canonical or the fields are longer than the
    vector; what was stored is then invalid. `empty`: the value of an empty count.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, label, dense, empty, _ = args
        words = FieldWords(builder, LANES)
        first, lengths, last = words.split_fields(at, 1 + count.literal_value)
        canonical = words.fit_word(lengths)
        present = builder.icmp_unsigned("!=", lengths, words.repeat_word(0))
        below = builder.icmp_unsigned(
            "==", builder.and_(first, words.repeat_word(0xFF)), words.repeat_word(MINUS)
        )
        below = builder.and_(below, present)
        lone = builder.and_(below, builder.icmp_unsigned("==", lengths, words.repeat_word(1)))
        canonical = builder.and_(canonical, builder.not_(lone))
        lengths = builder.sub(lengths, builder.zext(below, words.kind))
        first = builder.select(below, builder.lshr(first, words.repeat_word(8)), first)
        digits = words.align_right(builder.xor(first, words.repeat_byte(ord("0"))), lengths)
        over = builder.or_(builder.add(digits, words.repeat_byte(0x76)), digits)  # past 9 the top bit is set
        over = builder.and_(over, words.repeat_byte(0x80))
        canonical = builder.and_(canonical, builder.icmp_unsigned("==", over, words.repeat_word(0)))
        values = parse_numbers(words, digits)
        values = builder.select(below, builder.neg(values), values)
        values = builder.select(present, values, fill_empty(builder, empty))
        store_counts(builder, values, count.literal_value, label, dense)
        return words.choose_end(at, last, words.all_true(canonical))

    return types.int64(types.int64, types.int64, types.int64, types.int64, count), build
