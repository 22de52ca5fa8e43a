"""The outcome of a dry run: what a plan comes to, from shapes alone."""

from __future__ import annotations

import math
from typing import Any, Literal

from fastgen.config import Recipe
from fastgen.memory import data_bytes, network_bytes
from fastgen.plan import Plan, plan, times_of
from fastgen.roles import build_roles
from fastgen.surgery.held import num_held


def dry_run(recipe: Recipe, *, only: Literal["train"] | None = None) -> dict[str, Any]:
    """`describe` of a recipe's plan."""
    return describe(plan(recipe, only=only, dry=True))


def describe(planned: Plan) -> dict[str, Any]:
    """What a run would do: roles, parameters, memory, grid, batch."""
    recipe, family = planned.recipe, planned.family
    asked: Any = planned.student | {"storage": planned.storage}
    roles = build_roles(planned.roles, family, family.load_backbone(meta=True), **asked)
    trained = {name: sum(p.numel() for p in role.parameters().values()) for name, role in roles.items()}
    parameters = {id(p): p for role in roles.values() for p in role.denoiser.parameters()}
    networks, data, smaller = network_bytes(planned, roles), data_bytes(planned), planned.smaller()
    sparse = planned.sparse()
    return {
        "method": recipe.distiller.name,
        "teacher": recipe.teacher.pretrained,
        "family": type(family).__name__,
        "roles": {name: {"trains": trained[name], "tuning": _tuning_name(planned, name)} for name in roles},
        **({"student": smaller} if smaller else {}),
        **({"experts": sparse} if sparse else {}),
        "parameters": sum(p.numel() for p in parameters.values()) + num_held(role.denoiser for role in roles.values()),
        "bytes": networks + data,
        "network_bytes": networks,
        "data_bytes": data,
        "grid": [round(t, 6) for t in planned.times.tolist()],
        **({"sizes": sizes} if (sizes := _sizes(planned)) else {}),
        "batch": recipe.train.batch_size,
        "micro_batch": planned.at_once,
        "micro_batches": math.ceil(recipe.train.batch_size / planned.processes / planned.at_once),
        "processes": planned.processes,
        "steps": recipe.train.steps,
        "warnings": list(planned.warnings),
    }


def _sizes(planned: Plan) -> list[dict[str, Any]]:
    """Of several sizes, each with its grid and how many images are its own, where there are any."""
    counts = [{"images": len(part)} for part in planned.divided] or [{}] * len(planned.sized)
    sized = [(list(family.picture_shape[-2:]), times_of(planned.recipe, family).tolist()) for family in planned.sized]
    return [{"size": size, "grid": [round(t, 6) for t in times], **count} for (size, times), count in zip(sized, counts, strict=True)]


def _tuning_name(planned: Plan, role: str) -> str:
    if not planned.roles[role].trainable:
        kept = planned.storage.quantise or planned.storage.dtype
        return "frozen" if kept == "auto" else f"frozen, {kept}"
    return "full" if planned.tuning is None else f"LoRA rank {planned.tuning.rank}"
