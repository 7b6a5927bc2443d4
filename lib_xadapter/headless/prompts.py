"""Prompts to what the UNets are told, long ones, `(attention:1.2)` and `BREAK` included, as the WebUI reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .denoisers import Prompts
from .models import Models

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


@dataclass(frozen=True)
class Encoded:
    """A prompt as a text encoder gives it: (1, tokens, channels), and pooled (1, channels) where it has that."""

    tokens: Tensor
    pooled: Tensor | None = None


@torch.no_grad()
def encode(prompt: str, tokenizer: CLIPTokenizer, encoder: nn.Module, penultimate: bool) -> Encoded:
    """A prompt through one text encoder.

    Args:
        prompt: with or without attention weights.
        tokenizer: of the encoder.
        encoder: CLIPTextModel or CLIPTextModelWithProjection.
        penultimate: whether the last layer but one is taken, as SDXL does; else the last one, normed.
    """
    split = split_into_windows(prompt, tokenizer)
    output = encoder(split.tokens.to(encoder.device), output_hidden_states=True)
    hidden = (output.hidden_states[-2] if penultimate else output.last_hidden_state).float()
    weighted = hidden * split.weights[..., None].to(hidden)
    # keep the mean of every window, so that attention shifts and does not grow
    weighted = weighted * (hidden.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True))
    pooled = getattr(output, "text_embeds", None)
    return Encoded(weighted.flatten(0, 1)[None], None if pooled is None else pooled[:1].float())


def base_prompts(models: Models, prompt: str, negative_prompt: str, images: int, guided: bool) -> Prompts:
    """What SD1.5 is told."""
    pipeline = models.base
    with models.placement.holding(pipeline.text_encoder):
        cond, uncond = of_one_length(
            *(
                encode(text, pipeline.tokenizer, pipeline.text_encoder, penultimate=False).tokens
                for text in (prompt, negative_prompt)
            )
        )
    return Prompts(cond.repeat(images, 1, 1), uncond.repeat(images, 1, 1) if guided else None)


def upgraded_prompts(
    models: Models, prompt: str, negative_prompt: str, images: int, guided: bool, size: tuple[int, int]
) -> Prompts:
    """What SDXL is told; an empty negative prompt is all zeros, as in its training. `size` is (width, height)."""
    cond, uncond = (_encode_for_sdxl(models, text) for text in (prompt, negative_prompt))
    if not negative_prompt.strip():
        uncond = Encoded(torch.zeros_like(uncond.tokens), torch.zeros_like(uncond.pooled))
    tokens, uncond_tokens = of_one_length(cond.tokens, uncond.tokens)
    width, height = size
    return Prompts(
        tokens.repeat(images, 1, 1),
        uncond_tokens.repeat(images, 1, 1) if guided else None,
        cond.pooled.repeat(images, 1),
        uncond.pooled.repeat(images, 1) if guided else None,
        torch.tensor([[height, width, 0, 0, height, width]] * images, device=models.placement.device).float(),
    )


def of_one_length(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    """Both (1, tokens, channels) with as many tokens, whole prompts repeated.

    Attention over a prompt that is repeated is attention over the prompt, so that the shorter one keeps its meaning.
    """
    length = math.lcm(cond.shape[1], uncond.shape[1])
    return cond.repeat(1, length // cond.shape[1], 1), uncond.repeat(1, length // uncond.shape[1], 1)


def _encode_for_sdxl(models: Models, prompt: str) -> Encoded:
    pipeline = models.upgraded
    with models.placement.holding(pipeline.text_encoder, pipeline.text_encoder_2):
        first = encode(prompt, pipeline.tokenizer, pipeline.text_encoder, penultimate=True)
        second = encode(prompt, pipeline.tokenizer_2, pipeline.text_encoder_2, penultimate=True)
    return Encoded(torch.cat([first.tokens, second.tokens], dim=-1), second.pooled)
