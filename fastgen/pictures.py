"""Labelled grids of images, one row for each model, as the picture of a training step or of an evaluation."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from fastgen import records
from fastgen.files import write_atomically
from fastgen.printing import printable

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST, LARGEST = 48, 256  # pixels on an image's longer side
MARGIN, GAP = 8, 2
STRIP = 4  # frames that stand for a video
INK = (52, 56, 64)

_CELLS = "fastgen:cells"  # the text in a grid's PNG that says where its pictures are
_LABEL_WIDTH = 200
_ROTATED_LENGTH = 260
_UPRIGHT_WIDTH = 112  # columns at least this wide always have upright captions


def picture_grid(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str] | None = None, *, cell: int | None = None) -> Image.Image:
    """One picture with a row of images for each (label, images), labels at the left, captions (one for each column) on top.

    Images are (N, 3, H, W) float, clipped to [0, 1], or videos (N, 3, T, H, W), of which STRIP frames at even distances stand side by side; N
    and size may differ from row to row. Those whose longer side is below `cell`
    (default 48) are enlarged by a whole factor without smoothing, those above 256 (or `cell`, if larger) are reduced with antialiasing.
    The last column ends MARGIN pixels before the right edge, the last row MARGIN pixels above the lower edge, images are GAP apart.
    Captions run upwards where columns are narrow. Text is drawn in Pillow's own font, which has Latin letters only. `cells` finds the images again.
    Raises ValueError for no rows, another shape, a value that is not finite, or another number of captions than columns.
    """
    rows, columns = [(_line(label), images) for label, images in rows], None if columns is None else [_line(text) for text in columns]
    pictures = [[_strip([_resized(frame, cell or SMALLEST) for frame in frames]) for frames in _frames(images)] for _, images in rows]
    num_columns = max(map(len, pictures), default=0)
    if not num_columns or (columns is not None and len(columns) != num_columns):
        raise ValueError(f"a grid of {len(rows)} rows, {num_columns} columns and {None if columns is None else len(columns)} captions")
    width = max(picture.width for line in pictures for picture in line)
    font = _font(max(12, min(16, width // 8)))
    heads = _captions(columns or [], font, width)
    names = [_name(label, font, line) for (label, _), line in zip(rows, pictures, strict=True)]
    left = MARGIN + max(name.width for name in names) + MARGIN
    top = MARGIN + max((head.height + 2 * GAP for head in heads), default=0)
    heights = [max(item.height for item in [name, *line]) for name, line in zip(names, pictures, strict=True)]
    size = (left + num_columns * (width + GAP) - GAP + MARGIN, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    for x, head in zip(range(left, size[0], width + GAP), heads, strict=False):
        canvas.paste(head, (x + (width - head.width) // 2, top - 2 * GAP - head.height))
    found = []
    for (label, images), name, line, height in zip(rows, names, pictures, heights, strict=True):
        canvas.paste(name, (left - MARGIN - name.width, top + (height - name.height) // 2))
        places = [(x + (width - picture.width) // 2, top) for x, picture in zip(range(left, size[0], width + GAP), line, strict=False)]
        for place, picture in zip(places, line, strict=True):
            canvas.paste(picture, place)
        if images.ndim == 4:
            boxes = [[x, y, x + picture.width, y + picture.height] for (x, y), picture in zip(places, line, strict=True)]
            found.append({"label": label, "size": list(images.shape[-2:]), "boxes": boxes})
        top += height + GAP
    canvas.info[_CELLS] = json.dumps(found)
    return canvas


class Cells(records.Schema):
    """A row of a grid: boxes of its images, left, top, right and bottom, and their size [H, W] before they were enlarged or reduced."""

    label: str
    size: list[int]
    boxes: list[list[int]]


def cells(grid: Image.Image) -> dict[str, list[Image.Image]]:
    """The images in a picture of `picture_grid`, by row; those that were enlarged at their own size, those that were reduced as they are
    there. Empty for any other picture, and without rows of videos."""
    try:
        found = records.parse(grid.info.get(_CELLS, "[]"), list[Cells])
    except ValueError:
        return {}
    rows = {}
    for row in found:
        if len(row["size"]) == 2 and all(_inside(box, grid.size) for box in row["boxes"]):
            rows[row["label"]] = [_as_drawn(grid.crop(tuple(box)), *row["size"]) for box in row["boxes"]]
    return rows


def _inside(box: Sequence[int], size: tuple[int, int]) -> bool:
    return len(box) == 4 and 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def _as_drawn(image: Image.Image, height: int, width: int) -> Image.Image:
    enlarged = 0 < height < image.height and 0 < width < image.width
    return image.resize((width, height), Image.Resampling.NEAREST) if enlarged else image


def picture_row(images: Tensor) -> Image.Image:
    """Images (N, 3, H, W) float in [0, 1] side by side, pixel for pixel, without labels; of videos (N, 3, T, H, W) a strip each, one below the
    other."""
    if images.ndim == 4:
        return _joined(_to_images(images))
    strips = [_joined(frames) for frames in _frames(images)]
    column = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)))
    for i, strip in enumerate(strips):
        column.paste(strip, (0, i * strip.height))
    return column


def save_video(videos: Tensor, path: str | Path, rate: float) -> None:
    """Write videos (N, 3, T, H, W) float in [0, 1], side by side, as one lossless animated WebP, `rate` frames a second, in one step."""
    first, *others = [_joined(_to_images(videos[:, :, t])) for t in range(videos.shape[2])]
    content = io.BytesIO()
    first.save(content, format="WEBP", save_all=True, append_images=others, duration=round(1000 / rate), loop=0, lossless=True)
    write_atomically(Path(path), content.getvalue())


def _joined(parts: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(part.width for part in parts), parts[0].height))
    left = 0
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width
    return row


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    return frames[0] if len(frames) == 1 else _joined(frames)


def _frames(images: Tensor) -> list[list[Image.Image]]:
    """Of each image (N, 3, H, W) itself, of each video (N, 3, T, H, W) the first frame, the last, and those between."""
    if images.ndim != 5:
        return [[image] for image in _to_images(images)]
    count, last = min(STRIP, images.shape[2]), images.shape[2] - 1
    chosen = [round(i * last / max(1, count - 1)) for i in range(count)]
    return [list(frames) for frames in zip(*(_to_images(images[:, :, t]) for t in chosen), strict=True)]


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG in one step (readers see the old file or the whole new one), making its folder where there is none."""
    write_atomically(Path(path), png(image))


