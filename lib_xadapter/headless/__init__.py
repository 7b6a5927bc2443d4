"""X-Adapter on Hugging Face diffusers, without a WebUI: the only place that knows diffusers.

How a picture flows: `composed` takes two pipelines and what is asked of them, `pipeline` makes the base's picture,
switches and runs the joint stage of the core. The command line stands on it: `cli` reads the arguments, `model_files`
loads, `prompts` encodes, `grid` and `infotext` label and save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composed import BaseSide, XAdapterPipeline, XAdapterPipelineOutput

__all__ = ["BaseSide", "XAdapterPipeline", "XAdapterPipelineOutput"]


def __getattr__(name: str) -> Any:
    # the command line checks its arguments before anything heavy is imported
    if name in __all__:
        from . import composed

        return getattr(composed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
