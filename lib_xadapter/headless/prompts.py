"""Prompts encoded for the UNets, long ones, `(attention:1.2)` and `BREAK` included, as the WebUI reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..inversion_names import without_names
from ..wrapping import wrapped
from .conditioning import Conditioning, Encoded, EncodedSchedule, EncodedStretch
from .inversions import Inversion, Inversions, Lookup
from .model_files import family_of
from .models import Models
from .prompt_grammar import combined_prompts, prompt_schedule

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
class Piece:
    """A token, or what stands for several.

    Attributes:
        number: of the token, or the first one of a textual inversion's name.
        weight: how much attention it gets.
        inversion: the textual inversion that stands in its place.
    """

    number: int
    weight: float = 1.0
    inversion: Inversion | None = None

    @property
    def length(self) -> int:
        return 1 if self.inversion is None else self.inversion.number


@dataclass(frozen=True)
class Window:
    """What the text encoder takes at once, 77 tokens, start and end of text included.

    Attributes:
        tokens: their numbers.
        weights: the attention that each gets.
        inversions: textual inversions with the place of their first token.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    inversions: tuple[tuple[int, Inversion], ...] = ()


def split_into_windows(prompt: str, tokenizer: CLIPTokenizer, lookup: Lookup | None = None) -> list[Window]:
    """The tokens of a prompt, filled up to whole windows; at each `BREAK` a new one begins."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    stretches: list[list[Piece]] = [[]]
    for part in read_attention(prompt):
        if part.breaks:
            stretches.append([])
        else:
            numbers = tokenizer(part.text, add_special_tokens=False, verbose=False)["input_ids"]
            stretches[-1] += _pieces(numbers, part.weight, lookup)
    if len(stretches) > 1 and not stretches[-1]:
        stretches.pop()
    return [_filled(window, tokenizer) for stretch in stretches for window in _split(stretch, comma)]


def _pieces(numbers: Sequence[int], weight: float, lookup: Lookup | None) -> list[Piece]:
    pieces, place = [], 0
    while place < len(numbers):
        match = lookup.at(numbers, place) if lookup is not None else None
        pieces.append(Piece(numbers[place], weight, match.inversion if match else None))
        place += match.tokens if match else 1
    return pieces


def _split(pieces: Sequence[Piece], comma: int) -> list[list[Piece]]:
    """A window ends where nothing more fits, or behind a comma that is near."""
    windows: list[list[Piece]] = []
    window: list[Piece] = []
    last_comma: int | None = None

    for piece in pieces:
        length = sum(one.length for one in window)
        if piece.number == comma and piece.inversion is None:
            last_comma = len(window)
        elif length == WINDOW and last_comma is not None:
            behind = window[last_comma + 1 :]
            if sum(one.length for one in behind) < FARTHEST_COMMA:
                windows.append(window[: last_comma + 1])
                window, last_comma = behind, None
                length = sum(one.length for one in window)
        if length + piece.length > WINDOW:
            windows.append(window)
            window, last_comma = [], None
        window.append(piece)
    return [*windows, window]


def _filled(window: Sequence[Piece], tokenizer: CLIPTokenizer) -> Window:
    tokens, weights, inversions = [tokenizer.bos_token_id], [1.0], []
    for piece in window:
        if piece.inversion is not None:
            inversions.append((len(tokens), piece.inversion))
        tokens += [piece.number if piece.inversion is None else 0] * piece.length
        weights += [piece.weight] * piece.length
    room = WINDOW + 1 - len(tokens)
    return Window(
        (*tokens, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * room),
        (*weights, 1.0, *[1.0] * room),
        tuple(inversions),
    )


@dataclass(frozen=True)
class Encoder:
    """A text encoder with all that a prompt needs on the way through it.

    Attributes:
        tokenizer: with the text encoder's padding.
        module: CLIPTextModel or CLIPTextModelWithProjection.
        penultimate: whether the last layer but one is taken, as SDXL does; else the last one, normed.
        clip_skip: 2 for the last layer but one, normed, and so on.
        number: which of its model's text encoders it is, from 0.
        lookup: finds textual inversions.
    """

    tokenizer: CLIPTokenizer
    module: nn.Module
    penultimate: bool = False
    clip_skip: int = 1
    number: int = 0
    lookup: Lookup | None = None


@torch.no_grad()
def encode(prompts: Sequence[str], encoder: Encoder) -> list[Encoded]:
    """Prompts through one text encoder, all made as long as the longest.

    Those of one schedule belong together: the WebUI keeps the mean over all of them when it weighs tokens.
    """
    split = [split_into_windows(prompt, encoder.tokenizer, encoder.lookup) for prompt in prompts]
    longest, empty = max(map(len, split)), _filled([], encoder.tokenizer)
    windows = [[*each, *[empty] * (longest - len(each))] for each in split]
    encoded = [_encoded_windows([each[place] for each in windows], encoder) for place in range(longest)]
    tokens = torch.cat([one.tokens for one in encoded], dim=1)
    pooled = encoded[0].pooled
    return [
        Encoded(tokens[place : place + 1], None if pooled is None else pooled[place : place + 1])
        for place in range(len(prompts))
    ]


def _encoded_windows(windows: Sequence[Window], encoder: Encoder) -> Encoded:
    device = encoder.module.device
    tokens = torch.tensor([window.tokens for window in windows], device=device)
    weights = torch.tensor([window.weights for window in windows], device=device)
    with _inversions_in_place(windows, encoder):
        output = encoder.module(tokens, output_hidden_states=True)
    hidden = _hidden(output, encoder).float()
    weighted = hidden * weights[..., None]
    # so that attention shifts and does not grow
    weighted = weighted * (hidden.mean() / weighted.mean())
    pooled = getattr(output, "text_embeds", None)
    return Encoded(weighted, None if pooled is None else pooled.float())


@contextmanager
def _inversions_in_place(windows: Sequence[Window], encoder: Encoder) -> Iterator[None]:
    """While open, the embeddings of tokens that stand for textual inversions are those."""
    placed = [(row, place, inversion) for row, window in enumerate(windows) for place, inversion in window.inversions]

    def embedded(forward: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
        embeddings = forward(*arguments, **named).clone()
        for row, place, inversion in placed:
            embeddings[row, place : place + inversion.number] = inversion.vectors[encoder.number].to(embeddings)
        return embeddings

    if not placed:
        yield
        return
    with wrapped(encoder.module.get_input_embeddings(), "forward", embedded):
        yield


def _hidden(output: Any, encoder: Encoder) -> Tensor:
    if encoder.penultimate:
        return output.hidden_states[-2]
    if encoder.clip_skip <= 1:
        return output.last_hidden_state
    norm = getattr(encoder.module, "text_model", encoder.module).final_layer_norm
    return norm(output.hidden_states[-encoder.clip_skip])


def encoders_of(pipeline: Any, clip_skip: int = 1, inversions: Inversions | None = None) -> list[Encoder]:
    """The text encoders of a pipeline as the WebUI uses them.

    Args:
        pipeline: of SD1.5, SD2 or SDXL.
        clip_skip: of SD1.5, the only one that has it in the WebUI.
        inversions: that prompts may name.
    """
    modules = [(pipeline.tokenizer, pipeline.text_encoder)]
    family = family_of(pipeline)
    if family == "sdxl":
        modules.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    lookup = None
    if inversions is not None and inversions.names:
        lookup = Lookup(inversions, pipeline.tokenizer, widths_of(pipeline))
    return [
        Encoder(tokenizer, module, family == "sdxl", clip_skip if family == "sd1" else 1, number, lookup)
        for number, (tokenizer, module) in enumerate(modules)
    ]


def widths_of(pipeline: Any) -> tuple[int, ...]:
    """Of the vectors that textual inversions for a pipeline have."""
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    return tuple(one.get_input_embeddings().embedding_dim for one in encoders if one is not None)


@dataclass(frozen=True)
class PromptPair:
    """A prompt and a negative prompt for one model.

    Attributes:
        prompt, negative_prompt: in the WebUI's grammar.
        evaluations: of the model in a whole sampling, for schedules.
    """

    prompt: str
    negative_prompt: str
    evaluations: int = 1


def encode_for_base(models: Models, pair: PromptPair, clip_skip: int = 1) -> Conditioning:
    """For SD1.5, without the names of SDXL's textual inversions; `clip_skip` as in the WebUI, 1 for none."""
    pipeline, inversions = models.base, models.inversions
    texts = (pair.prompt, pair.negative_prompt)
    foreign = inversions.of_widths(widths_of(models.upgraded), texts)
    prompt, negative_prompt = (without_names(text, foreign) for text in texts)
    with models.placement.holding(pipeline.text_encoder):
        return encode_conditioning(
            pipeline, replace(pair, prompt=prompt, negative_prompt=negative_prompt), clip_skip, inversions
        )


