"""The regression on noise-sample pairs: value and gradient written out, pure noise in whatever the grid's time, and what it is refused for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_runs import CPU, Recorded, normal, optimizer_block, rng, toy_method, toy_setting, toy_trainer, weights

from fastgen import checkpoint, perceptual
from fastgen.config import validate
from fastgen.data import training
from fastgen.data.encoded import Keeping
from fastgen.data.pairs import Pairs, TeacherSampler, make_pairs
from fastgen.data.training import Batch, PairBatch
from fastgen.denoiser import Denoiser, Predictor
from fastgen.distillers import regression
from fastgen.distillers.base import Facts, Setting
from fastgen.distillers.dmd import DMD
from fastgen.distillers.regression import RegressionConfig, regression_loss
from fastgen.errors import UserError
from fastgen.families.toy import Toy
from fastgen.path import Flow, Path, VarianceExploding
from fastgen.trainer import Trainer

LATENT, LPIPS = RegressionConfig(), RegressionConfig(metric="lpips")


def student(family: Toy, seed: int = 0) -> Predictor:
    """A student that moved away from the teacher, in fp64."""
    backbone: Any = family.load_backbone().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        backbone.out.weight.copy_(0.1 * torch.randn(backbone.out.weight.shape, generator=generator))
    return Predictor(Denoiser(backbone, family), family)


def pairs(count: int = 6) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    noise, x0 = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    return PairBatch(noise, x0, {"component": torch.tensor([0, 1, 2, -1, 0, 1])[:count]})


def batch(of: PairBatch) -> Batch:
    """Its own prompts are another matter."""
    return Batch(2, {"component": torch.tensor([2, 2])}, pairs=of)


def parameters(predict: Predictor) -> list[Tensor]:
    denoiser: Any = predict.denoiser
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("path", [Flow(), VarianceExploding()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("grid", [None, [0.6]], ids=["end", "0.6"])
def test_value_and_gradient_are_those_written_out(path: Path, grid: Sequence[float] | None) -> None:
    family = Toy("toy:mixture", path=path)
    predict, setting, given = student(family), toy_setting(family, grid=grid), pairs()
    loss = regression_loss(predict, batch(given), setting, LATENT)
    time = setting.grid[0].item()
    assert time == (1.0 if grid is None else 0.6) * path.t_max
    # Unit noise goes in at the grid's time, scaled up on VE alone: it is no noised sample.
    x = given.noise * (time if isinstance(path, VarianceExploding) else 1)
    backbone: Any = predict.denoiser.backbone  # type: ignore[union-attr]
    t = torch.full((6,), time, dtype=torch.float64)
    alpha, sigma = path.coeffs(t[:1])
    d_alpha, d_sigma = path.velocity_coeffs(t[:1])
    velocity = backbone(x, t, given.cond["component"])
    x0 = (d_sigma * x - sigma * velocity) / (d_sigma * alpha - sigma * d_alpha)  # solved from x and dx/dt
    expected = (x0 - given.x0).square().sum() / 12
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert loss.shape == ()
    assert loss > 0.01
    mine, theirs = (torch.autograd.grad(value, parameters(predict)) for value in (loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert max(gradient.abs().max().item() for gradient in mine) > 1e-3


def test_the_student_is_asked_once_at_the_pairs_noise_with_the_pairs_prompts() -> None:
    family = Toy("toy:mixture")
    predict, given = Recorded(student(family)), pairs()
    regression_loss(predict, batch(given), toy_setting(family, grid=[0.6]), LATENT)
    ((x, t, cond),) = predict.inputs
    assert torch.equal(x, given.noise)
    assert t.tolist() == [0.6] * 6
    assert torch.equal(cond["component"], given.cond["component"])
    assert predict.in_graph == [True]


def test_a_student_that_is_the_teachers_map_has_no_loss() -> None:
    """A component of the mixture is a Gaussian, whose map in one step is not the teacher's x0 but mean + std noise."""
    family = Toy("toy:mixture")
    teacher = TeacherSampler(student(family), family.grid(7), (2,))
    made = make_pairs(teacher, family.encode_prompts, {"0": 0.5, "2": 0.5}, range(40), seed=0)
    data = training.with_pairs(training.prepare(family, {"1": 1.0}, None, Keeping(CPU)), made, family, Keeping(CPU))

    class Map:
        path = Flow()

        def __call__(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], *_: Any) -> Tensor:
            return teacher(x, cond)

    drawn = data.draw(rng(16))
    assert regression_loss(Map(), drawn, toy_setting(family), LATENT) < 1e-10  # type: ignore[arg-type]
    assert regression_loss(student(family, seed=5), drawn, toy_setting(family), LATENT) > 1e-3


