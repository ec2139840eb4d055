"""safetensors: files that are saved and loaded as spans, and what is mapped by its bytes.

Its library maps a file and copies tensors out of the map: those reads are page faults, which are not calls.
"""

from types import ModuleType
from typing import Any

from dlrm.runtime import trace
from dlrm.traced.checkpoints import as_checkpoint
from dlrm.traced.hooks import replace
from dlrm.traced.numpy_files import note_mapped


def hook(library: ModuleType) -> None:
    replace(library, "safe_open", _wrap_open, library)
    for name, direction in (("save_file", "save"), ("load_file", "load")):
        if hasattr(library, name):
            replace(library, name, lambda original, to=direction: as_checkpoint(original, to), library)


def _wrap_open(original: Any) -> Any:
    if getattr(original, "is_traced", False):  # safetensors.torch has it from safetensors
        return original

    class safe_open:
        """As safetensors' own, which cannot be subclassed."""

        def __init__(self, filename: Any, *args: Any, **kwargs: Any) -> None:
            self._file, self._opened = str(filename), original(filename, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._opened, name)

        def __enter__(self) -> "safe_open":
            self._opened = self._opened.__enter__() or self._opened
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._opened.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            return self._note(self._opened.get_tensor(name))

        def get_tensors(self, *args: Any) -> Any:
            found = self._opened.get_tensors(*args)
            for tensor in found.values():
                self._note(tensor)
            return found

        def get_slice(self, name: str) -> Any:
            return _Slice(self, self._opened.get_slice(name))

        def _note(self, tensor: Any) -> Any:
            if trace.is_tracing():
                note_mapped(self._file, 0, tensor.nbytes)
            return tensor

    return safe_open


class _Slice:
    def __init__(self, owner: Any, original: Any) -> None:
        self._owner, self._original = owner, original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __getitem__(self, key: Any) -> Any:
        return self._owner._note(self._original[key])
