"""Small runs with closed-form teachers, for the tests of methods, trainer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.config import OptimizerBlock, TrainBlock, validate
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.rows import Held
from fastgen.denoiser import Output, Predictor
from fastgen.distillers.base import Distiller, Setting
from fastgen.families.toy import Toy
from fastgen.parallel import SingleProcess, Strategy
from fastgen.rng import SampleRng
from fastgen.roles import Roles, build_roles
from fastgen.surgery.second_time import Defaults
from fastgen.trainer import Trainer

CPU = torch.device("cpu")
# Mean and variance of toy:gaussian.
MEAN, VARIANCE = torch.tensor([0.5, -0.3], dtype=torch.float64), torch.tensor([0.49, 0.16], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(count: int, scope: int = 0) -> SampleRng:
    """Random streams of samples 0..count - 1."""
    return SampleRng(0, (scope,), range(count))


def toy_setting(family: Toy, *, steps: int = 1, grid: Sequence[float] | None = None, guidance: float = 1.0, negative: str = "") -> Setting:
    """grid: explicit times of the student, instead of `steps` even ones."""
    steps = steps if grid is None else len(grid)
    return Setting(family.path, family.latent.shape, family.grid(steps, grid), guidance, family.encode_prompts([negative]), family.shift)


def optimizer_block(**keys: Any) -> OptimizerBlock:
    return validate(OptimizerBlock, keys, "optimizer")


def toy_roles(method: type[Distiller] | Distiller, family: Toy, *, dtype: torch.dtype = torch.float32) -> Roles:
    """The roles of a configured method, or all that its class can ask for."""
    backbone = family.load_backbone().to(dtype)
    if not isinstance(method, Distiller):
        return build_roles(method.roles, family, backbone)
    defaults = Defaults.on(family.path, method.setting.grid, method.setting.guidance)
    return build_roles(method.roles_for(method.config), family, backbone, defaults=defaults)


def toy_method(method: type[Distiller], setting: Setting, **config: Any) -> Distiller:
    return method(validate(method.Config, {"name": "test", **config}, "distiller"), setting)


def toy_trainer(
    distiller: Distiller,
    family: Toy,
    *,
    prompts: Sequence[str] = ("",),
    latents: Tensor | None = None,
    optimizers: OptimizerBlock | dict[str, OptimizerBlock] | None = None,
    dtype: torch.dtype = torch.float32,
    roles: Roles | None = None,
    parallel: Strategy | None = None,
    **train: Any,
) -> Trainer:
    """Prompts are equally likely; latents (N, D), if given, all carry the first prompt. One optimizer block serves every role.
    roles: instead of the method's own; parallel: instead of one process."""
    data = training.prepare(family, dict.fromkeys(prompts, 1.0), None, Keeping(CPU))
    if latents is not None:
        one = (torch.tensor([0]), torch.ones(1, dtype=torch.float64))
        data = training.TrainingData(data.prompts, data.cond, data.cumulative, Held({"latents": latents}), [one] * len(latents))
    roles = toy_roles(distiller, family, dtype=dtype) if roles is None else roles
    block = optimizers or optimizer_block(lr=1e-3)
    blocks = block if isinstance(block, dict) else dict.fromkeys(roles.trained, block)
    settings = TrainBlock(**{"steps": 4, "batch_size": 8, "ema": 0.9, "shard": "none", **train})
    return Trainer(distiller, roles, data, blocks, settings, parallel or SingleProcess(CPU))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of every trained parameter and of the average, by `role/parameter` and `ema/parameter`."""
    named = {f"{name}/{key}": value for name, role in trainer.roles.trained.items() for key, value in role.state_dict().items()}
    named |= {f"ema/{key}": value for key, value in trainer.ema["student"].shadow.items()}
    return {key: value.clone() for key, value in named.items()}


class Recorded(Predictor):
    """A predictor that notes each call of its network: `inputs` (x, t, cond), and whether the output was in a graph."""

    def __init__(self, predictor: Predictor) -> None:
        self.inputs: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        self.in_graph: list[bool] = []
        super().__init__(self._noting(predictor.denoiser), predictor.family)

    def _noting(self, denoiser: Callable[..., Output]) -> Callable[..., Output]:
        def call(x: Tensor, t: Tensor, cond: dict[str, Tensor], **options: Any) -> Output:
            output = denoiser(x, t, cond, **options)
            self.inputs.append((x.detach().clone(), t.clone(), cond))
            self.in_graph.append(output.prediction.requires_grad)
            return output

        return call