def encode_for_upgraded(models: Models, pair: PromptPair) -> Conditioning:
    """For SDXL."""
    pipeline = models.upgraded
    with models.placement.holding(pipeline.text_encoder, pipeline.text_encoder_2):
        return encode_conditioning(pipeline, pair, inversions=models.inversions)


def encode_conditioning(
    pipeline: Any, pair: PromptPair, clip_skip: int = 1, inversions: Inversions | None = None
) -> Conditioning:
    """For a pipeline's model, whose text encoders are on the device where they run."""
    encoders = encoders_of(pipeline, clip_skip, inversions)

    def schedule(text: str, weight: float = 1.0) -> EncodedSchedule:
        stretches = prompt_schedule(text, pair.evaluations)
        encoded = _side_by_side([encode([one.text for one in stretches], encoder) for encoder in encoders])
        each = zip(stretches, encoded, strict=True)
        return EncodedSchedule(tuple(EncodedStretch(one.last_step, prompt) for one, prompt in each), weight)

    conds = tuple(schedule(one.text, one.weight) for one in combined_prompts(pair.prompt))
    conditioning = _of_one_length(Conditioning(conds, schedule(pair.negative_prompt)))
    # an empty negative prompt is all zeros for SDXL, as in its training
    return _with_zeros(conditioning) if len(encoders) > 1 and not pair.negative_prompt else conditioning


