"""A caption for each picture, whatever it is written in; none that could be another picture's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fastgen.errors import UserError
from fastgen.evaluation.picture_captions import read_captions
from fastgen.evaluation.picture_folder import PictureFolder


def folder(path: Path, *names: str) -> PictureFolder:
    path.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (2, 2)).save(path / name)
    return PictureFolder(path, "--images")


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_are_in_the_order_of_the_names(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "set", "10.png", "2.png", "1.png")
    (tmp_path / "a.txt").write_text("one\n two \nten, with ümlauts\n", encoding="utf-8")
    assert read_captions(pictures, tmp_path / "a.txt") == ["one", "two", "ten, with ümlauts"]
    lines(tmp_path / "a.jsonl", {"prompt": "one"}, {"caption": "two"}, {"text": ["ten"]})
    assert read_captions(pictures, tmp_path / "a.jsonl") == ["one", "two", "ten"]
    (tmp_path / "a.csv").write_text('id,caption\n0,one\n1,"two, with\na new line"\n2,ten\n')
    assert read_captions(pictures, tmp_path / "a.csv") == ["one", "two, with\na new line", "ten"]
    (tmp_path / "a.txt").write_text("one\n\nten")  # the second picture was drawn for no prompt
    assert read_captions(pictures, tmp_path / "a.txt") == ["one", "", "ten"]


def test_rows_with_names_may_be_in_any_order_and_of_more_pictures(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "set", "a.png", "b.png")
    rows = [{"file_name": f"{name}.png", "text": f"of {name}"} for name in "cba"]
    assert read_captions(pictures, lines(tmp_path / "all.jsonl", *rows, rows[0])) == ["of a", "of b"]
    (tmp_path / "all.tsv").write_text("file_name\tprompt\n./b.png\tof b\na.png\tof a\n")
    assert read_captions(pictures, tmp_path / "all.tsv") == ["of a", "of b"]


def test_what_lies_beside_the_pictures_is_found(tmp_path: Path) -> None:
    pictures = folder(tmp_path, "a.png", "b.png")
    assert read_captions(pictures) is None
    (tmp_path / "a.txt").write_text("a\nby text\n")
    (tmp_path / "b.txt").write_text("b by text")
    assert read_captions(pictures) == ["a by text", "b by text"]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a by csv\nb.png,b by csv\n")
    assert read_captions(pictures) == ["a by csv", "b by csv"]
    lines(tmp_path / "metadata.jsonl", {"file_name": "b.png", "text": "b by json"}, {"file_name": "a.png", "text": "a by json"})
    assert read_captions(pictures) == ["a by json", "b by json"]
    lines(tmp_path / "prompts.jsonl", *({"id": i, "file_name": f"{name}.png", "prompt": name, "seed": i} for i, name in enumerate("ab")))
    assert read_captions(pictures) == ["a", "b"]  # as `fastgen evaluate` itself leaves them
    lines(tmp_path / "own.jsonl", {"prompt": "x"}, {"prompt": "y"})
    assert read_captions(pictures, tmp_path / "own.jsonl") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "one\n", r"'.*a\.txt' holds 1 captions, '.*' 2 pictures; give one for each$"),
        ("a.txt", "one\ntwo\nthree\n", r"'.*a\.txt' holds 3 captions, '.*' 2 pictures"),
        ("a.txt", "one\ntw\0o\n", r"'.*a\.txt' holds NUL bytes"),
        ("a.md", "one\ntwo\n", r"'.*a\.md' is none of \*\.txt, \*\.jsonl, \*\.csv, \*\.tsv$"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', r"'.*a\.jsonl' line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]', r"'.*a\.jsonl' line 2 has no one caption, which is a text prompt, caption or text: \['y'\]$"),
        ("a.jsonl", '{"text": ["x", "y"]}\n', r"line 1 has no one caption"),
        ("a.jsonl", '{"text": "x", "file_name": 3}\n', r"line 1 has the file_name 3, which is no name of a file$"),
        ("a.jsonl", '{"text": "x", "file_name": "a.png"}\n{"text": "y"}\n', r"'.*' has a file_name in some rows and none in others$"),
        ("a.jsonl", '{"text": "x", "file_name": "a.png"}\n{"text": "y", "file_name": "a.png"}', r"'.*' has two captions of 'a\.png'"),
        ("a.jsonl", '{"text": "x", "file_name": "a.png"}\n', r"'.*' has no captions for 1 of 2 pictures, the first: 'b\.png'$"),
        ("a.jsonl", '{"text": "x"}\n{"text": "\\ud800"}\n', r"the caption of 'b\.png' holds half a surrogate pair"),
    ],
)
def test_captions_that_are_not_one_for_each_picture_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    pictures = folder(tmp_path / "set", "a.png", "b.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"^--captions: .*{said}"):
        read_captions(pictures, tmp_path / name)


def test_a_caption_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--captions: no file '.*gone\.txt'$"):
        read_captions(folder(tmp_path, "a.png"), tmp_path / "gone.txt")
    (tmp_path / "a.txt").write_text("x")
    pictures = folder(tmp_path, "a.png", "b.png")
    with pytest.raises(UserError, match=r"^--images: '.*' has no captions for 1 of 2 pictures, the first: 'b\.png'$"):
        read_captions(pictures)
