"""Declaration of settings as fields of dataclasses, with their help."""

from dataclasses import field
from typing import Any


def identity(default: Any, help: str, length: int | None = None) -> Any:
    """Declare a setting that determines the result; ``length`` is the number of values of a list, if fixed."""
    return _setting(default, {"help": help, "identity": True, "length": length})


def runtime(default: Any, help: str, length: int | None = None) -> Any:
    """Declare a setting that may change from one start of a run to the next."""
    return _setting(default, {"help": help, "identity": False, "length": length})


def _setting(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(schema: type) -> Any:
    """Declare a nested group of settings."""
    return field(default_factory=schema)
