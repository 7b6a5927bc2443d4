"""Pictures in a grid with labels, and pictures with text in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..saving import write_whole
from .infotexts import PNG_KEY

MARGIN = 8
INK, PAPER = "black", "white"
SMALLEST_CELL = 128


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | None]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Pictures with a label over each column and before each row; None leaves a cell empty.

    Cells are as large as the largest picture; smaller ones are enlarged to it.
    """
    pictures = [picture for row in rows for picture in row if picture is not None]
    width = max(SMALLEST_CELL, *(picture.width for picture in pictures))
    height = max(SMALLEST_CELL, *(picture.height for picture in pictures))
    font = ImageFont.load_default(size=max(12, width // 18))
    left = MARGIN + max((_text_size(label, font)[0] for label in row_labels), default=0)
    top = 2 * MARGIN + max((_text_size(label, font)[1] for label in column_labels), default=0)
    grid = Image.new(
        "RGB", (left + len(column_labels) * (width + MARGIN) + MARGIN, top + len(rows) * (height + MARGIN)), PAPER
    )
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        middle = left + MARGIN + column * (width + MARGIN) + width // 2
        draw.multiline_text((middle, top // 2), label, INK, font, anchor="mm", align="center")
    for place, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + place * (height + MARGIN)
        draw.multiline_text((MARGIN, y + height // 2), label, INK, font, anchor="lm")
        for column, picture in enumerate(row):
            if picture is not None:
                grid.paste(picture.resize((width, height)), (left + MARGIN + column * (width + MARGIN), y))
    return grid


def save_picture(path: Path, picture: Image.Image, text: str = "") -> Path:
    """Write a PNG, whole or not at all, with its settings as text in it."""
    info = PngInfo()
    if text:
        info.add_text(PNG_KEY, text)
    return write_whole(path, lambda to: picture.save(to, format="PNG", pnginfo=info))


def _text_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return round(right - left), round(bottom - top)
