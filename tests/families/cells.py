"""One method on one family: a few steps, what they moved, and the exported student in plain diffusers. Cells of README's matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pipelines import verifying_here
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastgen import run
from fastgen.config import Recipe, validate
from fastgen.export import export_lora, export_student, verify
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.jvp import tangent
from fastgen.path import expand_time
from fastgen.plan import plan
from fastgen.roles import LoraTuning, build_roles, student
from fastgen.surgery.held import Storage
from fastgen.surgery.moe import expert_layers, part
from fastgen.surgery.precision import narrow
from fastgen.surgery.shrink import Shrink, kept_blocks

METHODS = ("dmd2", "scm", "lcm", "tbcm")
PROMPTS = ["a red cat", "two boats at sea"]
_TRAJECTORY = {"trajectory": {"evaluations": 4}, "warmup": 1}


def check_cell(
    source: Path, method: str, folder: Path, *, lora: bool = False, prompts: Sequence[str] = PROMPTS, in_child: bool = False, **teacher: Any
) -> None:
    """Train for two steps in `folder`, with all that stock's output depends on moving; export; draw in plain diffusers what we draw.

    source: a saved pipeline. lora: adapters, which are exported as such where the pipeline loads them and the method has no scalar input.
    in_child: verify runs its own script as it stands, see plain_child. teacher: of the recipe's block.
    """
    planned = plan(recipe(source, method, folder, lora=lora, prompts=prompts, **teacher))
    running = run.build(planned, run.Progress())
    before = {role: _copied(running, role) for role in running.roles.trained}
    for _ in range(2):
        running.trainer.train_step()
    needed = _needed(planned.family, prompts)
    for role, then in before.items():
        now = running.roles[role].parameters()
        assert all(parameter.isfinite().all() for parameter in now.values()), role
        still = {name for name, parameter in now.items() if torch.equal(parameter, then[name])}
        assert not still & _acting_on(needed, then), role
    as_adapter = lora and planned.family.loads_lora and not running.roles["student"].spec.inputs
    output = folder / "student"
    (export_lora if as_adapter else export_student)(running.averaged(), planned.family, running.info(), output)
    place: AbstractContextManager[Any] = nullcontext() if in_child else verifying_here()
    with place:
        result = verify(output, seeds=(0, 1), teacher_dir=source if as_adapter else None)
    assert result.passed, result
    task = "text-to-image" if "prompt" in planned.family.call_inputs(prompts) else "unconditional-image-generation"
    assert f"\npipeline_tag: {'text-to-video' if 'frames' in teacher else task}\n" in (output / "README.md").read_text()


def check_smaller(source: Path, folder: Path, *, prompts: Sequence[str] = PROMPTS, **teacher: Any) -> None:
    """A student of two of three blocks of each list trains beside a fake score of all, is exported, and plain diffusers draws what we draw."""
    data = recipe(source, "dmd2", folder, prompts=prompts, **teacher).dump()
    data["student"]["shrink"] = {"depth": 0.67}
    running = run.build(plan(validate(Recipe, data)), run.Progress())
    family, networks = running.plan.family, {name: role.denoiser.backbone for name, role in running.roles.items()}
    kept = kept_blocks(networks["teacher"], Shrink(0.67))
    assert set(map(tuple, kept.values())) == {(0, 2)}
    depths = {name: {len(network.get_submodule(blocks)) for blocks in kept} for name, network in networks.items()}  # type: ignore[arg-type]
    assert depths == {"student": {2}, "fake_score": {3}, "teacher": {3}}
    before = _copied(running, "student")
    running.trainer.train_step()
    assert [name for name, parameter in running.roles["student"].parameters().items() if not torch.equal(parameter, before[name])]
    export_student(running.averaged(), family, running.info(), folder / "student")
    with verifying_here():
        result = verify(folder / "student", seeds=(0, 1))
    assert result.passed, result
    loaded = find_family(folder / "student", **family.options).load_backbone()
    assert {name: value.shape for name, value in loaded.named_parameters()} == {name: value.shape for name, value in before.items()}


def check_experts(source: Path, folder: Path, experts: Mapping[str, Any], *, prompts: Sequence[str] = PROMPTS, **teacher: Any) -> None:
    """A student of experts trains beside a dense fake score, is exported, and plain diffusers draws what we draw with the class that it brings."""
    data = recipe(source, "dmd2", folder, prompts=prompts, **teacher).dump()
    data["student"]["moe"] = {"router_std": 1.0, "calibration": 1, **experts}
    running = run.build(plan(validate(Recipe, data)), run.Progress())
    family, networks = running.plan.family, {name: role.denoiser.backbone for name, role in running.roles.items()}
    assert {name: bool(expert_layers(network)) for name, network in networks.items()} == {"student": True, "fake_score": False, "teacher": False}
    before = _copied(running, "student")
    metrics = running.trainer.train_step()
    assert metrics["experts/student/balance"] > 1
    moved = {part(name) for name, parameter in running.roles["student"].parameters().items() if not torch.equal(parameter, before[name])}
    assert moved == {"shared", "experts", None}
    export_student(running.averaged(), family, running.info(), folder / "student")
    with verifying_here():
        result = verify(folder / "student", seeds=(0, 1))
    assert result.passed, result


def trained(source: Path, folder: Path, *, checkpointing: bool, prompts: Sequence[str], **teacher: Any) -> dict[str, Tensor]:
    """Parameters of every trained role after two steps of dmd2 with adapters, by role and name. Plain SGD: Adam enlarges what is rounded."""
    folder.mkdir()
    data = recipe(source, "dmd2", folder, lora=True, prompts=prompts, **teacher).dump()
    data["train"]["checkpointing"] = checkpointing
    data["optimizer"] = {role: {"name": "sgd", "lr": 1.0, "betas": [0.0, 0.0], "clip": 1.0} for role in data["optimizer"]}
    running = run.build(plan(validate(Recipe, data)), run.Progress())
    for _ in range(2):
        running.trainer.train_step()
    return {f"{name} {key}": value.detach() for name, role in running.roles.trained.items() for key, value in role.parameters().items()}


def on_rounded_weights(source: Path, prompts: Sequence[str], *, storage: Storage, autocast: torch.dtype | None, **teacher: Any) -> dict[str, Tensor]:
    """On weights rounded to bf16, kept as `storage` says: the prediction, its tangent along the sample, and the gradient of every factor of
    an adapter, one after the other."""
    family = find_family(source, **teacher)
    network = family.load_backbone()
    narrow(network, torch.bfloat16)
    tuning = LoraTuning(2, 3.0, family.lora_targets)
    role = build_roles({"student": student()}, family, network.float(), tuning=tuning, autocast=autocast, storage=storage)["student"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    x, dx, weight = torch.randn(3, len(prompts), *family.latent.shape, generator=generator)
    t, cond = torch.full((len(prompts),), 0.6 * family.path.t_max), family.encode_prompts(prompts)
    x = x * expand_time(family.path.prior_scale(t), x)
    prediction = role.denoiser(x, t, cond).prediction
    (prediction * weight).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in role.parameters().values() if parameter.grad is not None]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with torch.no_grad():
        _, tangents = tangent(lambda x: role.denoiser(x, t, cond).prediction, (x,), (dx,))
    return {"prediction": prediction.detach(), "tangent": tangents, "gradients": torch.cat(gradients)}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Distances relative to what is expected, of each tensor."""
    return {name: float((found[name].float() - value).norm() / value.norm()) for name, value in expected.items()}


