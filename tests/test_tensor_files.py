"""Files of named tensors: what is written is what is read, numbers included, whole or in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen import tensor_files
from fastgen.tensor_files import Saved

GRID = torch.arange(15.0).reshape(5, 3)
TENSORS = {
    "layers.1.weight/exp_avg": GRID,
    "turned": GRID.T,  # its numbers do not follow one another
    "layers.1.weight/step": torch.tensor(3.0),
    "updates": torch.tensor(7),
    "narrow": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "wide": torch.tensor([1 / 3], dtype=torch.float64),
    "bytes": torch.arange(250, 256, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "nothing": torch.empty(0, 3),
}


def parts(folder: Path, *, rows: tuple[int, ...] = (0, 3), last: int = 5) -> list[Path]:
    """GRID as processes write it that have some of its rows each."""
    files = []
    for index, (start, end) in enumerate(zip(rows, (*rows[1:], last), strict=True), 1):
        files.append(folder / f"role-{index:05d}-of-{len(rows):05d}.safetensors")
        save_file({"grid": GRID[start:end].clone()}, files[-1], {"DCP_SHARDING_INFO": f'{{"grid": {{"saved_offsets": [{start}, 0]}}}}'})
    return files


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    written = tensor_files.write(tmp_path, {"role": TENSORS, "none": {}}, target=tmp_path)
    assert written.keys() == {"role.safetensors", "none.safetensors"} == {file.name for file in tmp_path.iterdir()}
    found = Saved([tmp_path / "role.safetensors"])
    assert found.shapes == {name: value.shape for name, value in TENSORS.items()}
    for tensors in (found.read(), load_file(tmp_path / "role.safetensors")):
        assert tensors.keys() == TENSORS.keys()
        assert all(tensors[name].dtype == value.dtype and torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert Saved([tmp_path / "none.safetensors"]).read() == {}


def test_reading_into_tensors_casts_and_leaves_the_others(tmp_path: Path) -> None:
    tensor_files.write(tmp_path, {"role": TENSORS}, target=tmp_path)
    into: dict[str, Tensor] = {"layers.1.weight/exp_avg": torch.zeros(5, 3, dtype=torch.float64), "updates": torch.zeros((), dtype=torch.int64)}
    Saved([tmp_path / "role.safetensors"]).read_into(into)
    assert torch.equal(into["layers.1.weight/exp_avg"], GRID.double()) and int(into["updates"]) == 7


def test_parts_make_a_whole(tmp_path: Path) -> None:
    for rows in ((0, 3), (0, 2, 4, 5), (0, 1, 1, 4)):  # of four processes, the last has none, or one in between
        found = Saved(parts(tmp_path, rows=rows))
        assert found.shapes == {"grid": GRID.shape}
        assert torch.equal(found.read()["grid"], GRID)


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    for files in ([second], parts(tmp_path, rows=(0, 3))[1:]):
        with pytest.raises(ValueError, match="a part of grid is missing"):
            Saved(files)
    assert Saved([first]).shapes == {"grid": (3, 3)}  # a smaller tensor, for all that the file says


def test_plain_files_are_read_too(tmp_path: Path) -> None:
    save_file({"grid": GRID, "updates": torch.tensor(3)}, tmp_path / "ema.safetensors")
    found = Saved([tmp_path / "ema.safetensors"]).read()
    assert torch.equal(found["grid"], GRID) and int(found["updates"]) == 3
