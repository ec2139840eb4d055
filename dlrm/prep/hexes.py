"""Eight ids of eight hex digits each, with a tab behind each, in one go: a vector of 64-bit words."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir
from numba import types

from dlrm.prep.native import I8, I32, I64, intrinsic

FIELDS = 8
WIDTH = 9  # bytes from one id to the next
TAB = 9
WORDS = ir.VectorType(I64, FIELDS)


def each(byte: int) -> ir.Constant:
    """Such a byte in all places of all words."""
    return ir.Constant(WORDS, [byte * 0x0101010101010101] * FIELDS)


def by(bits: int) -> ir.Constant:
    return ir.Constant(WORDS, [bits] * FIELDS)


def all_of(builder: Any, lanes: Any) -> Any:
    mask = builder.bitcast(lanes, ir.IntType(FIELDS))
    return builder.icmp_unsigned("==", mask, ir.Constant(ir.IntType(FIELDS), (1 << FIELDS) - 1))


def gathered(builder: Any, at: Any) -> tuple[Any, Any]:
    """The eight words, and the byte behind each."""
    words = ir.Constant(WORDS, ir.Undefined)
    ends = ir.Constant(ir.VectorType(I8, FIELDS), ir.Undefined)
    for field in range(FIELDS):
        where = builder.add(at, I64(WIDTH * field))
        word = builder.load(builder.inttoptr(where, I64.as_pointer()), align=1)
        end = builder.load(builder.inttoptr(builder.add(where, I64(8)), I8.as_pointer()))
        words = builder.insert_element(words, word, I32(field))
        ends = builder.insert_element(ends, end, I32(field))
    return words, ends


def are_hex(builder: Any, words: Any) -> Any:
    """Whether every byte is 0-9, a-f or A-F: adding carries into the top bit from a bound on."""

    def within(values: Any, first: int, last: int) -> Any:
        low, high = builder.add(values, each(0x80 - first)), builder.add(values, each(0x7F - last))
        return builder.and_(low, builder.not_(high))

    digits = within(words, ord("0"), ord("9"))
    letters = within(builder.or_(words, each(0x20)), ord("a"), ord("f"))
    good = builder.and_(builder.or_(digits, letters), builder.not_(words))  # a top bit that was set is bad
    good = builder.and_(good, each(0x80))
    return all_of(builder, builder.icmp_unsigned("==", good, each(0x80)))


def values(builder: Any, words: Any) -> Any:
    """Digits to nibbles, nibbles to bytes, bytes to the id in the low half."""
    is_letter = builder.and_(builder.lshr(words, by(6)), each(1))
    nine = builder.add(is_letter, builder.shl(is_letter, by(3)))
    words = builder.add(builder.and_(words, each(0x0F)), nine)
    for bits, keep in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        high, low = builder.shl(words, by(bits)), builder.lshr(words, by(2 * bits))
        words = builder.and_(builder.or_(high, low), ir.Constant(WORDS, [keep] * FIELDS))
    return words


@intrinsic
def eight_hexes(typing: Any, at: Any, target: Any, id_step: Any) -> Any:
    """Ids from `at` on to `target`, in words of 4 or 8 bytes (1 or 2 steps). False: none is to be used."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, target, id_step = args
        words, ends = gathered(builder, at)
        tabs = ir.Constant(ir.VectorType(I8, FIELDS), [TAB] * FIELDS)
        separated = all_of(builder, builder.icmp_unsigned("==", ends, tabs))
        ids = values(builder, words)
        with builder.if_else(builder.icmp_signed("==", id_step, I64(1))) as (narrow, wide):
            with narrow:
                kind = ir.VectorType(I32, FIELDS)
                where = builder.inttoptr(target, kind.as_pointer())
                builder.store(builder.trunc(ids, kind), where, align=4)
            with wide:
                builder.store(ids, builder.inttoptr(target, WORDS.as_pointer()), align=4)
        return builder.and_(separated, are_hex(builder, words))

    return types.boolean(types.int64, types.int64, types.int64), build
