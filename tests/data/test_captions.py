"""The forms in which captions lie beside pictures, and what is said of a folder without any."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgen.data.images import load_images
from fastgen.errors import UserError


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(folder / name)
    return folder


def captions(folder: Path, **options: Any) -> dict[str, dict[str, float]]:
    images = load_images(str(folder), **options)
    return {str(file.relative_to(folder)): shares for file, shares in zip(images.sources, images.captions, strict=True)}


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=rf"^recipe key data\.images: .*{message}") as error:
        load_images(str(folder), **options)
    assert "\n" not in str(error.value)


def test_csv_with_quotes_and_other_columns(tmp_path: Path) -> None:
    rows = 'width,file_name, text\r\n2,a.png,"one, ""two""\r\nthree"\r\n\r\n2,b.png, four\r\n'
    (pictures(tmp_path, "a.png", "b.png") / "metadata.csv").write_bytes(rows.encode("utf-8-sig"))
    assert captions(tmp_path) == {"a.png": {'one, "two"\r\nthree': 1.0}, "b.png": {"four": 1.0}}


def test_parquet_with_lists_and_other_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"file_name": ["a.png", "b.png"], "text": [["one", "one", "two", "three"], ["four"]], "width": [2, 2]}
    pyarrow.parquet.write_table(pyarrow.table(rows), pictures(tmp_path, "a.png", "b.png") / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": {"one": 0.5, "two": 0.25, "three": 0.25}, "b.png": {"four": 1.0}}
    refused(
        tmp_path,
        r"metadata\.parquet' row 1 has no caption: no 'caption' among its keys 'file_name', 'text', 'width'; did you mean",
        caption_key="caption",
    )
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a.png"], "text": ["one"]}), tmp_path / "metadata.parquet")
    refused(tmp_path, r"metadata\.parquet' has no column 'file_name', but \['name', 'text'\]")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    refused(tmp_path, r"metadata\.parquet' is not a parquet file that can be read")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"metadata\.csv' is empty"),
        ("file_name,text\n", r"metadata\.csv' is empty"),
        ("a.png,a cat\n", r"metadata\.csv' line 1 must name the columns, .* file_name among them; it is \['a\.png', 'a cat'\]"),
        ("file_name;text\na.png;a cat\n", r"line 1 must name the columns, once each and separated by commas"),
        ("file_name,text,text\na.png,a,b\n", r"line 1 must name the columns, once each"),
        ("file_name,text\na.png,a cat\n\na.png,a cat, black\n", r"line 4 has 3 fields for 2 columns; a text with commas needs quotes"),
        ('file_name,text\na.png,"a\ncat"\na.png\n', r"line 4 has 1 fields for 2 columns"),
        ('file_name,text\na.png,"a cat\n', r"line 2 is not CSV \(unexpected end of data\)"),
        ("file_name,text\na.png," + "a" * 200_000, r"line 2 is not CSV \(field larger than field limit"),
        ("file_name,text\na.png,a cat\na.png, \n", r"line 3 has no caption: 'text' is ''"),
        ("file_name,text\na.png,a\0\n", r"metadata\.csv' holds NUL bytes"),
    ],
)
def test_mistakes_in_csv_are_named_with_their_line(tmp_path: Path, content: str, message: str) -> None:
    (pictures(tmp_path, "a.png") / "metadata.csv").write_text(content)
    refused(tmp_path, message)


def test_texts_beside_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.c.JPG", "b.png", ".hidden.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.txt").write_text("  a\tcat,\n\nblack \n")
    (tmp_path / "b.TXT").write_text("a dog", encoding="utf-16")
    (tmp_path / "b.c.txt").write_text("two\u2028lines", encoding="utf-8-sig")
    (tmp_path / "notes.txt").write_bytes(b"\xff of no picture")
    assert captions(tmp_path) == {"a.png": {"a cat, black": 1.0}, "b.c.JPG": {"two lines": 1.0}, "b.png": {"a dog": 1.0}}


def test_a_picture_without_its_text_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "c.txt").write_text(" \n")
    refused(tmp_path, r"b\.png' has no caption: there is no 'b\.txt' beside it; data\.skip_broken: true leaves")
    (tmp_path / "b.png").unlink()
    refused(tmp_path, r"c\.png' has no caption: '.*c\.txt' is empty; data\.skip_broken: true leaves")
    assert captions(tmp_path, skip_broken=True) == {"a.png": {"a cat": 1.0}}
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(tmp_path, r"a\.txt' is not UTF-8 text", skip_broken=True)


@pytest.mark.parametrize(("name", "encoding"), [("metadata.jsonl", "utf-16"), ("METADATA.JSONL", "utf-8-sig"), ("Metadata.CSV", "utf-32")])
def test_train_folders_upper_case_and_marked_encodings(tmp_path: Path, name: str, encoding: str) -> None:
    train = pictures(tmp_path / "train", "A.PNG")
    pictures(tmp_path / "test", "b.png")
    text = "file_name,text\nA.PNG,Bär" if name.endswith("CSV") else json.dumps({"file_name": "A.PNG", "text": "Bär"}, ensure_ascii=False)
    (train / name).write_text(text, encoding=encoding)
    assert captions(tmp_path) == {"train/A.PNG": {"Bär": 1.0}}


def test_texts_in_a_train_folder(tmp_path: Path) -> None:
    (pictures(tmp_path / "train", "a.png") / "a.txt").write_text("a cat")
    assert captions(tmp_path) == {"train/a.png": {"a cat": 1.0}}


def test_of_two_metadata_files_one_is_read_and_it_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,of csv")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "of jsonl"}')
    (tmp_path / "a.txt").write_text("of txt")
    assert captions(tmp_path) == {"a.png": {"of jsonl": 1.0}}
    assert load_images(str(tmp_path)).warnings == ("recipe key data.images: metadata.jsonl is read, metadata.csv beside it is not",)


def test_another_caption_key(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "blip_caption": ["a cat", "a dog"], "caption": "a cow", "tex": "a hen"}')
    assert captions(tmp_path, caption_key="blip_caption") == {"a.png": {"a cat": 0.5, "a dog": 0.5}}
    keys = r"among its keys 'file_name', 'blip_caption', 'caption', 'tex'"
    refused(tmp_path, rf"line 1 has no caption: no 'text' {keys}; did you mean data\.caption_key: 'tex'\?")
    refused(tmp_path, rf"no 'blip' {keys}; did you mean data\.caption_key: 'caption'\?", caption_key="blip")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,words\na.png,a cat")
    refused(tmp_path, r"line 2 has no caption: no 'text' among its keys 'file_name', 'words'; did you mean data\.caption_key: 'words'\?")


def test_a_folder_without_captions_is_told_what_it_holds(tmp_path: Path) -> None:
    files = r"metadata\.jsonl, metadata\.csv, metadata\.parquet, \.txt files beside the pictures, \.tar archives of these, "
    files += "or tables of Hugging Face's datasets"
    forms = f"is neither fastgen:digits, fastgen:scenes nor a folder with {files}: "
    pictures(tmp_path / "a", *(f"{i}.png" for i in range(12)), "x.JPG")
    (tmp_path / "a/captions.json").write_text("[]")
    (tmp_path / "a/val").mkdir()
    refused(tmp_path / "a", forms + r"it holds 12 \.png files, captions\.json, val/, x\.JPG$")
    pictures(tmp_path / "0.tgz")
    (tmp_path / "0.tgz/0.tgz").touch()
    refused(tmp_path / "0.tgz", forms + r"it holds 0\.tgz; compressed archives give no picture on its own")
    pictures(tmp_path / "many")
    for i in range(9):
        (tmp_path / f"many/a.{i}").touch()
    refused(tmp_path / "many", forms + r"it holds a\.0, .*, a\.5 and 3 other kinds$")
    pictures(tmp_path / "empty")
    refused(tmp_path / "empty", forms + "it is empty$")
    refused(tmp_path / "nothing", forms + "there is nothing$")
    refused(tmp_path / "a/captions.json", forms + "it is no folder$")
    refused(tmp_path / ("n" * 300), "cannot read '.*nnn': File name too long")
    with pytest.raises(UserError, match=forms + "there is nothing$"):
        load_images("fastgen:faces")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.jsonl")
    refused(tmp_path, r"metadata\.jsonl' is no file, but a device, a pipe or a socket")
    (tmp_path / "metadata.jsonl").unlink()
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    refused(tmp_path, r"a\.png' is no file, but a device")
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to("/dev/zero")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    refused(tmp_path, r"line 1: '.*a\.png' is no file, but a device")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "kept")
    (tmp_path / "a.png").rename(tmp_path / "a.parquet")
    refused(tmp_path, r"a\.parquet' is no file, but a device")
    (tmp_path / "kept").rename(tmp_path / "metadata.jsonl")
    (tmp_path / "a.png").mkdir()
    refused(tmp_path, r"line 1: '.*a\.png' is a folder, not a file")
