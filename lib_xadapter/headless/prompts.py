"""Prompts to what the UNets are told, long ones, `(attention:1.2)` and `BREAK` included, as the WebUI reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .models import Models
from .told import Encoded, EncodedSchedule, EncodedStretch, Told
from .words import combined_prompts, prompt_schedule

WINDOW = 75
"""Tokens that fit between start and end of text."""
COMMA = ",</w>"
FARTHEST_COMMA = 20
"""From the end of a window that it still ends (the WebUI's option `comma_padding_backtrack`)."""

MARKS = re.compile(r"\\[()\[\]\\]|[(\[]|:\s*(?P<weight>[+-]?\d*\.?\d+)\s*\)|[)\]]|[^\\()\[\]:]+|.", re.DOTALL)
STRONGER, WEAKER = 1.1, 1 / 1.1
BREAK = re.compile(r"\s*\bBREAK\b\s*")
BREAK_WEIGHT = -1.0
"""By which the word BREAK is known from one that brackets weigh, which is a word like others."""


@dataclass(frozen=True)
class Part:
    """A piece of a prompt and how much attention it gets."""

    text: str
    weight: float

    @property
    def breaks(self) -> bool:
        """Whether a new window begins here."""
        return self.text == "BREAK" and self.weight == BREAK_WEIGHT


def read_attention(prompt: str) -> list[Part]:
    """Pieces of a prompt: `(x)` 1.1 times the attention, `[x]` as much less, `(x:1.5)` as said, `\\(` a bracket."""
    pieces: list[tuple[str, float]] = []
    open_brackets: list[tuple[str, int]] = []

    def close(kind: str, factor: float) -> bool:
        # a bracket of the other kind does not stand in the way
        place = next((place for place in reversed(range(len(open_brackets))) if open_brackets[place][0] == kind), None)
        if place is None:
            return False
        first = open_brackets.pop(place)[1]
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]
        return True

    for found in MARKS.finditer(prompt):
        mark = found[0]
        if mark in "([":
            open_brackets.append((mark, len(pieces)))
        elif found["weight"] and close("(", float(found["weight"])):
            continue
        elif (mark == ")" and close("(", STRONGER)) or (mark == "]" and close("[", WEAKER)):
            continue
        elif len(mark) == 2 and mark[0] == "\\":
            pieces.append((mark[1], 1.0))
        elif mark != "\\":
            first, *others = BREAK.split(mark)
            pieces.append((first, 1.0))
            for text in others:
                pieces += [("BREAK", BREAK_WEIGHT), (text, 1.0)]
    for kind, begin in reversed(open_brackets):
        factor = STRONGER if kind == "(" else WEAKER
        pieces[begin:] = [(text, weight * factor) for text, weight in pieces[begin:]]
    return _joined(pieces)


def _joined(pieces: Sequence[tuple[str, float]]) -> list[Part]:
    parts: list[Part] = []
    for text, weight in pieces:
        if parts and parts[-1].weight == weight:
            parts[-1] = Part(parts[-1].text + text, weight)
        else:
            parts.append(Part(text, weight))
    return parts or [Part("", 1.0)]


@dataclass(frozen=True)
class TokenWindows:
    """A prompt in windows of 77 tokens, start and end of text included.

    Attributes:
        tokens: (windows, 77) token numbers.
        weights: (windows, 77), the attention that each gets.
    """

    tokens: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Token:
    """A token's number and how much attention it gets."""

    number: int
    weight: float = 1.0


