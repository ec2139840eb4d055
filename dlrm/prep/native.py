"""What numba lacks: unaligned 8-byte loads, loads and stores by address, trailing zeros, prefetch."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = extending.intrinsic  # the decorated functions exist in compiled code only
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def compiled(function: Any) -> Any:
    """Compile without the GIL, keep the machine code on disk."""
    return numba.njit(nogil=True, cache=True, boundscheck=False)(function)


def inlined(function: Any) -> Any:
    """A piece of a hot loop."""
    return numba.njit(nogil=True, cache=True, boundscheck=False, forceinline=True)(function)


@intrinsic
def byte_at(typing: Any, base: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I8.as_pointer()))

    return types.uint8(types.int64), build


@intrinsic
def word_at(typing: Any, base: Any) -> Any:
    """Eight bytes from any address, the first in the lowest byte."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()), align=1)

    return types.uint64(types.int64), build


def pointer(builder: Any, base: Any, index: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(base, kind.as_pointer()), [index])


@intrinsic
def get64(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], args[1], I64))

    return types.uint64(types.int64, types.int64), build


@intrinsic
def put64(typing: Any, base: Any, index: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], args[1], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64), build


@intrinsic
def get32(typing: Any, base: Any, index: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], args[1], I32))

    return types.uint32(types.int64, types.int64), build


@intrinsic
def put32(typing: Any, base: Any, index: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], pointer(builder, args[0], args[1], I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32), build


@intrinsic
def prefetch64(typing: Any, base: Any, index: Any) -> Any:
    """Ask for the cache line of an 8-byte slot, to be read and written soon."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        where = builder.bitcast(pointer(builder, args[0], args[1], I64), I8.as_pointer())
        builder.call(function, [where, I32(1), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@intrinsic
def trailing_zeros(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.uint64), build


@intrinsic
def ones(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), build
