"""Pictures in one array, as ADM's batches are: values, any order, flat memory, and every file that is none."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.errors import UserError
from fastgen.evaluation.archives import Archive
from fastgen.evaluation.picture_array import PictureArray, has_pictures
from fastgen.evaluation.picture_source import ready
from fastgen.evaluation.protocol import PrepareBlock


def noise(count: int = 9, height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_is_read_in_any_order(tmp_path: Path, compressed: bool) -> None:
    pictures = noise()
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "adm.npz", pictures, np.arange(9))  # arr_0, arr_1, as guided-diffusion's samplers write pictures and labels
    source = PictureArray(tmp_path / "adm.npz", "reference.file")
    assert len(source) == 9 and source.name(3) == "picture 3"
    for ids in (range(4), range(4, 9), [8], [0, 1, 5, 6, 2], [7, 7]):
        for index, one in zip(ids, source.read(list(ids)), strict=True):
            assert one.dtype == torch.uint8 and np.array_equal(one.permute(1, 2, 0).numpy(), pictures[index])


def test_a_plain_array_and_channels_first_are_read_too(tmp_path: Path) -> None:
    pictures = noise()
    np.save(tmp_path / "a.npy", pictures)
    np.savez(tmp_path / "b.npz", samples=pictures.transpose(0, 3, 1, 2).copy(), features=np.zeros((9, 4)))
    for path in (tmp_path / "a.npy", tmp_path / "b.npz"):
        source = PictureArray(path, "--images")
        assert torch.equal(torch.stack(source.read(range(9))).permute(0, 2, 3, 1), torch.from_numpy(pictures))
    resized = ready(PictureArray(tmp_path / "a.npy", "--images"), [1, 2], PrepareBlock(resize=4))
    assert resized.pixels.shape == (2, 3, 4, 4) and resized.raw is not None and resized.raw[0].shape == (3, 5, 7)


def test_content_is_of_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        np.save(tmp_path / f"{name}.npy", noise(seed=seed))
    a, b, c = (PictureArray(tmp_path / f"{name}.npy", "x").content for name in "abc")
    assert a == b != c


def test_memory_is_flat_however_many_pictures_there_are(tmp_path: Path) -> None:
    count, side = 1000, 192  # 110 MB
    with zipfile.ZipFile(tmp_path / "large.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            member.write(header((count, side, side, 3)))
            for index in range(count):
                member.write(bytes([index % 256]) * (side * side * 3))
        with archive.open("mu.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros(8))
    tracemalloc.start()
    try:
        source = PictureArray(tmp_path / "large.npz", "reference.file")
        for start in range(0, count, 40):
            ids = range(start, start + 40)
            assert [int(one[1, 3, 5]) for one in source.read(ids)] == [index % 256 for index in ids]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**25, peak  # a chunk is 4.4 MB, and a few copies of it live at once


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"holds no pictures, which are uint8 \(N, H, W, 3\): arr_0 float32 \(2, 4, 4, 3\)$"),
        ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}, r"holds no pictures, .*: arr_0 uint8 \(2, 4, 4, 1\)$"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"holds no pictures"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, r"holds no pictures, .*: no arrays$"),
        (
            {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros((2, 4, 4, 3), np.uint8)},
            r"holds several arrays of pictures, none of them arr_0: a uint8",
        ),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^--images: '.*a\.npz' {said}"):
        PictureArray(tmp_path / "a.npz", "--images")


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Bomb(str(tmp_path / "ran"))], dtype=object))
    with pytest.raises(UserError, match=r"^cannot read '.*a\.npy': "):
        PictureArray(tmp_path / "a.npy", "--images")
    np.savez(tmp_path / "a.npz", arr_0=np.array([Bomb(str(tmp_path / "ran"))], dtype=object))
    with pytest.raises(UserError, match="holds no pictures"):
        PictureArray(tmp_path / "a.npz", "--images")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(60)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"^cannot read '.*a\.npz': "):
        PictureArray(tmp_path / "a.npz", "--images")


def test_damaged_archives_are_refused_or_read_as_they_are(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", noise(40, 16, 16))
    content = (tmp_path / "whole.npz").read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        changed[int(draw.integers(len(changed)))] ^= 1 << int(draw.integers(8))
        (tmp_path / "a.npz").write_bytes(bytes(changed[: len(changed) - int(draw.integers(2)) * int(draw.integers(1, 400))]))
        try:
            source = PictureArray(tmp_path / "a.npz", "--images")
            for start in range(0, len(source), 8):
                source.read(range(start, min(start + 8, len(source))))
        except UserError:
            refused += 1
    assert refused > 50  # what flips in compressed pictures is found by their checksum


def test_a_header_that_promises_more_than_there_is_asks_for_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header((10**9, 256, 256, 3)) + bytes(100))
    with pytest.raises(UserError, match=r"^cannot read '.*a\.npz': arr_0\.npy holds 228 bytes, its header says 196608000000128$"):
        PictureArray(tmp_path / "a.npz", "--images")


def test_whole_arrays_are_read_as_they_are(tmp_path: Path) -> None:
    fortran, big = np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(4, dtype=">f4")
    np.savez_compressed(tmp_path / "a.npz", fortran=fortran, big=big, text=np.array("{}"), scalar=np.int64(7))
    archive = Archive(tmp_path / "a.npz")
    assert np.array_equal(archive.array("fortran"), fortran) and np.array_equal(archive.array("big"), big)
    assert str(archive.array("text")) == "{}" and int(archive.array("scalar")) == 7
    assert not has_pictures(archive)
