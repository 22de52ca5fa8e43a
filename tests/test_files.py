"""Writing: what is there afterwards, and what is said where it cannot be done."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgen import files
from fastgen.errors import UserError
from fastgen.files import PARTIAL, check_writable, check_writable_file, publish, recover, remove, share, write_atomically, writing


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    assert mode(write_atomically(tmp_path / "new/file", "x")) == 0o666 & ~umask
    save_file({"x": torch.zeros(2)}, tmp_path / "new/weights.safetensors")
    share(tmp_path / "new")
    assert mode(tmp_path / "new/weights.safetensors") == 0o666 & ~umask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    write_atomically(tmp_path / "file", "x")
    assert mode(tmp_path / "file") == 0o600


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/real").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/real")
    (tmp_path / "future").symlink_to("elsewhere/new")
    for name, real in (("link", "real"), ("future", "new")):
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "elsewhere" / real).read_text() == "new"


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomically(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_into_and_stays(tmp_path: Path) -> None:
    """A node of our own with the numbers of /dev/null, as root only."""
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make a device")
    write_atomically(tmp_path / "null", "gone")
    assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(full: Path) -> None:
    write_atomically(full / "file", "old")
    with pytest.raises(UserError, match=r"cannot write '.*/file': no space left on device; free some space") as failed:
        write_atomically(full / "file", b"x" * 10**6)
    assert "\n" not in str(failed.value)
    assert {path.name: path.read_text() for path in full.iterdir()} == {"file": "old"}


def test_a_full_disk_under_safetensors_is_one_line(full: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write '.*weights': no space left on device"), writing(full / "weights"):
        save_file({"x": torch.zeros(10**5)}, full / "weights")


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    cases = {
        "n" * 300: "file name too long; choose a shorter name",
        "file/below": r"'.*/file' is a file; choose another place",
        "dangling": r"'.*dangling' is a link to 'nowhere/at/all', where there is nothing",
        "dangling/below": r"'.*dangling' is a link to 'nowhere/at/all', where there is nothing",
        "folder": "a folder; a file is needed there|is a directory; a file is needed there",
    }
    for name, why in cases.items():
        with pytest.raises(UserError, match=why) as failed:
            write_atomically(tmp_path / name, "x")
        assert "\n" not in str(failed.value)
    assert sorted(os.listdir(tmp_path)) == ["circle", "dangling", "file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_read_only_disk_is_one_line(full: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", full], check=True)
    with pytest.raises(UserError, match=r"read-only file system; choose another place"):
        write_atomically(full / "file", "x")
    with pytest.raises(UserError, match=r"--output: cannot write .*read-only file system; choose another place"):
        check_writable(full / "a/b", "--output")


def test_where_a_folder_can_be_made_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    check_writable(tmp_path / "a/b", "--output")
    for name, why in {"n" * 300: "too long", "file/below": "is a file", "dangling/a": "is a link to"}.items():
        with pytest.raises(UserError, match=rf"--output: cannot write '.*': .*{why}"):
            check_writable(tmp_path / name, "--output")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_what_a_kill_left_of_an_earlier_writing_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    for name in ("old", "young"):
        (tmp_path / f"{PARTIAL}file.{name}").touch()
    os.utime(tmp_path / f"{PARTIAL}file.old", (0, 0))
    write_atomically(tmp_path / "file", "x")
    assert sorted(os.listdir(tmp_path)) == [f"{PARTIAL}file.young", "file"]


def test_what_another_process_puts_in_its_place_meanwhile_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / f"{PARTIAL}file.theirs"
    theirs.touch()
    stat = Path.stat

    def replaced(path: Path, **told: bool) -> os.stat_result:
        if path == theirs and theirs.exists():
            os.replace(theirs, tmp_path / "file")
        return stat(path, **told)

    monkeypatch.setattr(Path, "exists", lambda path: os.path.exists(path))
    monkeypatch.setattr(Path, "stat", replaced)
    write_atomically(tmp_path / "file", "ours")
    assert (tmp_path / "file").read_text("utf-8") == "ours" and os.listdir(tmp_path) == ["file"]


def put(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "content").write_text(text)
    return folder


def test_publish_replaces_a_folder(tmp_path: Path) -> None:
    publish(put(tmp_path / f"{PARTIAL}x", "new"), put(tmp_path / "x", "old").parent / "x")
    assert (tmp_path / "x/content").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_kill_between_the_renames_of_publish_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, target = put(tmp_path / f"{PARTIAL}x", "new"), put(tmp_path / "x", "old")
    monkeypatch.setattr(files.os, "replace", lambda old, new, rename=os.replace: rename(old, new) if old == target else killed())
    with pytest.raises(KeyboardInterrupt):
        publish(partial, target)
    monkeypatch.undo()
    assert not target.exists()
    recover(target)
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def killed() -> None:
    raise KeyboardInterrupt


def test_a_kill_inside_remove_leaves_no_half_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "x", "old")
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: killed() if path.exists() else None)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "x")
    assert os.listdir(tmp_path) == [f"{PARTIAL}x"]


def test_where_a_file_can_be_written_is_known_before(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere/file")
    for name in ("new.png", "pipe"):
        check_writable_file(tmp_path / name, "--output")
    for name, why in {"": "is a folder", "no/file": "no folder", "link": "is a link to", "n" * 300: "too long"}.items():
        with pytest.raises(UserError, match=f"--output: .*{why}"):
            check_writable_file(tmp_path / name, "--output")