def _side_by_side(of_encoders: Sequence[Sequence[Encoded]]) -> list[Encoded]:
    """What several text encoders say, channel after channel; the last one's pooled prompts."""
    return [
        Encoded(torch.cat([one.tokens for one in each], dim=-1), each[-1].pooled)
        for each in zip(*of_encoders, strict=True)
    ]


def _with_zeros(conditioning: Conditioning) -> Conditioning:
    (stretch,) = conditioning.uncond.stretches
    zeros = Encoded(torch.zeros_like(stretch.encoded.tokens), torch.zeros_like(stretch.encoded.pooled))
    return replace(conditioning, uncond=EncodedSchedule((replace(stretch, encoded=zeros),)))


def _of_one_length(conditioning: Conditioning) -> Conditioning:
    """All prompts with as many tokens, whole prompts repeated.

    Attention over a prompt that is repeated is attention over the prompt, so that the shorter one keeps its meaning.
    """
    schedules = (*conditioning.conds, conditioning.uncond)
    length = math.lcm(*(one.encoded.tokens.shape[1] for schedule in schedules for one in schedule.stretches))

    def lengthened(schedule: EncodedSchedule) -> EncodedSchedule:
        return replace(schedule, stretches=tuple(map(lengthened_stretch, schedule.stretches)))

    def lengthened_stretch(stretch: EncodedStretch) -> EncodedStretch:
        tokens = stretch.encoded.tokens
        repeated = tokens.repeat(1, length // tokens.shape[1], 1)
        return replace(stretch, encoded=replace(stretch.encoded, tokens=repeated))

    return Conditioning(tuple(map(lengthened, conditioning.conds)), lengthened(conditioning.uncond))


def arguments_of(conditioning: Conditioning, images: int, guided: bool) -> dict[str, Tensor]:
    """For a pipeline's own call: the prompts of the first evaluation."""
    cond, uncond = conditioning.conds[0].at(0), conditioning.uncond.at(0)
    given = {
        "prompt_embeds": cond.tokens.repeat(images, 1, 1),
        "negative_prompt_embeds": uncond.tokens.repeat(images, 1, 1) if guided else None,
        "pooled_prompt_embeds": None if cond.pooled is None else cond.pooled.repeat(images, 1),
        "negative_pooled_prompt_embeds": uncond.pooled.repeat(images, 1)
        if guided and uncond.pooled is not None
        else None,
    }
    return {name: value for name, value in given.items() if value is not None}
