"""Contact sheets: one picture that shows a few frames of many clips, a row for each. Drawing only, no reading."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from motionrag.video import sample_indices

Colour = tuple[int, int, int]
# The first where Pillow was built with FreeType, as its wheels are.
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN = 24
GAP = 4
ROW_GAP = 22
LABEL_GAP = 6
TITLE_COLOUR = (20, 20, 20)
CAPTION_COLOUR = (95, 95, 95)
RULE_COLOUR = (222, 222, 222)
TILE_COLOUR = (238, 238, 238)
MAX_CAPTION_LINES = 2
IMAGE_GAP = 13
MIN_TILE = 16
MIN_WIDTH = 320


@dataclass(frozen=True, eq=False)
class SheetRow:
    """One clip of a contact sheet.

    Attributes:
        title: what the row shows, one line above the frames.
        frames: uint8 `(t, h, w, 3)`, or PIL images; a single one makes a row with one tile.
        caption: smaller text under the title, up to two lines.
        image: shown once in front of the frames, such as the image that a video was made from.
    """

    title: str
    frames: "np.ndarray | Sequence[Image.Image]"
    caption: str = ""
    image: Image.Image | None = None


def contact_sheet(rows: Sequence[SheetRow], *, columns: int = 8, tile: int = 128) -> Image.Image:
    """Draw the rows one under the other on white.

    Args:
        rows: clips, from top to bottom.
        columns: frames shown of each clip, evenly spaced with first and last; a shorter clip shows all it has.
        tile: width and height of a tile in pixels; pictures of another shape keep theirs inside it.

    Returns:
        An RGB picture. Rows with an image have a column more, in front.

    Raises:
        ValueError: if there are no rows, a row has no frames, or the tiles are too small.
    """
    if not rows:
        raise ValueError("A contact sheet needs at least one row.")
    if columns < 1 or tile < MIN_TILE:
        raise ValueError(f"A contact sheet needs 1 column and tiles of {MIN_TILE} pixels at least.")
    pictures = [_sample(row, columns) for row in rows]
    image_width = tile + IMAGE_GAP if any(row.image is not None for row in rows) else 0
    # Wide enough to read the labels, however few the frames.
    width = max(image_width + max(map(len, pictures)) * (tile + GAP) - GAP, MIN_WIDTH)
    strips = [_draw_row(row, shown, width, image_width, tile) for row, shown in zip(rows, pictures, strict=True)]
    height = sum(strip.height for strip in strips) + ROW_GAP * (len(strips) - 1)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    top = MARGIN
    for strip in strips:
        if top > MARGIN:
            rule_y = top - ROW_GAP // 2
            ImageDraw.Draw(sheet).line([(MARGIN, rule_y), (MARGIN + width - 1, rule_y)], fill=RULE_COLOUR)
        sheet.paste(strip, (MARGIN, top))
        top += strip.height + ROW_GAP
    return sheet


def _sample(row: SheetRow, columns: int) -> list[Image.Image]:
    if not len(row.frames):
        raise ValueError(f"The row {row.title!r} of the contact sheet has no frames.")
    # sample_indices repeats the frames of short clips; here each is shown once.
    positions = np.unique(sample_indices(len(row.frames), columns))
    return [_as_image(row.frames[int(position)]) for position in positions]


def _as_image(picture: "np.ndarray | Image.Image") -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _draw_row(row: SheetRow, pictures: list[Image.Image], width: int, image_width: int, tile: int) -> Image.Image:
    """Label, image and frames of one row; frames of all rows start at the same place."""
    lines = _label_lines(row, width, tile)
    label_height = sum(_line_height(font) for _, font, _ in lines) + LABEL_GAP
    images = [] if row.image is None else [_as_image(row.image)]
    # Rows of wide films need not be as high as tiles are wide.
    tile_height = max(_fitted(picture, tile, tile)[1] for picture in images + pictures)
    strip = Image.new("RGB", (width, label_height + tile_height), "white")
    draw = ImageDraw.Draw(strip)
    top = 0
    for text, font, colour in lines:
        draw.text((0, top), text, fill=colour, font=font)
        top += _line_height(font)
    for image in images:
        _paste(strip, image, 0, label_height, tile, tile_height)
        rule_x = tile + IMAGE_GAP // 2
        draw.line([(rule_x, label_height), (rule_x, strip.height - 1)], fill=CAPTION_COLOUR)
    for column, picture in enumerate(pictures):
        _paste(strip, picture, image_width + column * (tile + GAP), label_height, tile, tile_height)
    return strip


def _fitted(picture: Image.Image, width: int, height: int) -> tuple[int, int]:
    scale = min(width / picture.width, height / picture.height)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _paste(strip: Image.Image, picture: Image.Image, left: int, top: int, width: int, height: int) -> None:
    """Put the whole picture into the tile, in its middle, on grey."""
    size = _fitted(picture, width, height)
    strip.paste(TILE_COLOUR, (left, top, left + width, top + height))
    corner = (left + (width - size[0]) // 2, top + (height - size[1]) // 2)
    strip.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)


def _label_lines(row: SheetRow, width: int, tile: int) -> list[tuple[str, Font, Colour]]:
    title_font = ImageFont.load_default(size=max(14, tile // 8))
    caption_font = ImageFont.load_default(size=max(12, tile // 10))
    title = _wrap(row.title, title_font, width, max_lines=1)
    caption = _wrap(row.caption, caption_font, width, max_lines=MAX_CAPTION_LINES)
    titles = [(line, title_font, TITLE_COLOUR) for line in title]
    return titles + [(line, caption_font, CAPTION_COLOUR) for line in caption]


def _wrap(text: str, font: Font, width: int, *, max_lines: int) -> list[str]:
    """Break the text at spaces into lines that fit; what is left over ends in an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] = f"{lines[-1]} {words[0]}…"
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    cut = bisect_right(range(len(line)), width, key=lambda length: math.ceil(font.getlength(line[:length] + "…")))
    return line[: max(0, cut - 1)].rstrip() + "…"


def _line_height(font: Font) -> int:
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (font.getbbox("Ág")[3], 0)
    return round((ascent + descent) * 1.15)
