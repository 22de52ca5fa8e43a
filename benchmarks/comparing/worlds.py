"""The embedded worlds on which methods are compared: whose teacher, which recipes, which pictures are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastgen.data import digits, scenes


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


def _scenes() -> list[str]:
    """Full prompts of every relation, then open ones, the same several times."""
    full = [scenes.full_caption((0, 2), (3, 7), 0), scenes.full_caption((3, 1), (5, 2), 1), scenes.full_caption((2, 3), (8, 0), 2)]
    full += [scenes.full_caption((1, 0), (6, 4), 3), scenes.full_caption((0, 3), (1, 9), 0), scenes.full_caption((2, 1), (7, 7), 2)]
    return [*full, *[scenes.TWO] * 8, *["a red digit and a blue digit"] * 4, *["a three and a seven"] * 4, *["a red digit and a seven"] * 4]


SCENES = World(
    "scenes",
    guidance=3.0,
    teacher_steps=(28, 4, 2, 1),
    recipes=(
        "scenes_dmd_1step", "scenes_dmd2_1step", "scenes_dmd2_gan_1step", "scenes_f_distill_1step", "scenes_scm_2step", "scenes_rcm_2step",
        "scenes_tbcm_2step", "scenes_meanflow_2step", "scenes_lcm_4step", "scenes_tscd_4step", "scenes_dmd2_4step", "scenes_dmd2_gan_4step",
        "scenes_dmd2_anchor_4step", "scenes_phased_dmd_4step",
    ),
    shown=_scenes,
)  # fmt: skip
WORLDS = {world.name: world for world in (SCENES, DIGITS)}
