"""The prompts of each step, where a prompt changes on the way or several are combined.

The pipeline's own loop knows one prompt. Its calls of the UNet, and of the ControlNets beside it, are given the prompts
of the step; where several are combined, each has rows of its own, and what they give is folded into the one that the
loop waits for: uncond + Σ weight · (cond − uncond).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MultiControlNetModel
from torch import Tensor, nn

from ..wrapping import wrapped


@dataclass(frozen=True)
class Encoded:
    """A prompt as a text encoder gives it: (1, tokens, channels), and pooled (1, channels) where it has that."""

    tokens: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class EncodedStretch:
    """A prompt, and the last evaluation that it is used in."""

    last: int
    encoded: Encoded


@dataclass(frozen=True)
class EncodedSchedule:
    """A prompt that changes on the way, and how much it counts among others."""

    stretches: tuple[EncodedStretch, ...]
    weight: float = 1.0

    def at(self, evaluation: int) -> Encoded:
        """The prompt of a model evaluation, counted from 0; the last stretch is for all that follow."""
        found = (stretch for stretch in self.stretches if evaluation <= stretch.last)
        return next(found, self.stretches[-1]).encoded


@dataclass(frozen=True)
class Conditioning:
    """The prompts of one model over a whole sampling.

    Attributes:
        conds: the prompts that are combined.
        uncond: the negative prompt.
    """

    conds: tuple[EncodedSchedule, ...]
    uncond: EncodedSchedule

    @property
    def is_plain(self) -> bool:
        """Whether one prompt and one negative prompt stand throughout."""
        (first, *others) = self.conds
        return not others and first.weight == 1 and len(first.stretches) == len(self.uncond.stretches) == 1

    def rows(self, evaluation: int, images: int) -> tuple[Tensor, Tensor | None]:
        """Tokens, and pooled prompts where there are any: the unconds, then each combined prompt, image by image."""
        prompts = [self.uncond.at(evaluation), *(cond.at(evaluation) for cond in self.conds)]
        pooled = [one.pooled.repeat(images, 1) for one in prompts if one.pooled is not None]
        return torch.cat([one.tokens.repeat(images, 1, 1) for one in prompts]), torch.cat(pooled) if pooled else None

    def folded(self, output: Tensor) -> Tensor:
        """(rows, …) of all prompts to those of unconds and one prompt."""
        uncond, *conds = output.chunk(1 + len(self.conds))
        sum_of_conds = sum(prompt.weight * (cond - uncond) for prompt, cond in zip(self.conds, conds, strict=True))
        return torch.cat([uncond, uncond + sum_of_conds])


@contextmanager
def conditioned(
    pipeline: Any, conditioning: Conditioning | None, evaluation: Callable[[], int], images: int
) -> Iterator[None]:
    """While open, calls of a pipeline's UNet and ControlNets are given the prompts of the evaluation."""
    with ExitStack() as scope:
        for module in prompted_modules(pipeline) if conditioning is not None else ():
            is_unet = module is pipeline.unet
            scope.enter_context(
                wrapped(module, "forward", _ConditionedForward(conditioning, evaluation, images, is_unet))
            )
        yield


def prompted_modules(pipeline: Any) -> list[nn.Module]:
    """The UNet, and each ControlNet once, also where it stands among several; T2I-Adapters are told no prompt."""
    net = getattr(pipeline, "controlnet", None)
    nets = net.nets if isinstance(net, MultiControlNetModel) else [net]
    return list(dict.fromkeys([pipeline.unet, *(one for one in nets if isinstance(one, nn.Module))]))


class _ConditionedForward:
    """Wraps the forward of a module."""

    def __init__(self, conditioning: Conditioning, evaluation: Callable[[], int], images: int, is_unet: bool) -> None:
        self._conditioning = conditioning
        self._evaluation = evaluation
        self._images = images
        self._is_unet = is_unet

    def __call__(self, forward: Callable[..., Any], sample: Tensor, timestep: Any, **named: Any) -> Any:
        tokens, pooled = self._conditioning.rows(self._evaluation(), self._images)
        named["encoder_hidden_states"] = tokens.to(sample)
        added = named.get("added_cond_kwargs")
        if added and pooled is not None:
            named["added_cond_kwargs"] = {
                **added,
                "text_embeds": pooled.to(sample),
                "time_ids": self._for_each(added["time_ids"]),
            }
        if "controlnet_cond" in named:
            named["controlnet_cond"] = self._for_each(named["controlnet_cond"])
        if (residuals := named.get("down_intrablock_additional_residuals")) is not None:
            # of T2I-Adapters, which run once before the loop; the UNet takes them off the list
            named["down_intrablock_additional_residuals"] = [self._for_each(one) for one in residuals]
        output = forward(self._for_each(sample), timestep, **named)
        return (self._conditioning.folded(output[0]), *output[1:]) if self._is_unet else output

    def _for_each(self, rows: Tensor) -> Tensor:
        """Rows of unconds and one prompt, as many times as there are prompts."""
        uncond, cond = rows.chunk(2)
        return torch.cat([uncond, *[cond] * len(self._conditioning.conds)])