def png(image: Image.Image) -> bytes:
    """An image as the content of a PNG file; of a grid, with where its images are."""
    content, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    if _CELLS in image.info:
        texts.add_text(_CELLS, image.info[_CELLS])
    image.save(content, format="PNG", pnginfo=texts)
    return content.getvalue()


def _line(text: str) -> str:
    """A label or prompt as one line of characters that can be seen."""
    return printable(" ".join(text.split()))


def _to_images(images: Tensor) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")
    wide = images.detach().float().cpu()
    if not bool(wide.isfinite().all()):
        raise ValueError("images contain NaN or infinity")
    # Rounds half up, as evaluation does.
    pixels = (wide * 255 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(image) for image in pixels]


def _resized(image: Image.Image, cell: int) -> Image.Image:
    longer = max(image.size)
    if longer < cell:
        factor = math.ceil(cell / longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    largest = max(LARGEST, cell)
    if longer <= largest:
        return image
    width, height = (max(1, round(side * largest / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 1


def _name(label: str, font: ImageFont.FreeTypeFont, line: Sequence[Image.Image]) -> Image.Image:
    """A row's label, in as many lines as the row's height takes."""
    height = max((picture.height for picture in line), default=0)
    return _text(label, font, width=_LABEL_WIDTH, num_lines=max(1, height // _line_height(font)), align=1.0)


def _captions(columns: Sequence[str], font: ImageFont.FreeTypeFont, width: int) -> list[Image.Image]:
    """Upright where columns are wide, or every caption takes at most three lines with no word broken; otherwise running upwards."""
    inner = width - 4 * GAP
    words_fit = all(font.getlength(word) <= inner for text in columns for word in text.split())
    if width >= _UPRIGHT_WIDTH or (words_fit and all(len(_wrap(text, font, inner)) <= 3 for text in columns)):
        return [_text(text, font, width=inner, num_lines=8, align=0.5) for text in columns]
    num_lines = max(1, width // _line_height(font))
    texts = [_text(text, font, width=_ROTATED_LENGTH, num_lines=num_lines, align=0.0) for text in columns]
    return [text.transpose(Image.Transpose.ROTATE_90) for text in texts]


def _text(text: str, font: ImageFont.FreeTypeFont, *, width: int, num_lines: int, align: float) -> Image.Image:
    """Text on white, wrapped to `width`, cut off with an ellipsis after `num_lines`; `align` is 0 (left), 0.5 (centred) or 1 (right)."""
    lines = _wrap(text, font, width)
    if len(lines) > num_lines:
        last = lines[num_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: num_lines - 1], last.rstrip() + "…"]
    longest = max((math.ceil(font.getlength(line)) for line in lines), default=0)
    image = Image.new("RGB", (max(1, longest), max(1, len(lines)) * _line_height(font)), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((round(align * (longest - font.getlength(line))), i * _line_height(font)), line, font=font, fill=INK)
    return image


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; words longer than a line are broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines
