"""The WebUI's grammar for anybody's pipeline: a prompt in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WrongArgument
from ..wrapping import wrapped
from .conditioning import Conditioning, conditioned
from .inversions import Inversions
from .lora_names import take_tags
from .prompts import PromptPair, arguments_of, encode_conditioning


@dataclass(frozen=True)
class PromptEmbeddings:
    """A prompt and a negative prompt as a pipeline of diffusers takes them.

    Attributes:
        prompt_embeds, negative_prompt_embeds: (1, tokens, channels), as long as each other.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (1, channels), for SDXL; None for SD1.5 and SD2.
        conditioning: the prompts of all steps, where the prompt changes on the way or is combined by `AND`; the
            embeddings above are then those of the first step and prompt.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    conditioning: Conditioning

    @property
    def is_plain(self) -> bool:
        """Whether the embeddings say everything: the prompt is the same at each step, and there is only one."""
        return self.conditioning.is_plain

    @property
    def arguments(self) -> dict[str, Tensor]:
        """For a pipeline's own call: `pipeline(**embeddings.arguments, …)`."""
        return arguments_of(self.conditioning, images=1, guided=True)

    @contextmanager
    def at_each_step(self, pipeline: Any, images: int = 1) -> Iterator[None]:
        """While open, the pipeline's UNet and ControlNets are given the prompts of the step; for one call.

        Args:
            pipeline: called with `arguments` and a guidance above 1.
            images: `num_images_per_prompt` of the call.
        """
        if self.is_plain:
            yield
            return
        evaluations = 0

        def counted(forward: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal evaluations
            output = forward(*arguments, **named)
            evaluations += 1
            return output

        with (
            conditioned(pipeline, self.conditioning, lambda: evaluations, images),
            wrapped(pipeline.unet, "forward", counted),
        ):
            yield


def encode_prompt(
    pipeline: Any,
    prompt: str,
    negative_prompt: str = "",
    *,
    clip_skip: int = 1,
    steps: int = 20,
    embeddings: str | Path | None = None,
) -> PromptEmbeddings:
    """A prompt in the WebUI's grammar, encoded for a pipeline of SD1.5, SD2 or SDXL.

    Attention weights, `[a:b:0.5]`, `[a|b]`, `AND` with weights, `BREAK`, prompts of any length, and textual inversions
    by name, encoded as the WebUI encodes them.

    Args:
        pipeline: with tokenizers and text encoders, which are where they run.
        prompt, negative_prompt: an empty negative prompt is all zeros for SDXL.
        clip_skip: as in the WebUI, 1 for none; of SD1.5 alone.
        steps: model evaluations of the sampling, for prompts that change on the way.
        embeddings: a folder of textual inversions, each named as its file.

    Raises:
        WrongArgument: the prompt names a LoRA, which `load_lora` merges.
        WrongFile: a textual inversion that is named cannot be read.
    """
    if loras := take_tags(prompt).loras:
        raise WrongArgument(f"prompt: the LoRA '{loras[0].path}' is named, which is to be merged by load_lora.")
    inversions = Inversions.below(Path(embeddings)) if embeddings is not None else None
    conditioning = encode_conditioning(pipeline, PromptPair(prompt, negative_prompt, steps), clip_skip, inversions)
    first, uncond = conditioning.conds[0].at(0), conditioning.uncond.at(0)
    return PromptEmbeddings(first.tokens, uncond.tokens, first.pooled, uncond.pooled, conditioning)
