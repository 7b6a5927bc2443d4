"""X-Adapter: SD1.5 plugins on SDXL (Ran et al., arXiv 2312.02238)."""

from .lora_files import detect_lora_base
from .mapping import MappingLayers, load_adapter

__version__ = "0.1.0"

__all__ = ["MappingLayers", "__version__", "detect_lora_base", "load_adapter"]
