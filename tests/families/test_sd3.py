"""The SD3 family against the stock StableDiffusion3Pipeline on random weights: one network call, the grid, whole pictures, every option."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from pipelines import CLIP_TOKENS, NEGATIVE, PROMPTS, adapter_tuning, draw, edit_json, tiny_sd3
from pipelines import sd3_folder as sd3_folder
from torch import Tensor

from fastgen.denoiser import Denoiser, Predictor
from fastgen.errors import UserError
from fastgen.families import family_class, find_family, resolve_source
from fastgen.families.sd3 import SD3
from fastgen.families.toy import Toy
from fastgen.generator import ImageGenerator
from fastgen.roles import LoraTuning, build_roles, frozen, trainable

TOKENS = 16
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def family(sd3_folder: Path) -> SD3:
    return SD3(sd3_folder, max_sequence_length=TOKENS)


@pytest.fixture
def stock(sd3_folder: Path) -> Any:
    """The folder in plain diffusers, with the scheduler that shifts once."""
    return StableDiffusion3Pipeline.from_pretrained(sd3_folder, scheduler=FlowMapEulerDiscreteScheduler(shift=3.0))


def ours(family: SD3, **settings: Any) -> ImageGenerator:
    return ImageGenerator(family, Predictor(Denoiser(family.load_backbone(), family), family), **settings)


def recorded(network: torch.nn.Module) -> list[tuple[dict[str, Any], Tensor]]:
    """Fills up with (keyword arguments, output) of every call of the network."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    network.register_forward_hook(lambda _module, _args, kwargs, output: calls.append((dict(kwargs), output[0])), with_kwargs=True)
    return calls


def guidance_call(guidance: float) -> dict[str, Any]:
    return {"guidance_scale": guidance, **({"negative_prompt": [NEGATIVE] * len(PROMPTS)} if guidance > 1 else {})}


def test_one_denoising_step_equals_the_real_pipelines(family: SD3, stock: Any) -> None:
    calls = recorded(stock.transformer)
    draw(stock, PROMPTS, SEEDS, num_inference_steps=4, max_sequence_length=TOKENS, **guidance_call(5.0))
    assert [kwargs["timestep"].unique().item() for kwargs, _ in calls] == pytest.approx([1000.0, 900.0, 750.0, 500.0], abs=1e-9)
    backbone = family.load_backbone()
    for kwargs, output in calls:
        cond = {key: kwargs[key] for key in ("encoder_hidden_states", "pooled_projections")}
        with torch.no_grad():
            prediction = family.call(backbone, kwargs["hidden_states"], kwargs["timestep"] / 1000, cond)
            later = family.call(backbone, kwargs["hidden_states"], kwargs["timestep"] / 1000 - 0.1, cond)
        torch.testing.assert_close(prediction, output, rtol=0, atol=1e-5)
        assert (later - output).abs().max() > 1e-3, "the time must matter for this test to mean anything"


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_sampler_calls_the_network_with_the_pipelines_own_arguments(family: SD3, stock: Any, guidance: float) -> None:
    theirs = recorded(stock.transformer)
    draw(stock, PROMPTS, SEEDS, num_inference_steps=4, max_sequence_length=TOKENS, **guidance_call(guidance))
    backbone = family.load_backbone()
    mine = recorded(backbone)
    generator = ImageGenerator(family, Predictor(Denoiser(backbone, family), family), steps=4, guidance=guidance, negative_prompt=NEGATIVE)
    generator.latents(PROMPTS, SEEDS)
    assert len(mine) == len(theirs) == 4
    for (given, output), (expected, reference) in zip(mine, theirs, strict=True):
        assert given["timestep"].dtype == expected["timestep"].dtype == torch.float64
        assert torch.equal(given["timestep"], expected["timestep"])
        for key in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            torch.testing.assert_close(given[key], expected[key], rtol=0, atol=1e-5)
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-5)


def test_the_schedulers_step_is_our_euler_step(family: SD3, stock: Any) -> None:
    calls = recorded(stock.transformer)
    draw(stock, PROMPTS, SEEDS, num_inference_steps=4, max_sequence_length=TOKENS, guidance_scale=1.0)
    times = family.grid(4)
    for i in range(3):
        x, velocity = calls[i][0]["hidden_states"], calls[i][1]
        t = times[i].expand(len(x))
        x0, eps = (family.path.convert(velocity, x, t, "velocity", kind) for kind in ("x0", "eps"))
        stepped = family.path.mix(x0, eps, times[i + 1].expand(len(x)))
        torch.testing.assert_close(stepped.float(), calls[i + 1][0]["hidden_states"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("resolution", [None, 24])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whole_pictures_equal_the_stock_pipelines(sd3_folder: Path, stock: Any, steps: int, guidance: float, resolution: int | None) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS, resolution=resolution)
    pictures = ours(family, steps=steps, guidance=guidance, negative_prompt=NEGATIVE)(PROMPTS, SEEDS)
    call = family.call_arguments(steps, guidance)
    expected = draw(stock, PROMPTS, SEEDS, **call | guidance_call(guidance))
    side = resolution or 16
    assert pictures.shape == expected.shape == (3, 3, side, side)
    assert call["height"] == call["width"] == side
    assert (pictures - expected).abs().max() <= 1e-5
    assert pictures.std() > 0.02


def test_pictures_depend_on_prompt_seed_guidance_and_negative_prompt(family: SD3) -> None:
    def picture(prompt: str = PROMPTS[0], seed: int = 3, guidance: float = 5.0, negative: str = NEGATIVE) -> Tensor:
        return ours(family, steps=2, guidance=guidance, negative_prompt=negative)([prompt], [seed])

    base = picture()
    for other in (picture(prompt=PROMPTS[1]), picture(seed=4), picture(guidance=1.0), picture(negative="")):
        assert (other - base).abs().max() > 1e-3


def test_the_stock_scheduler_shifts_its_grid_twice_and_ours_once(sd3_folder: Path, family: SD3) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(sd3_folder)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    draw(pipeline, PROMPTS, SEEDS, num_inference_steps=4, max_sequence_length=TOKENS, guidance_scale=1.0)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.858, 0.602, 0.0089, 0.0], abs=6e-4)
    assert family.shift == 3.0
    assert family.grid(4).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-12)
    assert family.grid(1).tolist() == [1.0]
    assert family.grid(4).dtype == torch.float64


def test_explicit_grid_is_stepped_on_exactly(sd3_folder: Path, family: SD3) -> None:
    grid = [1.0, 0.625, 0.25]
    call = family.call_arguments(3, 1.0, grid)
    assert call["sigmas"] == grid
    assert family.grid(3, grid).tolist() == grid
    assert "sigmas" not in family.call_arguments(3, 1.0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, scheduler=family.export_scheduler(grid))
    calls = recorded(pipeline.transformer)
    expected = draw(pipeline, PROMPTS, SEEDS, **json.loads(json.dumps(call)))
    assert [kwargs["timestep"][0].item() / 1000 for kwargs, _ in calls] == pytest.approx(grid, abs=1e-15)
    assert pipeline.scheduler.sigmas.tolist() == [*grid, 0.0]
    generator = ours(family, steps=3, grid=grid)
    assert generator.times().tolist() == grid
    assert (generator(PROMPTS, SEEDS) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_is_the_shift_of_this_resolution(sd3_folder: Path, tmp_path: Path, kind: Any) -> None:
    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3, base_image_seq_len=9, max_image_seq_len=100, time_shift_type=kind
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, scheduler=dynamic)
    pipeline.save_pretrained(tmp_path)
    shifts = []
    for resolution in (16, 32):
        call = {"height": resolution, "width": resolution, "max_sequence_length": TOKENS, "guidance_scale": 1.0}
        draw(pipeline, PROMPTS[:1], SEEDS[:1], num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], **call)
        for source in (tmp_path, pipeline):
            family = SD3(source, resolution=resolution)
            torch.testing.assert_close(family.grid(4), pipeline.scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)
            shifts.append(family.shift)
    assert shifts[0] == shifts[1] < shifts[2]


