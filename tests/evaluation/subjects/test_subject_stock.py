"""Stock pipelines as subjects: the pictures of their own call, seed by seed, and everything that they depend on in the identity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import tiny_sd3
from torch import Tensor

from fastgen.errors import NotFinite, UserError
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.stock import StockPipeline
from fastgen.evaluation.subjects.stock_call import CallSettings
from fastgen.rng import derive_seed

PROMPTS = ["a red cat", "two boats at sea under a moon", "a house"]
SEEDS = [3, 4, 5]
SQUARE, AS_IS = (32, 32), {"use_resolution_binning": False}
TEXTS: dict[str, Any] = {"prompt": PROMPTS}
CASES: list[tuple[str, list[str], CallSettings, dict[str, Any]]] = [
    # pipeline, prompts, what is asked, and beside the steps the arguments that its call should have
    ("tiny_sd3", PROMPTS, CallSettings(2, 3.0, (24, 16), 12), TEXTS | {"guidance_scale": 3.0, "height": 24, "width": 16, "max_sequence_length": 12}),
    ("tiny_sd15", PROMPTS, CallSettings(3, more={"negative_prompt": "fog", "eta": 0.3}), TEXTS | {"negative_prompt": ["fog"] * 3, "eta": 0.3}),
    ("tiny_sdxl", PROMPTS, CallSettings(2, 1.0), TEXTS | {"guidance_scale": 1.0}),
    ("tiny_flux", PROMPTS, CallSettings(2, None, SQUARE, more={"guidance_scale": 2.0}), TEXTS | {"guidance_scale": 2.0, "height": 32, "width": 32}),
    ("tiny_qwen", PROMPTS, CallSettings(2, 2.5, (16, 16)), TEXTS | {"true_cfg_scale": 2.5, "negative_prompt": [""] * 3, "height": 16, "width": 16}),
    ("tiny_sana", PROMPTS, CallSettings(2, None, SQUARE, more=AS_IS), TEXTS | {"height": 32, "width": 32} | AS_IS),
    ("tiny_dit", ["7", "207", "0"], CallSettings(2, 2.0), {"class_labels": [7, 207, 0], "guidance_scale": 2.0}),
    ("tiny_consistency", ["4", "0", "2"], CallSettings(2), {"class_labels": [4, 0, 2], "batch_size": 3}),
    ("tiny_ddpm", [""] * 3, CallSettings(4), {"batch_size": 3}),
    ("tiny_grey_ddim", [""] * 3, CallSettings(4), {"batch_size": 3}),
]


def by_hand(folder: Path, seeds: Sequence[int] = SEEDS, **arguments: Any) -> Tensor:
    """Pictures (B, 3, H, W) of the pipeline's own call."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.from_numpy(pipeline(generator=generators, output_type="np", **arguments)[0]).movedim(-1, 1).expand(-1, 3, -1, -1)


@pytest.mark.parametrize(("name", "prompts", "asked", "call"), CASES, ids=[case[0] for case in CASES])
def test_the_pictures_are_the_calls_own_whatever_the_batch(folder_of: Any, name: str, prompts: list[str], asked: CallSettings, call: Any) -> None:
    folder = folder_of(name)
    subject = StockPipeline(str(folder), asked)
    subject.check({"main": SampleSet("main", tuple(prompts), tuple(SEEDS))}, whole=True)
    pictures = subject.draw(prompts, SEEDS, range(3))
    assert torch.equal(pictures, by_hand(folder, num_inference_steps=asked.steps, **call))
    assert pictures.dtype == torch.float32 and pictures.std() > 0.01
    alone = torch.cat([subject.draw([prompt], [seed], [index]) for index, (prompt, seed) in enumerate(zip(prompts, SEEDS, strict=True))])
    assert (alone - pictures).abs().max() <= 1e-4
    assert not subject.drawn_alone and subject.steps == asked.steps
    assert (subject.draw(prompts[:1], SEEDS[1:2], [0]) - alone[:1]).abs().max() > 1e-3, "the seed must count"


