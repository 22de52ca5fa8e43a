"""A folder of pictures that somebody has drawn already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.errors import UserError, shown
from fastgen.evaluation.picture_captions import read_captions
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.protocol import PrepareBlock, SampleSet
from fastgen.evaluation.subjects.base import Subject


class PicturesSubject(Subject):
    """Picture i of the folder, in the order of names, is what was drawn for id i. captions: a file of what they were drawn for; by default what
    lies beside the pictures, where something does. They must be the protocol's prompts."""

    name: Literal["pictures"] = "pictures"

    def __init__(self, folder: Path, captions: Path | None = None) -> None:
        self.folder = PictureFolder(folder, "MODEL")
        self.captions = read_captions(self.folder, captions)

    @property
    def content(self) -> str:
        return self.folder.content

    @property
    def record(self) -> dict[str, Any]:
        return {"source": self.folder.folder.name, "pictures": len(self.folder), "captions": self.captions is not None}

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> list[str]:
        needed = sum(map(len, sets.values())) if whole else max(samples.first + len(samples) for samples in sets.values())
        if len(self.folder) < needed or (whole and len(self.folder) > needed):
            raise UserError(f"{str(self.folder.folder)!r} holds {len(self.folder)} pictures, and {needed} are measured, one for each prompt")
        self.folder.check_sizes(PrepareBlock())
        for samples in sets.values() if self.captions is not None else ():
            for row, prompt in enumerate(samples.prompts):
                if (caption := self.captions[samples.first + row]) != prompt:  # type: ignore[index]
                    name = self.folder.names[samples.first + row]
                    raise UserError(f"the caption of {name!r} is {shown(caption, 80)}, and the protocol's prompt there is {shown(prompt, 80)}")
        return list(self.folder.warnings)

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        return torch.stack(self.folder.read(list(ids)))
