"""DMD2 (Yin et al. 2024b, arXiv:2405.14867): match the student's noised distribution to the teacher's with two score networks.

Each step trains the fake score `critic_updates` times on the student's current samples (the two time-scale rule), then the
student once along mu_fake - mu_real. The guidance of the real score is the teacher's; the fake score runs without guidance.
A discriminator on real data (`gan`) is optional, as is everything below it in the Config; the options compose.

Conditioning time of a one-step student: it is sampled at the grid's first time, the noise end (1 on Flow), and is trained there,
so training and inference agree. There the teacher's x0 is the same for every noise, so the student starts as a point and has to
spread out; on a 2-D Gaussian it first becomes a line, a saddle that took 500 steps to leave (tests/distillers/test_dmd2.py). With
an explicit `student.grid: [t]`, t < 1, it still receives pure noise, in training as in the exported pipeline, but is conditioned
on t and starts spread out (0.6 to 0.8 worked best there; SDXL's one-step student uses t = 399 of 1000, and `regression` with a
`warmup` for it).

Departures from the paper: critic, discriminator and student draw their rollouts separately, each a fresh backward simulation; the
discriminator listens to the frozen teacher unless told otherwise.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import rewards
from fastgen.across import batch_std
from fastgen.distillers import gan, losses, regression
from fastgen.distillers.anchor import AnchorConfig, anchor_loss
from fastgen.distillers.base import Batch, Blend, Distiller, Facts, Loss, MethodConfig, Models, Update
from fastgen.distillers.gan import GANConfig
from fastgen.distillers.matching import DecoupledConfig, Matched, guidance_gradient, loss_by_time, matching_gradient
from fastgen.distillers.regression import RegressionConfig, regression_loss
from fastgen.distillers.rollout import ON_GRID, WHOLE, RolloutConfig, Sample, Segment, check_renoise, student_samples
from fastgen.distillers.running import log_means, new_log_means
from fastgen.errors import UserError
from fastgen.rewards import RewardConfig
from fastgen.rng import SampleRng
from fastgen.roles import RoleSpec, frozen, judge, student, trainable
from fastgen.sampling import Renoise
from fastgen.timesteps import TimeSampling

_REWARD_DECAY = 0.9


class DMD2Config(MethodConfig):
    """critic_updates: fake-score updates before each student update (K). match_times: noise levels of the matching.
    critic_times: noise levels of the fake score's training. weight: of the gradient, see losses.matching_weight. renoise: how a
    multi-step rollout moves between its steps; `euler` is what exports to flow pipelines. rollout: its times. inputs: of the student's
    later steps, its own `rollout` (backward simulation) or noised `data`. gan: the adversarial terms. regression: on noise-sample
    pairs, for one-step students. decoupled: guidance matched at noise levels of its own. ida: share of the student that enters the
    fake score after each student update (SenseFlow, arXiv:2506.00523: .03; allows fewer critic_updates). anchor: the first step
    follows the teacher instead of the matching. reward: samples of high reward count more (Re-DMD, arXiv:2512.04678)."""

    critic_updates: int = Field(default=5, ge=1, le=1000)
    match_times: TimeSampling = TimeSampling(lo=0.02, hi=0.98)
    critic_times: TimeSampling = TimeSampling(lo=0.001, hi=1.0)
    weight: losses.MatchingWeight = "normalised"
    renoise: Renoise = "euler"
    rollout: RolloutConfig = ON_GRID
    inputs: Literal["rollout", "data"] = "rollout"
    gan: GANConfig | None = None
    regression: RegressionConfig | None = None
    decoupled: DecoupledConfig | None = None
    ida: float = Field(default=0.0, ge=0, lt=1)
    anchor: AnchorConfig | None = None
    reward: RewardConfig | None = None


class DMD2(Distiller):
    """Roles: student, fake_score (trained), discriminator (trained heads, with `gan`), teacher (frozen)."""

    Config = DMD2Config
    roles: ClassVar[dict[str, RoleSpec]] = {"student": student(), "fake_score": trainable(), "teacher": frozen()}
    config: DMD2Config

    def __init__(self, config: Any, setting: Any) -> None:
        super().__init__(config, setting)
        if config.reward is not None:
            self.statistics["reward"] = new_log_means()

    @cached_property
    def _reward(self) -> rewards.Reward:
        assert self.config.reward is not None
        return rewards.load_reward(self.config.reward.name)

    @classmethod
    def load(cls, config: DMD2Config) -> None:
        if config.reward is not None:
            rewards.load_reward(config.reward.name)

    @classmethod
    def roles_for(cls, config: DMD2Config) -> dict[str, RoleSpec]:
        if config.gan is None:
            return dict(cls.roles)
        if config.gan.features == "fake_score":
            return cls.roles | {"fake_score": trainable(heads=config.gan.taps)}
        return cls.roles | {"discriminator": judge(config.gan.taps)}

    @classmethod
    def needs_latents(cls, config: DMD2Config) -> bool:
        return config.gan is not None or config.inputs == "data"

    @classmethod
    def needs_pairs(cls, config: DMD2Config) -> bool:
        return config.regression is not None

    @classmethod
    def check(cls, config: DMD2Config, facts: Facts) -> None:
        check_renoise(config.renoise, facts)
        if config.inputs == "data" and facts.steps == 1 and config.rollout.times == "grid":
            raise UserError("recipe key distiller.inputs: data, but a one-step student has no later step that would see them; remove it")
        for key, uses in (("gan", config.gan is not None), ("inputs: data", config.inputs == "data")):
            if uses and not facts.images:
                raise UserError(f"recipe key distiller.{key}: needs real data; give data.images in place of data.prompts")
        if config.ida and facts.reshaped:
            raise UserError(
                f"recipe key {facts.reshaped}: distiller.ida ({config.ida}) moves the fake score towards a student of its own shape; remove one"
            )
        if config.regression is not None:
            regression.check(config.regression, facts)
        if config.gan is not None and config.gan.start >= (steps := cls.matching_steps(config, facts)):
            raise UserError(f"recipe key distiller.gan.start: {config.gan.start} leaves none of the {steps} student steps in which matching goes on")
        if config.decoupled is not None and facts.guidance == 1:
            raise UserError("recipe key distiller.decoupled: teacher.guidance is 1, so there is no guidance to match apart")
        if config.decoupled is not None and not facts.linear_guidance:
            raise UserError("recipe key distiller.decoupled: this teacher's pipeline rescales guided predictions, so guidance is no part apart")
        if config.anchor is not None and facts.steps == 1:
            raise UserError("recipe key distiller.anchor: a one-step student has no step beside its first; it needs student.steps >= 2")
        if config.anchor is not None and config.rollout.times != "grid":
            raise UserError("recipe key distiller.anchor: needs rollout.times: grid, on which the first step's end is known")
        if config.reward is not None:
            rewards.check_reward(config.reward.name, facts.picture)

    @classmethod
    def files(cls, config: DMD2Config) -> dict[str, str]:
        return {} if config.reward is None else {"distiller.reward.name": rewards.content(config.reward.name)}

    @classmethod
    def matching_steps(cls, config: DMD2Config, facts: Facts) -> int:
        """The student steps in which one fake score is matched with; with several, the fewest."""
        return facts.train_steps - regression.steps_alone(config.regression)

    def span(self, role: str) -> tuple[int, int] | None:
        alone = regression.steps_alone(self.config.regression)
        return None if role == "student" or alone == 0 else (alone, self.setting.train_steps - alone)

    def updates(self, step: int) -> list[Update]:
        config, trained = self.config, (self.student_at(step),)
        if step < self.first_step(step):
            return [Update(trained, (self.regress,))]
        followers = (Blend(self.fake_at(step), trained[0], config.ida),) if config.ida and step > self.first_step(step) else ()
        critic, improve = self._critic_update(step), (self.match,)
        if config.regression is not None:
            improve = (*improve, self.regress)
        if config.anchor is not None and self.segment(step).first == 1:
            improve = (*improve, self.anchor)
        critics = [critic] * config.critic_updates
        return [Update(critic.trains, critic.terms, followers), *critics[1:], Update(trained, improve)]

    def _critic_update(self, step: int) -> Update:
        fake = self.fake_at(step)
        if self.config.gan is None:
            return Update((fake,), (self.critic,))
        return Update(tuple(dict.fromkeys((fake, self.judge_at(step)))), (self.critic, self.discriminate))

    def student_at(self, step: int) -> str:
        """The role that student step `step` trains."""
        return "student"

    def fake_at(self, step: int) -> str:
        """The role of its fake score."""
        return "fake_score"

    def judge_at(self, step: int) -> str:
        """The role whose heads judge."""
        assert self.config.gan is not None
        return "discriminator" if self.config.gan.features == "teacher" else self.fake_at(step)

    def first_step(self, step: int) -> int:
        """The student step at which matching with these roles began."""
        first, _ = self.span(self.fake_at(step)) or (0, 0)
        return first

    def segment(self, step: int) -> Segment:
        """The part of its sampling that the student is trained on."""
        return Segment(first=1) if self.config.anchor else WHOLE

    def critic(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Denoising loss of the fake score on the student's samples, in the network's own prediction kind."""
        sample = self._sample(models, batch, rng, step, train=False)
        fake, path = models[self.fake_at(step)], self.setting.path
        t, s = self._times(self.config.critic_times, rng.uniform("critic_time"), step)
        noised, target = path.bridge_target(sample.x, rng.normal("critic_noise", self.setting.shape), s, t, fake.kind)
        error = losses.per_sample_mean((fake(noised, t, batch.cond, fake.kind) - target).square())
        # Phased DMD, section 3.3: sigma_t|s^2 clamp(1/sigma_t|s^2, 0, 10). Any weight has the same optimum.
        weight = (10 * path.bridge(s, t)[1] ** 2).clamp(max=1) if self.segment(step).end else torch.ones_like(t)
        return Loss((weight * error).mean(), loss_by_time(error.detach(), t / path.t_max))

    def discriminate(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """The discriminator's loss on real data and the student's samples at equal noise levels, and its R1 penalty."""
        config = self.config.gan
        assert config is not None and batch.latents is not None
        sample = self._sample(models, batch, rng, step, train=False)
        path, judge, shape = self.setting.path, models[self.judge_at(step)], self.setting.shape
        t, s = self._times(config.times, rng.uniform("gan_time"), step)
        eps = rng.normal("real_noise", shape)
        real, fake = path.mix(batch.latents, eps, t), self._carried(sample, rng.normal("fake_noise", shape), s, t)
        on_real, on_fake = gan.judgement(judge, real, fake, t, batch.cond)
        value = gan.discriminator_loss(on_real, on_fake)
        logs = {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}
        if config.r1:
            disturbance = config.r1_noise * rng.normal("r1_noise", shape)
            penalty = gan.approximate_r1(judge, path, batch.latents, eps, disturbance, t, batch.cond)
            value, logs["r1"] = value + config.r1 * penalty, penalty.detach()
        return Loss(value if config.features == "teacher" else config.fake_score_weight * value, logs)

    def match(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Surrogate of the distribution-matching gradient at the student's re-noised samples, and what fools the discriminator."""
        sample = self._sample(models, batch, rng, step, train=True)
        with torch.no_grad():
            gradient, logs = self._gradient(models, batch, sample, rng, step)
        value = losses.surrogate(sample.x, gradient)
        if self.config.gan is not None and step - self.first_step(step) >= self.config.gan.start:
            t, s = self._times(self.config.gan.times, rng.uniform("gan_time"), step)
            carried = self._carried(sample, rng.normal("gan_noise", self.setting.shape), s, t)
            fooled = gan.generator_loss(models[self.judge_at(step)].logits(carried, t, batch.cond))
            value, logs["gan"] = value + self.config.gan.weight * fooled, fooled.detach()
        return Loss(value, logs)

    def regress(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """Distance to the teacher's sample of the same noise (Yin et al. 2024a, section 3.2)."""
        assert self.config.regression is not None
        value = regression_loss(self.sampler(models), batch, self.setting, self.config.regression)
        return Loss(self.config.regression.weight * value, {"distance": value.detach()})

    def anchor(self, models: Models, batch: Batch, rng: SampleRng, step: int) -> Loss:
        """The first step on the teacher's trajectory."""
        assert self.config.anchor is not None
        return Loss(anchor_loss(self.sampler(models), models["teacher"], batch, rng, self.setting, self.config.anchor))

    def _gradient(self, models: Models, batch: Batch, sample: Sample, rng: SampleRng, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """g (B, ...), the direction in the student's sample that descends, and numbers to log."""
        matched = self._matched(models, batch, sample, rng, step)
        gradient = matched.gradient
        if self.config.decoupled is not None:
            t, s = self._times(self.config.decoupled.times, rng.uniform("guidance_time"), step, below=sample.t)
            carried = self._carried(sample, rng.normal("guidance_noise", self.setting.shape), s, t)
            gradient = gradient + guidance_gradient(models["teacher"], carried, sample.x0, s, t, batch.cond, self.setting, self.config.weight)
        factor = self.factors(models, batch, sample, matched, step)
        gradient = gradient if factor is None else factor.reshape(-1, *[1] * (gradient.ndim - 1)).to(gradient) * gradient
        x0 = sample.x0.detach()
        logs = {"gradient": gradient.abs().mean(), "normaliser": matched.normaliser, "gap": matched.gap}
        return gradient, logs | {"sample_mean": losses.per_sample_mean(x0), "sample_std": batch_std(x0)}

    def _matched(self, models: Models, batch: Batch, sample: Sample, rng: SampleRng, step: int) -> Matched:
        t, s = self._times(self.config.match_times, rng.uniform("match_time"), step)
        carried = self._carried(sample, rng.normal("match_noise", self.setting.shape), s, t)
        real = models["teacher"] if self.config.decoupled else self.setting.guide(models["teacher"])
        return matching_gradient(real, models[self.fake_at(step)], carried, sample.x0, s, t, batch.cond, self.config.weight)

    def factors(self, models: Models, batch: Batch, sample: Sample, matched: Matched, step: int) -> Tensor | None:
        """A factor (B,) for each sample's gradient, or None: here exp(beta reward) over its running mean (Re-DMD, eq. 7)."""
        if self.config.reward is None:
            return None
        assert self.setting.decode is not None
        pixels = self.setting.decode(sample.x0).clamp(0, 1)
        weights = rewards.log_weights(self._reward(pixels, batch.prompts), self.config.reward.beta)
        means = log_means(self.statistics["reward"], weights, torch.zeros_like(weights, dtype=torch.long), step, _REWARD_DECAY)
        return (weights - means).exp()

    def _sample(self, models: Models, batch: Batch, rng: SampleRng, step: int, *, train: bool) -> Sample:
        config, data = self.config, batch.latents if self.config.inputs == "data" else None
        return student_samples(
            self.sampler(models),
            self.setting,
            batch.cond,
            rng,
            renoise=config.renoise,
            train=train,
            rollout=config.rollout,
            segment=self.segment(step),
            data=data,
        )

    def _times(self, times: TimeSampling, uniform: Tensor, step: int, below: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Path times (t, s), each (B,): noise levels, and where the student's samples stand; below: a path time that t stays under."""
        if below is not None:
            times = times.up_to(below.item() / self.setting.path.t_max)
        t = self.setting.draw_times(times, uniform)
        return t, torch.zeros_like(t)

    def _carried(self, sample: Sample, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """The student's samples at noise level t, with gradients where they have any."""
        alpha, sigma = (losses.expand_time(c, eps) for c in self.setting.path.bridge(s, t))
        return alpha * sample.x + sigma * eps
