"""DMD2 (Yin et al. 2024b, arXiv:2405.14867): match the student's noised distribution to the teacher's with two score networks.

Each step trains the fake score `critic_updates` times on the student's current samples (the two time-scale rule), then the
student once along mu_fake - mu_real. The guidance of the real score is the teacher's; the fake score runs without guidance.

Conditioning time of a one-step student: it is sampled at the grid's first time, the noise end (1 on Flow), and is trained there,
so training and inference agree. There the teacher's x0 is the same for every noise, so the student starts as a point and has to
spread out; on a 2-D Gaussian it first becomes a line, a saddle that took 500 steps to leave (tests/distillers/test_dmd2.py). With
an explicit `student.grid: [t]`, t < 1, it still receives pure noise, in training as in the exported pipeline, but is conditioned
on t and starts spread out (0.6 to 0.8 worked best there; SDXL's one-step student uses t = 399 of 1000).

Departure from the paper: critic and student draw their rollouts separately, each a fresh backward simulation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Loss, MethodConfig, Models, Update
from fastgen.distillers.rollout import ON_GRID, RolloutConfig, student_samples
from fastgen.rng import SampleRng
from fastgen.roles import frozen, trainable
from fastgen.sampling import Renoise
from fastgen.timesteps import TimeSampling


class DMD2Config(MethodConfig):
    """critic_updates: fake-score updates before each student update (K). match_times: noise levels of the matching.
    critic_times: noise levels of the fake score's training. weight: `normalised` as the paper trains, or `kl` for the exact
    KL gradient. renoise: how a multi-step rollout moves between its steps; `euler` is what exports to flow pipelines. rollout: its times."""

    critic_updates: int = Field(5, ge=1)
    match_times: TimeSampling = TimeSampling(lo=0.02, hi=0.98)
    critic_times: TimeSampling = TimeSampling(lo=0.001, hi=1.0)
    weight: Literal["normalised", "kl"] = "normalised"
    renoise: Renoise = "euler"
    rollout: RolloutConfig = ON_GRID


class DMD2(Distiller):
    """Roles: student, fake_score (trained), teacher (frozen)."""

    Config = DMD2Config
    roles: ClassVar = {"student": trainable(), "fake_score": trainable(), "teacher": frozen()}
    config: DMD2Config

    def updates(self, step: int) -> list[Update]:
        critic = Update(("fake_score",), (self.critic,))
        return [critic] * self.config.critic_updates + [Update(("student",), (self.match,))]

    def critic(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Denoising loss of the fake score on the student's samples, in the network's own prediction kind."""
        x0 = self._samples(models, batch, rng, train=False)
        fake, path = models["fake_score"], self.setting.path
        t = self.setting.draw_times(self.config.critic_times, rng.uniform("critic_time"))
        eps = rng.normal("critic_noise", self.setting.shape)
        prediction = fake(path.mix(x0, eps, t), t, batch.cond, fake.kind)
        return Loss(losses.mean_squared_error(prediction, path.predict(x0, eps, t, fake.kind)))

    def match(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Surrogate of the distribution-matching gradient at the student's re-noised samples."""
        x = self._samples(models, batch, rng, train=True)
        path = self.setting.path
        t = self.setting.draw_times(self.config.match_times, rng.uniform("match_time"))
        with torch.no_grad():
            noised = path.mix(x, rng.normal("match_noise", self.setting.shape), t)
            real = self.setting.guide(models["teacher"])(noised, t, batch.cond)
            fake = models["fake_score"](noised, t, batch.cond)
            scale = losses.normaliser(x, real)
            weight = 1 / scale if self.config.weight == "normalised" else losses.kl_weight(path, t, x)
            gradient = losses.distribution_matching_gradient(fake, real, weight)
        logs = {"gap": gradient.abs().mean(), "normaliser": scale.mean(), "sample_std": x.detach().std()}
        return Loss(losses.surrogate(x, gradient), logs)

    def _samples(self, models: Models, batch: Batch, rng: SampleRng, *, train: bool) -> Tensor:
        config = self.config
        return student_samples(models["student"], self.setting, batch.cond, rng, renoise=config.renoise, train=train, rollout=config.rollout)