def split_into_windows(prompt: str, tokenizer: CLIPTokenizer) -> TokenWindows:
    """The tokens of a prompt, filled up to whole windows; at each `BREAK` a new one begins."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    stretches: list[list[Token]] = [[]]
    for part in read_attention(prompt):
        if part.breaks:
            stretches.append([])
        else:
            numbers = tokenizer(part.text, add_special_tokens=False, verbose=False)["input_ids"]
            stretches[-1] += [Token(number, part.weight) for number in numbers]
    if len(stretches) > 1 and not stretches[-1]:
        stretches.pop()
    windows = [window for stretch in stretches for window in _split(stretch, comma)]
    filled = [_filled(window, tokenizer) for window in windows]
    numbers, weights = ([[getattr(token, name) for token in row] for row in filled] for name in ("number", "weight"))
    return TokenWindows(torch.tensor(numbers), torch.tensor(weights))


def _split(tokens: Sequence[Token], comma: int) -> list[Sequence[Token]]:
    windows = []
    while len(tokens) > WINDOW:
        end = _end_of_window(tokens, comma)
        windows.append(tokens[:end])
        tokens = tokens[end:]
    return [*windows, tokens]


def _end_of_window(tokens: Sequence[Token], comma: int) -> int:
    """How many of more tokens than fit go into the first window: it ends behind a comma where one is near its end."""
    commas = [place for place in range(WINDOW - FARTHEST_COMMA, WINDOW) if tokens[place].number == comma]
    return commas[-1] + 1 if commas and tokens[WINDOW].number != comma else WINDOW


def _filled(window: Sequence[Token], tokenizer: CLIPTokenizer) -> list[Token]:
    filled = [Token(tokenizer.bos_token_id), *window, Token(tokenizer.eos_token_id)]
    return filled + [Token(tokenizer.pad_token_id)] * (WINDOW + 2 - len(filled))


@torch.no_grad()
def encode(prompt: str, tokenizer: CLIPTokenizer, encoder: nn.Module, penultimate: bool, clip_skip: int = 1) -> Encoded:
    """A prompt through one text encoder.

    Args:
        prompt: with or without attention weights.
        tokenizer: of the encoder.
        encoder: CLIPTextModel or CLIPTextModelWithProjection.
        penultimate: whether the last layer but one is taken, as SDXL does; else the last one, normed.
        clip_skip: 2 for the last layer but one, normed, and so on.
    """
    split = split_into_windows(prompt, tokenizer)
    output = encoder(split.tokens.to(encoder.device), output_hidden_states=True)
    hidden = _hidden(output, encoder, penultimate, clip_skip).float()
    weighted = hidden * split.weights[..., None].to(hidden)
    # keep the mean of every window, so that attention shifts and does not grow
    weighted = weighted * (hidden.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True))
    pooled = getattr(output, "text_embeds", None)
    return Encoded(weighted.flatten(0, 1)[None], None if pooled is None else pooled[:1].float())


def _hidden(output: Any, encoder: nn.Module, penultimate: bool, clip_skip: int) -> Tensor:
    if penultimate:
        return output.hidden_states[-2]
    if clip_skip <= 1:
        return output.last_hidden_state
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm(output.hidden_states[-clip_skip])


@dataclass(frozen=True)
class Wanted:
    """The words for one model.

    Attributes:
        prompt, negative_prompt: in the WebUI's grammar.
        evaluations: of the model in a whole sampling, for schedules.
    """

    prompt: str
    negative_prompt: str
    evaluations: int = 1


def told_to_base(models: Models, wanted: Wanted, clip_skip: int = 1) -> Told:
    """What SD1.5 is told; `clip_skip` as in the WebUI, 1 for none."""
    pipeline = models.base
    with models.placement.holding(pipeline.text_encoder):
        return _told(wanted, lambda text: encode(text, pipeline.tokenizer, pipeline.text_encoder, False, clip_skip))


def told_to_upgraded(models: Models, wanted: Wanted) -> Told:
    """What SDXL is told; an empty negative prompt is all zeros, as in its training."""

    def encoded(text: str) -> Encoded:
        return _encode_for_sdxl(models, text)

    told = _told(wanted, encoded)
    if wanted.negative_prompt.strip():
        return told
    (stretch,) = told.uncond.stretches
    zeros = Encoded(torch.zeros_like(stretch.encoded.tokens), torch.zeros_like(stretch.encoded.pooled))
    return replace(told, uncond=EncodedSchedule((replace(stretch, encoded=zeros),)))


def _told(wanted: Wanted, encoded: Callable[[str], Encoded]) -> Told:
    def schedule(text: str, weight: float = 1.0) -> EncodedSchedule:
        stretches = prompt_schedule(text, wanted.evaluations)
        return EncodedSchedule(tuple(EncodedStretch(one.last_step, encoded(one.text)) for one in stretches), weight)

    conds = tuple(schedule(one.text, one.weight) for one in combined_prompts(wanted.prompt))
    return _of_one_length(Told(conds, schedule(wanted.negative_prompt)))


def _of_one_length(told: Told) -> Told:
    """All prompts with as many tokens, whole prompts repeated.

    Attention over a prompt that is repeated is attention over the prompt, so that the shorter one keeps its meaning.
    """
    schedules = (*told.conds, told.uncond)
    length = math.lcm(*(one.encoded.tokens.shape[1] for schedule in schedules for one in schedule.stretches))

    def lengthened(schedule: EncodedSchedule) -> EncodedSchedule:
        return replace(schedule, stretches=tuple(map(lengthened_stretch, schedule.stretches)))

    def lengthened_stretch(stretch: EncodedStretch) -> EncodedStretch:
        tokens = stretch.encoded.tokens
        repeated = tokens.repeat(1, length // tokens.shape[1], 1)
        return replace(stretch, encoded=replace(stretch.encoded, tokens=repeated))

    return Told(tuple(map(lengthened, told.conds)), lengthened(told.uncond))


def arguments_of(told: Told, images: int, guided: bool) -> dict[str, Tensor]:
    """What a pipeline's own call is told: the prompts of the first evaluation."""
    cond, uncond = told.conds[0].at(0), told.uncond.at(0)
    given = {
        "prompt_embeds": cond.tokens.repeat(images, 1, 1),
        "negative_prompt_embeds": uncond.tokens.repeat(images, 1, 1) if guided else None,
        "pooled_prompt_embeds": None if cond.pooled is None else cond.pooled.repeat(images, 1),
        "negative_pooled_prompt_embeds": uncond.pooled.repeat(images, 1)
        if guided and uncond.pooled is not None
        else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _encode_for_sdxl(models: Models, prompt: str) -> Encoded:
    pipeline = models.upgraded
    with models.placement.holding(pipeline.text_encoder, pipeline.text_encoder_2):
        first = encode(prompt, pipeline.tokenizer, pipeline.text_encoder, penultimate=True)
        second = encode(prompt, pipeline.tokenizer_2, pipeline.text_encoder_2, penultimate=True)
    return Encoded(torch.cat([first.tokens, second.tokens], dim=-1), second.pooled)
