"""A family against the stock pipeline that it stands for: what every family's test compares, so that its own file states only cases.

Pipelines are live ones, so both sides have the same weights; where batches are laid out alike, the same arithmetic runs in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.denoiser import Denoiser, Predictor
from fastgen.families.base import Family
from fastgen.generator import ImageGenerator
from fastgen.jvp import check_precision, check_tangent
from fastgen.path import TrigFlow

PROMPTS = ["a red cat", "two boats at sea under a moon"]  # of different length
NEGATIVE = "blurry"
SEEDS = [3, 4]
TOLERANCE = 1e-6  # of pixels in [0, 1], see `allowed`


def denoiser(family: Family) -> Denoiser:
    return Denoiser(family.load_backbone(), family)


def generator(family: Family, steps: int, guidance: float = 1.0, **settings: Any) -> ImageGenerator:
    """Our sampler. settings: as of ImageGenerator."""
    given = {"sampler": family.samplers[0], **settings}
    return ImageGenerator(family, Predictor(denoiser(family), family), steps=steps, guidance=guidance, **given)


def drawn_by_stock(
    family: Family, pipeline: Any, prompts: Sequence[str] = PROMPTS, *, steps: int, guidance: float = 1.0, grid: Any = None, **more: Any
) -> Tensor:
    """Pixels (B, 3[, T], H, W) in [0, 1] of the documented call, one seed a prompt; more: of its arguments."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]]
    call = family.call_arguments(steps, guidance, grid) | more
    own, pipeline.scheduler = pipeline.scheduler, family.sampling_scheduler(steps, grid, family.samplers[0])
    try:
        pixels = pipeline(**family.call_inputs(prompts), generator=generators, output_type="np", **call)[0]
    finally:
        pipeline.scheduler = own
    return torch.as_tensor(np.asarray(pixels)).movedim(-1, 1)


def allowed(family: Family, steps: int, guidance: float) -> float:
    """Rounding of the network as it is in pixels: guidance w multiplies that of its two predictions by up to 2w - 1."""
    return TOLERANCE * (2 * guidance - 1) * family.amplification(family.grid(steps)[0].item())


def check_pictures(
    family: Family,
    pipeline: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int,
    guidance: float = 1.0,
    negative: str | None = None,
    grid: Any = None,
    slack: float = 1.0,
) -> Tensor:
    """Ours are stock's. negative: None leaves it to stock's own default; slack: how many times what is `allowed`. Returns them, (B, 3[, T], H, W)."""
    # One for each prompt: StableDiffusionPipeline takes no text beside a list.
    told = {name: [text] * len(prompts) for name, text in family.negative_arguments(negative, guidance).items()}
    given = {} if negative is None else {"negative_prompt": negative}
    expected = drawn_by_stock(family, pipeline, prompts, steps=steps, guidance=guidance, grid=grid, **told)
    pictures = generator(family, steps, guidance, grid=grid, **given)(prompts, SEEDS[: len(prompts)])
    assert pictures.shape == expected.shape == (len(prompts), *family.picture_shape)
    assert (pictures - expected).abs().max() <= slack * allowed(family, steps, guidance)
    assert pictures.std() > 0.01 and ((pictures > 0) & (pictures < 1)).float().mean() > 0.9
    return pictures


def calls_of(network: torch.nn.Module, draw: Callable[[], Any]) -> list[tuple[dict[str, Any], Tensor]]:
    """(arguments by name, output) of every call of the network while drawing."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    signature = inspect.signature(network.forward)

    def note(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        calls.append((dict(signature.bind(*args, **kwargs).arguments), output))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        draw()
    finally:
        handle.remove()
    return calls


def check_first_call(family: Family, pipeline: Any, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Our sampler's first call of the network has stock's arguments and output, bit for bit. Returns the arguments by name."""
    ours = generator(family, 2)
    denoisers: Any = ours.predict
    stock_network = getattr(pipeline, family.component)
    theirs, expected = calls_of(stock_network, lambda: drawn_by_stock(family, pipeline, prompts, steps=2))[0]
    given, output = calls_of(denoisers.denoiser.backbone, lambda: ours.latents(prompts, SEEDS[: len(prompts)]))[0]
    for name in theirs.keys() | given.keys():
        assert _same(given.get(name), theirs.get(name)), name
    assert _same(output, expected)
    return theirs


