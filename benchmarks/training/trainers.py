"""The trainers that are measured: of shipped recipes on the bundled digits teacher, and of random networks of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.training.networks import Network
from fastgen.conditioning import Conditioning, select
from fastgen.config import Recipe, validate
from fastgen.data.rows import Held
from fastgen.data.training import TrainingData, with_pairs
from fastgen.distillers import distiller_class
from fastgen.families.base import Family
from fastgen.families.sd3 import SD3
from fastgen.memory import network_bytes
from fastgen.parallel import launch
from fastgen.plan import Plan, plan
from fastgen.progress import Progress
from fastgen.roles import build_roles
from fastgen.run.building import Run, build, keeping_of, load_pairs
from fastgen.surgery.second_time import Defaults
from fastgen.trainer import Trainer

PROMPTS = 8  # of random conditioning
IMAGES = 16  # random latents


def of_recipe(name: str, overrides: Sequence[str]) -> tuple[Trainer, Plan]:
    """A shipped recipe's, in the third quarter of its training: past warm-ups, in the last phase. Nothing is measured of its student."""
    recipe = Recipe.load(name, ["evaluate.protocol=null", "evaluate.every=0", *overrides])
    planned = plan(recipe, only="train")
    run = build(planned, Progress())
    if recipe.data.pairs is not None:
        run.trainer.data = _with_pairs(run)
    run.trainer.move_to(_middle(planned))
    return run.trainer, planned


def _with_pairs(run: Run) -> TrainingData:
    return with_pairs(run.data.parts[0], load_pairs(run, Progress()), run.plan.family, keeping_of(run.plan, run.parallel.device))


def of_network(planned: Plan, network: Network) -> Trainer:
    """A trainer of random networks on random data, at the same place; every tensor is made on the recipe's device."""
    parallel = launch(planned.recipe.train)
    device, family = parallel.device, planned.family
    generator = torch.Generator(device).manual_seed(0)
    cond = {key: torch.randn(PROMPTS, *shape, generator=generator, device=device) for key, shape in network.texts.items()}
    setting = planned.setting(select(cond, torch.tensor([0])), family.decode)
    defaults = Defaults.on(setting.path, setting.grid, setting.guidance)
    with device:
        backbone = network.make().eval()
    roles = build_roles(planned.roles, family, backbone, tuning=planned.tuning, autocast=planned.autocast, defaults=defaults, storage=planned.storage)
    distiller = planned.method(planned.method_config, setting)
    vars(distiller)["_checked"] = True  # the check at a run's start is for real networks: of random ones, tangents in bf16 may be noise
    trainer = Trainer(
        distiller,
        roles,
        random_data(cond, family.latent.shape, generator),
        planned.optimizers,
        planned.recipe.train,
        parallel,
    )
    trainer.move_to(_middle(planned))
    return trainer


def random_data(cond: Conditioning, shape: Sequence[int], generator: torch.Generator) -> TrainingData:
    """Prompts of equal weight, and latents that each carry one of them."""
    prompts = [str(i) for i in range(PROMPTS)]
    cumulative = torch.arange(1, PROMPTS + 1, dtype=torch.float64) / PROMPTS
    latents = torch.randn(IMAGES, *shape, generator=generator, device=generator.device)
    captions = [(torch.tensor([i % PROMPTS]), torch.ones(1, dtype=torch.float64)) for i in range(IMAGES)]
    return TrainingData(prompts, Held(cond), cumulative, Held({"latents": latents}), captions)


def planned_for(network: Network, recipe: Recipe) -> Plan:
    """What the recipe comes to with this network for a teacher. No file that it names is opened."""
    method = distiller_class(recipe.distiller.name)
    return Plan(recipe, method, validate(method.Config, recipe.distiller.model_dump(), "distiller"), network.family(), {"": 1.0}, None)


def planned_bytes(planned: Plan) -> int:
    """What fastgen.memory says that networks and what trains them take."""
    return network_bytes(planned, build_roles(planned.roles, planned.family, planned.family.load_backbone(meta=True), tuning=planned.tuning))


def parameters(trainer: Trainer) -> int:
    """Of the teacher's network."""
    role = trainer.roles["teacher"] if "teacher" in trainer.roles else trainer.roles["student"]
    own = {id(p) for one in trainer.roles.values() if one.denoiser.adapter for p in one.parameters().values()}
    return sum(p.numel() for p in role.denoiser.backbone.parameters() if id(p) not in own)


def decoders(family: Family) -> dict[str, nn.Module]:
    """What a method may decode with."""
    return {"decoder": family.vae.decoder} if isinstance(family, SD3) else {}


def _middle(planned: Plan) -> int:
    return 3 * planned.recipe.train.steps // 4
