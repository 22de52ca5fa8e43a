"""One step of a distilled student is the teacher's whole ODE map: sCM, TBCM and rCM on closed-form teachers, minutes each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_runs import optimizer_block, toy_method, toy_setting, toy_trainer

from fastgen.distillers.base import Distiller
from fastgen.distillers.rcm import RCM
from fastgen.distillers.scm import SCM
from fastgen.distillers.tbcm import TBCM
from fastgen.ema import EMA, Averages
from fastgen.families.toy import Mixture, Toy
from fastgen.sampling import few_step, ode
from fastgen.trainer import Trainer


def start_as_a_fitted_network(trainer: Trainer, mixture: Mixture, steps: int = 1000, batch: int = 512) -> None:
    """A closed form has no weights to copy: the student becomes a plain network, fitted to the teacher's velocity."""
    role = trainer.roles["student"]
    backbone: Any = role.denoiser.backbone
    backbone.exact = lambda x, t, component: torch.zeros_like(x)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(backbone.out.weight, std=0.05, generator=generator)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=2e-3, betas=(0.9, 0.99))
    data, cond = mixture.sample(20_000, generator).float(), {"component": torch.full((batch,), -1)}
    for step in range(steps):
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        t, eps = torch.rand(batch, generator=generator), torch.randn(batch, 2, generator=generator)
        x = role.denoiser.family.path.mix(x0, eps, t)
        with torch.no_grad():
            velocity = trainer.models["teacher"](x, t, cond, "velocity")
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        (trainer.models["student"](x, t, cond, "velocity") - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.ema = Averages({"student": EMA(role.parameters(), trainer.settings.ema)})


def one_step_errors(trainer: Trainer, mixture: Mixture, count: int = 20_000) -> tuple[float, Tensor, Tensor]:
    """RMSE from the exact map, and errors of mean and standard deviation in units of the data's."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(5))
    cond = {"component": torch.full((count,), -1)}
    with torch.no_grad(), trainer.ema.applied():
        drawn = few_step(trainer.models["student"], noise, trainer.distiller.setting.grid, cond, renoise="euler").double()
    few = {"component": cond["component"][:4000]}
    with torch.no_grad():
        exact = ode(trainer.models["teacher"], noise[:4000].double(), torch.linspace(1, 0, 201, dtype=torch.float64), few)
    data = mixture.sample(200_000, torch.Generator().manual_seed(2))
    rmse = (drawn[:4000] - exact).square().mean().sqrt().item()
    return rmse, (drawn.mean(0) - data.mean(0)).abs() / data.std(0), (drawn.std(0) / data.std(0) - 1).abs()


METHODS: dict[type[Distiller], dict[str, Any]] = {
    SCM: {"steps": 2000, "batch_size": 512},
    TBCM: {"steps": 2500, "batch_size": 48},
    RCM: {"steps": 500, "batch_size": 512},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
@pytest.mark.parametrize("method", list(METHODS), ids=lambda method: method.__name__)
def test_one_step_is_the_exact_ode_map(method: type[Distiller], name: str) -> None:
    family = Toy(f"toy:{name}", width=128)
    keys: dict[str, Any] = {"critic_updates": 1} if method is RCM else {}
    distiller = toy_method(method, toy_setting(family), **keys)
    latents = family.mixture.sample(20_000, torch.Generator().manual_seed(1)).float() if distiller.needs_latents(distiller.config) else None
    block = optimizer_block(lr=2e-3, betas=[0.9, 0.99], schedule="cosine")
    blocks = dict.fromkeys([name for name, spec in distiller.roles_for(distiller.config).items() if spec.trainable], block)
    trainer = toy_trainer(distiller, family, latents=latents, optimizers=blocks, ema=0.99, **METHODS[method])
    start_as_a_fitted_network(trainer, family.mixture)
    trainer.run([])
    rmse, mean, std = one_step_errors(trainer, family.mixture)
    if method is not RCM:  # the regulariser pulls it off the map, towards the distribution
        assert rmse <= 0.05, (rmse, mean, std)
    assert mean.max() <= 0.03, (rmse, mean, std)
    assert std.max() <= 0.03, (rmse, mean, std)
