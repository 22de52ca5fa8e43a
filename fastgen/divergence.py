"""Which role diverged, when a loss or a gradient stops being finite: often not the one that the failing term trains.

Gradients that are not finite are never applied, so a role's weights leave their range in its own optimizer step, by a learning rate that
is too high, and the next term that asks this role shows it. What a role's weights began with tells how far they have come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastgen.data.training import Batch
from fastgen.ema import EMA
from fastgen.roles import Role, Roles
from fastgen.shards import largest

# Multiples of a role's largest weight at the start. Fine-tuning moves it by little, and adapters, which start small, by less than a
# hundred; Adam moves every weight by the learning rate a step, so a rate that is too high passes both soon.
SUSPICIOUS, DIVERGED = 10.0, 1e4


class Diagnosis(NamedTuple):
    """role: whose learning rate to lower; None where no role is at fault."""

    reason: str
    role: str | None = None


def of_inputs(inputs: Mapping[str, Tensor]) -> Diagnosis | None:
    """Whether a number that is not finite comes from what the term was given, by name."""
    broken = [name for name, value in inputs.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    return Diagnosis(f"no role is at fault, but the data: {' and '.join(broken)} hold numbers that are not finite") if broken else None


def diagnose(roles: Roles, begun: Mapping[str, float]) -> Diagnosis:
    """What else it comes from. begun: `largest` of each trained role's weights when it was made."""
    if found := unsound(roles.trained, begun, SUSPICIOUS):
        return found
    for name, role in roles.items():
        if not math.isfinite(largest(role.denoiser.backbone.parameters())):  # frozen ones: those it trains are sound
            return Diagnosis(f"no trained role is at fault: role {name!r} has frozen weights that are not finite, the teacher's own")
    return Diagnosis("no role's weights stand out, so this term itself is where it began")


def unsound(roles: Mapping[str, Role], begun: Mapping[str, float], limit: float = DIVERGED) -> Diagnosis | None:
    """The first trained role with a weight that is not finite, else the one that has grown most, beyond `limit` times its start."""
    sizes = {name: largest(role.parameters().values()) for name, role in roles.items()}
    for name, size in sizes.items():
        if not math.isfinite(size):
            return Diagnosis(f"role {name!r} has diverged: its weight {_first(roles[name].parameters())!r} is not finite", name)
    growth = {name: size / begun[name] for name, size in sizes.items() if begun[name] > 0}
    name = max(growth, key=growth.__getitem__, default=None)
    if name is None or growth[name] < limit:
        return None
    how = "has" if growth[name] >= DIVERGED else "has probably"
    return Diagnosis(f"role {name!r} {how} diverged: its weights reach {sizes[name]:.3g}, {growth[name]:.3g} times what they began with", name)


def unsound_average(averages: Mapping[str, EMA]) -> Diagnosis | None:
    """The first role whose average holds a number that is not finite."""
    for name, average in averages.items():
        if not math.isfinite(largest(average.shadow.values())):
            return Diagnosis(f"the average of role {name!r} has diverged: its weight {_first(average.shadow)!r} is not finite", name)
    return None


def inputs_of(batch: Batch, negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a batch brings into a term, by names that say where it comes from."""
    named = {f"the conditioning {key!r} of data.prompts or captions": value for key, value in batch.cond.items()}
    named |= {f"the conditioning {key!r} of teacher.negative_prompt": value for key, value in negative.items()}
    if batch.latents is not None:
        named["the latents of data.images"] = batch.latents
    if batch.pairs is not None:
        named |= {"the noise of data.pairs": batch.pairs.noise, "the samples of data.pairs": batch.pairs.x0}
    return named


def _first(tensors: Mapping[str, Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if not math.isfinite(largest([tensor])))
