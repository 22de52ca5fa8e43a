"""Batches: drawn with the weights' frequencies, images with their own captions, latents as the family encodes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen.data.images import CaptionedImages, load_images
from fastgen.data.training import TrainingData, prepare
from fastgen.families.base import LatentSpec
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.rng import SampleRng

CPU = torch.device("cpu")
COUNT = 4000


def rng(ids: range = range(COUNT), seed: int = 0, step: int = 0) -> SampleRng:
    return SampleRng(seed, ("batch", step), ids)


def chi_square(counts: Tensor, shares: list[float]) -> float:
    """Pearson's statistic per degree of freedom: about 1 when the shares are right."""
    expected = torch.tensor(shares, dtype=torch.float64) * counts.sum()
    return (((counts - expected) ** 2 / expected).sum() / (len(shares) - 1)).item()


def test_prompts_are_drawn_with_their_weights() -> None:
    shares = {"0": 0.05, "3": 0.5, "": 0.15, "5": 0.3}
    data = prepare(Toy("toy:ring"), shares, None, CPU)
    assert data.prompts == list(shares)
    cond, latents = data.draw(rng())
    assert latents is None
    drawn = cond["component"]
    counts = torch.stack([(drawn == component).sum() for component in (0, 3, -1, 5)])
    assert counts.sum() == COUNT
    assert chi_square(counts, list(shares.values())) < 4
    assert chi_square(counts, [0.25] * 4) > 100


def test_a_prompt_of_weight_zero_is_never_drawn_wherever_it_stands() -> None:
    data = prepare(Toy("toy:ring"), {"0": 0.0, "1": 0.5, "2": 0.0, "3": 0.5, "4": 0.0}, None, CPU)
    assert set(data.draw(rng())[0]["component"].tolist()) == {1, 3}


def test_weights_need_not_sum_to_one() -> None:
    data = prepare(Toy("toy:ring"), {"1": 6.0, "2": 2.0}, None, CPU)
    assert (data.draw(rng())[0]["component"] == 1).double().mean() == pytest.approx(0.75, abs=0.03)


def test_the_extremes_of_the_uniform_numbers_stay_in_the_table() -> None:
    class Fixed(SampleRng):
        def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
            return torch.tensor([0.0, 1 - 2**-24])

    data = prepare(Toy("toy:ring"), dict.fromkeys("01234", 0.2), None, CPU)
    assert data.draw(Fixed(0, (), [0, 1]))[0]["component"].tolist() == [0, 4]
    latents = torch.arange(7.0)[:, None]
    captions = [(torch.tensor([0, 1]), torch.tensor([0.5, 1.0], dtype=torch.float64))] * 7
    images = TrainingData(data.prompts, data.cond, data.cumulative, latents, captions)
    cond, drawn = images.draw(Fixed(0, (), [0, 1]))
    assert drawn is not None
    assert drawn.flatten().tolist() == [0, 6]
    assert cond["component"].tolist() == [0, 1]


def vectors() -> tuple[Toy, CaptionedImages]:
    """Three 'images' of the two-dimensional ring, each with captions of its own and one that two of them share."""
    captions = [{"0": 0.25, "1": 0.75}, {"2": 1.0}, {"3": 0.5, "1": 0.5}]
    return Toy("toy:ring"), CaptionedImages(captions, [torch.full((2,), float(i)) for i in range(3)])


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> TrainingData:
    family, images = vectors()
    family.latent = LatentSpec(2, (1,))
    monkeypatch.setattr(CaptionedImages, "batches", lambda self, resolution: iter([torch.stack(self.sources)]))
    return prepare(family, {"7": 1.0}, images, CPU)


def test_captions_belong_to_their_image_with_their_probabilities(paired: TrainingData) -> None:
    cond, latents = paired.draw(rng())
    assert latents is not None
    assert latents.shape == (COUNT, 2)
    image, component = latents[:, 0].long(), cond["component"]
    pairs = {(0, 0): 1 / 12, (0, 1): 1 / 4, (1, 2): 1 / 3, (2, 3): 1 / 6, (2, 1): 1 / 6}
    counts = torch.stack([((image == i) & (component == c)).sum() for i, c in pairs])
    assert counts.sum() == COUNT, "a caption of another image was drawn"
    assert chi_square(counts, list(pairs.values())) < 4


def test_images_bring_their_own_prompts(paired: TrainingData) -> None:
    assert set(paired.prompts) == {"0", "1", "2", "3"}
    weights = paired.cumulative.diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert dict(zip(paired.prompts, weights.tolist(), strict=True)) == pytest.approx({"0": 1 / 12, "1": 5 / 12, "2": 1 / 3, "3": 1 / 6})


@pytest.mark.parametrize("make", [lambda paired: paired, lambda _: prepare(Toy("toy:ring"), {"1": 1.0, "2": 2.0}, None, CPU)])
def test_a_samples_row_depends_on_its_own_id_alone(paired: TrainingData, make: Callable[[TrainingData], TrainingData]) -> None:
    data = make(paired)
    cond, latents = data.draw(rng(range(64)))
    part, part_latents = data.draw(rng(range(40, 50)))
    assert torch.equal(part["component"], cond["component"][40:50])
    if latents is not None and part_latents is not None:
        assert torch.equal(part_latents, latents[40:50])
    other, _ = data.draw(rng(range(64), step=1))
    assert not torch.equal(other["component"], cond["component"])


def test_latents_and_conditioning_are_the_familys_encoding(sd3_folder: Path, tmp_path: Path) -> None:
    sizes, rows = [(16, 16), (40, 24), (20, 33)], []
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f'{{"file_name": "{i}.png", "text": ["picture {i}", "noise"]}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    images, family = load_images(str(tmp_path)), SD3(sd3_folder, max_sequence_length=16, resolution=24)
    messages: list[str] = []
    data = prepare(family, None, images, CPU, messages.append)
    assert messages == ["encoding 4 prompts", "encoding 3 images"]
    assert data.latents is not None
    (pixels,) = images.batches(24)
    with torch.no_grad():
        mode = family.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(data.latents, (mode - 0.0609) * 1.5305, rtol=0, atol=1e-6)
    assert data.latents.shape == (3, *family.latent.shape)
    encoded = family.encode_prompts(data.prompts)
    assert all(torch.equal(value, encoded[key]) for key, value in data.cond.items())
    cond, latents = data.draw(rng(range(60)))
    assert latents is not None
    image = (latents[:, None] == data.latents).flatten(2).all(-1).double().argmax(1)
    row = (cond["pooled_projections"][:, None] == encoded["pooled_projections"]).all(-1).double().argmax(1)
    assert set(zip(image.tolist(), [data.prompts[i] for i in row.tolist()], strict=True)) == {
        (i, text) for i in range(3) for text in (f"picture {i}", "noise")
    }
    assert not any(tensor.requires_grad for tensor in (data.latents, *data.cond.values()))
