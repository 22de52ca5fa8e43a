"""What a training step costs in network passes: the measure by which methods get the same budget, whatever the machine."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.training.passes import Pass, recorded
from fastgen.trainer import Trainer

_STEPS = 6  # of which the mean is taken: roll-outs end at random steps


def sample_passes(made: Iterable[Pass]) -> int:
    """Passes of one sample through the network, of a step's. A forward pass counts one, a tangent one more, and a backward pass one for the
    gradients of the weights and one for those of the input: each is a product of matrices as large as the forward pass's."""
    return sum(each.batch * (1 + bool(each.tangents) + bool(each.gradients) * (bool(each.learning) + bool(each.moving))) for each in made)


def passes_a_step(trainer: Trainer, steps: int = _STEPS) -> float:
    """Mean over some steps; a trainer that stands where it is to be measured, and goes back there where its run is over."""
    place = trainer.step
    trainer.train_step()  # checks tangents
    total = 0
    for _ in range(steps):
        if trainer.step == trainer.settings.steps:
            trainer.move_to(place)
        made, _ = recorded(trainer.train_step, trainer.roles, {})
        total += sample_passes(made)
    return total / steps
