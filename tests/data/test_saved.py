"""Pictures in the tables of Hugging Face's `datasets` are the same training pictures as those in a folder, read where they lie."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgen.data.images import load_images
from fastgen.errors import UserError

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(level: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").rotate(90 * level).convert("RGB").save(file, kind)
    return file.getvalue()


def rows(count: int = 3) -> Any:
    pictures = [{"bytes": picture(i), "path": None} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": pictures, "text": [f"the {i}" for i in range(count)], "number": list(range(count))}, features)


def folder(path: Path, which: list[int]) -> Path:
    path.mkdir()
    for place, i in enumerate(which):
        (path / f"{place}.png").write_bytes(picture(i))
        (path / f"{place}.txt").write_text(f"the {i}", encoding="utf-8")
    return path


def same(source: Path, reference: Path) -> None:
    found, expected = load_images(str(source)), load_images(str(reference))
    assert found.captions == expected.captions
    assert torch.equal(torch.cat(list(found.batches(12, 20))), torch.cat(list(expected.batches(12, 20))))


def refused(source: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=rf"^recipe key data\.images: .*{message}") as error:
        load_images(str(source), **options)
    assert "\n" not in str(error.value)


def test_a_saved_data_set_gives_what_its_files_do(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "saved")
    same(tmp_path / "saved", folder(tmp_path / "files", [0, 1, 2]))


def test_rows_that_were_selected_and_shuffled_are_those(tmp_path: Path) -> None:
    rows(4).select([3, 1, 2]).save_to_disk(tmp_path / "saved")
    same(tmp_path / "saved", folder(tmp_path / "files", [3, 1, 2]))


def test_of_several_splits_the_one_for_training_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": rows(2), "test": rows(3)}).save_to_disk(tmp_path / "saved")
    same(tmp_path / "saved", folder(tmp_path / "files", [0, 1]))


def test_parquet_files_of_a_repository_give_what_their_pictures_do(tmp_path: Path) -> None:
    (tmp_path / "repository/data").mkdir(parents=True)
    rows(2).to_parquet(tmp_path / "repository/data/train-00000-of-00002.parquet")
    rows(4).select([2, 3]).to_parquet(tmp_path / "repository/data/train-00001-of-00002.parquet")
    rows(1).to_parquet(tmp_path / "repository/data/test-00000-of-00001.parquet")
    same(tmp_path / "repository", folder(tmp_path / "files", [0, 1, 2, 3]))
    assert "test-00000-of-00001.parquet beside it is not" in load_images(str(tmp_path / "repository")).warnings[0]
    same(tmp_path / "repository/data/train-00001-of-00002.parquet", folder(tmp_path / "two", [2, 3]))


def test_the_content_is_that_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    rows(4).select([0, 1, 3]).save_to_disk(tmp_path / "other")
    one, two, other = (load_images(str(tmp_path / name)).content() for name in ("one", "two", "other"))
    assert one == two != other


def test_a_row_without_caption_or_picture_is_named_and_skipped_when_asked(tmp_path: Path) -> None:
    broken = rows().to_dict()
    broken["image"] = [{"bytes": picture(0), "path": None}, {"bytes": b"no picture", "path": None}, None]
    datasets.Dataset.from_dict(broken, rows().features).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", r"row 2' is not an image that can be read \(it is in no format that is read\)")
    kept = load_images(str(tmp_path / "saved"), skip_broken=True)
    assert len(kept) == 1 and "2 of 3 pictures are left out" in kept.warnings[0]
    refused(tmp_path / "saved", "row 1' has no caption: no 'caption' among its keys .*did you mean data.caption_key: 'text'", caption_key="caption")


def test_a_picture_by_its_path_alone_is_read_from_there(tmp_path: Path) -> None:
    files = folder(tmp_path / "files", [1])
    listed = {"image": [{"bytes": None, "path": str(files / "0.png")}], "text": ["the 1"]}
    datasets.Dataset.from_dict(listed, datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})).save_to_disk(
        tmp_path / "saved"
    )
    same(tmp_path / "saved", files)


def test_a_truncated_table_is_named(tmp_path: Path) -> None:
    rows().save_to_disk(tmp_path / "saved")
    table = next((tmp_path / "saved").glob("*.arrow"))
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])
    refused(tmp_path / "saved", "saved' is no data set that can be read")
    rows().to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    refused(tmp_path / "x.parquet", "x.parquet' is no data set that can be read")


def test_a_table_without_pictures_or_with_several_is_refused(tmp_path: Path) -> None:
    rows().remove_columns("image").save_to_disk(tmp_path / "none")
    refused(tmp_path / "none", r"no column of pictures, but \['text', 'number'\]")
    left, right = rows().rename_column("image", "left"), rows().select_columns("image").rename_column("image", "right")
    datasets.concatenate_datasets([left, right], axis=1).save_to_disk(tmp_path / "both")
    refused(tmp_path / "both", r"several columns of pictures, \['left', 'right'\]: call one of them 'image'")
    parquet.write_table(rows().data.table.select(["text"]), tmp_path / "texts.parquet")
    refused(tmp_path / "texts.parquet", "no column of pictures")
