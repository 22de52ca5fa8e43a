"""Which size a picture is for, and which sizes pictures ask for: by hand, and on files of known sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgen.data.buckets import divided, found, nearest, offered
from fastgen.data.images import CaptionedImages, load_images
from fastgen.data.rows import Held
from fastgen.data.training import SizedData, TrainingData
from fastgen.data.weighted import cumulative
from fastgen.errors import UserError
from fastgen.rng import SampleRng


def always(_size: tuple[int, int]) -> bool:
    return True


@pytest.mark.parametrize(
    ("picture", "place"),
    [
        ((500, 500), 0),
        ((300, 400), 1),
        ((400, 300), 2),
        ((1000, 2000), 1),
        ((3000, 1000), 2),
        ((1100, 1000), 3),
        ((501, 500), 0),
        ((1024, 1024), 3),
        ((800, 800), 3),
    ],
)
def test_a_picture_goes_to_the_nearest_aspect_and_among_those_to_the_nearest_area(picture: tuple[int, int], place: int) -> None:
    assert nearest([(512, 512), (448, 576), (576, 448), (1024, 1024)], picture) == place


def test_offers_are_no_larger_than_the_square_and_of_every_aspect_to_two_to_one() -> None:
    offers = offered((1024, 1024), 16, always)
    assert offers[0] == (1024, 1024)
    assert {(832, 1216), (1216, 832), (768, 1344), (896, 1152)} <= set(offers)  # SDXL's own
    for height, width in offers:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 <= height * width <= 1024**2
        assert 0.5 <= height / width <= 2
    assert set(offered((16, 16), 4, lambda size: max(size) <= 24)) == {(16, 16), (12, 20), (20, 12)}


def pictures(folder: Path, sizes: list[tuple[int, int]]) -> CaptionedImages:
    """Of (height, width) as they are shown; each second one of another than its file says, which EXIF turns."""
    folder.mkdir()
    for i, (height, width) in enumerate(sizes):
        turned = Image.Exif()
        turned[274] = 6
        image = Image.linear_gradient("L").resize((height, width) if i % 2 else (width, height)).convert("RGB")
        image.save(folder / f"{i:04d}.jpg", exif=turned if i % 2 else Image.Exif())
        (folder / f"{i:04d}.txt").write_text(f"picture {i}")
    return load_images(str(folder))


def test_sizes_are_read_as_pictures_are_shown(tmp_path: Path) -> None:
    sizes = [(20, 30), (20, 30), (31, 17), (31, 17)]
    assert pictures(tmp_path / "images", sizes).sizes() == sizes


def test_each_size_has_its_own_pictures_in_their_order_and_one_without_any_is_refused(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", [(20, 20), (20, 30), (40, 41), (40, 60)])
    square, wide = divided(images, [(16, 16), (16, 24)])
    kept = [[next(iter(captions)) for captions in part.captions] for part in (square, wide)]
    assert kept == [["picture 0", "picture 2"], ["picture 1", "picture 3"]]
    with pytest.raises(UserError, match=r"^recipe key student\.sizes\.2: \[32, 16\] is nearest to none of the 4 images; remove it$"):
        divided(images, [(16, 16), (16, 24), (32, 16)])


def test_found_sizes_are_the_frequent_ones_and_rare_pictures_go_to_their_neighbours(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", [(32, 32)] * 40 + [(24, 40)] * 60 + [(40, 24)])
    sizes = found(images, (32, 32), 4, always)
    assert sizes == [(24, 40), (32, 32)]  # of 101 the one is fewer than a fiftieth
    assert Counter(nearest(sizes, size) for size in images.sizes()) == {0: 60, 1: 41}
    assert found(images, (32, 32), 4, lambda size: size == (32, 32)) == [(32, 32)]


def sized_data() -> SizedData:
    """Three pictures of one size, one of another; a latent holds its own number."""

    def part(numbers: list[int], width: int) -> TrainingData:
        latents = torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 1, 2, width).clone()
        captions = [(torch.tensor([number]), cumulative([1.0])) for number in numbers]
        return TrainingData(list("abcd"), Held({"c": torch.arange(4.0)}), cumulative([1.0] * 4), Held({"latents": latents}), captions)

    return SizedData((part([0, 1, 2], 2), part([3], 4)), cumulative([3.0, 1.0]))


def test_a_batch_has_one_size_and_every_picture_the_same_chance() -> None:
    data, seen = sized_data(), Counter[int]()
    for step in range(2000):
        batch = data.draw(SampleRng(0, (step, 0), range(4)).at("data"))
        assert batch.latents is not None
        assert batch.latents.shape == (4, 1, 2, (2, 4)[batch.place])
        numbers = batch.latents[:, 0, 0, 0].long().tolist()
        assert [data.prompts[number] for number in numbers] == list(batch.prompts)
        seen.update(numbers)
    # 8000 draws in 2000 batches: a batch of the fourth picture is 4 of it, so its share's deviation is that of 2000 throws.
    assert all(abs(count / 8000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5 for count in seen.values())


def test_the_size_is_the_updates_own_however_it_is_split() -> None:
    data = sized_data()
    for step in range(40):
        whole = data.draw(SampleRng(0, (step, 1), range(8)).at("data"))
        parts = [data.draw(SampleRng(0, (step, 1), ids).at("data")) for ids in ([5, 6, 7], [0, 1], [2, 3, 4])]
        assert {part.place for part in parts} == {whole.place}
        assert whole.latents is not None
        assert torch.equal(torch.cat([part.latents for part in parts if part.latents is not None]), whole.latents[[5, 6, 7, 0, 1, 2, 3, 4]])
    assert len({data.draw(SampleRng(0, (0, index), range(2)).at("data")).place for index in range(20)}) == 2  # and not the step's


def test_pictures_that_would_be_enlarged_are_told_by_their_headers(tmp_path: Path) -> None:
    sizes = [(16, 16), (15, 40), (40, 15), (15, 15), (60, 60), (16, 24), (24, 16)]
    images = pictures(tmp_path / "images", sizes)
    assert images.enlarged(16, 16) == {i: sizes[i] for i in (1, 2, 3)}
    assert images.enlarged(16, 24) == {i: sizes[i] for i in (0, 1, 2, 3, 6)}
    tensors = CaptionedImages([{"a": 1.0}], [torch.zeros(3, 4, 4)])
    assert tensors.enlarged(16, 16) == {}  # of another size they are refused
