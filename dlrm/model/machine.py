"""Machine code for loops over vectors of float32, written as LLVM's instructions, made once and kept on disk.

For the few places where every library is slow, on x86 with AVX2: elsewhere `host()` is None.
"""

import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llvmlite import binding, ir

LANES = 8  # floats in a vector
INT, FLOAT = ir.IntType(64), ir.FloatType()
FLOATS, INTS = FLOAT.as_pointer(), INT.as_pointer()
VECTOR = ir.VectorType(FLOAT, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
CTYPES = {INT: ctypes.c_int64, FLOATS: ctypes.c_void_p, INTS: ctypes.c_void_p}
Value = Any  # ir.Value, or a whole number
FOLDER = Path(__file__).parent / "__pycache__"
END = b"whole"  # of a file
_engines: list[Any] = []  # own the machine code


class Code:
    """A function under construction: what it does so far, and more of it."""

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[ir.Type]) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.arguments = self.function.args
        self.build = ir.IRBuilder(self.function.append_basic_block())

    def number(self, value: Value) -> Any:
        return INT(value) if isinstance(value, int) else value

    def plus(self, left: Value, right: Value) -> Any:
        return self.build.add(self.number(left), self.number(right))

    def times(self, left: Value, right: Value) -> Any:
        return self.build.mul(self.number(left), self.number(right))

    def over(self, left: Value, right: Value) -> Any:
        return self.build.sdiv(self.number(left), self.number(right))

    def add(self, left: Any, right: Any) -> Any:
        """Of floats, or of vectors."""
        return self.build.fadd(left, right)

    def room(self, kind: ir.Type, count: int) -> Any:
        """Memory of the function's own. Not within a loop: each turn would take more."""
        return self.build.alloca(kind, INT(count))

    def at(self, pointer: Any, *steps: Value) -> Any:
        for step in steps:
            pointer = self.build.gep(pointer, [self.number(step)])
        return pointer

    def get(self, pointer: Any, *steps: Value) -> Any:
        return self.build.load(self.at(pointer, *steps), align=4)

    def put(self, value: Any, pointer: Any, *steps: Value) -> None:
        """A number or a vector."""
        target = self.build.bitcast(self.at(pointer, *steps), value.type.as_pointer())
        self.build.store(value, target, align=4)

    def vector(self, pointer: Any, *steps: Value) -> Any:
        return self.build.load(self.build.bitcast(self.at(pointer, *steps), VECTOR.as_pointer()), align=4)

    def everywhere(self, number: Any) -> Any:
        """A vector of the same number."""
        one = self.build.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.IntType(32)(0))
        return self.pick(one, one, [0] * LANES)

    def pick(self, left: Any, right: Any, places: Sequence[int]) -> Any:
        """Elements of two vectors, counted through both."""
        return self.build.shuffle_vector(
            left, right, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
        )

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        name, module = "llvm.fma.v8f32", self.function.module
        known = module.globals.get(name) or ir.Function(module, ir.FunctionType(VECTOR, [VECTOR] * 3), name)
        return self.build.call(known, [left, right, total])

    def sums(self, vectors: Sequence[Any]) -> Any:
        """Four vectors' sums, as a vector of four."""

        def pairs(left: Any, right: Any) -> Any:  # as the processor adds neighbours, in each half
            even = self.pick(left, right, [0, 2, 8, 10, 4, 6, 12, 14])
            return self.add(even, self.pick(left, right, [1, 3, 9, 11, 5, 7, 13, 15]))

        one, two, three, four = vectors
        both = pairs(pairs(one, two), pairs(three, four))
        return self.add(self.pick(both, both, range(4)), self.pick(both, both, range(4, 8)))

    def loop(
        self, start: Value, stop: Value, step: int, body: Callable[..., Any], carried: Sequence[Any] = ()
    ) -> list[Any]:
        """`body(counter, *values)` returns the values for its next turn; at least one turn is made."""
        before, inside = self.build.block, self.function.append_basic_block()
        after = self.function.append_basic_block()
        self.build.branch(inside)
        self.build.position_at_end(inside)
        counter, *values = (self.build.phi(kind) for kind in (INT, *(value.type for value in carried)))
        results = list(body(counter, *values) or ())
        following = self.plus(counter, step)
        self.build.cbranch(self.build.icmp_signed("<", following, self.number(stop)), inside, after)
        end = self.build.block
        for phi, first, later in zip(
            (counter, *values), (self.number(start), *carried), (following, *results), strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(later, end)
        self.build.position_at_end(after)
        return results


@functools.cache
def host() -> tuple[str, str] | None:
    """The processor's name and features in LLVM's words, where it has what this room needs."""
    features = binding.get_host_cpu_features() if platform.machine() == "x86_64" else {}
    if not (features.get("avx2") and features.get("fma")):
        return None
    return binding.get_host_cpu_name(), features.flatten()


def compiled(
    key: str, functions: Mapping[str, Sequence[ir.Type]], write: Any
) -> dict[str, Callable[..., None]]:
    """Functions by name, given their arguments. `write(codes)` says what they do, if there is no code on disk
    for this key, this processor and these sources."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    processor = host()
    assert processor
    target = binding.Target.from_default_triple().create_target_machine(*processor, opt=2)
    stamp = hashlib.sha256(repr((key, processor, binding.llvm_version_info)).encode())
    for source in (__file__, write.__code__.co_filename):
        stamp.update(Path(source).read_bytes())
    path = FOLDER / f"{stamp.hexdigest()[:16]}.o"
    binary = b""
    with suppress(OSError):  # none yet, or somebody else's
        binary = path.read_bytes()
    if binary[-len(END) :] != END:
        module = ir.Module()
        codes = {name: Code(module, name, arguments) for name, arguments in functions.items()}
        write(codes)
        for code in codes.values():
            code.build.ret_void()
        binary = target.emit_object(binding.parse_assembly(str(module))) + END
        keep(path, binary)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(binary[: -len(END)]))
    engine.finalize_object()
    _engines.append(engine)
    return {
        name: ctypes.CFUNCTYPE(None, *(CTYPES[kind] for kind in arguments))(engine.get_function_address(name))
        for name, arguments in functions.items()
    }


def keep(path: Path, binary: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(binary)
        partial.replace(path)
    except OSError:  # a project that cannot be written to, a full disk
        with suppress(OSError):
            partial.unlink()
