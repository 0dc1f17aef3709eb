"""Pictures for people: grids with labels, boxes and masks drawn on top."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from attnctrl.region import Region

Color = tuple[int, int, int]
# Okabe and Ito's palette: told apart by colour-blind readers too.
PALETTE: tuple[Color, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66), (0, 0, 0),
)  # fmt: skip
PAPER: Color = (255, 255, 255)
INK: Color = (32, 32, 32)
_PAD = 8


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """`image` as RGB with its longer side `side` pixels; small pictures keep hard pixels when they grow."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS)


def draw_regions(image: Image.Image, regions: Sequence[Region], names: bool = True) -> Image.Image:
    """A copy of `image` with the outline of every region that has a box or a mask, and its name."""
    picture = image.convert("RGB").copy()
    pen = ImageDraw.Draw(picture)
    stroke = max(1, max(picture.size) // 100)
    size = max(9, max(picture.size) // 24)
    for index, region in enumerate(regions):
        color = PALETTE[index % len(PALETTE)]
        if region.box is not None:
            frame = _pixels(region.box, picture.size)
            pen.rectangle(frame, outline=color, width=stroke)
            corner = frame[:2]
        elif region.mask is not None:
            inside = _mask_on(np.asarray(region.mask) >= 0.5, picture.size)
            picture.paste(color, mask=Image.fromarray(_edge(inside, stroke)))
            rows, columns = np.nonzero(inside)
            if len(rows) == 0:
                continue
            corner = (int(columns[0]), int(rows[0]))
        else:
            continue
        if names:
            tag(pen, corner, region.label, color, size, picture.size)
    return picture


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    groups: Sequence[tuple[str, int]] = (),
    side: int = 256,
) -> Image.Image:
    """Pictures in a labelled table.

    Args:
        rows: Pictures, row by row, all rows of one length.
        row_labels: One for each row.
        column_labels: One for each column; too long ones are cut with an ellipsis.
        groups: Headings over neighbouring columns: (text, number of columns), together as many as there are columns.
        side: Longer side of each picture in pixels.

    Raises:
        ValueError: Labels and pictures differ in number, or there are none.
    """
    columns = len(column_labels)
    if not rows or not columns or len(rows) != len(row_labels) or any(len(row) != columns for row in rows):
        shape = [len(row) for row in rows]
        raise ValueError(f"{len(row_labels)} x {columns} labels for rows of {shape} pictures; give one label to each.")
    if groups and sum(count for _, count in groups) != columns:
        raise ValueError(f"headings over {sum(count for _, count in groups)} columns; there are {columns}.")
    cells = [[enlarge(image, side) for image in row] for row in rows]
    size = max(12, side // 14)
    line = size + _PAD
    left = _PAD + max(round(_font(size).getlength(label)) for label in row_labels) + _PAD
    widths = [max(row[i].width for row in cells) for i in range(columns)]
    heights = [max(image.height for image in row) for row in cells]
    lefts = [left + sum(widths[:i]) + _PAD * i for i in range(columns + 1)]
    headings, first = [], 0
    for text, count in groups:
        headings.append((lefts[first], _wrap(text, lefts[first + count] - lefts[first] - 3 * _PAD, size)))
        first += count
    top = _PAD + line * (1 + max((len(lines) for _, lines in headings), default=0))
    sheet = Image.new("RGB", (lefts[-1], top + sum(heights) + _PAD * len(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, lines in headings:
        for i, text in enumerate(lines):
            pen.text((x, _PAD + i * line), text, fill=INK, font=_font(size))
    for i, label in enumerate(column_labels):
        pen.text((lefts[i], top - line), _fit(label, widths[i], size), fill=INK, font=_font(size))
    for j, (label, row) in enumerate(zip(row_labels, cells, strict=True)):
        y = top + sum(heights[:j]) + _PAD * j
        pen.text((_PAD, y + heights[j] // 2 - size // 2), label, fill=INK, font=_font(size))
        for i, image in enumerate(row):
            sheet.paste(image, (lefts[i], y))
    return sheet


def _fit(text: str, width: int, size: int) -> str:
    """`text`, cut with an ellipsis so that it is at most `width` pixels long."""
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrap(text: str, width: int, size: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between words; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fit(word, width, size))
    return lines


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    left, top = round(x0 * size[0]), round(y0 * size[1])
    return left, top, max(left, round(x1 * size[0]) - 1), max(top, round(y1 * size[1]) - 1)


def _mask_on(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _edge(inside: np.ndarray, stroke: int) -> np.ndarray:
    """Pixels of `inside` (bool [H, W]) within `stroke` steps of its border; the picture's border counts as one."""
    core = np.pad(inside, stroke)
    for _ in range(stroke):
        core = core & np.roll(core, 1, 0) & np.roll(core, -1, 0) & np.roll(core, 1, 1) & np.roll(core, -1, 1)
    return inside & ~core[stroke:-stroke, stroke:-stroke]


def tag(pen: Any, corner: tuple[int, int], text: str, color: Color, size: int, canvas: tuple[int, int]) -> None:
    """A text on a plate at the corner (x, y), moved to stay inside the picture of size (width, height)."""
    text = _fit(text, canvas[0] - 4, size)
    width = round(_font(size).getlength(text)) + 4
    x = max(0, min(corner[0], canvas[0] - width))
    y = max(0, min(corner[1], canvas[1] - size - 4))
    pen.rectangle((x, y, x + width, y + size + 3), fill=color)
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.text((x + 2, y), text, fill=INK if light else PAPER, font=_font(size))
