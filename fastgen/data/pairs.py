"""Noise-sample pairs (z, y): unit noise z and the sample y where the teacher's deterministic sampler leads from it.

DMD regresses on them (Yin et al. 2024a, section 3.2), reflow learns the lines between them (Liu et al. 2022). Pair i depends on the seed, the
prompts and i alone, so that the first pairs of a larger set are a smaller set, in batches of any size up to rounding. Noise that was drawn is
kept as its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.data import weighted
from fastgen.data.rows import Chosen, Held, Rows
from fastgen.errors import TrainingFailed
from fastgen.generator import noise_from_seeds
from fastgen.path import Flow
from fastgen.rng import SampleRng, derive_seed
from fastgen.sampling import Predict, few_step, initial, ode

Solver = Literal["euler", "heun"]
_CLEAN = 1e-3  # flow time: below it, rounding of a prediction of x0 would be most of its velocity
Encode = Callable[[Sequence[str]], Conditioning]  # prompts -> conditioning (P, ...)


@dataclass(frozen=True)
class Pairs:
    """M pairs on the CPU. rows: the samples `x0` (M, *shape) fp32 and their noise, as its `seed` (M,) int64 or as `z` (M, *shape) fp32;
    prompts (M,)."""

    rows: Rows
    prompts: tuple[str, ...]

    @classmethod
    def held(cls, seeds: Tensor, prompts: Sequence[str], x0: Tensor) -> Pairs:
        """In memory."""
        return cls(Held({"seed": seeds, "x0": x0}), tuple(prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The unit noise and the samples, both (B, *shape) fp32, of rows (B,)."""
        some = self.rows.select(index)
        noise = some["z"] if "z" in some else noise_from_seeds(some["seed"].tolist(), some["x0"].shape[1:])
        return noise, some["x0"]

    def first(self, count: int) -> Pairs:
        """The first `count` of them."""
        return Pairs(Chosen(self.rows, torch.arange(count)), self.prompts[:count])


@dataclass(frozen=True)
class TeacherSampler:
    """A guided teacher's deterministic sampler of samples of `shape`. times: its grid (N,), fp64 path times, on its device.

    `euler` is what the teacher's pictures are drawn with: N evaluations, each keeping its own eps (DDIM on any path). `heun` integrates
    to the last time in order 2 and jumps to data from there, as Karras et al. 2022, alg. 1: 2N - 1 evaluations.
    """

    predict: Predict
    times: Tensor
    shape: tuple[int, ...]
    solver: Solver = "euler"

    @torch.no_grad()
    def __call__(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """x0 (B, *shape) from unit noise (B, *shape)."""
        if self.solver == "euler":
            return few_step(self.predict, noise, self.times, cond, renoise="euler")
        x = ode(self.predict, initial(self.predict.path, noise, self.times), self.times, cond, solver="heun")
        return self.predict(x, self.times[-1].expand(len(x)), cond).to(noise.dtype)

    @torch.no_grad()
    def backwards(self, x0: Tensor, cond: Conditioning) -> Tensor:
        """The unit noise (B, *shape) that its ODE leads to from samples x0 (B, *shape): the pairs of real data (Lee et al. 2024, config G).

        Integrated in rectified flow's time, where the velocity is finite from data to noise on any path, through the flow times of `times`;
        where samples are clean the network is asked at its least noise.
        """
        path, flow = self.predict.path, Flow()
        floor = flow.time(path.ratio(torch.tensor(path.t_min, dtype=torch.float64))).clamp(min=_CLEAN)
        times = torch.cat([flow.time(path.ratio(self.times)), torch.zeros(1, dtype=torch.float64, device=self.times.device)]).flip(0)
        predict = _Above(self.predict, floor.item())
        x = ode(predict, x0, times, cond, solver=self.solver)
        start = self.times[:1].double()
        alpha, sigma = (value.to(x) for value in path.coeffs(start))
        x = x * (alpha + sigma)  # flow: x_t (1 - t + t); the path's own scale at equal noise-to-signal ratio
        return (x / path.prior_scale(start).to(x)).to(x0.dtype)


@dataclass(frozen=True)
class _Above:
    """Velocities on Flow, at times no smaller than `floor`."""

    predict: Predict
    floor: float

    @property
    def path(self) -> Flow:
        return Flow()

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, kind: str = "velocity", path: object = None) -> Tensor:
        assert kind == "velocity"
        return self.predict(x, t.clamp(min=self.floor), cond, "velocity", Flow())


def noise_seeds(seed: int, ids: Sequence[int]) -> list[int]:
    """The seed of each pair's noise: consecutive 32-bit numbers, which is all that torch's CPU generator uses of a seed, so that no two of
    2^32 pairs have the same noise."""
    first = derive_seed(seed, "pairs", "noise")
    return [(first + i) % 2**32 for i in ids]


def drawn_prompts(prompts: Mapping[str, float], ids: Sequence[int], *, seed: int) -> list[str]:
    """Each pair's prompt, drawn with the weights of `prompts`."""
    texts, table = list(prompts), weighted.cumulative(prompts.values())
    return [texts[row] for row in weighted.rows(table, SampleRng(seed, ("pairs",), ids).uniform("prompt")).tolist()]


def draw(teacher: TeacherSampler, encode: Encode, prompts: Sequence[str], ids: range, *, seed: int) -> tuple[Tensor, Tensor]:
    """(seeds (B,) int64, samples (B, *shape) fp32) of the pairs with these indices and prompts, on the CPU, in one batch.

    TrainingFailed when the teacher gives something that is not finite.
    """
    device, seeds = teacher.times.device, noise_seeds(seed, ids)
    cond = {key: value.to(device) for key, value in encode(prompts).items()}
    x0 = teacher(noise_from_seeds(seeds, teacher.shape).to(device), cond).float().cpu()
    return torch.tensor(seeds), _finite(x0, ids)


def draw_from(teacher: TeacherSampler, encode: Encode, prompts: Sequence[str], x0: Tensor, ids: range) -> Tensor:
    """The noise (B, *shape) fp32, on the CPU, where the teacher's ODE leads from samples x0 (B, *shape), whose indices these are."""
    device = teacher.times.device
    cond = {key: value.to(device) for key, value in encode(prompts).items()}
    return _finite(teacher.backwards(x0.to(device), cond).float().cpu(), ids)


def _finite(x: Tensor, ids: range) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise TrainingFailed(f"the teacher's samples of pairs {ids.start} to {ids.stop - 1} are not finite")
    return x


def make_pairs(teacher: TeacherSampler, encode: Encode, prompts: Mapping[str, float], ids: range, *, seed: int, batch: int = 64) -> Pairs:
    """The pairs with these indices, in memory. TrainingFailed when the teacher gives something that is not finite."""
    texts, parts = drawn_prompts(prompts, ids, seed=seed), []
    for start in range(0, len(ids), batch):
        parts.append(draw(teacher, encode, texts[start : start + batch], ids[start : start + batch], seed=seed))
    seeds, x0 = zip(*parts, strict=True)
    return Pairs.held(torch.cat(seeds), texts, torch.cat(x0))
