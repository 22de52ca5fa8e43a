"""The embedded worlds on which methods are compared: whose teacher, which recipes, which pictures are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgen.data import digits


@dataclass(frozen=True)
class World:
    """name: also of its bundled teacher, of its protocol, and what its recipes begin with. teacher_steps: at which the teacher is measured.
    recipes: in the order of the table. shown: prompts of the sample grid, a column each."""

    name: str
    guidance: float
    teacher_steps: tuple[int, ...]
    recipes: tuple[str, ...]
    shown: Callable[[], list[str]]

    @property
    def teacher(self) -> str:
        return f"fastgen:{self.name}"


def _digits() -> list[str]:
    named = [digits.NAMED[i % 3].format(word) for i, word in enumerate(digits.WORDS)]
    return [*named, *digits.GENERIC * 2, *digits.PARITY[0] * 2, *digits.PARITY[1] * 2]


DIGITS = World(
    "digits",
    guidance=1.5,
    teacher_steps=(25, 4, 2, 1),
    recipes=(
        "digits_dmd2_1step", "digits_dmd2_4step", "digits_dmd2_gan_1step", "digits_dmd2_gan_4step", "digits_phased_dmd_4step",
        "digits_f_distill_1step", "digits_scm_2step", "digits_rcm_2step", "digits_tbcm_2step", "digits_meanflow_2step",
    ),
    shown=_digits,
)  # fmt: skip


WORLDS = {world.name: world for world in (DIGITS,)}
