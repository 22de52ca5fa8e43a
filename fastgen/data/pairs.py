"""Noise-sample pairs (z, y): unit noise z and the sample y where the teacher's deterministic sampler leads from it.

DMD regresses on them (Yin et al. 2024a, section 3.2). Pair i depends on the seed, the prompts and i alone, so that the first pairs of
a larger set are a smaller set, in batches of any size. The noise is kept as its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgen.conditioning import Conditioning
from fastgen.data import weighted
from fastgen.errors import TrainingFailed
from fastgen.generator import noise_from_seeds
from fastgen.rng import SampleRng, derive_seed
from fastgen.sampling import Predict, few_step, initial, ode

Solver = Literal["euler", "heun"]
Encode = Callable[[Sequence[str]], Conditioning]  # prompts -> conditioning (P, ...)


@dataclass(frozen=True)
class Pairs:
    """seeds (M,) int64, prompts (M,) and samples x0 (M, *shape) fp32, on the CPU."""

    seeds: Tensor
    prompts: tuple[str, ...]
    x0: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def noise(self, rows: Tensor) -> Tensor:
        """The unit noise (B, *shape) fp32 of rows (B,)."""
        return noise_from_seeds(self.seeds[rows].tolist(), self.x0.shape[1:])


def cat(parts: Sequence[Pairs]) -> Pairs:
    """One set after the other."""
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return Pairs(torch.cat([part.seeds for part in parts]), prompts, torch.cat([part.x0 for part in parts]))


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


def noise_seeds(seed: int, ids: Sequence[int]) -> list[int]:
    """The seed of each pair's noise: consecutive 32-bit numbers, which is all that torch's CPU generator uses of a seed, so that no two of
    2^32 pairs have the same noise."""
    first = derive_seed(seed, "pairs", "noise")
    return [(first + i) % 2**32 for i in ids]


def make_pairs(
    teacher: TeacherSampler,
    encode: Encode,
    prompts: Mapping[str, float],
    ids: range,
    *,
    seed: int,
    batch: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> Pairs:
    """The pairs with these indices, their prompts drawn with the weights of `prompts`; `progress` is told the last finished index + 1.

    TrainingFailed when the teacher gives something that is not finite.
    """
    texts, table = list(prompts), weighted.cumulative(prompts.values())
    device, parts = teacher.times.device, []
    for start in range(ids.start, ids.stop, batch):
        some = range(start, min(start + batch, ids.stop))
        drawn = [texts[row] for row in weighted.rows(table, SampleRng(seed, ("pairs",), some).uniform("prompt")).tolist()]
        seeds = noise_seeds(seed, some)
        cond = {key: value.to(device) for key, value in encode(drawn).items()}
        x0 = teacher(noise_from_seeds(seeds, teacher.shape).to(device), cond).float().cpu()
        if not bool(torch.isfinite(x0).all()):
            raise TrainingFailed(f"the teacher's samples of pairs {some.start} to {some.stop - 1} are not finite")
        parts.append(Pairs(torch.tensor(seeds), tuple(drawn), x0))
        progress(some.stop)
    return cat(parts)