@contextmanager
def rounding_products() -> Iterator[None]:
    """In fp32, what goes into a linear or convolution layer and what comes out is rounded to bf16, and so are the gradients on their way back: the
    least that any mixed precision does, on any processor, for products add in fp32."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)

    def rounded(value: Any) -> Any:
        return value.bfloat16().float() if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    def going_in(layer: nn.Module, args: Any) -> Any:
        return tuple(map(rounded, args)) if isinstance(layer, kinds) else None

    before = register_module_forward_pre_hook(going_in)
    after = register_module_forward_hook(lambda layer, _, out: rounded(out) if isinstance(layer, kinds) else None)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def recipe(source: Path, method: str, folder: Path, *, lora: bool = False, prompts: Sequence[str] = PROMPTS, **teacher: Any) -> Recipe:
    """Of two steps; `folder` gets its prompts, or pictures with captions."""
    family = find_family(source, **{key: value for key, value in teacher.items() if key not in ("dtype", "quantise")})
    distiller = _distiller(method, family)
    from_pictures = method == "lcm" or (method == "scm" and "trajectory" not in distiller)
    optimizer = {"lr": 1e-3, "weight_decay": 0.0}
    return validate(
        Recipe,
        {
            "teacher": {"pretrained": str(source), "guidance": 2.0 if family.takes_guidance else 1.0, **teacher},
            "student": {"steps": 2, "sampler": family.samplers[0], "tune": {"lora": {"rank": 2, "alpha": 3}} if lora else "full"},
            "distiller": {"name": method, **distiller},
            "data": {"images": str(pictures(folder, prompts))} if from_pictures else {"prompts": str(texts(folder, prompts))},
            "optimizer": {"student": optimizer, **({"fake_score": optimizer} if method == "dmd2" else {})},
            "train": {"steps": 2, "batch_size": 2, "ema": 0.0, "device": "cpu"},
        },
    )


def _distiller(method: str, family: Family) -> dict[str, Any]:
    """Videos have no data yet, so sCM trains on the teacher's trajectories; without a place for a scalar input, LCM bakes one guidance in."""
    if method == "scm" and len(family.latent.size) > 2:
        return {"points": "teacher_trajectory", **_TRAJECTORY}
    scales = {} if family.time_projection is None or not family.takes_guidance else {"guidance": [1.0, 2.5]}
    by_method = {
        "dmd2": {"critic_updates": 1, "renoise": family.samplers[0]},
        "scm": {"warmup": 1},
        "lcm": {"num_times": 8, "skip": 2, **scales},
        "tbcm": _TRAJECTORY,
    }
    return by_method[method]


def texts(folder: Path, prompts: Sequence[str]) -> Path:
    """A prompt a line."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    return path


def pictures(folder: Path, prompts: Sequence[str]) -> Path:
    """Smooth ones with captions."""
    images = folder / "images"
    images.mkdir()
    for i, prompt in enumerate(prompts):
        Image.linear_gradient("L").rotate(90 * i).convert("RGB").save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(prompt)
    return images


def _copied(running: Any, role: str) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in running.roles[role].parameters().items()}


def _needed(family: Family, prompts: Sequence[str]) -> set[str]:
    """The network's parameters that its output depends on, beyond rounding."""
    network = family.load_backbone()
    cond = family.encode_prompts(prompts)
    x = torch.randn(len(prompts), *family.latent.shape, generator=torch.Generator().manual_seed(0))
    out = family.call(network, x, torch.full((len(prompts),), 0.6 * family.path.t_max), cond)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    sizes = {name: float(parameter.grad.abs().max()) for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {name for name, size in sizes.items() if size > 1e-7 * max(sizes.values())}


def _acting_on(needed: set[str], names: Mapping[str, Tensor]) -> set[str]:
    """Of trained parameters those that act on a needed one: themselves, or as adapters of their layer."""
    layers = {name.removesuffix(".weight") for name in needed}
    acting = {name for name in names if name in needed or name.partition(".lora_")[0] in layers}
    assert acting
    return acting
