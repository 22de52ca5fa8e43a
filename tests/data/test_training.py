"""Batches: drawn with the weights' frequencies, images with their own captions, latents as the family encodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen.data.encoded import Keeping
from fastgen.data.images import CaptionedImages, load_images
from fastgen.data.pairs import Pairs
from fastgen.data.rows import Held
from fastgen.data.training import TrainingData, prepare, prompt_weights, with_pairs
from fastgen.families.base import LatentSpec
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.progress import Progress
from fastgen.rng import SampleRng

CPU = torch.device("cpu")
KEEP = Keeping(CPU)
COUNT = 4000


class Heard(Progress):
    """The stages of a run."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, message: str) -> None:
        self.stages.append(message)


def rng(ids: range = range(COUNT), seed: int = 0, step: int = 0) -> SampleRng:
    return SampleRng(seed, ("batch", step), ids)


def chi_square(counts: Tensor, shares: list[float]) -> float:
    """Pearson's statistic per degree of freedom: about 1 when the shares are right."""
    expected = torch.tensor(shares, dtype=torch.float64) * counts.sum()
    return (((counts - expected) ** 2 / expected).sum() / (len(shares) - 1)).item()


def test_prompts_are_drawn_with_their_weights() -> None:
    shares = {"0": 0.05, "3": 0.5, "": 0.15, "5": 0.3}
    data = prepare(Toy("toy:ring"), shares, None, KEEP)
    assert data.prompts == list(shares)
    batch = data.draw(rng())
    assert batch.latents is None
    assert batch.pairs is None
    assert batch.size == COUNT
    drawn = batch.cond["component"]
    assert batch.prompts == tuple("" if component < 0 else str(component) for component in drawn.tolist())
    counts = torch.stack([(drawn == component).sum() for component in (0, 3, -1, 5)])
    assert counts.sum() == COUNT
    assert chi_square(counts, list(shares.values())) < 4
    assert chi_square(counts, [0.25] * 4) > 100


def test_a_prompt_of_weight_zero_is_never_drawn_wherever_it_stands() -> None:
    data = prepare(Toy("toy:ring"), {"0": 0.0, "1": 0.5, "2": 0.0, "3": 0.5, "4": 0.0}, None, KEEP)
    assert set(data.draw(rng()).cond["component"].tolist()) == {1, 3}


def test_weights_need_not_sum_to_one() -> None:
    data = prepare(Toy("toy:ring"), {"1": 6.0, "2": 2.0}, None, KEEP)
    assert (data.draw(rng()).cond["component"] == 1).double().mean() == pytest.approx(0.75, abs=0.03)


def test_the_extremes_of_the_uniform_numbers_stay_in_the_table() -> None:
    class Fixed(SampleRng):
        def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:  # type: ignore[override]
            return torch.tensor([0.0, 1 - 2**-24])

    data = prepare(Toy("toy:ring"), dict.fromkeys("01234", 0.2), None, KEEP)
    assert data.draw(Fixed(0, (), [0, 1])).cond["component"].tolist() == [0, 4]
    latents = Held({"latents": torch.arange(7.0)[:, None]})
    captions = [(torch.tensor([0, 1]), torch.tensor([0.5, 1.0], dtype=torch.float64))] * 7
    images = TrainingData(data.prompts, data.cond, data.cumulative, latents, captions)
    batch = images.draw(Fixed(0, (), [0, 1]))
    assert batch.latents is not None
    assert batch.latents.flatten().tolist() == [0, 6]
    assert batch.cond["component"].tolist() == [0, 1]


def vectors() -> tuple[Toy, CaptionedImages]:
    """Three 'images' of the two-dimensional ring, each with captions of its own and one that two of them share."""
    captions = [{"0": 0.25, "1": 0.75}, {"2": 1.0}, {"3": 0.5, "1": 0.5}]
    return Toy("toy:ring"), CaptionedImages(captions, [torch.full((2, 1, 1), float(i)) for i in range(3)])


