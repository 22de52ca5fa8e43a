"""Pictures that somebody has drawn already, in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastgen.errors import UserError, shown
from fastgen.evaluation.picture_captions import read_captions
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.base import Subject
from fastgen.portable import source_name


class PicturesSubject(Subject):
    """A folder whose pictures are, in the order of their names, those of a protocol's ids. captions: a file of what each was drawn for, by
    default what lies beside the pictures; where there are any, they must be the protocol's prompts."""

    name: Literal["pictures"] = "pictures"

    def __init__(self, folder: Path, captions: Path | None = None, *, key: str = "MODEL") -> None:
        self.pictures = PictureFolder(folder, key)
        self.captions = read_captions(self.pictures, captions)

    @property
    def content(self) -> str:
        return self.pictures.content

    @property
    def record(self) -> dict[str, Any]:
        return {"source": source_name(str(self.pictures.folder)), "pictures": len(self.pictures), "captions": self.captions is not None}

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> list[str]:
        there, wanted = len(self.pictures), max(samples.first + len(samples) for samples in sets.values())
        where = f"{str(self.pictures.folder)!r}"
        if there < wanted or (whole and there != wanted):
            more = "; --stop-after N takes a quick look at the first ones" if whole and there < wanted else ""
            raise UserError(f"{where} holds {there} pictures, and the protocol measures {'' if whole else 'the first '}{wanted}{more}")
        for samples in sets.values():
            self._check_prompts(samples, where)
        unsaid = (
            [] if self.captions is not None else [f"{where} has no captions: its pictures are taken as those of the prompts, in the order of names"]
        )
        return [*self.pictures.warnings, *(unsaid if any(any(samples.prompts) for samples in sets.values()) else [])]

    def _check_prompts(self, samples: SampleSet, where: str) -> None:
        if self.captions is None or not any(samples.prompts):
            return
        for index, prompt in enumerate(samples.prompts, samples.first):
            if self.captions[index].strip() != prompt.strip():
                one, other = shown(self.captions[index], 80), shown(prompt, 80)
                what = f"{self.pictures.names[index]!r} was drawn for {one}, picture {index} of the protocol is for {other}"
                raise UserError(f"{where} has other prompts than the protocol: {what}")

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> list[Tensor]:
        return self.pictures.read(ids)
