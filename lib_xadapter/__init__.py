"""X-Adapter: SD1.5 plugins on SDXL (Ran et al., arXiv 2312.02238)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora_files import detect_lora_base
    from .mapping import MappingLayers, load_adapter

__version__ = "0.1.0"

__all__ = ["MappingLayers", "__version__", "detect_lora_base", "load_adapter"]

_MODULES = {"detect_lora_base": ".lora_files", "MappingLayers": ".mapping", "load_adapter": ".mapping"}


def __getattr__(name: str) -> Any:
    """Imports a name of `__all__` on its first use: a host that is not in use costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)
