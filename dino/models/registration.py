"""Makes timm know the region architectures as soon as timm is imported, at no cost to a program that never does.

Importing timm takes seconds, and `import dino` comes first in every command, also in ``dino --help``. So importing
this package leaves a note with Python's import system instead; only the standard library is used here.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHED = "timm"
REGISTERS = "dino.models.inputs"  # importing it registers the architectures


def register_with_timm() -> None:
    """Register the region architectures with timm: now where it is imported already, else when it will be."""
    if WATCHED in sys.modules:
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds timm as anyone else would, but with a loader that registers afterwards and then takes this away."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != WATCHED or self._asking:
            return None
        self._asking = True  # the search below comes past here again
        try:
            spec = importlib.util.find_spec(WATCHED)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(importlib.abc.Loader):
    """The real loader, with one thing to do after it."""

    def __init__(self, loader: Any, watcher: _Watcher) -> None:
        self._loader, self._watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._watcher in sys.meta_path:
            sys.meta_path.remove(self._watcher)
        self._loader.exec_module(module)
        importlib.import_module(REGISTERS)