def test_encode_latents_equals_the_pipelines_vae_path(sd3_folder: Path, family: SD3) -> None:
    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(sd3_folder)
    with torch.no_grad():  # a posterior without spread, so that the pipeline's sample is the mode
        pipeline.vae.encoder.conv_out.weight[4:].zero_()
        pipeline.vae.encoder.conv_out.bias[4:].fill_(-30.0)
    pixels = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    image = pipeline.image_processor.preprocess(pixels, height=16, width=16)
    pipeline.scheduler.set_timesteps(4)
    pipeline.scheduler.sigmas = torch.zeros(5)  # no noise on top
    with torch.no_grad():
        first = pipeline.scheduler.timesteps[:1].repeat(2)
        expected = pipeline.prepare_latents(image, first, 2, 1, torch.float32, "cpu", torch.Generator())
    latents = family.encode_latents(2 * pixels - 1)
    assert latents.shape == (2, *family.latent.shape)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def test_decode_latents_equals_the_pipelines_vae_path(family: SD3, stock: Any) -> None:
    latents = 2 * torch.randn((2, 4, 12, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor + stock.vae.config.shift_factor, return_dict=False)[0]
    expected = stock.image_processor.postprocess(decoded, output_type="pt")
    assert expected.shape == (2, 3, 24, 16)
    torch.testing.assert_close(family.decode_latents(latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [5, 16])
def test_encode_prompts_equals_the_pipelines(sd3_folder: Path, stock: Any, length: int) -> None:
    prompts = [*PROMPTS, "", "a cat " * 20]
    cond = SD3(sd3_folder, max_sequence_length=length).encode_prompts(prompts)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = stock.encode_prompt(
            prompts, None, None, negative_prompt=[NEGATIVE] * 5, do_classifier_free_guidance=True, max_sequence_length=length
        )
    assert embeds.shape == (5, CLIP_TOKENS + length, 40)
    assert pooled.shape == (5, 20)
    torch.testing.assert_close(cond["encoder_hidden_states"], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(cond["pooled_projections"], pooled, rtol=0, atol=1e-5)
    null = SD3(sd3_folder, max_sequence_length=length).encode_prompts([NEGATIVE])
    torch.testing.assert_close(null["encoder_hidden_states"], negative[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(null["pooled_projections"], negative_pooled[:1], rtol=0, atol=1e-5)
    assert not cond["pooled_projections"].requires_grad


def test_many_prompts_are_encoded_in_chunks_with_equal_rows(family: SD3) -> None:
    prompts = [f"a number {i}" for i in range(70)]
    together = family.encode_prompts(prompts)
    for i in (0, 63, 64, 69):
        alone = family.encode_prompts([prompts[i]])
        for key, value in together.items():
            assert value.shape[0] == 70
            torch.testing.assert_close(value[i : i + 1], alone[key], rtol=0, atol=1e-5)


def test_free_encoders_drops_them_and_a_later_call_loads_them_again(sd3_folder: Path) -> None:
    family = SD3(sd3_folder, max_sequence_length=TOKENS)
    before = family.encode_prompts(PROMPTS)
    pixels = family.decode_latents(torch.ones(1, 4, 8, 8))
    family.free_encoders()
    assert family._loaded.encoders is None
    assert family.codec._loaded is None
    for key, value in family.encode_prompts(PROMPTS).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-5)  # as in any two readings of one file
    torch.testing.assert_close(family.decode_latents(torch.ones(1, 4, 8, 8)), pixels, rtol=0, atol=1e-5)


def test_defaults_of_a_plain_folder_and_of_an_exported_one(sd3_folder: Path, tmp_path: Path) -> None:
    plain = SD3(sd3_folder)
    assert (plain.max_sequence_length, plain.resolution, plain.latent.shape, plain.pixels_per_latent) == (256, 16, (4, 8, 8), 2)
    assert plain.own_call == {"num_inference_steps": 28, "guidance_scale": 7.0}
    copy = shutil.copytree(sd3_folder, tmp_path / "own")
    (copy / "fastgen.json").write_text(json.dumps({"call": {"num_inference_steps": 2, "guidance_scale": 1.5, "max_sequence_length": 9}}))
    own = SD3(copy)
    assert own.max_sequence_length == 9
    assert (own.own_call["num_inference_steps"], own.own_call["guidance_scale"]) == (2, 1.5)
    assert SD3(copy, max_sequence_length=12).max_sequence_length == 12


@pytest.mark.parametrize("resolution", [18, 25, 2])
def test_a_resolution_the_network_cannot_draw_is_refused(sd3_folder: Path, resolution: int) -> None:
    with pytest.raises(UserError, match=rf"teacher\.resolution.*{resolution}.*multiple of 4"):
        SD3(sd3_folder, resolution=resolution)


def test_a_resolution_beyond_the_position_embedding_is_refused(sd3_folder: Path) -> None:
    SD3(sd3_folder, resolution=64)
    with pytest.raises(UserError, match=r"teacher\.resolution.*68.*at most 64"):
        SD3(sd3_folder, resolution=68)


@pytest.fixture
def live() -> Any:
    return tiny_sd3()


def test_a_live_pipeline_draws_what_its_folder_draws(live: Any, family: SD3) -> None:
    from_live = SD3(live, max_sequence_length=TOKENS)
    pictures = ours(from_live, steps=2, guidance=5.0, negative_prompt=NEGATIVE)(PROMPTS, SEEDS)
    torch.testing.assert_close(pictures, ours(family, steps=2, guidance=5.0, negative_prompt=NEGATIVE)(PROMPTS, SEEDS), rtol=0, atol=1e-5)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(from_live.encode_latents(pixels), family.encode_latents(pixels), rtol=0, atol=1e-5)
    assert (from_live.shift, from_live.own_call) == (3.0, {"num_inference_steps": 28, "guidance_scale": 7.0})


@pytest.mark.parametrize("tuning", [None, adapter_tuning()], ids=["full", "lora"])
def test_training_a_role_leaves_the_live_pipelines_transformer_untouched(live: Any, tuning: LoraTuning | None) -> None:
    before = {name: value.clone() for name, value in live.transformer.state_dict().items()}
    required = [parameter.requires_grad for parameter in live.transformer.parameters()]
    family = SD3(live, max_sequence_length=TOKENS)
    roles = build_roles({"student": trainable(), "teacher": frozen()}, family, family.load_backbone(), tuning=tuning)
    x, t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    cond = family.encode_prompts(PROMPTS[:2])
    start = roles["student"].predictor(x, t, cond, "velocity")
    optimizer = torch.optim.SGD(roles["student"].parameters().values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        roles["student"].predictor(x, t, cond, "velocity").square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert (roles["student"].predictor(x, t, cond, "velocity") - start).abs().max() > 1e-3
        torch.testing.assert_close(roles["teacher"].predictor(x, t, cond, "velocity"), start, rtol=0, atol=1e-5)
    after = live.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in live.transformer.parameters()] == required


def test_a_pipeline_made_around_a_student_leaves_the_live_one_alone(live: Any) -> None:
    family = SD3(live)
    backbone, scheduler = family.load_backbone(), family.export_scheduler()
    made = family.load_pipeline(backbone, scheduler)
    assert made.transformer is backbone
    assert made.scheduler is scheduler
    assert live.transformer is not backbone
    assert isinstance(live.scheduler, FlowMatchEulerDiscreteScheduler)
    assert family.load_pipeline(None, scheduler).transformer is live.transformer


def test_a_half_precision_live_pipeline_serves_fp32_training(live: Any, family: SD3) -> None:
    half = SD3(live.to(dtype=torch.bfloat16), max_sequence_length=TOKENS)
    assert {parameter.dtype for parameter in half.load_backbone().parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in live.transformer.parameters()} == {torch.bfloat16}
    pixels = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = half.encode_latents(pixels)
    assert latents.dtype == torch.float32
    assert (latents - family.encode_latents(pixels)).abs().max() < 0.05
    assert half.decode_latents(latents).dtype == torch.float32
    assert {value.dtype for value in half.encode_prompts(PROMPTS).values()} == {torch.float32}


def test_meta_backbone_has_shapes_and_no_data(sd3_folder: Path, live: Any) -> None:
    real = SD3(sd3_folder).load_backbone()
    for meta in (SD3(source).load_backbone(meta=True) for source in (sd3_folder, live)):
        assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
        assert {name: tuple(value.shape) for name, value in meta.state_dict().items()} == {
            name: tuple(value.shape) for name, value in real.state_dict().items()
        }
        assert not meta.training


def test_meta_backbone_reads_no_weights(sd3_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd3_folder, tmp_path / "copy")
    for file in (copy / "transformer").glob("*.safetensors"):
        file.unlink()
    assert len(SD3(copy).blocks(SD3(copy).load_backbone(meta=True))) == 2


def test_backbone_is_fp32_eval_and_its_blocks_give_the_image_stream(family: SD3) -> None:
    backbone = family.load_backbone()
    assert not backbone.training
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    blocks = family.blocks(backbone)
    assert [type(block).__name__ for block in blocks] == ["JointTransformerBlock"] * 2
    with torch.no_grad():
        out = Denoiser(backbone, family)(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5]), family.encode_prompts(PROMPTS[:2]), taps=(0, 1))
    assert [tuple(feature.shape) for feature in out.features] == [(2, 16, 32)] * 2  # 8x8 latents in patches of 2, width 32


def test_auto_finds_the_family_by_the_pipelines_class(sd3_folder: Path, live: Any) -> None:
    assert isinstance(find_family(sd3_folder), SD3)
    assert isinstance(find_family(str(sd3_folder)), SD3)
    assert isinstance(find_family(live), SD3)
    assert isinstance(find_family(sd3_folder, "sd3", resolution=24), SD3)
    assert isinstance(find_family("toy:ring"), Toy)
    found: Any = find_family(sd3_folder, resolution=24, max_sequence_length=7)
    assert (found.max_sequence_length, found.resolution) == (7, 24)


def test_unknown_families_are_refused_with_the_allowed_names(sd3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.family: 'sd33' is not a family; did you mean 'sd3'\? allowed: .*auto, .*sd3, sdxl, toy"):
        find_family(sd3_folder, "sd33")
    with pytest.raises(UserError, match="is not a family"):
        family_class("base")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        UserError, match=r"no family for pipeline class 'KandinskyPipeline'; supported: .*StableDiffusion3Pipeline.*states.*families/README\.md"
    ):
        find_family(tmp_path)
    with pytest.raises(UserError, match="no family for pipeline class 'dict'"):
        find_family({})


def test_resolve_source_says_what_is_wrong(sd3_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(sd3_folder) == resolve_source(str(sd3_folder)) == sd3_folder
    with pytest.raises(UserError, match=r"folder without model_index\.json"):
        resolve_source(tmp_path)
    for text in (str(tmp_path / "nothing"), "./nothing", "~/nothing", "nothing", "a/b/c"):
        with pytest.raises(UserError, match=r"no folder .*allowed: fastgen:NAME, a hub id 'owner/name', or a diffusers folder"):
            resolve_source(text)
    assert (resolve_source("fastgen:digits") / "model_index.json").is_file()
    with pytest.raises(UserError, match="no bundled teacher 'digitz'; did you mean 'digits'"):
        resolve_source("fastgen:digitz")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot get 'nobody/nothing-here' from the hub"):
        resolve_source("nobody/nothing-here")


def test_a_broken_model_index_is_one_clear_line(tmp_path: Path) -> None:
    for text in (b"{", b"[]", b"{}", b'{"_class_name": []}', b'{"_class_name": 3}', b'{"_class_name": "X", "vae": [1, 2]}', b"\xff\xfe"):
        (tmp_path / "model_index.json").write_bytes(text)
        with pytest.raises(UserError, match=r"recipe key teacher\.pretrained: .*model_index\.json'"):
            find_family(tmp_path)


def test_gradients_through_decode_are_those_through_the_vae(family: SD3, stock: Any) -> None:
    latents = 3 * torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    mine, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    direction = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    pixels = family.decode(mine)
    config = stock.vae.config
    expected = stock.vae.decode(theirs / config.scaling_factor + config.shift_factor, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    gradients = (torch.autograd.grad((output * direction).sum(), x)[0] for output, x in ((pixels, mine), (expected, theirs)))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_decode_latents_is_decode_clamped_and_without_gradients(family: SD3) -> None:
    latents = 20 * torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels, clamped = family.decode(latents), family.decode_latents(latents.clone().requires_grad_())
    assert pixels.min() < 0 or pixels.max() > 1, "the clamp must matter for this test to mean anything"
    assert torch.equal(clamped, pixels.clamp(0, 1))
    assert not clamped.requires_grad


def test_decoding_in_training_loads_the_vae_once_and_leaves_it_frozen(sd3_folder: Path) -> None:
    family = SD3(sd3_folder)
    family.free_encoders()  # as a run does before it trains
    latents = torch.ones((1, 4, 8, 8), requires_grad=True)
    family.decode(latents).sum().backward()
    vae = family.vae
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not vae.training
    family.decode(latents).sum().backward()
    assert family.vae is vae
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


def test_decoding_with_a_live_pipeline_gives_its_vae_no_gradients_and_leaves_it_as_it_was(live: Any) -> None:
    required = [parameter.requires_grad for parameter in live.vae.parameters()]
    assert all(required)
    latents = torch.ones((1, 4, 8, 8), requires_grad=True)
    SD3(live).decode(latents).sum().backward()
    assert latents.grad is not None
    assert all(parameter.grad is None for parameter in live.vae.parameters())
    assert [parameter.requires_grad for parameter in live.vae.parameters()] == required


def test_a_unipc_teacher_has_its_flow_shift(live: Any, tmp_path: Path) -> None:
    live.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    live.save_pretrained(tmp_path)
    draw(live, PROMPTS[:1], SEEDS[:1], num_inference_steps=4, max_sequence_length=TOKENS, guidance_scale=1.0)
    stock = live.scheduler.sigmas
    for source in (tmp_path, live):
        family = find_family(source)
        assert family.shift == 3
        assert family.grid(4).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-12)
        torch.testing.assert_close(family.grid(4).float(), stock[:-1], rtol=0, atol=1e-3)  # UniPC ends at 1/1000, not at 0
        assert family.export_scheduler().config.shift == 3


@pytest.fixture
def copied(sd3_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd3_folder, tmp_path / "copied")


@pytest.mark.parametrize("gone", ["unknown class", "no folder", "no entry", "bent grid"])
def test_with_a_stated_shift_the_scheduler_may_be_anything(copied: Path, gone: str) -> None:
    config = copied / "scheduler" / "scheduler_config.json"
    if gone == "unknown class":
        edit_json(config, _class_name="MyScheduler")
        edit_json(copied / "model_index.json", scheduler=["my_schedules", "MyScheduler"])
    elif gone == "no folder":
        shutil.rmtree(config.parent)
    elif gone == "no entry":
        edit_json(copied / "model_index.json", scheduler=[None, None])
        config.write_text("{")
    else:
        edit_json(config, shift_terminal=0.1)
    with pytest.raises(UserError, match=r"recipe key teacher\.pretrained: .*scheduler.*; give the recipe key teacher\.shift"):
        find_family(copied)
    family: Any = find_family(copied, max_sequence_length=TOKENS, shift=2.0)
    assert family.shift == 2
    assert family.grid(2).tolist() == pytest.approx([1, 2 / 3], abs=1e-12)
    made = family.load_pipeline(None, family.export_scheduler())
    expected = draw(made, PROMPTS, SEEDS, **family.call_arguments(2, 1.0))
    assert made.scheduler.sigmas.tolist() == pytest.approx([1, 2 / 3, 0], abs=1e-12)
    assert (ours(family, steps=2)(PROMPTS, SEEDS) - expected).abs().max() <= 1e-5


def test_a_stated_shift_goes_before_a_readable_one(sd3_folder: Path, live: Any) -> None:
    for source in (sd3_folder, live):
        assert (find_family(source).shift, find_family(source, shift=1.5).shift) == (3, 1.5)
    with pytest.raises(UserError, match=r"recipe key teacher\.shift: -1 is not a number above 0"):
        find_family(sd3_folder, shift=-1)
    with pytest.raises(UserError, match=r"recipe key teacher\.shift: does not apply to a closed-form teacher"):
        find_family("toy:ring", shift=2.0)


def test_a_vae_without_its_numbers_is_refused(copied: Path) -> None:
    path = copied / "vae" / "config.json"
    config = json.loads(path.read_text())
    for key, given in (("shift_factor", None), ("shift_factor", "0.1"), ("scaling_factor", None), ("scaling_factor", True)):
        path.write_text(json.dumps(config | {key: given}))
        with pytest.raises(UserError, match=rf"teacher\.pretrained: its vae has {key} {given!r}, but StableDiffusion3Pipeline needs a number"):
            find_family(copied)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "shift_factor"}))  # the class's own default is None
    with pytest.raises(UserError, match=r"its vae has shift_factor None"):
        find_family(copied)


