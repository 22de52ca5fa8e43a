"""Images with captions: picture files, as folders, archives and tables have them, or the embedded digits and scenes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import ImageColor
from torch import Tensor

from fastgen.config import DataBlock
from fastgen.data import digits, scenes
from fastgen.data.captions import KEY, Captions, Faults, read_captions
from fastgen.data.latents import LatentImages, latents_in, latents_of_sizes
from fastgen.data.pixels import Colour, Readable, Unreadable, check_header, read_rgb, upright_size
from fastgen.data.remote import is_remote
from fastgen.errors import UserError
from fastgen.files import expanded
from fastgen.fingerprints import digest, known_hash
from fastgen.rng import SampleRng

BUNDLED = ("fastgen:digits", "fastgen:scenes")


@dataclass(frozen=True)
class CaptionedImages:
    """captions[i]: every caption of image i with its probability. background: sRGB, what transparent pixels of files lie on. crop: of files,
    the middle or a random part. warnings: what was left out when the set was listed. undecodable: of those to be skipped, what `batches` has
    left out so far, each with why."""

    captions: list[Captions]
    sources: list[Any]  # image files, members of archives, cells of tables, or tensors (3, H, W) fp32 in [-1, 1]
    background: Colour = (255, 255, 255)
    crop: Literal["center", "random"] = "center"
    skip_broken: bool = False
    warnings: tuple[str, ...] = ()
    undecodable: dict[int, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.sources)

    def content(self, count: int | None = None) -> str:
        """What the set is, or its first `count` images, wherever they lie: SHA-256 over their captions and the bytes of their files, in order."""
        images = list(zip(self.captions, self.sources, strict=True))[:count]
        return digest([[list(captions.items()), _hash(source)] for captions, source in images])

    def check_size(self, height: int, width: int) -> None:
        """UserError for images that cannot be resized because they are tensors of another size."""
        for source in self.sources:
            if isinstance(source, Tensor) and source.shape[-1] != width:
                raise UserError(f"{KEY}: these images are {source.shape[-1]} pixels wide, the teacher needs {width}")
            if isinstance(source, Tensor) and source.shape[-2] != height:
                raise UserError(f"{KEY}: these images are {source.shape[-2]} pixels high, the teacher needs {height}")

    def batches(self, height: int, width: int, size: int = 64) -> Iterator[Tensor]:
        """Pixels (B, 3, height, width) fp32 in [-1, 1]: the largest crop of this aspect, resized with antialiasing. UserError for a file that
        cannot be decoded, or with `skip_broken` a place in `undecodable`."""
        self.check_size(height, width)
        for start in range(0, len(self), size):
            pixels = self.pixels(range(start, min(start + size, len(self))), height, width)
            if pixels:
                yield torch.stack(list(pixels.values()))

    def pixels(self, indices: Iterable[int], height: int, width: int) -> dict[int, Tensor]:
        """The same of single images, (3, height, width) by their index."""
        return {i: picture for i in indices if (picture := self._pixels(i, height, width)) is not None}

    def chosen(self, indices: Sequence[int]) -> CaptionedImages:
        """Some of them, in that order."""
        return replace(self, captions=[self.captions[i] for i in indices], sources=[self.sources[i] for i in indices], undecodable={})

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each as it is shown, by its header."""
        known = functools.cache(upright_size)  # a file may have several rows
        return [(source.shape[-2], source.shape[-1]) if isinstance(source, Tensor) else known(source) for source in self.sources]

    def enlarged(self, height: int, width: int) -> dict[int, tuple[int, int]]:
        """The files that `pixels` would enlarge, by their index, each with its (height, width); by their headers."""

        @functools.cache  # a file may have several rows
        def size(source: Any) -> tuple[int, int] | None:
            if min(check_header(source).size) >= max(height, width):  # however it is turned, which of some formats only decoding tells
                return None
            tall, wide = upright_size(source)
            return (tall, wide) if tall < height or wide < width else None

        return {i: found for i, source in enumerate(self.sources) if not isinstance(source, Tensor) and (found := size(source)) is not None}

    def decodable(self) -> tuple[CaptionedImages, list[str]]:
        """The images that `batches` has yielded, once it is through, and a warning of others; UserError where there is none."""
        kept = [i for i in range(len(self)) if i not in self.undecodable]
        warnings = Faults(self.skip_broken, list(self.undecodable.values())).warnings(len(kept))
        return self.chosen(kept), warnings

    def _pixels(self, index: int, height: int, width: int) -> Tensor | None:
        source, faults = self.sources[index], Faults(self.skip_broken)
        if isinstance(source, Tensor):
            return source
        from torchvision.transforms.v2 import functional

        try:
            crop = read_rgb(source, self.background, aspect=(height, width), place=self._place(index))
        except Unreadable as error:
            faults.add(_unreadable(source, error))
            self.undecodable[index] = faults.found[0]
            return None
        return (functional.resize(crop, [height, width], antialias=True) / 127.5 - 1).clamp(-1, 1)

    def _place(self, index: int) -> float:
        """Where image `index` is cropped, the same in every run: a seed of a run's own would be another data set, encoded again."""
        return 0.5 if self.crop == "center" else SampleRng(0, ("crop",), (index,)).uniform("place").item()


