"""Where weights are looked up: below one folder, whatever a protocol calls them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fastgen.errors import UserError
from fastgen.evaluation.extraction import Extractors
from fastgen.evaluation.extractors.base import Resources, feature
from fastgen.evaluation.weights import Unavailable, Weights


def test_files_and_folders_lie_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "a.pth").write_bytes(b"a")
    weights = Weights(tmp_path)
    assert weights.file("net/a.pth", source="s", sha256=hashlib.sha256(b"a").hexdigest()[:8]) == tmp_path / "net/a.pth"
    assert weights.directory("net", source="s", files=["a.pth"]) == tmp_path / "net"
    with pytest.raises(Unavailable, match=r"^needs b\.pth, which is not in '.*': get it from s and put it there$"):
        weights.file("b.pth", source="s")
    with pytest.raises(
        Unavailable, match=r"^needs a\.pth from s: put it into a folder and name that with --weights-dir \(recipe key evaluate.weights_dir\)$"
    ):
        Weights().file("a.pth", source="s")


@pytest.mark.parametrize("name", ["{root}/secret.pth", "../secret.pth", "net/../../secret.pth", ".."])
@pytest.mark.parametrize("folder", [True, False])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str, folder: bool) -> None:
    (tmp_path / "weights" / "net").mkdir(parents=True)
    (tmp_path / "secret.pth").write_bytes(b"s")
    name = name.format(root=tmp_path)
    for look in (Weights(tmp_path / "weights" if folder else None).file, Weights(tmp_path / "weights").directory):
        with pytest.raises(UserError, match=rf"^weights '{name}': they are looked up below --weights-dir; give their name there") as caught:
            look(name, source="s")
        assert not isinstance(caught.value, Unavailable)


def test_so_is_one_of_a_protocol(tmp_path: Path) -> None:
    extractors = Extractors(Resources(Weights(tmp_path)))
    for each in (
        feature("inception", "pool3", weights="../mine.pth", sha256="0" * 64),
        feature("open_clip", "image", model="ViT-B-32", pretrained="/home/me/clip.pt"),
    ):
        with pytest.raises(UserError, match=r"^weights '(\.\./mine\.pth|/home/me/clip\.pt)': they are looked up below --weights-dir"):
            extractors.require([each])
