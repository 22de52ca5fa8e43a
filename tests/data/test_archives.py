"""Pictures in tar archives are the same training pictures as those in a folder, read where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgen.data.archives import Member, samples
from fastgen.data.images import load_images
from fastgen.errors import UserError


def picture(level: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").rotate(90 * level).convert("RGB").save(file, kind)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes | str], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


THREE: dict[str, bytes | str] = {
    "a/0001.png": picture(1), "a/0001.txt": "a  cat\n", "a/0001.json": json.dumps({"caption": ["one", "two"]}),
    "a/0002.jpg": picture(2, "jpeg"), "a/0002.TXT": "a dog",
    "__key__": "x", "a/.hidden.png": b"", "a/0002.cls": "7",
    "b/0001.webp": picture(3, "webp"), "b/0001.txt": "a cow",
}  # fmt: skip


def refused(source: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=rf"^recipe key data\.images: .*{message}") as error:
        load_images(str(source), **options)
    assert "\n" not in str(error.value)


def test_an_archive_gives_what_its_unpacked_folder_does(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.tar", {name: content for name, content in THREE.items() if name.startswith("a/000")})
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    packed, unpacked = load_images(str(archive)), load_images(str(tmp_path / "folder/a"))
    assert packed.captions == unpacked.captions == [{"a cat": 1.0}, {"a dog": 1.0}]
    pixels = [torch.cat(list(images.batches(12, 20))) for images in (packed, unpacked)]
    assert pixels[0].shape == (2, 3, 12, 20) and torch.equal(*pixels)
    assert not torch.equal(pixels[0][0], pixels[0][1])


def test_archives_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    pack(tmp_path / "train/shard-1.tar", {"0.png": picture(0), "0.txt": "last"})
    pack(tmp_path / "train/shard-0.TAR", THREE)
    images = load_images(str(tmp_path))
    assert [str(source) for source in images.sources] == [
        f"{tmp_path}/train/{name}" for name in ("shard-0.TAR/a/0001.png", "shard-0.TAR/a/0002.jpg", "shard-0.TAR/b/0001.webp", "shard-1.tar/0.png")
    ]
    assert [list(captions) for captions in images.captions] == [["a cat"], ["a dog"], ["a cow"], ["last"]]


def test_archives_beside_what_is_read_are_named(tmp_path: Path) -> None:
    pack(tmp_path / "set.tar", THREE)
    (tmp_path / "x.png").write_bytes(picture(0))
    (tmp_path / "x.txt").write_text("x")
    images = load_images(str(tmp_path))
    assert (len(images), images.warnings) == (1, ("recipe key data.images: x.txt is read, set.tar beside it is not",))
    (tmp_path / "metadata.csv").write_text("file_name,text\nx.png,x")
    assert load_images(str(tmp_path)).warnings == ("recipe key data.images: metadata.csv is read, set.tar beside it is not",)


def test_a_key_of_the_recipe_is_one_of_the_json(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.tar", {name: THREE[name] for name in ("a/0001.png", "a/0001.txt", "a/0001.json")})
    assert load_images(str(archive), caption_key="caption").captions == [{"one": 0.5, "two": 0.5}]
    refused(archive, r"0001\.json' has no caption: no 'captions' among its keys 'caption'; did you mean", caption_key="captions")


def test_a_member_is_a_file_of_its_own(tmp_path: Path) -> None:
    found, problems = samples(pack(tmp_path / "set.tar", {"a.txt": "0123456789", "b.txt": "x" * 100_000, "c.txt": ""}))
    first, second, third = (files["txt"] for files in found.values())
    assert problems == []
    with first.open() as file:
        assert file.read(3) == b"012" and file.seek(-4, 2) == 6 and file.read(99) == b"6789" and file.read() == b""
        assert file.seek(1) == 1 and file.seek(2, 1) == 3 and file.tell() == 3 and file.read() == b"3456789"
    with second.open() as file:
        assert file.read() == b"x" * 100_000
    with third.open() as file:
        assert file.read() == b""


def test_the_set_is_its_archives_content_wherever_they_lie(tmp_path: Path) -> None:
    one, same = pack(tmp_path / "1/set.tar", THREE), pack(tmp_path / "2/moved.tar", THREE)
    other = pack(tmp_path / "3/set.tar", THREE | {"b/0001.webp": picture(2, "webp")})
    contents = [load_images(str(archive)).content() for archive in (one, same, other)]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"c.png": picture(0)}, r"'.*set\.tar/c' has no caption: there is no \.txt and no \.json beside the picture"),
        ({"c.png": picture(0), "c.jpg": picture(0), "c.txt": "c"}, r"'.*set\.tar/c' has 2 pictures: c\.png, c\.jpg"),
        ({"c.png": picture(0), "c.txt": " \n"}, r"c\.txt' has no caption: 'text' is ''"),
        ({"c.png": picture(0), "c.txt": b"caf\xe9"}, r"c\.txt' is not UTF-8 text"),
        ({"c.png": picture(0), "c.json": "{"}, r"c\.json' is not JSON"),
        ({"c.png": picture(0), "c.json": "[1]"}, r"c\.json' is not a JSON object, but \[1\]"),
        ({"c.png": picture(0), "c.json": "{}"}, r"c\.json' has no caption: no 'text' among its keys"),
        ({"c.png": b"no picture", "c.txt": "c"}, r"c\.png' is not an image that can be read"),
    ],
)
def test_a_broken_sample_is_named_and_left_out_only_when_asked(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    archive = pack(tmp_path / "set.tar", {**THREE, **files, "d.png": picture(0), "d.txt": "d"})
    refused(archive, message + ".*; data.skip_broken: true leaves such pictures out")
    images = load_images(str(archive), skip_broken=True)
    assert len(images) == 4 and images.warnings[0].startswith("recipe key data.images: 1 of 5 pictures are left out, such as: ")


def test_a_picture_whose_pixels_are_broken_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.tar", {**THREE, "c.png": picture(0)[:-60], "c.txt": "c"})
    with pytest.raises(UserError, match=r"set\.tar/c\.png' is not an image that can be read"):
        list(load_images(str(archive)).batches(8, 8))
    images = load_images(str(archive), skip_broken=True)
    assert sum(map(len, images.batches(8, 8))) == 3 and len(images.decodable()[0]) == 3


@pytest.mark.parametrize("cut", [0, 200, 700, 5000])
def test_an_archive_that_breaks_off_gives_its_whole_samples_only_when_asked(tmp_path: Path, cut: int) -> None:
    whole = pack(tmp_path / "whole.tar", {f"{i}.{kind}": picture(i) if kind == "png" else f"{i}" for i in range(40) for kind in ("png", "txt")})
    (tmp_path / "set.tar").write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2 + cut])
    refused(tmp_path / "set.tar", r"set\.tar' is no tar archive that can be read after \d+ files \(")
    images = load_images(str(tmp_path / "set.tar"), skip_broken=True)
    assert 10 < len(images) < 30 and "pictures are left out" in images.warnings[0]
    assert len(torch.cat(list(images.batches(4, 4)))) == len(images)


def test_a_header_that_is_damaged_does_not_end_a_set_unsaid(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.tar", THREE)
    found, _ = samples(archive)
    content = bytearray(archive.read_bytes())
    content[found["b/0001"]["webp"].offset - 400] ^= 0xFF
    archive.write_bytes(content)
    refused(archive, r"set\.tar' is no tar archive that can be read after 6 files \(it breaks off before its end is marked\)")
    assert len(load_images(str(archive), skip_broken=True)) == 2


def test_what_is_no_archive_says_so(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(b"not a tar" * 200)
    refused(tmp_path / "set.tar", r"set\.tar' is no tar archive that can be read \(")
    refused(tmp_path / "set.tar", r"all of 1 pictures are broken, the first: '.*set\.tar' is no tar archive", skip_broken=True)
    (tmp_path / "set.tar").unlink()
    refused(tmp_path / "set.tar", "there is nothing")
    packed = pack(tmp_path / "set.tar.gz", THREE, "w:gz")
    for source in (packed, tmp_path):
        refused(source, "compressed archives give no picture on its own: unpack them, or make .tar of them")
    twice = pack(tmp_path / "twice/set.tar", THREE)
    with tarfile.open(twice, "a") as tar:
        tar.addfile(tarfile.TarInfo("a/0001.png"))
    refused(twice, r"set\.tar' holds 'a/0001\.png' twice")


def test_members_have_names_for_people(tmp_path: Path) -> None:
    assert str(Member(tmp_path / "s.tar", "a/1.png", 512, 3)) == f"{tmp_path}/s.tar/a/1.png"
