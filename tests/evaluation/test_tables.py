"""Rows of features, in memory and on disk: the same whatever they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.evaluation import tables
from fastgen.evaluation.tables import Table

N, SHAPE = 23, (2, 3)


def rows(dtype: torch.dtype) -> Tensor:
    return torch.randint(256, (N, *SHAPE), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(params=[torch.float32, torch.uint8], ids=["fp32", "uint8"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tensor, list[Table]]:
    """Rows, and tables of them: of the tensor, and of a file."""
    source = rows(request.param)
    np.save(tmp_path / "feature.npy", source.numpy())
    return source, [Table(source), Table(tmp_path / "feature.npy")]


def test_a_file_and_a_tensor_say_the_same(both: tuple[Tensor, list[Table]]):
    source, made = both
    order = torch.tensor([4, 0, 4, 22, 7, 7])
    for table in made:
        assert (len(table), table.row_shape, table.width) == (N, SHAPE, 6)
        for found, wanted in (
            (table.read(), source),
            (table.read(5, 9), source[5:9]),
            (table.read(20, 99), source[20:]),
            (table.read(23, 30), source[:0]),
            (table.take(order), source[order]),
            (table.select(order).read(), source[order]),
            (table.select(order).read(1, 3), source[order][1:3]),
            (table.select(order).take(torch.tensor([5, 3])), source[[7, 22]]),
            (table.select(order).select(torch.tensor([3, 3])).read(), source[[22, 22]]),
            (table.first(7).read(), source[:7]),
            (table.first(99).read(), source),
            (table.select(order).first(2).read(), source[[4, 0]]),
        ):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
        assert len(table.select(order)) == 6 and len(table.first(7)) == 7


def test_blocks_hold_every_row_once_in_order(both: tuple[Tensor, list[Table]], monkeypatch: pytest.MonkeyPatch):
    source, made = both
    for table in made:
        assert [len(block) for block in table.blocks(10)] == [10, 10, 3]
        assert torch.equal(torch.cat(list(table.blocks(10))), source)
        assert torch.equal(torch.cat(list(table.select(torch.arange(N).flip(0)).blocks(4))), source.flip(0))
        assert [len(block) for block in table.blocks()] == [N]
    monkeypatch.setattr(tables, "_BLOCK", 8 * 6 * 9)  # nine rows of six numbers in fp64
    assert [[len(block) for block in table.blocks()] for table in made] == [[9, 9, 5]] * 2


def test_what_is_read_is_the_readers_own(both: tuple[Tensor, list[Table]]):
    source, made = both
    for table in made:
        table.read().zero_()
        table.take(torch.arange(3)).zero_()
        assert torch.equal(table.read(), source) and bool(source.any())


def test_only_the_first_rows_of_a_file_may_count(tmp_path: Path):
    source = rows(torch.float32)
    np.save(tmp_path / "feature.npy", source.numpy())
    for table in (Table(source, 5), Table(tmp_path / "feature.npy", 5)):
        assert len(table) == 5
        assert torch.equal(table.read(), source[:5]) and torch.equal(table.read(3, 9), source[3:5])
        assert torch.equal(table.select(torch.tensor([4, 1])).read(), source[[4, 1]])


def test_no_pickle_is_read(tmp_path: Path):
    np.save(tmp_path / "feature.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        Table(tmp_path / "feature.npy").read()
