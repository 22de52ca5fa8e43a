"""Pictures that are there already as a subject: by id, beside their captions, in the right number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.dumps import PngFolder
from fastgen.evaluation.extraction import Drawing, drawn
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.protocol import PrepareBlock, SampleSet
from fastgen.evaluation.subjects.pictures import PicturesSubject

PROMPTS = ("a cat", "a dog", "a tree", "a house")
SETS = {"named": SampleSet("named", PROMPTS[:2], (1, 2)), "open": SampleSet("open", PROMPTS[2:], (3, 4), first=2)}


def pixels(count: int = 4, height: int = 6, width: int = 5) -> Tensor:
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def folder_with(path: Path, pictures: list[Tensor] | Tensor, captions: tuple[str, ...] | None = None) -> Path:
    path.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{index}.png")
    if captions is not None:
        rows = [{"file_name": f"{index}.png", "prompt": caption} for index, caption in enumerate(captions)]
        (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pictures_come_by_id(tmp_path: Path) -> None:
    subject = PicturesSubject(folder_with(tmp_path / "drawn", pixels(), PROMPTS))
    assert subject.check(SETS, whole=True) == []
    assert torch.equal(torch.stack(subject.draw(["a tree", "a cat"], [3, 1], [2, 0])), pixels()[[2, 0]])
    assert (subject.name, subject.steps, subject.guidance) == ("pictures", None, None)
    assert subject.record == {"source": "drawn", "pictures": 4, "captions": True}


def test_what_was_dumped_of_several_sets_or_models_is_refused_with_their_folders(tmp_path: Path) -> None:
    one, other = tmp_path / "dump/student_4steps/named", tmp_path / "dump/student_4steps/open"
    for folder, samples in zip((one, other), SETS.values(), strict=True):
        PngFolder(folder, samples, "model").write(range(2), pixels(2))
    assert PicturesSubject(one).check({"named": SETS["named"]}, whole=True) == []
    for folder in (tmp_path / "dump", one.parent):
        with pytest.raises(UserError, match=rf"^MODEL: '{folder}' holds pictures of several sets or models: name one of {one}, {other}$"):
            PicturesSubject(folder)
    with pytest.raises(UserError, match=r"^protocol p: reference\.images: '.*' holds pictures of several sets or models"):
        PictureFolder(tmp_path / "dump", "protocol p: reference.images")
    shutil.rmtree(other)
    assert len(PicturesSubject(tmp_path / "dump").pictures) == 2


def test_what_another_evaluation_dumped_is_measured_as_it_is(tmp_path: Path) -> None:
    samples = SampleSet("main", PROMPTS, (1, 2, 3, 4))
    PngFolder(tmp_path / "dump", samples, "model").write(range(4), pixels())
    subject = PicturesSubject(tmp_path / "dump")
    assert subject.check({"main": samples}, whole=True) == []
    found, _ = drawn(samples, range(4), Drawing(subject.draw, 3))
    assert isinstance(found, Tensor) and torch.equal(found, pixels())


def test_pictures_of_several_sizes_are_prepared_one_by_one(tmp_path: Path) -> None:
    sizes = [pixels(1, 6, 5)[0], pixels(1, 9, 8)[0], pixels(1, 7, 7)[0]]
    subject = PicturesSubject(folder_with(tmp_path / "drawn", sizes))
    found, _ = drawn(SampleSet("main", ("",) * 3, (1, 2, 3)), range(3), Drawing(subject.draw, 2, prepare=PrepareBlock(crop="centre", resize=4)))
    assert isinstance(found, list) and all(torch.equal(*pair) for pair in zip(found, sizes, strict=True))


def test_a_number_of_pictures_that_is_not_the_protocols(tmp_path: Path) -> None:
    fewer, more = (PicturesSubject(folder_with(tmp_path / f"{count}", pixels(count))) for count in (3, 5))
    with pytest.raises(
        UserError, match=r"^'.*3' holds 3 pictures, and the protocol measures 4; --stop-after N takes a quick look at the first ones$"
    ):
        fewer.check(SETS, whole=True)
    with pytest.raises(UserError, match=r"^'.*5' holds 5 pictures, and the protocol measures 4$"):
        more.check(SETS, whole=True)
    heads = {name: each.head(1) for name, each in SETS.items()}
    assert len(fewer.check(heads, whole=False)) == len(more.check(heads, whole=False)) == 1
    with pytest.raises(UserError, match=r"holds 3 pictures, and the protocol measures the first 4$"):
        fewer.check(SETS, whole=False)


def test_captions_must_be_the_protocols_prompts(tmp_path: Path) -> None:
    swapped = PicturesSubject(folder_with(tmp_path / "swapped", pixels(), ("a cat", "a dog", "a house", "a tree")))
    said = r"^'.*' has other prompts than the protocol: '2\.png' was drawn for 'a house', picture 2 of the protocol is for 'a tree'$"
    with pytest.raises(UserError, match=said):
        swapped.check(SETS, whole=True)
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    assert PicturesSubject(tmp_path / "swapped", tmp_path / "captions.txt").check(SETS, whole=True) == []
    unsaid = PicturesSubject(folder_with(tmp_path / "unsaid", pixels())).check(SETS, whole=True)
    assert len(unsaid) == 1 and unsaid[0].endswith("has no captions: its pictures are taken as those of the prompts, in the order of names")
    assert swapped.check({"main": SampleSet("main", ("",) * 4, (1, 2, 3, 4))}, whole=True) == []


def test_identity_is_that_of_the_pictures(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "drawn", pixels())
    found = PicturesSubject(folder).identity
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    assert PicturesSubject(copied).identity == found
    Image.fromarray(pixels()[0].permute(1, 2, 0).numpy()).save(copied / "1.png")
    assert PicturesSubject(copied).identity != found


def test_there_are_no_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--steps: 2, but what is measured takes no steps$"):
        PicturesSubject(folder_with(tmp_path / "drawn", pixels())).at(2)
