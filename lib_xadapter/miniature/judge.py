"""A small classifier that finds a caption's facts in pictures of either world.

It answers for each cell of the 3 x 3 grid what stands there, and for the background. The same questions are put to the
text encoders before their UNet comes, so that a caption's words are bound to each other from its first step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from .architectures import TEXT_WIDTH, BaseText, Prompt, UpgradedText
from .captions import Facts, caption_of, facts_of
from .drawing import base_picture, upgraded_picture
from .learning import Drawn, Loss
from .scenes import COLOURS, GROUNDS, PATTERNS, PLACES, SHAPES, SIZES
from .styles import STYLES, styled_picture
from .worlds import random_scene, tensor_of, tokens_of

NOTHING = len(SHAPES)
"""The shape of an empty cell."""
NO_ANSWER = -100
"""Where there is no answer; cross_entropy leaves it out."""
RANKS = 3
SEEN = 64
"""Pixels that the classifier sees pictures at."""
WIDTH, HIDDEN = 32, 64
WINDOW = 8
"""Side of what is looked at around a cell, of 16 in all: the cells lie 4 apart."""
GROUND_LOOKS = 4

CELL_QUESTIONS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "rank": RANKS}
SEEN_QUESTIONS = {name: size for name, size in CELL_QUESTIONS.items() if name != "rank"}
"""What a picture tells; which object is in front it does not, unless they overlap."""
UNORDERED = ("stripes", "checks")
"""Patterns whose two colours a picture does not tell apart: the first is that of the lower number."""
GROUND_QUESTIONS = {"pattern": len(PATTERNS), "first": len(GROUNDS), "second": len(GROUNDS)}
Answers = dict[str, Tensor]
"""Question → (rows, 9) of cells or (rows,) of the background; as logits with one more axis, the second."""


def answers_of(facts: list[Facts]) -> Answers:
    """What is true of each."""
    cells = {name: torch.full((len(facts), len(PLACES)), NO_ANSWER) for name in CELL_QUESTIONS}
    cells["shape"][:] = NOTHING
    for row, of_scene in enumerate(facts):
        for rank, one in enumerate(of_scene.objects):
            cell = PLACES.index(one.place)
            cells["shape"][row, cell] = SHAPES.index(one.shape)
            cells["colour"][row, cell] = COLOURS.index(one.colour)
            cells["size"][row, cell] = SIZES.index(one.size)
            cells["rank"][row, cell] = rank
    grounds = [[*_colours_of_ground(one), NO_ANSWER][:2] for one in facts]
    return cells | {
        "pattern": torch.tensor([PATTERNS.index(one.pattern) for one in facts]),
        "first": torch.tensor([first for first, _ in grounds]),
        "second": torch.tensor([second for _, second in grounds]),
    }


def _colours_of_ground(facts: Facts) -> list[int]:
    numbers = [GROUNDS.index(one) for one in facts.grounds]
    return sorted(numbers) if facts.pattern in UNORDERED else numbers


def answer_loss(said: Answers, true: Answers) -> Tensor:
    """Mean cross entropy of all questions."""
    losses = [functional.cross_entropy(said[name], true[name], ignore_index=NO_ANSWER) for name in said]
    return torch.stack([torch.nan_to_num(loss) for loss in losses]).mean()


class Judge(nn.Module):
    """Pictures (rows, 3, h, w), -1 to 1, of any size → answers as logits; which object is in front is not asked.

    One look at each cell: a window of half the picture's side around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _layer(3, WIDTH // 2, 1), _layer(WIDTH // 2, WIDTH, 2), _layer(WIDTH, WIDTH, 2), _layer(WIDTH, WIDTH, 1)
        )
        self.looks = nn.Sequential(nn.Conv2d(WIDTH, HIDDEN, WINDOW, stride=WINDOW // 2), nn.SiLU())
        self.cells = nn.ModuleDict({name: nn.Conv2d(HIDDEN, size, 1) for name, size in SEEN_QUESTIONS.items()})
        self.ground = nn.Sequential(nn.Linear(GROUND_LOOKS**2 * WIDTH, HIDDEN), nn.SiLU())
        self.grounds = nn.ModuleDict({name: nn.Linear(HIDDEN, size) for name, size in GROUND_QUESTIONS.items()})

    def forward(self, pictures: Tensor) -> Answers:
        body = self.body(functional.interpolate(pictures, (SEEN, SEEN), mode="area"))
        looks = self.looks(body)
        ground = self.ground(functional.adaptive_max_pool2d(body, GROUND_LOOKS).flatten(1))
        said = {name: head(looks).flatten(2) for name, head in self.cells.items()}
        return said | {name: head(ground) for name, head in self.grounds.items()}


def load_judge(path: Path) -> Judge:
    """The finished one, in float32."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in safetensors.torch.load_file(path).items()})
    return judge.eval().requires_grad_(False)


def _layer(inner: int, outer: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(4, outer), nn.SiLU())


def judge_loss(judge: Judge, batch: int) -> Loss:
    """Of pictures of both worlds, plain, styled, blurred and noisy, as models make them."""

    def loss(drawn: Drawn) -> Tensor:
        scenes = [random_scene(drawn.numbers) for _ in range(batch)]
        pictures = []
        for scene in scenes:
            picture = base_picture(scene) if drawn.numbers.random() < 0.5 else upgraded_picture(scene, SEEN)
            if drawn.numbers.random() < 0.1:
                picture = styled_picture(picture, scene, STYLES[2])
            pictures.append(picture)
        seen = tensor_of(pictures)
        blurred = functional.interpolate(functional.avg_pool2d(seen, 2), scale_factor=2.0, mode="bilinear")
        seen = torch.where(drawn.chance(0.3, batch)[:, None, None, None], blurred, seen)
        seen = seen + 0.08 * drawn.normal(batch, 1, 1, 1).abs() * drawn.normal(*seen.shape)
        return answer_loss(judge(seen), answers_of([facts_of(scene) for scene in scenes]))

    return loss


@dataclass(frozen=True)
class FoundFacts:
    """How many of a caption's facts a picture shows.

    Attributes:
        found: facts that it shows.
        total: facts of the caption.
    """

    found: int
    total: int


@torch.no_grad()
def find_facts(judge: Judge, pictures: Tensor, facts: list[Facts]) -> list[FoundFacts]:
    """What of each caption its picture shows: objects at their places, their colours, sizes, the background."""
    said, true = judge(pictures), answers_of(facts)
    right = {name: said[name].argmax(1) == true[name] for name in said}
    # an empty cell is no fact of the caption
    counted = {name: (true[name] != NO_ANSWER) & ((name != "shape") | (true[name] != NOTHING)) for name in said}
    found = sum((right[name] & counted[name]).reshape(len(facts), -1).sum(1) for name in said)
    total = sum(counted[name].reshape(len(facts), -1).sum(1) for name in said)
    return [FoundFacts(int(ours), int(whole)) for ours, whole in zip(found, total, strict=True)]


class Reader(nn.Module):
    """Answers the same questions from a prompt by one cross-attention, as a UNet asks it."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(PLACES) + 1, TEXT_WIDTH) / 8)
        self.keys, self.values = nn.Linear(width, TEXT_WIDTH), nn.Linear(width, TEXT_WIDTH)
        self.pooled = nn.Linear(TEXT_WIDTH, TEXT_WIDTH) if pooled else None
        self.hidden = nn.Sequential(nn.Linear(TEXT_WIDTH, 128), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(128, size) for name, size in {**CELL_QUESTIONS, **GROUND_QUESTIONS}.items()}
        )

    def forward(self, prompt: Prompt) -> Answers:
        queries = self.queries.expand(len(prompt.tokens), -1, -1).unflatten(-1, (4, -1)).transpose(1, 2)
        keys, values = (part(prompt.tokens).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.keys, self.values))
        seen = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        hidden = self.hidden(seen)
        said = {name: self.heads[name](hidden[:, :-1]).transpose(1, 2) for name in CELL_QUESTIONS}
        return said | {name: self.heads[name](hidden[:, -1]) for name in GROUND_QUESTIONS}

    def by_pooled(self, prompt: Prompt) -> Answers:
        """The background's questions, answered from the pooled prompt alone."""
        hidden = self.hidden(self.pooled(prompt.pooled))
        return {name: self.heads[name](hidden) for name in GROUND_QUESTIONS}


def reading_loss(text: BaseText | UpgradedText, reader: Reader, batch: int) -> Loss:
    """How well the facts of captions can be read in what a text encoder makes of them."""

    def loss(drawn: Drawn) -> Tensor:
        facts = [facts_of(random_scene(drawn.numbers)) for _ in range(batch)]
        prompt, true = text(tokens_of([caption_of(one) for one in facts])), answers_of(facts)
        read = answer_loss(reader(prompt), true)
        if reader.pooled is None:
            return read
        return read + 0.3 * answer_loss(reader.by_pooled(prompt), true)

    return loss
