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
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


BUILT_IN = (
    "intrinsics",
    "fields",
    "counts",
    "hex_ids",
)  # their code is inlined where other files are compiled
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
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


@intrinsic
def load64(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(get_pointer(builder, args[0], args[1], I64))

    return types.uint64(types.int64, types.int64), build


@intrinsic
def store64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], get_pointer(builder, args[0], args[1], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), build


@intrinsic
def load32(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(get_pointer(builder, args[0], args[1], I32))

    return types.uint32(types.int64, types.int64), build


@intrinsic
def store32(typing: Any, base: Any, index: Any, value: Any) -> Any:
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


def get_vector_pointer(builder: Any, address: Any, kind: Any, words: int) -> Any:
    return builder.inttoptr(address, ir.VectorType(kind, words).as_pointer())


def make_copier(words: int) -> Any:
    """A function (target, source) that copies `words` 4-byte words between two addresses."""

    @intrinsic
    def copy(typing: Any, target: Any, source: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(get_vector_pointer(builder, args[1], I32, words), align=4)
            builder.store(value, get_vector_pointer(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    return copy


def make_narrower(words: int) -> Any:
    """A function (target, source) that copies the low halves of `words` 8-byte words."""

    @intrinsic
    def narrow(typing: Any, target: Any, source: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(get_vector_pointer(builder, args[1], I64, words), align=4)
            value = builder.trunc(value, ir.VectorType(I32, words))
            builder.store(value, get_vector_pointer(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    return narrow


def make_subtracter(words: int) -> Any:
    """A function (target, source, number) that copies `words` 4-byte words and subtracts the number from
    each.
    """

    @intrinsic
    def subtract(typing: Any, target: Any, source: Any, less: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(I32, words)
            value = builder.load(get_vector_pointer(builder, args[1], I32, words), align=4)
            each = builder.insert_element(ir.Constant(kind, ir.Undefined), args[2], I32(0))
            zeros = ir.Constant(kind, [0] * words)
            each = builder.shuffle_vector(each, each, zeros)
            builder.store(builder.sub(value, each), get_vector_pointer(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int32), build

    return subtract


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
