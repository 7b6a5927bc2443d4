"""A small classifier that finds a caption's facts in pictures of either world; its features make Fréchet distances.

It answers for each cell of the 3 x 3 grid what stands there, and for the background. The same questions are put to the
text encoders before their UNet comes, so that a caption's words are bound to each other from its first step on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .architectures import TEXT_WIDTH, BaseText, Prompt, UpgradedText
from .captions import Facts, ObjectFacts, caption_of, facts_of
from .drawing import base_picture, upgraded_picture
from .learning import Drawn, Loss
from .scenes import COLOURS, GROUNDS, PATTERNS, PLACES, SHAPES, SIZES, scene_of
from .styles import STYLES, styled_picture
from .worlds import tensor_of, tokens_of

NOTHING = len(SHAPES)
"""The shape of an empty cell."""
UNASKED = -100
"""Where there is no answer; cross_entropy leaves it out."""
RANKS = 3
SEEN = 64
"""Pixels that the classifier sees pictures at."""
WIDTH, HIDDEN = 24, 48

CELL_QUESTIONS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "rank": RANKS}
GROUND_QUESTIONS = {"pattern": len(PATTERNS), "first": len(GROUNDS), "second": len(GROUNDS)}
Answers = dict[str, Tensor]
"""Question → (rows, 9) of cells or (rows,) of the background; as logits with one more axis, the second."""


def answers_of(facts: list[Facts]) -> Answers:
    """What is true of each."""
    cells = {name: torch.full((len(facts), len(PLACES)), UNASKED) for name in CELL_QUESTIONS}
    cells["shape"][:] = NOTHING
    for row, told in enumerate(facts):
        for rank, one in enumerate(told.objects):
            cell = PLACES.index(one.place)
            cells["shape"][row, cell] = SHAPES.index(one.shape)
            cells["colour"][row, cell] = COLOURS.index(one.colour)
            cells["size"][row, cell] = SIZES.index(one.size)
            cells["rank"][row, cell] = rank
    grounds = [[*(GROUNDS.index(one) for one in told.grounds), UNASKED][:2] for told in facts]
    return cells | {
        "pattern": torch.tensor([PATTERNS.index(told.pattern) for told in facts]),
        "first": torch.tensor([first for first, _ in grounds]),
        "second": torch.tensor([second for _, second in grounds]),
    }


def answer_loss(said: Answers, true: Answers) -> Tensor:
    """Mean cross entropy of all questions."""
    losses = [functional.cross_entropy(said[name], true[name], ignore_index=UNASKED) for name in said]
    return torch.stack([torch.nan_to_num(loss) for loss in losses]).mean()


class Judge(nn.Module):
    """Pictures (rows, 3, h, w), -1 to 1, of any size → answers as logits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, WIDTH // 2, WIDTH, WIDTH, 2 * WIDTH)
        self.body = nn.Sequential(
            *(_halving(inner, outer) for inner, outer in itertools.pairwise(widths)),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1),
            nn.SiLU(),
        )
        inner = 2 * WIDTH * 16
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(inner, HIDDEN), nn.SiLU())
        cells = {name: nn.Linear(HIDDEN, len(PLACES) * size) for name, size in CELL_QUESTIONS.items()}
        grounds = {name: nn.Linear(HIDDEN, size) for name, size in GROUND_QUESTIONS.items()}
        self.heads = nn.ModuleDict(cells | grounds)

    def features(self, pictures: Tensor) -> Tensor:
        """(rows, 48), for Fréchet distances."""
        seen = functional.interpolate(pictures, (SEEN, SEEN), mode="area")
        return self.hidden(self.body(seen))

    def forward(self, pictures: Tensor) -> Answers:
        features = self.features(pictures)
        return {
            name: head(features).unflatten(1, (-1, len(PLACES))) if name in CELL_QUESTIONS else head(features)
            for name, head in self.heads.items()
        }


def _halving(inner: int, outer: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.SiLU(), nn.Conv2d(outer, outer, 4, 2, 1)
    )


def judge_loss(judge: Judge, batch: int) -> Loss:
    """Of pictures of both worlds, plain, styled, blurred and noisy, as models make them."""

    def loss(drawn: Drawn) -> Tensor:
        scenes = [scene_of(int(drawn.numbers.integers(2**31))) for _ in range(batch)]
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
class Found:
    """How many of a caption's facts a picture shows.

    Attributes:
        shown, asked: facts.
    """

    shown: int
    asked: int


@torch.no_grad()
def find_facts(judge: Judge, pictures: Tensor, facts: list[Facts]) -> list[Found]:
    """What of each caption its picture shows: objects at their places, their colours, sizes, order, background."""
    said, true = judge(pictures), answers_of(facts)
    right = {name: said[name].argmax(1) == true[name] for name in said}
    # an empty cell is no fact of the caption
    asked = {name: (true[name] != UNASKED) & ((name != "shape") | (true[name] != NOTHING)) for name in said}
    # with one object there is no order
    asked["rank"] &= torch.tensor([len(told.objects) > 1 for told in facts])[:, None]
    shown = sum((right[name] & asked[name]).reshape(len(facts), -1).sum(1) for name in said)
    of = sum(asked[name].reshape(len(facts), -1).sum(1) for name in said)
    return [Found(int(one), int(all_)) for one, all_ in zip(shown, of, strict=True)]


@torch.no_grad()
def seen_facts(judge: Judge, pictures: Tensor) -> list[str]:
    """A caption of what the classifier sees in each picture."""
    best = {name: logits.argmax(1) for name, logits in judge(pictures).items()}
    captions = []
    for row in range(len(pictures)):
        cells = [cell for cell in range(len(PLACES)) if best["shape"][row, cell] != NOTHING]
        cells.sort(key=lambda cell: int(best["rank"][row, cell]))
        objects = tuple(
            ObjectFacts(
                SIZES[best["size"][row, cell]],
                COLOURS[best["colour"][row, cell]],
                SHAPES[best["shape"][row, cell]],
                PLACES[cell],
            )
            for cell in cells
        )
        pattern = PATTERNS[best["pattern"][row]]
        grounds = tuple(GROUNDS[best[name][row]] for name in ("first", "second"))
        captions.append(caption_of(Facts(objects, pattern, grounds[: 1 if pattern == "plain" else 2])))
    return captions


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
        facts = [facts_of(scene_of(int(drawn.numbers.integers(2**31)))) for _ in range(batch)]
        prompt, true = text(tokens_of([caption_of(told) for told in facts])), answers_of(facts)
        read = answer_loss(reader(prompt), true)
        if reader.pooled is None:
            return read
        return read + 0.3 * answer_loss(reader.by_pooled(prompt), true)

    return loss
