"""The flow of a path that ends before pure noise, as Stable Diffusion's, against its own UNet and betas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import PROMPTS
from tiny_sd15 import tiny_sd15

from fastgen import load_teacher
from fastgen.straightness import flow_times, follow, straightness


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_flow_begins_where_the_last_training_step_ends(prediction_type: Any) -> None:
    pipeline = tiny_sd15(prediction_type=prediction_type)
    generator = load_teacher(pipeline, guidance=1.0)
    alpha, sigma = pipeline.scheduler.alphas_cumprod[-1].sqrt(), (1 - pipeline.scheduler.alphas_cumprod[-1]).sqrt()
    found = straightness(generator, dict.fromkeys(PROMPTS, 1 / 3), samples=4, steps=4)
    assert found.noise_end == pytest.approx((sigma / (alpha + sigma)).item(), rel=1e-5) and found.noise_end < 0.97

    noise = torch.randn(3, *generator.family.latent.shape, generator=torch.Generator().manual_seed(0))
    measured = follow(generator.predict, noise, flow_times(generator.family.path, 6), generator.conditioning(PROMPTS))
    states = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    with torch.no_grad():
        said = pipeline.unet(noise, torch.tensor(899), states).sample
    x0 = (noise - sigma * said) / alpha if prediction_type == "epsilon" else alpha * noise - sigma * said
    expected = (x0 - measured.drawn).flatten(1).square().sum(1)
    torch.testing.assert_close(measured.one_step.float(), expected, rtol=1e-3, atol=1e-5)
    through = (noise - alpha * measured.drawn) / sigma
    torch.testing.assert_close(measured.displacement.float(), (through - measured.drawn).flatten(1).square().sum(1), rtol=1e-4, atol=1e-5)