def test_another_class_of_vae_or_network_is_refused_by_name(copied: Path, live: Any) -> None:
    from diffusers import AutoencoderTiny

    live.vae = AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                               num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    live.vae.save_pretrained(copied / "vae")
    said = r"teacher\.pretrained: its vae is a AutoencoderTiny, family SD3 takes a AutoencoderKL"
    for source in (copied, live):
        with pytest.raises(UserError, match=said):
            find_family(source)
    edit_json(copied / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(UserError, match=said):
        find_family(copied)
    edit_json(copied / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(UserError, match=r"its transformer is a FluxTransformer2DModel, family SD3 takes a SD3Transformer2DModel"):
        find_family(copied)


def test_a_compiled_or_derived_network_of_a_live_pipeline_is_still_its_class(live: Any) -> None:
    class Mine(type(live.transformer)):
        pass

    class Compiled(torch.nn.Module):  # as torch.compile wraps it, whose import takes seconds
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self._orig_mod, self.config = network, network.config

    class Nobodys(torch.nn.Module):  # of no diffusers class: taken at its word
        config: ClassVar[dict[str, Any]] = {"scaling_factor": 1.0}

    live.transformer.__class__ = Mine
    assert find_family(live).shift == 3
    live.transformer = Compiled(live.transformer)
    assert find_family(live).shift == 3
    live.vae = Compiled(live.transformer._orig_mod)
    with pytest.raises(UserError, match=r"its vae is a SD3Transformer2DModel"):
        find_family(live)
    live.vae = Nobodys()
    with pytest.raises(UserError, match=r"teacher\.pretrained: its vae has no block_out_channels"):
        find_family(live)


def test_what_a_configuration_leaves_out_is_the_classes_own_default(copied: Path) -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    for name, keys in (("transformer", ("sample_size", "patch_size", "pos_embed_max_size")), ("vae", ("block_out_channels",))):
        path = copied / name / "config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys}))
    found: Any = find_family(copied)
    network, vae = (inspect.signature(cls.__init__).parameters for cls in (SD3Transformer2DModel, AutoencoderKL))
    assert found.latent.size == (network["sample_size"].default,) * 2
    assert found.pixels_per_latent == 2 ** (len(vae["block_out_channels"].default) - 1)
    most = network["pos_embed_max_size"].default * network["patch_size"].default
    with pytest.raises(UserError, match=rf"at most {most}$"):
        find_family(copied, resolution=most + 2)


def test_a_text_length_that_the_pipeline_refuses_is_refused(sd3_folder: Path, stock: Any) -> None:
    assert SD3(sd3_folder, max_sequence_length=512).max_sequence_length == 512
    with pytest.raises(UserError, match=r"recipe key teacher\.max_sequence_length: 513, but the pipeline takes at most 512"):
        SD3(sd3_folder, max_sequence_length=513)
    with pytest.raises(ValueError, match="cannot be greater than 512"):
        stock(PROMPTS[0], num_inference_steps=1, max_sequence_length=513)


def test_the_own_call_is_the_pipelines_signature(sd3_folder: Path) -> None:
    parameters = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    family = SD3(sd3_folder)
    assert family.own_call == {key: parameters[key].default for key in ("num_inference_steps", "guidance_scale")}
    assert family.max_sequence_length == parameters["max_sequence_length"].default


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_configuration_is_one_clear_line(copied: Path, text: str) -> None:
    for name in ("fastgen.json", "vae/config.json", "transformer/config.json"):
        (copied / name).write_text(text)
        with pytest.raises(UserError, match=rf"cannot read '.*{name}': [^\n]+$"):
            find_family(copied)