def images_of(data: DataBlock, sizes: Sequence[Sequence[int]] | None = None) -> CaptionedImages | LatentImages | None:
    """`load_images` of what a recipe names, or the latents there; None where it names nothing. sizes: student.sizes. UserError for keys that have
    nothing to say of it."""
    options = {key: getattr(data, key) for key in ("background", "caption_key", "skip_broken", "crop", "buckets")}
    given = [key for key, value in options.items() if value != DataBlock.model_fields[key].default]
    if given and data.images is None:
        raise UserError(f"recipe key data.{given[0]}: needs data.images, which it is about; remove it")
    if given and data.images in BUNDLED:
        raise UserError(f"recipe key data.{given[0]}: says how picture files are read, and {data.images} has none; remove it")
    if data.images is None:
        return None
    if is_remote(data.images):
        way_on = f"fastgen cache latents RECIPE data.images={data.images} --output DIR fetches and encodes it once, then data.images: DIR"
        raise UserError(f"recipe key data.images: {data.images!r} lies elsewhere, and training reads pictures at random; {way_on}")
    latents = None
    if data.images not in BUNDLED:
        folder = expanded(data.images)
        latents = latents_of_sizes(folder, sizes) or latents_in(folder) if sizes else latents_in(folder) or latents_of_sizes(folder, ())
    if given and latents is not None:
        raise UserError(f"recipe key data.{given[0]}: says how picture files are read, and {data.images!r} holds latents; remove it")
    options.pop("buckets")
    return load_images(data.images, **options) if latents is None else latents


def load_images(
    source: str, background: str = "white", caption_key: str = "text", *, skip_broken: bool = False, crop: Literal["center", "random"] = "center"
) -> CaptionedImages:
    """`fastgen:digits`, `fastgen:scenes`, or pictures with captions in a folder, an archive or tables, as `read_captions` finds them;
    reads every header.

    background: the colour of transparent pixels, as Pillow's ImageColor names it. caption_key: of metadata, the key or column with the caption
    or a list of captions. UserError for a picture without caption, file or format that is read, which `skip_broken` leaves out.
    """
    if source == "fastgen:scenes":
        return CaptionedImages(scenes.captions_of(scenes.training()), list(scenes.training().images))
    if source == "fastgen:digits":
        images, labels = digits.load_images()
        return CaptionedImages([digits.captions(label) for label in labels.tolist()], list(images))
    faults = Faults(skip_broken)
    rows, ignored = read_captions(expanded(source), caption_key, faults)
    problem = functools.cache(_header_problem)  # a file may have several rows
    for file, _ in rows:
        if why := problem(file):
            faults.add(why)
    kept = [(captions, file) for file, captions in rows if not problem(file)]
    red, green, blue = ImageColor.getrgb(background)[:3]
    warnings = (*ignored, *faults.warnings(len(kept)))
    return CaptionedImages([captions for captions, _ in kept], [file for _, file in kept], (red, green, blue), crop, skip_broken, warnings)


def _header_problem(file: Readable) -> str | None:
    try:
        check_header(file)
    except Unreadable as error:
        return _unreadable(file, error)
    return None


def _unreadable(file: Readable, error: Unreadable) -> str:
    return f"{str(file)!r} is not an image that can be read ({error})"


def _hash(source: Any) -> str:
    if isinstance(source, Tensor):
        return hashlib.sha256(source.numpy().tobytes()).hexdigest()
    return known_hash(source) if isinstance(source, Path) else source.content()