def test_what_takes_one_prompt_at_a_time_is_given_one(folder_of: Any) -> None:
    folder, size = folder_of("tiny_prx"), {"height": 16, "width": 16}
    for guidance, alone in ((3.0, True), (None, True), (1.0, False)):  # its own guidance is 4
        subject = StockPipeline(str(folder), CallSettings(2, guidance, (16, 16), more=AS_IS))
        assert subject.drawn_alone == alone
        told = {"guidance_scale": 4.0 if guidance is None else guidance, "num_inference_steps": 2, **size, **AS_IS}
        pictures = subject.draw(PROMPTS, SEEDS, range(3))
        batches = [[i] for i in range(3)] if alone else [[0, 1, 2]]
        expected = [by_hand(folder, [SEEDS[i] for i in some], prompt=[PROMPTS[i] for i in some], **told) for some in batches]
        assert torch.equal(pictures, torch.cat(expected))


@pytest.fixture
def lcm_sd3(folder_of: Any, tmp_path: Path) -> Path:
    """A pipeline that hands its scheduler no generators, with a scheduler that draws."""
    from diffusers import FlowMatchLCMScheduler

    folder = Path(shutil.copytree(folder_of("tiny_sd3"), tmp_path / "lcm"))
    FlowMatchLCMScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "FlowMatchLCMScheduler"]}))
    return folder


