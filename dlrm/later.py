"""Modules that torchrec names and a training hardly uses, imported when somebody wants more than their names.

In their places stand modules that know the few answers which every run asks for; any other question imports
the real one, so a missing answer costs time and nothing else. It saves about a second of every start.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Stands for the module `name`; `known` are its attributes that need no import."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__(name)
        spec = importlib.util.find_spec(name)
        self.__dict__.update(known, __spec__=spec, __path__=spec and spec.submodule_search_locations or [])
        self._place()

    def _place(self) -> None:
        parent, _, child = self.__name__.rpartition(".")
        sys.modules[self.__name__] = self
        if parent:
            setattr(sys.modules[parent], child, self)

    def real(self) -> ModuleType:
        """Import it, and leave its place to it."""
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent:
                delattr(sys.modules[parent], child)
        return importlib.import_module(name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what Python asks of every module
            raise AttributeError(attribute)
        return getattr(self.real(), attribute)


class Parts:
    """Imports the modules of a package that was put off: the whole package first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, Later):
            return None
        package.real()
        importlib.import_module(name)
        return importlib.util.spec_from_loader(name, self, is_package=False)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It has been."""


class Part:
    """Stands for `name` of a module that was put off, with some answers; the real one has all others."""

    def __init__(self, module: str, name: str, **known: Any) -> None:
        self.__dict__.update(known, _place=(module, name))

    def _real(self) -> Any:
        module, name = self._place
        found = sys.modules[module]
        return getattr(found.real() if isinstance(found, Later) else found, name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._real(), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self._real(), attribute, value)


class Never:
    """A class without instances: for isinstance and except."""


class NeverRaised(Exception):
    pass


def _plain(name: str, kind: type, result: Callable[[Any], Any]) -> Callable[..., Any]:
    """A question about sizes that may be symbols; of an ordinary `kind` the answer is known."""

    def answer(value: Any, *more: Any, **named: Any) -> Any:
        if type(value) is kind:
            return result(value)
        module = sys.modules[SYMBOLS]
        return getattr(module.real() if isinstance(module, Later) else module, name)(value, *more, **named)

    return answer


def _as_it_is(function: Any = None, *_: Any, **named: Any) -> Any:
    """torch._dynamo.disable, where nothing is compiled; a decorator with or without arguments."""
    return (lambda decorated: decorated) if function is None else function


SYMBOLS = "torch.fx.experimental.symbolic_shapes"  # 0.3 seconds, sympy
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
    "tensordict": {"TensorDict": Never},  # 0.1 seconds, and torch._dynamo
}


def put_off(known: dict[str, dict[str, Any]] = KNOWN) -> None:
    """Call it when torch has been imported and torchrec has not. What is there already stays."""
    if not any(isinstance(finder, Parts) for finder in sys.meta_path):
        sys.meta_path.insert(0, Parts())
    for name, answers in known.items():
        if name not in sys.modules and importlib.util.find_spec(name):
            Later(name, answers)
