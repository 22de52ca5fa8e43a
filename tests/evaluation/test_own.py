"""Protocols made of prompts and pictures on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgen.errors import UserError
from fastgen.evaluation.own import protocol_of

BY_PICTURES = ["fid", "fid_infinity", "kid", "precision_recall", "fd_dinov2", "cmmd"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n\na tree\n")
    return path


def pictures(folder: Path, captions: list[str] | None = None) -> Path:
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"{index}.png")
    if captions:
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"file_name": f"{i}.png", "prompt": text}) + "\n" for i, text in enumerate(captions))
        )
    return folder


def test_prompts_and_pictures(prompts: Path, tmp_path: Path) -> None:
    protocol = protocol_of(None, prompts=prompts, images=pictures(tmp_path / "real"))
    assert protocol.name == "own" and protocol.spec.size is None
    assert protocol.sets["main"].prompts == ("a cat", "a dog", "a tree")
    assert list(protocol.spec.metrics) == ["clip_score", *BY_PICTURES]
    assert protocol.spec.reference is not None and protocol.spec.reference.images == str(tmp_path / "real")


def test_prompts_alone_are_compared_with_their_pictures(prompts: Path) -> None:
    protocol = protocol_of(None, prompts=prompts)
    assert list(protocol.spec.metrics) == ["clip_score"] and protocol.spec.reference is None


def test_a_count_takes_some_or_begins_again(prompts: Path) -> None:
    assert protocol_of(None, prompts=prompts, count=2).sets["main"].prompts == ("a cat", "a dog")
    assert protocol_of(None, prompts=prompts, count=5).sets["main"].prompts == ("a cat", "a dog", "a tree", "a cat", "a dog")
    assert len(set(protocol_of(None, prompts=prompts, count=5).sets["main"].seeds)) == 5


def test_models_without_conditions(tmp_path: Path) -> None:
    protocol = protocol_of(None, model="owner/name", images=pictures(tmp_path / "real"), count=7)
    assert protocol.sets["main"].prompts == ("",) * 7 and list(protocol.spec.metrics) == BY_PICTURES


def test_pictures_that_are_there_bring_their_number_and_captions(tmp_path: Path) -> None:
    real = pictures(tmp_path / "real")
    plain = protocol_of(None, model=str(pictures(tmp_path / "plain")), images=real)
    assert plain.sets["main"].prompts == ("",) * 3 and list(plain.spec.metrics) == BY_PICTURES
    told = protocol_of(None, model=str(pictures(tmp_path / "told", ["a cat", "a dog", "a tree"])), images=real)
    assert told.sets["main"].prompts == ("a cat", "a dog", "a tree") and list(told.spec.metrics) == ["clip_score", *BY_PICTURES]
    assert told.hash() != plain.hash()
    (tmp_path / "captions.txt").write_text("one\ntwo\nthree\n")
    assert protocol_of(None, model=str(tmp_path / "plain"), images=real, captions=tmp_path / "captions.txt").sets["main"].prompts[0] == "one"


def test_without_either_it_is_a_protocol_by_name() -> None:
    assert protocol_of(None).name == "digits" and protocol_of("digits").name == "digits"
    with pytest.raises(UserError, match=r"^unknown protocol 'digit' \(--protocol\): did you mean 'digits'"):
        protocol_of("digit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": Path("real")}, "^--images: needs --prompts, of which pictures are drawn, or --count"),
        ({"count": 5}, "^--count: needs --prompts or --images"),
        ({"protocol": "digits", "images": Path("real")}, "^--prompts and --images make a protocol of their own, and --protocol digits is one"),
        ({"prompts": Path("nowhere.txt")}, "^--prompts: .*no file '.*nowhere.txt'"),
    ],
)
def test_options_that_exclude_or_need_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        protocol_of(options.pop("protocol", None), model="owner/name", **options)