def test_noise_of_a_scheduler_without_generators_is_each_pictures_own(lcm_sd3: Path) -> None:
    subject, state = StockPipeline(str(lcm_sd3), CallSettings(2, 1.0)), torch.get_rng_state()
    together = subject.draw(PROMPTS, SEEDS, range(3))
    assert subject.drawn_alone and torch.equal(torch.get_rng_state(), state)
    other = StockPipeline(str(lcm_sd3), CallSettings(2, 1.0))
    assert torch.equal(torch.cat([other.draw([prompt], [seed], [0]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]), together)
    assert torch.equal(subject.draw(PROMPTS[1:], SEEDS[1:], range(1, 3)), together[1:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("scheduler", SEEDS[0]))
        expected = by_hand(lcm_sd3, SEEDS[:1], prompt=PROMPTS[:1], num_inference_steps=2, guidance_scale=1.0)
        torch.manual_seed(SEEDS[0])
        with_initial_noise = by_hand(lcm_sd3, SEEDS[:1], prompt=PROMPTS[:1], num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(together[:1], expected)
    assert (together[:1] - with_initial_noise).abs().max() > 1e-3


def test_another_number_of_steps_shares_the_weights(folder_of: Any) -> None:
    one = StockPipeline(str(folder_of("tiny_sd15")), CallSettings(1, 2.0))
    three = one.at(3)
    fresh = StockPipeline(str(folder_of("tiny_sd15")), CallSettings(3, 2.0))
    assert three.pipeline is one.pipeline and (one.steps, three.steps) == (1, 3)
    assert three.identity == fresh.identity != one.identity
    assert torch.equal(three.draw(PROMPTS, SEEDS, range(3)), fresh.draw(PROMPTS, SEEDS, range(3)))


def identity(folder: Path, **options: Any) -> str:
    asked = {name: options.pop(name) for name in list(options) if name in CallSettings.__dataclass_fields__}
    return StockPipeline(str(folder), CallSettings(**asked), **options).identity


def test_each_setting_counts_in_the_identity(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("tiny_sd3")
    settings: list[dict[str, Any]] = [
        {}, {"steps": 2}, {"guidance": 2.0}, {"size": (16, 32)}, {"max_sequence_length": 9}, {"more": {"negative_prompt": "x"}}, {"dtype": "bf16"},
    ]  # fmt: skip
    found = [identity(folder, **each) for each in settings]
    assert len(set(found)) == len(found)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    assert identity(copied) == found[0] == identity(folder, steps=28, guidance=7.0)
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.5}))
    assert identity(copied) not in found
    shutil.copy(folder / "scheduler" / "scheduler_config.json", config)
    tiny_sd3(1).vae.save_pretrained(copied / "vae")
    assert identity(copied) not in found


def test_the_record_says_what_was_called(folder_of: Any) -> None:
    record = StockPipeline(str(folder_of("tiny_sd15")), CallSettings(3)).record
    assert record == json.loads(json.dumps(record)) and str(folder_of("tiny_sd15").parent) not in json.dumps(record)
    assert record["source"] == "tiny_sd15" and record["pipeline"] == "StableDiffusionPipeline"
    assert record["scheduler"]["class"] == "PNDMScheduler" and record["scheduler"]["beta_end"] == 0.013
    assert record["call"] == {"eta": 0.0, "guidance_rescale": 0.0, "guidance_scale": 7.5, "num_inference_steps": 3}
    assert record["without"] == ["safety_checker"] and record["dtype"] == "fp32" and record["device"] == "cpu"


def test_half_precision_is_close(folder_of: Any) -> None:
    full, half = (
        StockPipeline(str(folder_of("tiny_sd15")), CallSettings(1, 1.0), dtype=dtype).draw(PROMPTS, SEEDS, range(3)) for dtype in ("fp32", "bf16")
    )
    assert half.dtype == torch.float32 and 1e-4 < (full - half).abs().mean() < 0.05


def edited(folder: Path, target: Path, **index: Any) -> str:
    shutil.copytree(folder, target)
    path = target / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return str(target)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"_class_name": ["mine", "MyPipeline"]}, "names mine.MyPipeline, which is code of its own, and fastgen runs none"),
        (
            {"_class_name": "StableDifusionPipeline"},
            "is a StableDifusionPipeline, which diffusers .* has not; did you mean 'StableDiffusionPipeline'",
        ),
        ({"_class_name": None}, "has no key '_class_name'"),
        ({"_class_name": "StableDiffusionImageVariationPipeline"}, "needs image, so it does not draw pictures of prompts alone"),
        ({"scheduler": ["os", "path"]}, r"its scheduler is a os\.path, .*fastgen runs no code of a pipeline's own"),
        ({"unet": ["mine", "UNet"]}, r"its unet is a mine\.UNet, .*fastgen runs no code of a pipeline's own"),
    ],
)
def test_folders_that_are_refused(folder_of: Any, tmp_path: Path, index: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        StockPipeline(edited(folder_of("tiny_sd15"), tmp_path / "edited", **index))
    assert "recipe key" not in str(refused.value)


def test_pickles_are_refused(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(edited(folder_of("tiny_sd15"), tmp_path / "pickled"))
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="has its weights as a pickle alone"):
        StockPipeline(str(folder))


def test_videos_are_refused(folder_of: Any) -> None:
    with pytest.raises(UserError, match=r"^WanPipeline draws videos, and only pictures are measured$"):
        StockPipeline(str(folder_of("tiny_wan")))


def test_prompts_that_a_pipeline_cannot_take(folder_of: Any) -> None:
    samples = {"main": SampleSet("main", ("1", "a cat"), (1, 2))}
    with pytest.raises(UserError, match=r"^set main has prompts, and DDPMPipeline takes none"):
        StockPipeline(str(folder_of("tiny_ddpm")), CallSettings(2)).check(samples, whole=True)
    with pytest.raises(UserError, match=r"^set main: 'a cat' is neither a class 0 to 4 nor one's name$"):
        StockPipeline(str(folder_of("tiny_consistency")), CallSettings(2)).check(samples, whole=True)


def test_classes_by_their_names(folder_of: Any, tmp_path: Path) -> None:
    folder = edited(folder_of("tiny_dit"), tmp_path / "named", id2label={"7": "cock, rooster", "207": "golden retriever"})
    subject = StockPipeline(folder, CallSettings(1))
    assert torch.equal(subject.draw(["rooster", "golden retriever"], [1, 2], [0, 1]), subject.draw(["7", "207"], [1, 2], [0, 1]))
    with pytest.raises(UserError, match=r"'golden retreiver' is neither a class 0 to 999 nor one's name; did you mean 'golden retriever'\?"):
        subject.check({"main": SampleSet("main", ("golden retreiver",), (1,))}, whole=True)


def test_what_the_call_itself_refuses_is_one_line(folder_of: Any) -> None:
    subject = StockPipeline(str(folder_of("tiny_sd15")), CallSettings(1, size=(17, 16)))
    with pytest.raises(UserError, match=r"^pipeline 'tiny_sd15': its call fails: ValueError: .*divisible by 8"):
        subject.draw(PROMPTS, SEEDS, range(3))


def test_pictures_that_are_none(folder_of: Any) -> None:
    subject = StockPipeline(str(folder_of("tiny_ddpm")), CallSettings(1))
    subject.pipeline.unet.conv_out.bias.data.fill_(np.nan)
    with pytest.raises(NotFinite, match=r"^3 of 3 pictures of pipeline 'tiny_ddpm' in fp32 are not finite$"):
        subject.draw([""] * 3, SEEDS, range(3))
