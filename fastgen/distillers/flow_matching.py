"""Flow matching on data (Lipman et al. 2022; Liu et al. 2022): trains a teacher, the bundled ones among them.

The trained network is sampled with classifier-free guidance, so a share of the prompts is replaced by the negative prompt.
On other paths and prediction kinds it is ordinary denoising in the network's own kind.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fastgen import conditioning
from fastgen.distillers import losses
from fastgen.distillers.base import Batch, Distiller, Loss, MethodConfig, Models, Update
from fastgen.rng import SampleRng
from fastgen.roles import student
from fastgen.timesteps import TimeSampling


class FlowMatchingConfig(MethodConfig):
    """times: training noise levels. drop: share of prompts replaced by the negative prompt."""

    times: TimeSampling = TimeSampling(name="logit_normal")
    drop: float = Field(0.1, ge=0, le=1)


class FlowMatching(Distiller):
    """Role: student. Needs latents."""

    Config = FlowMatchingConfig
    roles: ClassVar = {"student": student()}
    config: FlowMatchingConfig

    @classmethod
    def leaves_a_flow(cls, config: FlowMatchingConfig) -> bool:
        return True

    @classmethod
    def student_is_guided(cls, config: FlowMatchingConfig) -> bool:
        return True

    @classmethod
    def needs_latents(cls, config: FlowMatchingConfig) -> bool:
        return True

    def updates(self, step: int) -> list[Update]:
        return [Update(("student",), (self.denoise,))]

    def denoise(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """MSE of the network's own prediction kind at x_t = alpha x0 + sigma eps."""
        assert batch.latents is not None
        student, path = models["student"], self.setting.path
        t = self.setting.draw_times(self.config.times, rng.uniform("time"))
        eps = rng.normal("noise", self.setting.shape)
        cond = conditioning.drop(batch.cond, self.setting.negative, rng.uniform("drop") < self.config.drop)
        prediction = student(path.mix(batch.latents, eps, t), t, cond, student.kind)
        return Loss(losses.mean_squared_error(prediction, path.predict(batch.latents, eps, t, student.kind)))