def _same(ours: Any, theirs: Any) -> bool:
    """Equal tensors, however deep; what only says that there is nothing counts as nothing."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        theirs = theirs if theirs.ndim else theirs.expand(ours.shape)  # a UNet's time, one for the whole batch
        return ours.shape == theirs.shape and bool((ours == theirs).all())
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[key], theirs[key]) for key in ours)
    return ours == theirs or not (ours or theirs)


def check_codec(family: Family, pipeline: Any) -> None:
    """What is encoded is decoded as the pipeline's VAE alone does it: that `decode` is stock's, the pictures show."""
    pixels = 2 * torch.rand((2, *family.picture_shape), generator=torch.Generator().manual_seed(0)) - 1
    latents = family.encode_latents(pixels)
    assert latents.shape == (2, *family.latent.shape)
    video = pixels if pixels.ndim == 5 or not hasattr(pipeline.vae.config, "temperal_downsample") else pixels[:, :, None]
    with torch.no_grad():
        made = pipeline.vae.encode(video)
        expected = pipeline.vae.decode(made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent, return_dict=False)[0]
    torch.testing.assert_close(family.decode(latents), expected.view(pixels.shape) / 2 + 0.5, rtol=0, atol=1e-5)
    assert latents.std() > 0.01


def check_shapes(family: Family, prompts: Sequence[str] = PROMPTS) -> None:
    """What the plan counts with, from configurations alone, is what there is."""
    cond, meta = family.encode_prompts(prompts), family.meta_conditioning(len(prompts))
    assert {key: (value.shape, value.dtype) for key, value in cond.items()} == {key: (value.shape, value.dtype) for key, value in meta.items()}
    network = denoiser(family)
    x, t = torch.randn(len(prompts), *family.latent.shape), torch.full((len(prompts),), 0.4)
    with torch.no_grad():
        features = network(x, t, cond, taps=range(len(family.blocks(network.backbone)))).features
    assert [feature.shape[-1] for feature in features] == family.feature_widths(family.load_backbone(meta=True))
    assert all(feature.ndim == 3 and len(feature) == len(prompts) for feature in features)


def check_time_features(family: Family, prompts: Sequence[str] = PROMPTS) -> None:
    """They depend on the time alone, and on it, and are what goes into `time_projection`."""
    assert family.time_projection is not None
    network, t = denoiser(family), torch.tensor([0.3, 0.8], dtype=torch.float64)
    found: list[Tensor] = []
    network.backbone.get_submodule(family.time_projection).register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        network(torch.randn(2, *family.latent.shape), t, family.encode_prompts(prompts))
        features = family.time_features(network.backbone, t)
    assert torch.equal(features, found[0])
    assert (features[0] - features[1]).abs().max() > 1e-2


def keep_wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms take their variance in fp32 whatever they are given, which limits finite differences."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **given: x if args[:1] == (torch.float32,) else to(x, *args, **given))


def check_exact_tangent(family: Family, monkeypatch: pytest.MonkeyPatch, prompts: Sequence[str] = PROMPTS) -> None:
    """d/dt of the velocity on TrigFlow in float64, as sCM calls it, is the best of several finite differences."""
    network = denoiser(family).double()
    predict = Predictor(network, family)
    cond = {key: value.double() if value.is_floating_point() else value for key, value in family.encode_prompts(prompts).items()}
    x, dx = (torch.randn(2, *family.latent.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t = torch.tensor([0.4, 1.1], dtype=torch.float64)
    speed = (t.sin() * t.cos()).view(2, *[1] * (x.ndim - 1))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # networks embed times in fp32 whatever their weights are
    check = check_tangent(lambda x, t: predict(x, t, cond, "velocity", TrigFlow()), (x, t), (speed * dx, t.sin() * t.cos()), network)
    assert check.relative_error <= 1e-6
    assert check.tangent.abs().max() > 1e-3


def check_half_precision_tangent(family: Family, prompts: Sequence[str] = PROMPTS) -> None:
    """Under bf16 autocast the tangent is that of single precision, at times that bf16 rounds."""
    network, cond = denoiser(family), family.encode_prompts(prompts)
    predict, random = Predictor(network, family), torch.Generator().manual_seed(2)
    x, dx = (torch.randn(2, *family.latent.shape, generator=random) for _ in range(2))
    t = torch.tensor([0.8573, 1.1558])
    speed = t.sin() * t.cos()
    given = (x, t), (speed.view(2, 1, 1, 1) * dx, speed)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return predict(x, t, cond, "velocity", TrigFlow())

    full = check_tangent(velocity, *given, network)
    network.autocast = torch.bfloat16
    assert check_precision(velocity, *given, full) <= 0.12


def check_cut(family: Family) -> None:
    """`legibility` says a prompt to be cut from the length on from which its last letters change nothing that it is encoded as."""
    cut = [count for count in range(1, 80) if family.legibility(["a" * count]).cut]
    assert cut == list(range(cut[0], 80)), "nothing, or everything from some length on"
    keep = cut[0] - 1

    def encoded(count: int, last: str) -> Conditioning:
        return family.encode_prompts(["a" * (count - 1) + last])

    for count, told in ((keep, True), (keep + 1, False)):
        a, b = encoded(count, "a"), encoded(count, "b")
        assert any(not torch.equal(a[key], b[key]) for key in a) == told, (count, keep)
