"""Operations that numba lacks: loads and stores by address, vector copies, bit counts, prefetch.

Addresses are int64; the caller must make sure that they are valid.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
import hashlib
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # the decorated functions exist in compiled code only
literal_intrinsic: Any = extending.intrinsic(prefer_literal=True)  # for numbers known when compiling
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


# Files whose code is inlined where others are compiled
BUILT_IN = ("intrinsics", "fields", "counts", "hex_ids")
STAMP = hashlib.sha256(
    b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in BUILT_IN)
).digest()


def compiled(function: Any, **how: Any) -> Any:
    """Compile a function to run without the GIL. The machine code is cached on disk until the function's file
    or one of BUILT_IN changes.
    """
    dispatcher: Any = numba.njit(nogil=True, cache=True, boundscheck=False, **how)(function)
    dispatcher._cache._cache_file._source_stamp += STAMP  # numba itself checks the function's own file only
    return dispatcher


def inlined(function: Any) -> Any:
    """Compile a function that is always inlined into the functions that call it."""
    return compiled(function, forceinline=True)


@intrinsic
def load_byte(typing: Any, base: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I8.as_pointer()))

    return types.uint8(types.int64), build


@intrinsic
def load_word(typing: Any, base: Any) -> Any:
    """Load eight bytes from an unaligned address; the first becomes the lowest byte."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()), align=1)

    return types.uint64(types.int64), build


def get_pointer(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    """LLVM's pointer to item `index` of type `kind`, from the address `base`, int64."""
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


@intrinsic
def load64(typing: Any, base: Any, index: Any) -> Any:
    """Item `index` of an array of uint64 at the address `base`, unchecked."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(get_pointer(builder, args[0], args[1], I64))

    return types.uint64(types.int64, types.int64), build


@intrinsic
def store64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """Write item `index` of an array of uint64 at the address `base`, unchecked."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], get_pointer(builder, args[0], args[1], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), build


@intrinsic
def load32(typing: Any, base: Any, index: Any) -> Any:
    """Item `index` of an array of uint32 at the address `base`, unchecked."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(get_pointer(builder, args[0], args[1], I32))

    return types.uint32(types.int64, types.int64), build


@intrinsic
def store32(typing: Any, base: Any, index: Any, value: Any) -> Any:
    """Write item `index` of an array of uint32 at the address `base`, unchecked."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], get_pointer(builder, args[0], args[1], I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32), build


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line of an address that is written soon."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        where = builder.inttoptr(args[0], I8.as_pointer())
        builder.call(function, [where, I32(1), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), build


LONGEST_VECTOR = 64  # words: longer runs are handled in several vectors


def iterate_vectors(builder: Any, source: Any, source_kind: Any, target: Any, words: int) -> Any:
    """(words, vector loaded from address `source`, pointer to store its int32 words to) for all `words`."""
    for first in range(0, words, LONGEST_VECTOR):
        count = min(LONGEST_VECTOR, words - first)
        whole, kind = ir.VectorType(source_kind, count), ir.VectorType(I32, count)
        at = builder.add(source, I64(first * source_kind.width // 8)) if first else source
        to = builder.add(target, I64(first * 4)) if first else target
        value = builder.load(builder.inttoptr(at, whole.as_pointer()), align=4)
        yield count, value, builder.inttoptr(to, kind.as_pointer())


@literal_intrinsic
def copy_words(typing: Any, target: Any, source: Any, words: Any) -> Any:
    """Copy a constant number of 4-byte words between two addresses."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for _, value, to in iterate_vectors(builder, args[1], I32, args[0], words.literal_value):
            builder.store(value, to, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, words), build


@literal_intrinsic
def narrow_words(typing: Any, target: Any, source: Any, words: Any) -> Any:
    """Copy the low halves of a constant number of 8-byte words."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for count, value, to in iterate_vectors(builder, args[1], I64, args[0], words.literal_value):
            builder.store(builder.trunc(value, ir.VectorType(I32, count)), to, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, words), build


@literal_intrinsic
def subtract_words(typing: Any, target: Any, source: Any, less: Any, words: Any) -> Any:
    """Copy a constant number of 4-byte words, and subtract `less` from each."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for count, value, to in iterate_vectors(builder, args[1], I32, args[0], words.literal_value):
            each = builder.insert_element(ir.Constant(value.type, ir.Undefined), args[2], I32(0))
            each = builder.shuffle_vector(each, each, ir.Constant(value.type, [0] * count))
            builder.store(builder.sub(value, each), to, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32, words), build


@intrinsic
def count_trailing_zeros(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.uint64), build


@intrinsic
def count_ones(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), build