@pytest.fixture
def captioned(monkeypatch: pytest.MonkeyPatch) -> TrainingData:
    family, images = vectors()
    family.latent = LatentSpec(2, (1, 1))
    monkeypatch.setattr(CaptionedImages, "pixels", lambda self, indices, *_: {i: self.sources[i] for i in indices})
    return prepare(family, {"7": 1.0}, images, KEEP)


def test_captions_belong_to_their_image_with_their_probabilities(captioned: TrainingData) -> None:
    batch = captioned.draw(rng())
    assert batch.latents is not None
    assert batch.latents.shape == (COUNT, 2, 1, 1)
    image, component = batch.latents[:, 0, 0, 0].long(), batch.cond["component"]
    assert batch.prompts == tuple(map(str, component.tolist()))
    pairs = {(0, 0): 1 / 12, (0, 1): 1 / 4, (1, 2): 1 / 3, (2, 3): 1 / 6, (2, 1): 1 / 6}
    counts = torch.stack([((image == i) & (component == c)).sum() for i, c in pairs])
    assert counts.sum() == COUNT, "a caption of another image was drawn"
    assert chi_square(counts, list(pairs.values())) < 4


def test_images_bring_their_own_prompts(captioned: TrainingData) -> None:
    assert set(captioned.prompts) == {"0", "1", "2", "3"}
    weights = captioned.cumulative.diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert dict(zip(captioned.prompts, weights.tolist(), strict=True)) == pytest.approx({"0": 1 / 12, "1": 5 / 12, "2": 1 / 3, "3": 1 / 6})


@pytest.mark.parametrize("make", [lambda captioned: captioned, lambda _: prepare(Toy("toy:ring"), {"1": 1.0, "2": 2.0}, None, KEEP)])
def test_a_samples_row_depends_on_its_own_id_alone(captioned: TrainingData, make: Callable[[TrainingData], TrainingData]) -> None:
    data = make(captioned)
    whole, part = data.draw(rng(range(64))), data.draw(rng(range(40, 50)))
    assert torch.equal(part.cond["component"], whole.cond["component"][40:50])
    assert part.prompts == whole.prompts[40:50]
    if whole.latents is not None and part.latents is not None:
        assert torch.equal(part.latents, whole.latents[40:50])
    assert not torch.equal(data.draw(rng(range(64), step=1)).cond["component"], whole.cond["component"])


@pytest.mark.parametrize("size", [(24, 24), (16, 28)])
def test_latents_and_conditioning_are_the_familys_encoding(sd3_folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    sizes, rows = [(16, 16), (40, 24), (20, 33)], []
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f'{{"file_name": "{i}.png", "text": ["picture {i}", "noise"]}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    images, family = load_images(str(tmp_path)), SD3(sd3_folder, max_sequence_length=16, size=size)
    heard = Heard()
    data = prepare(family, None, images, KEEP, heard)
    assert heard.stages == ["encoding 4 prompts", "encoding 3 images"]
    assert data.latents is not None and isinstance(data.cond, Held)
    latents = data.latents.select(torch.arange(3))["latents"]
    (pixels,) = images.batches(*size)
    with torch.no_grad():
        mode = family.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, (mode - 0.0609) * 1.5305, rtol=0, atol=1e-5)
    assert latents.shape == (3, *family.latent.shape)
    encoded = family.encode_prompts(data.prompts)
    assert all(torch.equal(value, encoded[key]) for key, value in data.cond.tensors.items())
    batch = data.draw(rng(range(60)))
    assert batch.latents is not None
    image = (batch.latents[:, None] == latents).flatten(2).all(-1).double().argmax(1)
    row = (batch.cond["pooled_projections"][:, None] == encoded["pooled_projections"]).all(-1).double().argmax(1)
    assert batch.prompts == tuple(data.prompts[i] for i in row.tolist())
    assert set(zip(image.tolist(), batch.prompts, strict=True)) == {(i, text) for i in range(3) for text in (f"picture {i}", "noise")}
    assert not any(tensor.requires_grad for tensor in (latents, *data.cond.tensors.values()))


