"""X-Adapter on Hugging Face diffusers, without a WebUI: the only place that knows diffusers.

How a picture flows: `composed` takes two pipelines and what is asked of them, `pipeline` makes the base's picture,
switches and runs the joint stage of the core. The command line stands on it: `cli` reads the arguments, `model_files`
loads, `prompts` encodes, `grid` and `infotext` label and save.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composed import BaseSide, XAdapterPipeline, XAdapterPipelineOutput
    from .loras import load_lora
    from .prompt_embeddings import PromptEmbeddings, encode_prompt

__all__ = [
    "BaseSide",
    "PromptEmbeddings",
    "XAdapterPipeline",
    "XAdapterPipelineOutput",
    "encode_prompt",
    "load_lora",
]
HOMES = {"load_lora": "loras", "PromptEmbeddings": "prompt_embeddings", "encode_prompt": "prompt_embeddings"}
"""Where those that are not in `composed` are."""


def __getattr__(name: str) -> Any:
    # the command line checks its arguments before anything heavy is imported
    if name in __all__:
        return getattr(import_module(f".{HOMES.get(name, 'composed')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
