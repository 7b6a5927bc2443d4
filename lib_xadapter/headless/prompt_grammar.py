"""The WebUI's grammar around a prompt: what changes on the way, what is combined, styles.

`[a:b:0.5]` turns from a to b after half of the steps, `[a|b]` takes turns, `a AND b:0.5` are prompts of their own with
weights. Attention within a prompt is read by `prompts`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import WrongArgument

MARKS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
AND = re.compile(r"\bAND\b")
AND_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")


@dataclass(frozen=True)
class Scheduled:
    """`[before:after:when]`; `when` is a step, or where it has a point a fraction of the steps."""

    before: Sequence[Node]
    after: Sequence[Node]
    when: str

    def last_step(self, steps: int) -> int:
        """The last step, from 1, that `before` is used in."""
        number = float(self.when)
        return min(steps, int(number * steps if "." in self.when else number))


@dataclass(frozen=True)
class Alternate:
    """`[a|b|c]`: one after the other, step by step."""

    choices: Sequence[Sequence[Node]]


Node = str | Scheduled | Alternate


@dataclass(frozen=True)
class Stretch:
    """A prompt and the last step, from 1, that it is used in."""

    last_step: int
    text: str


def prompt_schedule(prompt: str, steps: int) -> list[Stretch]:
    """What a prompt says at each step."""
    nodes = _Reader(prompt).read()
    ends = sorted({steps, *_ends(nodes, steps)})
    return [Stretch(end, _at(nodes, end, steps)) for end in ends]


def _ends(nodes: Sequence[Node], steps: int) -> set[int]:
    found: set[int] = set()
    for node in nodes:
        if isinstance(node, Scheduled):
            last = node.last_step(steps)
            found |= ({last} if last >= 1 else set()) | _ends(node.before, steps) | _ends(node.after, steps)
        elif isinstance(node, Alternate):
            found |= set(range(1, steps + 1))
    return found


def _at(nodes: Sequence[Node], step: int, steps: int) -> str:
    return "".join(_node_at(node, step, steps) for node in nodes)


def _node_at(node: Node, step: int, steps: int) -> str:
    if isinstance(node, Scheduled):
        return _at(node.before if step <= node.last_step(steps) else node.after, step, steps)
    if isinstance(node, Alternate):
        return _at(node.choices[(step - 1) % len(node.choices)], step, steps)
    return node


class _Reader:
    """Reads a prompt mark by mark."""

    def __init__(self, prompt: str) -> None:
        self._marks = MARKS.findall(prompt)
        self._place = 0

    def read(self) -> list[Node]:
        nodes: list[Node] = []
        while self._place < len(self._marks):
            nodes += self._next()
        return nodes

    def _next(self) -> list[Node]:
        mark = self._marks[self._place]
        self._place += 1
        if mark not in ("[", "("):
            return [mark]
        begin = self._place
        parts, separators = self._group("]" if mark == "[" else ")")
        if parts is None:
            # no bracket closes it: a letter like others
            self._place = begin
            return [mark]
        if mark == "(":
            return ["(", *_together(parts, separators), ")"]
        if separators and set(separators) == {"|"}:
            return [Alternate(parts)]
        if set(separators) == {":"} and len(parts) in (2, 3):
            last = parts[-1]
            found = NUMBER.fullmatch("".join(last)) if all(isinstance(node, str) for node in last) else None
            if found:
                return [Scheduled(parts[0] if len(parts) == 3 else [], parts[-2], found[1])]
        return ["[", *_together(parts, separators), "]"]

    def _group(self, closing: str) -> tuple[list[list[Node]] | None, list[str]]:
        parts: list[list[Node]] = [[]]
        separators: list[str] = []
        while self._place < len(self._marks):
            mark = self._marks[self._place]
            if mark == closing:
                self._place += 1
                return parts, separators
            if mark in (":", "|"):
                self._place += 1
                separators.append(mark)
                parts.append([])
            elif mark in ("]", ")"):
                return None, []
            else:
                parts[-1] += self._next()
        return None, []


def _together(parts: Sequence[Sequence[Node]], separators: Sequence[str]) -> list[Node]:
    nodes = list(parts[0])
    for separator, part in zip(separators, parts[1:], strict=True):
        nodes += [separator, *part]
    return nodes


@dataclass(frozen=True)
class Combined:
    """One of the prompts that `AND` combines, and how much it counts."""

    text: str
    weight: float


def combined_prompts(prompt: str) -> list[Combined]:
    """The prompts between `AND`s; `a:0.5` has the weight 0.5."""
    found = []
    for text in AND.split(prompt):
        weight = AND_WEIGHT.search(text)
        found.append(Combined(text[: weight.start()] if weight else text.rstrip(), float(weight[1]) if weight else 1.0))
    return found


@dataclass(frozen=True)
class Style:
    """A row of styles.csv."""

    prompt: str
    negative_prompt: str


def read_styles(path: Path) -> dict[str, Style]:
    """The styles of a WebUI's styles.csv, by name.

    Raises:
        WrongArgument: it cannot be read, or has no column `name`.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise WrongArgument(f"--styles: {path} cannot be read ({error}).") from error
    if any("name" not in row for row in rows):
        raise WrongArgument(f"--styles: {path.name} has no column 'name'.")
    # older files call the prompt's column text
    return {
        row["name"]: Style(row.get("prompt") or row.get("text") or "", row.get("negative_prompt") or "") for row in rows
    }


def with_style(prompt: str, style: str) -> str:
    """A prompt in a style: in the place of its `{prompt}`, or before it."""
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)
