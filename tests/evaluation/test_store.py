"""Stores of features: what was written is read, whoever wrote it; what a kill, a full disk or a bad sector left is made again."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.evaluation.store import Store, total

COUNT, CHUNK = 23, 8  # chunks of 8, 8 and 7


def wanted(name: str, ids: Sequence[int]) -> Tensor:
    """Rows by their ids: fp32 (B, 5), or uint8 (B, 2, 3) of `bytes`."""
    start = torch.tensor(list(ids))
    if name == "bytes":
        return (start[:, None] * 7 + torch.arange(6)).remainder(256).to(torch.uint8).reshape(-1, 2, 3)
    return start[:, None] + torch.arange(5) / 7 + len(name)


def fill(store: Store, names: Sequence[str] = ("one",), chunks: Sequence[int] = (0, 1, 2)) -> None:
    for chunk in chunks:
        ids = store.ids(chunk)
        store.write(chunk, {name: wanted(name, ids) for name in names}, {"seconds": 0.5, "pictures": len(ids)})


def again(store: Store) -> Store:
    """What another process sees of it."""
    return Store(store.folder, store.count, store.chunk)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", COUNT, CHUNK)


def whole(store: Store, *names: str) -> bool:
    return all(torch.equal(store.table(name).read(), wanted(name, range(COUNT))) for name in names)


def test_what_was_written_is_read(store: Store):
    assert store.missing(["one"]) == [0, 1, 2]
    assert [list(store.ids(chunk)) for chunk in store.chunks] == [list(range(8)), list(range(8, 16)), list(range(16, 23))]
    fill(store, ("one", "bytes"), (2, 0, 1))
    for each in (store, again(store)):
        assert each.missing(["one", "bytes"]) == []
        assert whole(each, "one", "bytes")
        assert each.table("bytes").read().dtype == torch.uint8
        assert total(each.costs(), "pictures") == COUNT and total(each.costs(), "seconds") == 1.5 and total(each.costs(), "peak") == 0
    assert np.array_equal(np.load(store.folder / "one.npy"), wanted("one", range(COUNT)).numpy())  # an array that anybody reads
    assert sorted(path.name for path in store.folder.iterdir()) == [".lock", "bytes.npy", "chunks", "one.npy"]


def test_a_store_of_one_small_chunk(tmp_path: Path):
    store = Store(tmp_path, 3, 64)
    fill(store, chunks=[0])
    assert torch.equal(again(store).table("one").read(), wanted("one", range(3)))


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path):
    stores = [Store(tmp_path / name, COUNT, CHUNK) for name in "ab"]
    fill(stores[0])
    fill(stores[1], chunks=(2, 1, 0))
    one, other = ((store.folder / "one.npy").read_bytes() for store in stores)
    assert one == other


def test_what_is_not_whole_goes_on(store: Store):
    fill(store, chunks=[1])
    for each in (store, again(store)):
        assert each.missing(["one"]) == [0, 2]
        with pytest.raises(UserError, match="lacks 2 of 3 chunks of one"):
            each.table("one")
    other = again(store)
    fill(other, chunks=[0, 2])
    assert whole(other, "one")


def test_what_another_process_has_written_meanwhile_is_seen(store: Store):
    assert store.missing(["one"]) == [0, 1, 2]
    fill(again(store), chunks=[1])
    assert store.missing(["one"]) == [0, 2]
    fill(store, chunks=[0, 2])
    assert whole(store, "one")


def test_a_wrong_number_of_rows_is_an_error_of_ours(store: Store):
    with pytest.raises(ValueError, match="feature one: 8 rows for the 7 pictures of chunk 2"):
        store.write(2, {"one": wanted("one", range(8))}, {})


def test_features_come_to_a_store_that_holds_others(store: Store):
    fill(store)
    later = again(store)
    assert later.missing(["one", "bytes"]) == [0, 1, 2] and later.missing(["one"]) == []
    fill(later, ["bytes"])
    assert whole(again(store), "one", "bytes")
    assert total(later.costs(), "pictures") == COUNT  # each picture's cost once


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_flipped_bit_of_a_row_makes_its_chunk_again(store: Store, chunk: int):
    fill(store, ("one", "bytes"))
    path = store.folder / "one.npy"
    data = bytearray(path.read_bytes())
    data[-COUNT * 5 * 4 + store.ids(chunk)[-1] * 5 * 4] ^= 1
    path.write_bytes(data)
    damaged = again(store)
    assert damaged.missing(["one"]) == [chunk] and damaged.missing(["bytes"]) == []
    with pytest.raises(UserError, match="lacks 1 of 3 chunks"):
        damaged.table("one")
    fill(damaged, ["one"], [chunk])
    assert whole(again(store), "one", "bytes")


def test_a_flipped_bit_anywhere_in_a_record_makes_its_chunk_again(store: Store):
    fill(store)
    path = store.folder / "chunks" / "000001.json"
    sound = path.read_bytes()
    for place in range(0, len(sound) - 1, 3):  # the last is a line's end
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert again(store).missing(["one"]) == [1], sound[place : place + 1]
    fill(again(store), chunks=[1])
    assert whole(again(store), "one")


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "removed", "pickle"])
def test_a_damaged_array_is_made_again(store: Store, damage: str):
    fill(store, ("one", "bytes"))
    path = store.folder / "one.npy"
    if damage == "removed":
        path.unlink()
    elif damage == "pickle":
        np.save(path, np.array([{}] * COUNT, dtype=object))
    else:
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-30], "empty": b"", "header": b"x" + data[1:]}[damage])
    damaged = again(store)
    assert damaged.missing(["one"]) == [0, 1, 2] and damaged.missing(["bytes"]) == []
    fill(damaged, ["one"])
    assert whole(again(store), "one", "bytes")


def test_a_flipped_bit_of_an_arrays_header_never_ends_in_a_traceback(store: Store):
    fill(store)
    path = store.folder / "one.npy"
    sound = path.read_bytes()
    for place in range(len(sound) - COUNT * 5 * 4):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 7]) + sound[place + 1 :])
        assert again(store).missing(["one"]) in ([], [0, 1, 2]), place  # blanks may become other blanks


@pytest.mark.parametrize("rows", [torch.ones(COUNT, 6), torch.ones(COUNT, 5, dtype=torch.uint8), torch.ones(COUNT - 1, 5)])
def test_an_array_of_another_shape_or_type_gives_way(store: Store, rows: Tensor):
    fill(store)
    np.save(store.folder / "one.npy", rows.numpy())
    other = again(store)
    assert other.missing(["one"]) == [0, 1, 2]
    fill(other, chunks=[1])
    assert again(store).missing(["one"]) == [0, 2]  # what was written before the array gave way is gone
    fill(other, chunks=other.missing(["one"]))
    assert whole(again(store), "one")


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every write to an array beyond its first `after` bytes finds no space, and puts half of what it should."""

    class Full(FileIO):
        def write(self, data: Any, /) -> int:
            nonlocal after
            after -= len(data)
            if after < 0:
                super().write(bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    opened = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        return Full(self, "r+") if mode == "r+b" else opened(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", open_)


def test_a_full_disk_is_one_line_and_leaves_the_store_sound(store: Store, monkeypatch: pytest.MonkeyPatch):
    fill(store, ("one", "bytes"), [0])
    with monkeypatch.context() as patch:
        full_disk(patch, after=8 * 5 * 4)  # chunk 1's rows of `one`, and no more
        with pytest.raises(UserError, match=r"cannot write .*bytes\.npy.*no space left on device; free some space and go on") as caught:
            fill(store, ("one", "bytes"), [1])
        assert "\n" not in str(caught.value)
        assert store.missing(["one", "bytes"]) == [1, 2]
    assert again(store).missing(["one", "bytes"]) == [1, 2]
    fill(store, ("one", "bytes"), [1, 2])
    assert whole(again(store), "one", "bytes")


def test_a_full_disk_while_a_chunk_is_made_again_keeps_no_record_of_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Half of the new rows are on disk under the record of the old ones."""
    fill(store)
    with monkeypatch.context() as patch:
        full_disk(patch, after=0)
        with pytest.raises(UserError, match="no space left"):
            store.write(1, {"one": wanted("other", store.ids(1))}, {})
    for each in (store, again(store)):
        assert each.missing(["one"]) == [1]


def test_a_kill_between_rows_and_record_makes_the_chunk_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    fill(store, chunks=[0])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastgen.evaluation.store.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(store, chunks=[1])
    for each in (store, again(store)):
        assert each.missing(["one"]) == [1, 2]
    fill(store, chunks=[1, 2])
    assert whole(again(store), "one")


def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*'.*file' is a file; choose another place"):
        fill(Store(tmp_path / "file", COUNT, CHUNK))


def test_two_processes_that_begin_at_once_lose_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Another process makes the array, and fills its chunk, between our look and ours."""
    other, allocate = again(store), Store._allocate

    def slow(self: Store, *args: Any) -> None:
        monkeypatch.setattr(Store, "_allocate", allocate)
        fill(other, chunks=[1])
        allocate(self, *args)

    monkeypatch.setattr(Store, "_allocate", slow)
    fill(store, chunks=[0, 2])
    assert whole(again(store), "one")


def test_two_processes_fill_one_store(tmp_path: Path):
    def work(part: int) -> None:
        store = Store(tmp_path / "store", 6 * COUNT, CHUNK)
        together.wait()
        fill(store, ("one", "bytes"), [chunk for chunk in store.chunks if chunk % 2 == part])

    context = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds
    together = context.Barrier(2)
    processes = [context.Process(target=work, args=(part,)) for part in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    store = Store(tmp_path / "store", 6 * COUNT, CHUNK)
    assert store.missing(["one", "bytes"]) == []
    for name in ("one", "bytes"):
        assert torch.equal(store.table(name).read(), wanted(name, range(6 * COUNT)))
    assert sorted(path.name for path in store.folder.iterdir()) == [".lock", "bytes.npy", "chunks", "one.npy"]
    assert len(list((store.folder / "chunks").iterdir())) == len(store.chunks)


def test_two_processes_that_write_different_features_of_the_same_chunks_lose_none(tmp_path: Path):
    """Each adds to the record what the other may be adding just now."""

    def work(name: str) -> None:
        store = Store(tmp_path / "store", 6 * COUNT, CHUNK)
        for chunk in store.chunks:
            together.wait()
            fill(store, [name], [chunk])

    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    processes = [context.Process(target=work, args=(name,)) for name in ("one", "bytes")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert Store(tmp_path / "store", 6 * COUNT, CHUNK).missing(["one", "bytes"]) == []


def test_costs_alone_are_kept_too(store: Store):
    """Of pictures that no feature is extracted of."""
    store.write(0, {}, {"pictures": 8.0})
    assert again(store).costs() == [{"pictures": 8.0}]


def test_records_are_sealed_json(store: Store):
    fill(store, chunks=[2])
    record = json.loads((store.folder / "chunks" / "000002.json").read_text())
    assert record["costs"] == {"seconds": 0.5, "pictures": 7} and set(record) == {"sha256", "costs", "seal"}