def test_it_draws_the_student_towards_the_pairs() -> None:
    family = Toy("toy:gaussian")
    predict, setting = student(family), toy_setting(family, grid=[0.7])
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = family.mixture.means[0] + family.mixture.variances[0].sqrt() * noise  # the ODE's map, in closed form
    given = batch(PairBatch(noise, target, {"component": torch.full((256,), -1)}))
    optimizer = torch.optim.Adam(parameters(predict), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = regression_loss(predict, given, setting, LATENT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """LPIPS gives way to a distance that can be written out; notes what it was asked to compare."""
    seen: list[tuple[Tensor, Tensor]] = []

    def load(*_: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        assert options == {"device": CPU}

        def distance(a: Tensor, b: Tensor) -> Tensor:
            seen.append((a, b))
            return (a - b).abs().pow(3).flatten(1).sum(1)

        return distance

    monkeypatch.setattr(perceptual, "load_lpips", load)
    return seen


def test_lpips_compares_decoded_pictures(measured: list[tuple[Tensor, Tensor]]) -> None:
    family = Toy("toy:mixture")
    predict, given = student(family), pairs()
    decoder = torch.randn(2, 3 * 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def decode(latents: Tensor) -> Tensor:
        return (latents @ decoder).view(-1, 3, 2, 2)

    setting: Setting = replace(toy_setting(family), decode=decode)
    loss = regression_loss(predict, batch(given), setting, LPIPS)
    x0 = predict(given.noise, torch.ones(6, dtype=torch.float64), given.cond)
    expected = ((x0 - given.x0) @ decoder).abs().pow(3).sum() / 6
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    mine, theirs = (torch.autograd.grad(value, parameters(predict)) for value in (loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    ((student_pictures, teacher_pictures),) = measured
    assert student_pictures.requires_grad
    assert not teacher_pictures.requires_grad


def facts(**changes: Any) -> Facts:
    return Facts(**{"steps": 1, "guidance": 1.0, "grid": (1.0,), "end": 1.0, "train_steps": 10} | changes)


def test_only_one_step_students_regress() -> None:
    regression.check(LATENT, facts())
    with pytest.raises(UserError, match=r"recipe key distiller\.regression: a pair says where one step from noise leads, but student\.steps is 4"):
        regression.check(LATENT, facts(steps=4))


def test_a_warmup_leaves_steps_for_the_matching() -> None:
    regression.check(RegressionConfig(warmup=9), facts())
    with pytest.raises(UserError, match=r"recipe key distiller\.regression\.warmup: 10 leaves none of train\.steps 10"):
        regression.check(RegressionConfig(warmup=10), facts())


def test_lpips_is_loaded_when_a_recipe_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("recipe key distiller.regression.metric: no weights")

    monkeypatch.setattr(perceptual, "load_lpips", refuse)
    regression.check(LATENT, facts())
    with pytest.raises(UserError, match=r"distiller\.regression\.metric: no weights"):
        regression.check(LPIPS, facts())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 0}, r"regression\.weight: .*greater than 0"),
        ({"weight": float("nan")}, r"regression\.weight: .*less than or equal to 1000000 .*nan"),
        ({"metric": "l1"}, r"regression\.metric: .*'latent' or 'lpips'.*'l1'"),
        ({"warmup": -1}, r"regression\.warmup: .*greater than or equal to 0"),
        ({"warmups": 5}, r"regression\.warmups: unknown key; did you mean 'warmup'"),
    ],
)
def test_the_block_refuses_what_it_does_not_know(given: dict[str, Any], message: str) -> None:
    assert (LATENT.weight, LATENT.metric, LATENT.warmup) == (0.25, "latent", 0)
    with pytest.raises(UserError, match=r"recipe key distiller\." + message):
        validate(RegressionConfig, given, "distiller.regression")


def test_a_pair_table_feeds_the_loss() -> None:
    """The noise a batch carries is that of the pairs' seeds."""
    family = Toy("toy:gaussian")
    made = Pairs.held(torch.tensor([5, 9]), ("", ""), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    drawn = training.with_pairs(training.prepare(family, {"": 1.0}, None, Keeping(CPU)), made, family, Keeping(CPU)).draw(rng(30)).pairs
    assert drawn is not None
    by_sample = {tuple(x0.tolist()): noise for x0, noise in zip(drawn.x0, drawn.noise, strict=True)}
    for seed, x0 in ((5, (1.0, 2.0)), (9, (3.0, 4.0))):
        assert torch.equal(by_sample[x0], torch.randn((1, 2), generator=torch.Generator().manual_seed(seed))[0])


def test_a_resumed_run_keeps_to_the_pairs_it_began_with(tmp_path: Folder) -> None:
    """Bit for bit, although the folder they come from has grown."""

    def run(count: int) -> Trainer:
        family = Toy("toy:gaussian", width=16)
        trainer = toy_trainer(toy_method(DMD, toy_setting(family)), family, optimizers=optimizer_block(lr=1e-2), steps=4)
        made = Pairs.held(torch.arange(count), ("",) * count, normal(33, 2)[:count].float())
        trainer.data = training.with_pairs(trainer.data.parts[0], made, family, Keeping(CPU))
        return trainer

    whole = run(20)
    whole.run([], should_stop=lambda: whole.step == 2)
    folder = checkpoint.save(tmp_path, whole, {}, keep=1)
    whole.run([])
    grown, fewer = run(33), run(7)
    checkpoint.load(folder, grown)
    grown.run([])
    assert all(torch.equal(value, weights(grown)[key]) for key, value in weights(whole).items())
    with pytest.raises(UserError, match=r"recipe key data\.pairs: 7 pairs, but the run began with 20"):
        checkpoint.load(folder, fewer)
