"""Pictures on disk: what is read back, parts and kills, and what is refused."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastgen.data.images import load_images
from fastgen.errors import UserError
from fastgen.evaluation import dumps
from fastgen.evaluation.dumps import FORMS, Dump, ParquetShards, PngFolder, png
from fastgen.evaluation.extraction import Drawing, Extractors, Part, fill, lacking
from fastgen.evaluation.extractors.base import Resources, feature
from fastgen.evaluation.picture_folder import PictureFolder
from fastgen.evaluation.preparation import prepared
from fastgen.evaluation.protocol import PrepareBlock, SampleSet
from fastgen.evaluation.store import Store

SET = SampleSet("main", ("a cat", 'a "dog"\n', "a cat", "ein Äffchen", "x"), (5, 6, 2**63 - 1, 8, 9), first=7, chunk=2)
CHUNKS = [range(2), range(2, 4), range(4, 5)]
PIXELS = torch.randint(0, 256, (5, 3, 6, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def filled(dump: Dump, chunks: list[range] = CHUNKS) -> Dump:
    for rows in chunks:
        assert not dump.has(rows)
        dump.write(rows, PIXELS[rows.start : rows.stop])
        assert dump.has(rows)
    return dump


def decoded(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pngs_hold_the_measured_values_and_lines_say_what_they_show(tmp_path: Path) -> None:
    filled(PngFolder(tmp_path / "out", SET, "m"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert lines[1] == {"id": 8, "file_name": "000008.png", "prompt": 'a "dog"\n', "seed": 6}
    assert [line["id"] for line in lines] == [7, 8, 9, 10, 11]
    assert [line["seed"] for line in lines] == list(SET.seeds)
    for line, picture in zip(lines, PIXELS, strict=True):
        assert torch.equal(decoded((tmp_path / "out" / line["file_name"]).read_bytes()), picture)


def test_our_own_readers_read_the_folder_back(tmp_path: Path) -> None:
    filled(PngFolder(tmp_path, SET, "m"))
    folder = PictureFolder(tmp_path, "--images")
    assert folder.names == tuple(f"{number:06d}.png" for number in range(7, 12))
    assert torch.equal(torch.stack(folder.read(range(5))), PIXELS)
    images = load_images(str(tmp_path), caption_key="prompt")  # as training takes them
    assert [list(captions) for captions in images.captions] == [[prompt] for prompt in SET.prompts]


def test_shards_hold_the_same_and_are_pictures_to_hugging_face(tmp_path: Path) -> None:
    from pyarrow import parquet

    filled(ParquetShards(tmp_path, SET, "m"))
    shards = sorted(tmp_path.glob("*.parquet"))
    assert [shard.name for shard in shards] == ["000007.parquet", "000009.parquet", "000011.parquet"]
    rows = [row for shard in shards for row in parquet.read_table(shard).to_pylist()]
    assert [row["id"] for row in rows] == [7, 8, 9, 10, 11]
    assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(SET.prompts, SET.seeds, strict=True))
    assert [row["image"]["path"] for row in rows] == [f"{number:06d}.png" for number in range(7, 12)]
    assert torch.equal(torch.stack([decoded(row["image"]["bytes"]) for row in rows]), PIXELS)
    features = json.loads(parquet.read_schema(shards[0]).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and features["seed"] == {"dtype": "int64", "_type": "Value"}


@pytest.mark.parametrize("kind", FORMS.values())
def test_parts_make_what_one_process_makes_to_the_byte(kind: type[Dump], tmp_path: Path) -> None:
    whole = filled(kind(tmp_path / "whole", SET, "m"))
    one, other = kind(tmp_path / "parts", SET, "m"), kind(tmp_path / "parts", SET, "m")
    filled(other, CHUNKS[1::2])
    filled(one, CHUNKS[0::2])
    assert files(whole.folder) == files(one.folder)


@pytest.mark.parametrize("kind", FORMS.values())
def test_what_a_kill_interrupts_is_written_again(kind: type[Dump], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump, replaced, real = kind(tmp_path / "out", SET, "m"), 0, os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal replaced
        replaced += 1
        if replaced == (2 if kind is PngFolder else 1):  # in the middle of the chunk
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        dump.write(CHUNKS[0], PIXELS[:2])
    monkeypatch.undo()
    resumed = filled(kind(tmp_path / "out", SET, "m"))
    assert files(resumed.folder) == files(filled(kind(tmp_path / "whole", SET, "m")).folder)


def test_another_evaluations_folder_is_refused(tmp_path: Path) -> None:
    PngFolder(tmp_path, SET, "m")
    PngFolder(tmp_path, SET, "m")  # a resumed run
    ends = r"; remove it, or choose another$"
    with pytest.raises(UserError, match=rf"^--dump: '.*' holds pictures of another model, or of this one with other settings or versions{ends}"):
        PngFolder(tmp_path, SET, "other")
    with pytest.raises(UserError, match=rf"holds pictures of other prompts or seeds{ends}"):
        PngFolder(tmp_path, replace(SET, seeds=(1, 2, 3, 4, 5)), "m")
    with pytest.raises(UserError, match=rf"holds pictures of other prompts or seeds and another model.*{ends}"):
        PngFolder(tmp_path, SET.head(2), "other")
    with pytest.raises(UserError, match=rf"holds pictures of another form{ends}"):
        ParquetShards(tmp_path, SET, "m")


def test_a_folder_that_another_process_takes_at_the_same_moment_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between this process's looking for a manifest and its looking for other files the other one has begun."""
    look, begun = dumps._content, []

    def later(folder: Path, key: str) -> list[Path]:
        if not begun:
            begun.append(folder)
            PngFolder(folder, SET, "m")
        return look(folder, key)

    monkeypatch.setattr(dumps, "_content", later)
    PngFolder(tmp_path / "dump", SET, "m")
    begun.clear()
    with pytest.raises(UserError, match="holds pictures of another model"):
        PngFolder(tmp_path / "other", SET, "another")


