"""What things are by content: hashes that follow bytes, seals that follow data, and a memory that never gives a wrong answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flipped

from fastgen import fingerprints
from fastgen.errors import UserError
from fastgen.fingerprints import CACHE, check_files, file_hash, file_hashes, file_names, folder_hash, known_hash, sealed, unsealed


def write(folder: Path, **files: str) -> Path:
    for file, text in files.items():
        path = folder / file.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_seal_follows_the_data_and_not_the_text() -> None:
    content = {"step": 3, "seconds": 0.1, "nested": {"b": [1, None, "é"], "a": True}}
    record = sealed(content)
    assert record["seal"] == sha256(b'{"nested": {"a": true, "b": [1, null, "\\u00e9"]}, "seconds": 0.1, "step": 3}')
    assert unsealed(json.loads(json.dumps(record, indent=3))) == content
    assert unsealed(dict(reversed(record.items()))) == content
    for other in (record | {"step": 4}, record | {"more": 1}, record | {"seal": None}, content, [], None):
        with pytest.raises(ValueError, match="seal"):
            unsealed(other)


def test_a_file_is_its_bytes_and_a_missing_one_is_a_users_mistake(tmp_path: Path) -> None:
    write(tmp_path, a="x", below__b="y")
    assert file_hash(tmp_path / "a") == sha256(b"x")
    assert file_hashes(tmp_path, ["below/b", "a"]) == {"below/b": sha256(b"y"), "a": sha256(b"x")}
    check_files(tmp_path, {"a": sha256(b"x")}, "saved")
    with pytest.raises(UserError, match=r"below/b': it is not the file that was saved"):
        check_files(tmp_path, {"a": sha256(b"x"), "below/b": sha256(b"x")}, "saved")
    with pytest.raises(UserError, match=r"cannot read '.*/c'"):
        check_files(tmp_path, {"c": sha256(b"x")}, "saved")


def test_a_folder_is_names_and_contents_only(tmp_path: Path) -> None:
    one = write(tmp_path / "one", config="x", unet__weights="y")
    expected = hashlib.sha256()
    for file, text in (("config", "x"), ("unet/weights", "y")):
        expected.update(file.encode() + b"\0" + hashlib.sha256(text.encode()).digest())
    assert folder_hash(one) == expected.hexdigest()
    assert folder_hash(write(tmp_path / "two", unet__weights="y", config="x")) == folder_hash(one)
    assert folder_hash(write(tmp_path / "three", config="x", unet__weights="z")) != folder_hash(one)
    assert folder_hash(write(tmp_path / "four", config="x", vae__weights="y")) != folder_hash(one)
    for ignored in ("README.md", "results.json", ".cache/huggingface/date"):
        (one / ignored).parent.mkdir(parents=True, exist_ok=True)
        (one / ignored).write_text("new")
    assert folder_hash(one) == expected.hexdigest()
    for missing in (tmp_path / "absent", write(tmp_path / "empty", **{"README.md": ""})):
        with pytest.raises(UserError, match="not a model folder"):
            folder_hash(missing)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", weights="w", config="c")
    write(tmp_path / "model", index="i")
    (tmp_path / "model/unet").symlink_to(tmp_path / "elsewhere")  # how a disk's large folders are often shared
    (tmp_path / "model/linked").symlink_to(tmp_path / "elsewhere/config")
    (tmp_path / "model/nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "model/self").symlink_to(tmp_path / "model")
    assert file_names(tmp_path / "model") == ["index", "linked", "unet/config", "unet/weights"]
    plain = write(tmp_path / "plain", index="i", linked="c", unet__config="c", unet__weights="w")
    assert folder_hash(plain) == folder_hash(tmp_path / "model")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, in which every file counts as large and as settled."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(fingerprints, "_LARGE", 0)
    monkeypatch.setattr(fingerprints, "_SETTLED", -1e9)
    return tmp_path / "home"


def entries(home: Path) -> list[Path]:
    return sorted((home / CACHE).glob("*")) if (home / CACHE).is_dir() else []


def no_reading(_: Path) -> str:
    pytest.fail("the file was read again")


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, file="one") / "file"
    assert known_hash(file) == sha256(b"one")
    (tmp_path / "link").symlink_to(file)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "file_hash", no_reading)
        assert known_hash(file) == known_hash(tmp_path / "link") == sha256(b"one")
    assert len(entries(home)) == 1
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and `rsync -t` do: size, mtime and inode are the same
    assert known_hash(file) == sha256(b"two")
    file.rename(tmp_path / "moved")
    write(tmp_path, file="six")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (known_hash(file), known_hash(tmp_path / "moved")) == (sha256(b"six"), sha256(b"two"))


def test_small_files_and_those_that_have_just_changed_are_not_remembered(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, file="one") / "file"
    for name, value in (("_LARGE", 4), ("_SETTLED", 1e9)):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprints, name, value)
            assert known_hash(file) == sha256(b"one")
    assert entries(home) == []


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, file="one") / "file"

    def changing(path: Path) -> str:
        value = file_hash(path)
        path.write_text("another")
        return value

    monkeypatch.setattr(fingerprints, "file_hash", changing)
    known_hash(file)
    assert entries(home) == []


def another_hash(entry: Path) -> None:
    entry.write_text(entry.read_text().replace(sha256(b"one"), sha256(b"two")))


def another_file(entry: Path) -> None:
    entry.write_text(json.dumps(sealed({"file": {"inode": 1}, "sha256": sha256(b"two")})))


def no_hash(entry: Path) -> None:
    entry.write_text(json.dumps(sealed({**unsealed(json.loads(entry.read_text())), "sha256": "two"})))


def a_folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


TEXTS = (b"", b"{", b"[]", b"\xff", b"[" * 99_999)


@pytest.mark.parametrize("damage", [another_hash, another_file, no_hash, a_folder, *TEXTS])
def test_a_damaged_entry_is_never_believed(tmp_path: Path, home: Path, damage: Callable[[Path], object] | bytes) -> None:
    file = write(tmp_path, file="one") / "file"
    known_hash(file)
    (entry,) = entries(home)
    if isinstance(damage, bytes):
        entry.write_bytes(damage)
    else:
        damage(entry)
    assert known_hash(file) == sha256(b"one")


def test_one_flipped_bit_in_an_entry_is_never_believed(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path, file="one") / "file"
    known_hash(file)
    (entry,) = entries(home)
    content = entry.read_bytes()
    for bit in range(0, 8 * len(content), 61):
        entry.write_bytes(flipped(content, bit))
        assert known_hash(file) == sha256(b"one")


def test_without_a_place_to_remember_files_are_read(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, file="one") / "file"
    write(tmp_path, home="a file where the home should be")
    assert known_hash(file) == sha256(b"one")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert known_hash(file) == sha256(b"one")
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        known_hash(tmp_path / "nowhere")
