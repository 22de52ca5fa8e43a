"""Stores: what is written is what is read, whoever made which shard; what is broken is named, and made again."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen.config import DataBlock
from fastgen.data import store
from fastgen.data.encoded import Keeping
from fastgen.data.store import ROWS, Encoded, Manifest, Store
from fastgen.errors import UserError
from fastgen.progress import Progress

COUNT = 2 * ROWS + 5
FIELDS: dict[str, Any] = {"text": ("float", (3, 2)), "length": ("int64", ())}


def manifest(count: int = COUNT, **changed: Any) -> Manifest:
    given = {"kind": "prompts", "count": count, "dtype": "fp32", "fields": FIELDS, "origin": {"encoder": "a"}, "rows": prefix(count)}
    return Manifest(**{**given, **changed})


def prefix(count: int) -> str:
    return store.of_texts([str(i) for i in range(count)])


def encode(ids: range) -> Encoded:
    rows = torch.tensor(ids)
    return Encoded({"text": (rows[:, None, None] + torch.arange(6).view(3, 2) / 8).float(), "length": rows}, [str(i) for i in ids], {})


def made(folder: Path, part: tuple[int, int] = (0, 1), count: int = COUNT) -> Store:
    found = store.create(folder, manifest(count), prefix)
    for shard in found.broken(part):
        found.make(shard, encode)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    found, index = made(tmp_path / "store"), torch.tensor([COUNT - 1, 0, ROWS, ROWS - 1, 0])
    read, expected = found.select(index), encode(range(COUNT)).tensors
    assert read.keys() == expected.keys()
    assert all(torch.equal(value, expected[key][index]) and value.dtype == expected[key].dtype for key, value in read.items())
    assert [each for _, each in found.about()] == [str(i) for i in range(COUNT)]


def test_half_precision_is_read_as_what_it_was_rounded_to(tmp_path: Path) -> None:
    found = store.create(tmp_path, manifest(5, dtype="bf16"), prefix)
    text = torch.randn(5, 3, 2).bfloat16()
    found.make(0, lambda ids: Encoded({"text": text, "length": torch.arange(5)}, list(range(5)), {}))
    assert torch.equal(found.select(torch.arange(5))["text"], text.float())
    assert found.manifest.row_bytes == 6 * 2 + 8


def test_parts_make_the_same_files_as_one(tmp_path: Path) -> None:
    made(tmp_path / "one")
    made(tmp_path / "parts", (1, 2))
    assert sorted(files(tmp_path / "parts")) == ["shard_000001.safetensors", "store.json"]
    made(tmp_path / "parts", (0, 2))
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_what_is_missing_or_broken_is_made_again_to_the_same_bytes(tmp_path: Path) -> None:
    found = made(tmp_path)
    whole = files(tmp_path)
    found.file(0).unlink()
    found.file(1).write_bytes(whole["shard_000001.safetensors"][:-1])
    assert Store(tmp_path, manifest()).missing() == [0, 1]
    flip(found.file(2), -3)
    assert Store(tmp_path, manifest()).missing() == [0, 1] and Store(tmp_path, manifest()).broken() == [0, 1, 2]
    made(tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("at", [-1, -9])
def test_a_flipped_bit_is_named_when_its_row_is_read(tmp_path: Path, at: int) -> None:
    found = made(tmp_path)
    flip(found.file(1), at)
    fresh = Store(tmp_path, manifest())
    fresh.select(torch.arange(2 * ROWS - 1))
    with pytest.raises(UserError, match=rf"^recipe key data\.store: row {2 * ROWS - 1} in '.*shard_000001\.safetensors' is not what was written"):
        fresh.select(torch.tensor([2 * ROWS - 1]))


def test_shards_are_opened_ahead_and_what_is_broken_is_said_by_who_reads_it(tmp_path: Path) -> None:
    """What is kept of each lies together then: opened between batches, it kept their memory from being used again."""
    found = made(tmp_path)
    flip(found.file(0), 12)
    found.file(2).unlink()
    opened = Keeping(torch.device("cpu"), DataBlock(store="unused", keep="disk")).opened(Store(tmp_path, manifest()), Progress())
    assert isinstance(opened, Store) and opened._open.keys() == {1}
    assert opened.select(torch.tensor([ROWS]))["length"].tolist() == [ROWS]
    for shard in (0, 2):
        with pytest.raises(UserError, match=rf"shard_00000{shard}\.safetensors"):
            opened.select(torch.tensor([shard * ROWS]))


def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    found = made(tmp_path)
    flip(found.file(0), 12)
    with pytest.raises(UserError, match=r"shard_000000\.safetensors"):
        Store(tmp_path, manifest()).select(torch.tensor([0]))


def test_a_store_grows_with_what_is_added_at_the_end(tmp_path: Path) -> None:
    made(tmp_path / "grown", count=ROWS + 1)
    first = (tmp_path / "grown/shard_000000.safetensors").stat().st_mtime_ns
    made(tmp_path / "grown")
    made(tmp_path / "whole")
    assert files(tmp_path / "grown") == files(tmp_path / "whole")
    assert (tmp_path / "grown/shard_000000.safetensors").stat().st_mtime_ns == first


def refused(folder: Path, wanted: Manifest, message: str, of: Any = prefix) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=rf"^recipe key data\.store: .*{message}") as error:
        store.create(folder, wanted, of)
    assert "\n" not in str(error.value) and files(folder) == before


def test_rows_of_something_else_are_refused_with_both_values(tmp_path: Path) -> None:
    made(tmp_path)
    refused(tmp_path, manifest(origin={"encoder": "b"}), "was encoded with encoder 'a', this recipe needs 'b'; choose another folder")
    refused(tmp_path, manifest(dtype="bf16"), "was encoded with data.dtype 'fp32', this recipe needs 'bf16'")
    wider = {**FIELDS, "text": ("float", (4, 2))}
    refused(tmp_path, manifest(fields=wider), r"the rows' shapes .*\(3, 2\).*, this recipe needs .*\(4, 2\)")
    refused(tmp_path, manifest(COUNT - 1), f"holds {COUNT} other prompts than this recipe's {COUNT - 1}")
    refused(tmp_path, manifest(), "holds 517 other prompts than this recipe's 517", of=lambda count: "x")


def test_folders_of_something_else_and_broken_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    refused(tmp_path / "other", manifest(), "holds other files and no store")
    made(tmp_path / "store")
    record = json.loads((tmp_path / "store/store.json").read_text(encoding="utf-8"))
    (tmp_path / "store/store.json").write_text(json.dumps({**record, "count": 7}), encoding="utf-8")
    refused(tmp_path / "store", manifest(), "cannot read '.*store.json': its content is not what was written")


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    wanted = manifest(10**6)
    with pytest.raises(UserError, match=r"^recipe key data\.store: '.*new' needs 0\.54 GB more for 1000000 prompts, and its disk has 0\.00 GB free$"):
        store.create(tmp_path / "new", wanted, prefix)
    assert not (tmp_path / "new").exists()


def test_a_whole_store_asks_for_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(0))
    assert not store.create(tmp_path, manifest(), prefix).missing()