def test_somebodys_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"^--output: '.*' holds other files; choose a folder that is empty, or none yet$"):
        PngFolder(tmp_path, SET, "m", "--output")
    assert files(tmp_path) == {"thesis.tex": b"x"}
    with pytest.raises(UserError, match=r"^--dump: '.*thesis\.tex' is a file, a folder is needed$"):
        PngFolder(tmp_path / "thesis.tex", SET, "m")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dump.json").write_text('{"form": "png"}')
    with pytest.raises(UserError, match=r"cannot read .*dump\.json': key set: missing"):
        PngFolder(tmp_path / "broken", SET, "m")


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = PngFolder(tmp_path, SET, "m")

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dumps, "_put", full)
    with pytest.raises(UserError, match=r"cannot write .*: no space left on device; free some space and go on"):
        dump.write(CHUNKS[0], PIXELS[:2])
    assert not list(tmp_path.glob("*0000*"))


def test_parquet_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--dump: parquet needs pyarrow: pip install 'fastgen-distill\[data\]', or choose png$"):
        ParquetShards(tmp_path, SET, "m")


def test_pngs_are_what_pillow_reads_of_any_memory_layout() -> None:
    picture = PIXELS[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(decoded(png(picture)), PIXELS[0])


def test_an_evaluation_in_parts_keeps_what_it_measures(tmp_path: Path) -> None:
    """Through the loop of an evaluation itself: pictures are rounded, kept, and only then cropped and resized."""
    of, extractors = feature("thumbnails", "rgb", size=64), Extractors(Resources())
    floats = torch.rand((5, 3, 6, 9), generator=torch.Generator().manual_seed(1))
    prepare = PrepareBlock(crop="centre", resize=4)
    for part in (Part(1, 2), Part(0, 2)):
        dump, store = PngFolder(tmp_path / "pictures", SET, "m"), Store(tmp_path / "store", len(SET), SET.chunk)
        drawing = Drawing(lambda prompts, seeds, ids: floats[[number - SET.first for number in ids]], 1, "truncate", prepare, dumps=[dump])
        fill(store, SET, lacking(store, [extractors.name(of)], [dump], part), drawing, extractors, [of])
        assert not lacking(store, [extractors.name(of)], [dump], part)
    kept = torch.stack(PictureFolder(tmp_path / "pictures", "--images").read(range(5)))
    assert torch.equal(kept, (floats * 255).to(torch.uint8))
    assert torch.equal(store.table(extractors.name(of)).read(), prepared(kept, prepare))
