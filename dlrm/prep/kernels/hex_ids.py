"""Parses eight ids at once, in a vector of 64-bit words: ids of exactly, or of up to, eight hex digits."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

from llvmlite import ir
from numba import types

from dlrm.prep.kernels.fields import TAB, FieldWords
from dlrm.prep.kernels.intrinsics import I8, I32, I64, intrinsic

FIELDS = 8
WIDTH = 9  # bytes from one id of eight digits to the next


def gather_digits(words: FieldWords, at: Any) -> tuple[Any, Any]:
    """Eight words of text, eight digits each, and whether a tab follows each."""
    builder, found = words.builder, words.repeat_word(0)
    ends = ir.Constant(ir.VectorType(I8, FIELDS), ir.Undefined)
    for field in range(FIELDS):
        where = builder.add(at, I64(WIDTH * field))
        word = builder.load(builder.inttoptr(where, I64.as_pointer()), align=1)
        end = builder.load(builder.inttoptr(builder.add(where, I64(8)), I8.as_pointer()))
        found = builder.insert_element(found, word, I32(field))
        ends = builder.insert_element(ends, end, I32(field))
    return found, builder.icmp_unsigned("==", ends, ir.Constant(ends.type, [TAB] * FIELDS))


def find_hex(words: FieldWords, text: Any) -> Any:
    """Whether all bytes of each word are 0-9, a-f or A-F. The bounds are tested by additions that carry into
    the top bit of a byte.
    """
    builder = words.builder

    def find_range(values: Any, first: str, last: str) -> Any:
        low = builder.add(values, words.repeat_byte(0x80 - ord(first)))
        high = builder.add(values, words.repeat_byte(0x7F - ord(last)))
        return builder.and_(low, builder.not_(high))

    digits, letters = (
        find_range(text, "0", "9"),
        find_range(builder.or_(text, words.repeat_byte(0x20)), "a", "f"),
    )
    # bytes from 0x80 on are neither, whatever the additions give for them
    canonical = builder.and_(builder.or_(digits, letters), builder.not_(text))
    canonical = builder.and_(canonical, words.repeat_byte(0x80))
    return builder.icmp_unsigned("==", canonical, words.repeat_byte(0x80))


def store_ids(words: FieldWords, text: Any, target: Any, id_step: Any) -> None:
    """Convert eight words of hex digits to ids and store them from address `target` on, as uint32 (`id_step`
    1) or int64 (`id_step` 2).
    """
    builder = words.builder
    is_letter = builder.and_(builder.lshr(text, words.repeat_word(6)), words.repeat_byte(1))
    nine = builder.add(is_letter, builder.shl(is_letter, words.repeat_word(3)))
    ids = builder.add(builder.and_(text, words.repeat_byte(0x0F)), nine)
    for bits, keep in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        high, low = builder.shl(ids, words.repeat_word(bits)), builder.lshr(ids, words.repeat_word(2 * bits))
        ids = builder.and_(builder.or_(high, low), words.repeat_word(keep))
    with builder.if_else(builder.icmp_signed("==", id_step, I64(1))) as (narrow, wide):
        with narrow:
            kind = ir.VectorType(I32, FIELDS)
            where = builder.inttoptr(target, kind.as_pointer())
            builder.store(builder.trunc(ids, kind), where, align=4)
        with wide:
            builder.store(ids, builder.inttoptr(target, words.kind.as_pointer()), align=4)


@intrinsic
def parse_eight_full(typing: Any, at: Any, target: Any, id_step: Any) -> Any:
    """Parse eight ids of eight digits each from address `at`, and store them at `target` (see `store_ids`).

    Returns the address of the next field, or -1 if an id has another form; what was stored is then invalid.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, target, id_step = args
        words = FieldWords(builder, FIELDS)
        text, ended = gather_digits(words, at)
        store_ids(words, text, target, id_step)
        canonical = words.all_true(builder.and_(ended, find_hex(words, text)))
        return builder.select(canonical, builder.add(at, I64(FIELDS * WIDTH)), I64(-1))

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic
def parse_eight_any(typing: Any, at: Any, target: Any, id_step: Any) -> Any:
    """The same for ids of 0 to 8 digits. At least one must be shorter than 8: only then do all eight with
    their tabs fit into REACH bytes.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, target, id_step = args
        words = FieldWords(builder, FIELDS)
        text, lengths, last = words.split_fields(at, FIELDS)
        half = builder.and_(builder.shl(lengths, words.repeat_word(2)), words.repeat_word(63))
        zeros = builder.lshr(builder.lshr(words.repeat_byte(ord("0")), half), half)
        text = builder.or_(words.align_right(text, lengths), zeros)
        store_ids(words, text, target, id_step)
        return words.choose_end(
            at, last, words.all_true(builder.and_(words.fit_word(lengths), find_hex(words, text)))
        )

    return types.int64(types.int64, types.int64, types.int64), build