PAIR_PROMPTS = ("0", "6", "0", "", "3")


def with_five_pairs(data: TrainingData, family: Toy | None = None) -> TrainingData:
    """Pair i has seed 10 + i and x0 = (i, -i)."""
    x0 = torch.arange(5.0)[:, None] * torch.tensor([1.0, -1.0])
    return with_pairs(data, Pairs.held(torch.arange(10, 15), PAIR_PROMPTS, x0), family or Toy("toy:ring"), KEEP)


def test_pairs_are_drawn_evenly_each_with_its_own_noise_and_prompt() -> None:
    data = with_five_pairs(prepare(Toy("toy:ring"), {"0": 0.9, "1": 0.1}, None, KEEP))
    pairs = data.draw(rng()).pairs
    assert pairs is not None
    index = pairs.x0[:, 0].long()
    assert chi_square(torch.bincount(index, minlength=5), [0.2] * 5) < 4
    assert torch.equal(pairs.x0[:, 1], -pairs.x0[:, 0])
    noise = torch.cat([torch.randn((1, 2), generator=torch.Generator().manual_seed(10 + i)) for i in range(5)])
    assert torch.equal(pairs.noise, noise[index])
    assert torch.equal(pairs.cond["component"], torch.tensor([0, 6, 0, -1, 3])[index])


def test_pairs_and_prompts_are_drawn_independently_and_pairs_change_no_other_draw() -> None:
    plain = prepare(Toy("toy:ring"), {"0": 0.5, "1": 0.5}, None, KEEP)
    batch, before = with_five_pairs(plain).draw(rng()), plain.draw(rng())
    assert batch.pairs is not None
    assert torch.equal(batch.cond["component"], before.cond["component"])
    joint = 5 * batch.cond["component"] + batch.pairs.x0[:, 0].long()
    assert chi_square(torch.bincount(joint, minlength=10), [0.1] * 10) < 4


def test_a_samples_pair_depends_on_its_own_id_alone() -> None:
    data = with_five_pairs(prepare(Toy("toy:ring"), {"0": 1.0}, None, KEEP))
    whole, part, later = (data.draw(rng(ids, step=step)).pairs for ids, step in ((range(64), 0), (range(40, 50), 0), (range(64), 1)))
    assert whole is not None and part is not None and later is not None
    assert torch.equal(part.x0, whole.x0[40:50])
    assert torch.equal(part.noise, whole.noise[40:50])
    assert torch.equal(part.cond["component"], whole.cond["component"][40:50])
    assert not torch.equal(later.x0, whole.x0)


def test_only_prompts_that_are_new_are_encoded_for_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    family, encoded = Toy("toy:ring"), list[str]()
    data = prepare(family, {"0": 0.5, "3": 0.5}, None, KEEP)
    encode = family.encode_prompts

    def noting(prompts: Sequence[str], batch: int) -> dict[str, Tensor]:
        encoded.extend(prompts)
        return encode(prompts, batch)

    monkeypatch.setattr(family, "encode_prompts", noting)
    table = with_five_pairs(data, family).pairs
    assert encoded == ["6", ""]
    assert table is not None
    assert torch.equal(table.cond.select(table.rows)["component"], torch.tensor([0, 6, 0, -1, 3]))


def test_the_prompts_of_pairs_are_weighted_as_the_runs_own() -> None:
    assert prompt_weights({"0": 0.25, "1": 0.75}, None) == {"0": 0.25, "1": 0.75}
    assert prompt_weights(None, vectors()[1]) == pytest.approx({"0": 1 / 12, "1": 5 / 12, "2": 1 / 3, "3": 1 / 6})
