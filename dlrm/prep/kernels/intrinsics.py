"""What numba lacks: loads and stores by address, rows copied as vectors, trailing zeros, prefetch."""

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


BUILT_IN = ("intrinsics", "fields", "counts", "hex_ids")  # become a part of what other files compile
STAMP = hashlib.sha256(
    b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in BUILT_IN)
).digest()


def compiled(function: Any, **how: Any) -> Any:
    """Compile without the GIL, keep the machine code on disk until this file or what is built in changes."""
    made: Any = numba.njit(nogil=True, cache=True, boundscheck=False, **how)(function)
    made._cache._cache_file._source_stamp += STAMP  # numba itself looks at the function's own file only
    return made


def inlined(function: Any) -> Any:
    """A piece of a hot loop."""
    return compiled(function, forceinline=True)


@intrinsic
def load_byte(typing: Any, base: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I8.as_pointer()))

    return types.uint8(types.int64), build


@intrinsic
def load_word(typing: Any, base: Any) -> Any:
    """Eight bytes from any address, the first in the lowest byte."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()), align=1)

    return types.uint64(types.int64), build


def pointer(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


@intrinsic
def load64(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], args[1], I64))

    return types.uint64(types.int64, types.int64), build


@intrinsic
def store64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], args[1], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), build


@intrinsic
def load32(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], args[1], I32))

    return types.uint32(types.int64, types.int64), build


@intrinsic
def store32(typing: Any, base: Any, index: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], args[1], I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32), build


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for a cache line that is to be read and written soon."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        where = builder.inttoptr(args[0], I8.as_pointer())
        builder.call(function, [where, I32(1), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), build


def vector(builder: Any, address: Any, kind: Any, words: int) -> Any:
    return builder.inttoptr(address, ir.VectorType(kind, words).as_pointer())


def make_copier(words: int) -> Any:
    """A function (target, source) that copies so many 4-byte words between two addresses."""

    @intrinsic
    def copy(typing: Any, target: Any, source: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(vector(builder, args[1], I32, words), align=4)
            builder.store(value, vector(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    return copy


def make_narrower(words: int) -> Any:
    """The same from 8-byte words, of which the low halves are kept."""

    @intrinsic
    def narrow(typing: Any, target: Any, source: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(vector(builder, args[1], I64, words), align=4)
            value = builder.trunc(value, ir.VectorType(I32, words))
            builder.store(value, vector(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    return narrow


def make_subtracter(words: int) -> Any:
    """A function (target, source, less) that copies so many 4-byte words, each less a number."""

    @intrinsic
    def subtract(typing: Any, target: Any, source: Any, less: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(I32, words)
            value = builder.load(vector(builder, args[1], I32, words), align=4)
            each = builder.insert_element(ir.Constant(kind, ir.Undefined), args[2], I32(0))
            zeros = ir.Constant(kind, [0] * words)
            each = builder.shuffle_vector(each, each, zeros)
            builder.store(builder.sub(value, each), vector(builder, args[0], I32, words), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int32), build

    return subtract


@intrinsic
def count_trailing_zeros(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.uint64), build


@intrinsic
def ones(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), build
