"""Modules that torchrec names and a training hardly uses, imported when somebody wants more than their names.

In their places stand modules that know the few answers which every run asks for; any other question imports
the real one, so a missing answer costs time and nothing else. It saves about a second of every start.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

KERNELS = "torch._meta_registrations"  # 0.2 seconds, of `import torch` itself
TORCH = "2.13.0+cpu"  # tried with this build alone; the CUDA one, "2.13.0", is imported whole


class PutOff(ModuleType):
    """Stands for the module `name`; `known` are its attributes that need no import."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        spec = importlib.util.find_spec(name)
        path = spec and spec.submodule_search_locations
        self.__dict__.update(known, __spec__=spec, **({} if path is None else {"__path__": path}))
        self._place()

    def _place(self) -> None:
        parent, _, child = self.__name__.rpartition(".")
        sys.modules[self.__name__] = self
        if parent:
            setattr(sys.modules[parent], child, self)

    def real(self) -> ModuleType:
        """Import it, and leave its place to it."""
        name = self.__name__
        kernels()  # it may compute without data
        if sys.modules.get(name) is self:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent:  # which may itself be on its way
                vars(sys.modules[parent]).pop(child, None)
        return importlib.import_module(name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what Python asks of every module
            raise AttributeError(attribute)
        return getattr(self.real(), attribute)


class Parts:
    """Imports the modules of a package that was put off: the whole package first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, PutOff):
            return None
        package.real()
        importlib.import_module(name)
        return importlib.util.spec_from_loader(name, self, is_package=False)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been."""


def real_part(module: str, name: str) -> Any:
    """What the module itself has under this name: it is imported now, if it was put off."""
    found = sys.modules[module]
    return getattr(found.real() if isinstance(found, PutOff) else found, name)


class Part:
    """Stands for `name` of a module that was put off, with some answers; the real one has all others."""

    def __init__(self, module: str, name: str, **known: Any) -> None:
        self.__dict__.update(known, _place=(module, name))

    def _real(self) -> Any:
        return real_part(*self._place)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._real(), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self._real(), attribute, value)


class Class(type):
    """Stands for a class of a module that was put off: has no instances until that was imported."""

    def __new__(cls, module: str, name: str) -> Any:
        return super().__new__(cls, name, (), {"__module__": module})

    def __init__(cls, module: str, name: str) -> None:
        super().__init__(name, (), {})

    def _real(cls) -> Any:
        return real_part(cls.__module__, cls.__name__)

    def __instancecheck__(cls, thing: Any) -> bool:
        return not isinstance(sys.modules[cls.__module__], PutOff) and isinstance(thing, cls._real())

    def __subclasscheck__(cls, kind: type) -> bool:
        return not isinstance(sys.modules[cls.__module__], PutOff) and issubclass(kind, cls._real())

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return cls._real()(*arguments, **named)

    def __getattr__(cls, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(cls._real(), attribute)


class NeverRaised(Exception):
    """For `except`, which wants a class of its own kind."""


def _plain(name: str, kind: type, result: Callable[[Any], Any]) -> Callable[..., Any]:
    """A question about sizes that may be symbols; of an ordinary `kind` the answer is known."""

    def answer(value: Any, *more: Any, **named: Any) -> Any:
        if type(value) is kind:
            return result(value)
        return real_part(SYMBOLS, name)(value, *more, **named)

    return answer


def _as_it_is(function: Any = None, *_: Any, **named: Any) -> Any:
    """torch._dynamo.disable, where nothing is compiled; a decorator with or without arguments."""
    return (lambda decorated: decorated) if function is None else function


def _classes(module: str, *names: str) -> dict[str, Any]:
    return {name: Class(module, name) for name in names}


SYMBOLS = "torch.fx.experimental.symbolic_shapes"  # 0.3 seconds, sympy
TENSOR, OLD_TENSOR = "torch.distributed.tensor", "torch.distributed._tensor"
DISTRIBUTED = ("DTensor", "Placement", "Replicate", "Shard")
MESH = _classes("torch.distributed.device_mesh", "DeviceMesh")  # a module that is always there
SAVING, SHARDED = "torch.distributed.checkpoint", "torch.distributed.fsdp"
KNOWN: dict[str, dict[str, Any]] = {
    SYMBOLS: {
        **{
            name: _plain(name, bool, lambda value: value)
            for name in ("expect_true", "guard_or_false", "guard_or_true", "statically_known_true")
        },
        "is_nested_int": _plain("is_nested_int", int, lambda value: False),
        "GuardOnDataDependentSymNode": NeverRaised,
    },
    "torch._dynamo": {  # 0.5 seconds, torch.compile
        "disable": _as_it_is,
        "graph_break": lambda *anything: None,
        "config": Part("torch._dynamo", "config", patch=lambda **named: contextlib.nullcontext()),
        "utils": Part("torch._dynamo", "utils", get_optimize_ddp_mode=lambda: "ddp_optimizer"),
        "trace_rules": Part("torch._dynamo", "trace_rules", clear_lru_cache=lambda: None),
    },
    "tensordict": _classes("tensordict", "TensorDict"),  # 0.1 seconds, and torch._dynamo
    # together 0.2 seconds
    TENSOR: _classes(TENSOR, *DISTRIBUTED) | MESH,
    OLD_TENSOR: _classes(TENSOR, *DISTRIBUTED) | MESH,
    f"{OLD_TENSOR}.api": _classes(TENSOR, *DISTRIBUTED),
    f"{OLD_TENSOR}.placement_types": _classes(TENSOR, *DISTRIBUTED),
    SHARDED: _classes(SHARDED, "FullyShardedDataParallel"),
    "torch.distributed._composable.fsdp": {},
    "torch.distributed._composable.fsdp.fully_shard": _classes(SHARDED, "FSDPModule"),
    SAVING: {},
    **{
        f"{SAVING}.{part}": _classes(f"{SAVING}.{part}", *names.split())
        for part, names in {
            "metadata": "ChunkStorageMetadata MetadataIndex TensorProperties TensorStorageMetadata",
            "planner": "TensorWriteData WriteItem WriteItemType",
        }.items()
    },
}


def put_off(known: dict[str, dict[str, Any]] = KNOWN) -> None:
    """Call it when torch has been imported and torchrec has not. What is there already stays."""
    for name, answers in known.items():
        if name not in sys.modules and importlib.util.find_spec(name):
            PutOff(name, answers)
    if not any(isinstance(finder, Parts) for finder in sys.meta_path):
        sys.meta_path.insert(0, Parts())


def import_torch() -> None:
    """torch without its kernels for tensors that have no data, but for those in C++, which make tables."""
    if "torch" in sys.modules or version("torch") != TORCH:
        importlib.import_module("torch")
        return
    sys.modules[KERNELS] = Kernels(KERNELS)
    torch: Any = importlib.import_module("torch")
    torch._meta_registrations = sys.modules[KERNELS]
    # the one thing that they bring which others want, too: no torch.Generator without it
    torch._C._set_generator_metaclass(importlib.import_module("torch._opaque_base").OpaqueBaseMeta)


class Kernels(ModuleType):
    """Stands for them until something else that was put off, and may compute without data, is imported, or
    one of them is asked for by its name.
    """

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        kernels()
        return getattr(sys.modules[KERNELS], attribute)


def kernels() -> None:
    if isinstance(sys.modules.get(KERNELS), Kernels):
        del sys.modules[KERNELS]
        parent, _, child = KERNELS.rpartition(".")
        setattr(sys.modules[parent], child, importlib.import_module(KERNELS))
