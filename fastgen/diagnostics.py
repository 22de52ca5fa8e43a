"""What goes wrong when distributions are matched, told from the numbers that a run logs: drift from the teacher, and the known ways to collapse.

`drift` compares pictures. `Watch` reads the rows of metrics.jsonl one by one and warns of six signatures, with the numbers that
show it and what helps. The thresholds come from runs on the digits teacher (shipped recipes of one to four steps, and ones made to
fail) and on the closed-form ring of eight modes. Saturation, mode loss and a discriminator that wins were not seen there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Numbers = Mapping[str, float]  # finite scalars of one student step

GREY_LEVEL = 1 / 255

# Steps that a logged number is averaged over: single batches scatter by a fifth.
SMOOTHING = 10
# Steps that critic lag looks back: long enough for one of its swings, short enough to forget that a one-step student began as a point, where
# the critic's loss is next to nothing.
LAG_WINDOW = 200
# Multiple of its recent minimum that the critic's loss has risen to. Samples that spread out are harder to denoise, but the digits recipes
# stay below 1.25; a critic's learning rate 70 times below the student's gave 4, a single critic update on the ring 7.
LAG_LOSS = 2.0
# Multiple of its own minimum since then that the gradient has risen to. With a critic that follows, it falls while the loss rises: the
# digits recipes stay below 1.2; the two runs above gave 2.7 and 10.
LAG_GRADIENT = 1.5
# Share of clipped pixels beyond the teacher's own: on digits, where that is large, healthy draws lie within -.03 and .04.
SATURATED = 0.1
# Spread of the student's pictures of one prompt over the teacher's: healthy draws lie within .82 and 1.23.
SPREAD_LOST = 0.6
# Difference of the student's mean from the teacher's: healthy draws of the digits recipes lie within .01 of it from the fifth step on, also
# at guidance 8. A discriminator of weight .1 on data 30 % darker than the teacher drew the mean down by .07, while losses fell as ever; a
# critic's learning rate 50 times below the student's threw it from +.055 to -.034.
MEAN_SHIFTED = 5 * GREY_LEVEL
# Standard errors that the difference is away from 0, on digits .002 to .009 each; pictures whose brightness varies more need it.
MEAN_ERRORS = 3.0
# Share of the difference before that leaves it as it was; below, the student is on its way back.
RECOVERING = 0.9
# Mean logit of real minus that of fake: at 8 a sample is told apart with odds of 50 to 1 on either side, and its gradient says little.
LOGITS_APART = 8.0
# Student steps on which they have been so far apart in a row: a discriminator may win for a while.
LOGITS_PATIENCE = 50
# Share of a student's experts that no token of a batch chose: the digits recipe stays below .05 from its first routed step on, and at 128 tokens a
# step, where chance leaves some out, below .08; without noise in its routers, at first every token chooses the same and it is .83.
IDLE = 0.1
# Student steps on which it has been so large in a row.
IDLE_PATIENCE = 50


def drift(student: Tensor, teacher: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """How a student's pictures differ from its teacher's of the same noise and prompts.

    student, teacher: (N, C, …) pixels in [0, 1]; prompts: N, those that repeat with other noise each time. `drift/mean`: the student's mean
    minus the teacher's. `drift/mean_error`: its standard error over the pictures, absent for one. `drift/std`: ratio of the pixels'
    standard deviations, averaged over channels. `drift/saturation`: share of pixels within a grey level of 0 or 1, minus the teacher's.
    `drift/spread`: ratio of the mean RMS distances between two pictures of one prompt, averaged over prompts and absent where none repeats
    (pictures of different prompts would differ although the noise changed nothing). Means and shares of 0, ratios of 1 are perfect.
    """
    deviations = [pixels.transpose(0, 1).flatten(1).std(1, correction=0) for pixels in (student, teacher)]
    numbers = {
        "drift/mean": student.mean() - teacher.mean(),
        "drift/std": _ratio(*deviations).mean(),
        "drift/saturation": _saturated(student) - _saturated(teacher),
    }
    if len(prompts) > 1:
        numbers["drift/mean_error"] = (student - teacher).flatten(1).mean(1).std() / len(prompts) ** 0.5
    groups = [[i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)]
    if repeated := [group for group in groups if len(group) > 1]:
        spreads = (torch.stack([_spread(pixels[group]) for group in repeated]).mean() for pixels in (student, teacher))
        numbers["drift/spread"] = _ratio(*spreads)
    return {name: value.item() for name, value in numbers.items()}


def _ratio(student: Tensor, teacher: Tensor) -> Tensor:
    # Teacher pictures that are blank, or all the same, to within a grey level give no scale to compare with.
    return student / teacher.clamp(min=GREY_LEVEL)


def _saturated(pixels: Tensor) -> Tensor:
    return ((pixels <= GREY_LEVEL) | (pixels >= 1 - GREY_LEVEL)).float().mean()


def _spread(pixels: Tensor) -> Tensor:
    """Mean RMS distance of two different pictures."""
    flat = pixels.flatten(1)
    return torch.pdist(flat).mean() / flat.shape[1] ** 0.5


class Watch:
    """Warnings of a run, each at most once. All it knows comes from the rows, so a resumed run's watch is made by showing it the old ones."""

    def __init__(self) -> None:
        self._signatures: dict[str, Signature] = {
            "critic lag": CriticLag(),
            "saturation": Saturation(),
            "mode loss": ModeLoss(),
            "mean shift": MeanShift(),
            "discriminator won": DiscriminatorWon(),
            "dead experts": DeadExperts(),
        }

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """What one row of metrics.jsonl gives reason to warn of, in the form `signature: evidence; remedy`."""
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
        found = {name: evidence for name, signature in self._signatures.items() if (evidence := signature.seen(numbers))}
        return [f"{name}: {evidence}; {self._signatures.pop(name).remedy}" for name, evidence in found.items()]


class Signature(Protocol):
    """One way to fail."""

    remedy: str

    def seen(self, numbers: Numbers) -> str | None:
        """The evidence, once this step's numbers complete it."""
        ...


class CriticLag:
    """The fake score no longer follows the student: its loss on the student's samples rises, and the gradient swings.

    Each set of trained roles has a history of its own, because a phase of phased_dmd starts with another student and fake score.
    """

    remedy = "raise distiller.critic_updates or optimizer.fake_score.lr, lower optimizer.student.lr, or set distiller.ida (dmd2 and its relatives)"

    def __init__(self) -> None:
        self._histories: dict[frozenset[str], _Smoothed] = {}

    def seen(self, numbers: Numbers) -> str | None:
        if not {"loss/critic", "match/gradient"} <= numbers.keys():
            return None
        trained = frozenset(name for name in numbers if name.startswith("lr/"))
        history = self._histories.setdefault(trained, _Smoothed())
        history.add(numbers["loss/critic"], numbers["match/gradient"])
        losses, gradients = zip(*history.recent, strict=True)
        lowest = min(losses)
        smallest = min(gradients[losses.index(lowest) :])
        if losses[-1] < LAG_LOSS * lowest or gradients[-1] < LAG_GRADIENT * smallest:
            return None
        return (
            f"the fake score no longer follows the student: within {LAG_WINDOW} steps loss/critic has risen from {lowest:.3g} to {losses[-1]:.3g} "
            f"and match/gradient swings, now from {smallest:.3g} to {gradients[-1]:.3g}"
        )


class _Smoothed:
    """The last moving averages of pairs of numbers, unbiased from the first pair on."""

    def __init__(self) -> None:
        self.recent: deque[tuple[float, float]] = deque(maxlen=LAG_WINDOW)
        self._sums, self._weight = (0.0, 0.0), 0.0

    def add(self, *pair: float) -> None:
        keep = 1 - 1 / SMOOTHING
        first, second = (keep * total + value / SMOOTHING for total, value in zip(self._sums, pair, strict=True))
        self._sums, self._weight = (first, second), keep * self._weight + 1 / SMOOTHING
        self.recent.append((first / self._weight, second / self._weight))


class Saturation:
    """The student clips more pixels than its teacher, two draws in a row."""

    remedy = "lower teacher.guidance, or match its part at noise levels of its own with distiller.decoupled (dmd2 and its relatives)"

    def __init__(self) -> None:
        self._before = -math.inf

    def seen(self, numbers: Numbers) -> str | None:
        if not {"drift/saturation", "match/gradient"} <= numbers.keys():
            return None
        before, self._before = self._before, numbers["drift/saturation"]
        if min(before, self._before) < SATURATED:
            return None
        return f"in the last two draws {before:.0%} and {self._before:.0%} more of the student's pixels than of the teacher's are black or white"


class ModeLoss:
    """The student's pictures of one prompt are much more alike than the teacher's, two draws in a row, and do not recover: a student that began as a
    point has a small spread too, but a rising one.

    Pictures are needed. `match/sample_std` does not tell: what varies within one picture dominates it, so repeating a single good
    picture leaves it where it was, and in a student that began as a point, or in a phase that ends at a noisy sample, it has no scale.
    """

    remedy = (
        "use distiller.regression, a GAN term (distiller.gan), f_distill with its divergence js, phased_dmd, or distiller.anchor "
        "(dmd2 and its relatives)"
    )

    def __init__(self) -> None:
        self._before = math.inf

    def seen(self, numbers: Numbers) -> str | None:
        if not {"drift/spread", "match/gradient"} <= numbers.keys():
            return None
        before, self._before = self._before, numbers["drift/spread"]
        if before >= SPREAD_LOST or self._before > before:
            return None
        return f"the student's pictures of one prompt lie {before:.2f} and then {self._before:.2f} times as far apart as the teacher's"


class MeanShift:
    """The student's pictures are darker or brighter than the teacher's, two draws in a row, by more than chance explains, and do not recover. Every
    method's pictures are judged: no loss need tell, because the mean is a small part of what each of them measures."""

    remedy = (
        "lower optimizer.student.lr, see whether data.images or distiller.reward are darker or brighter than the teacher, and where a fake score "
        "is trained raise distiller.critic_updates"
    )

    def __init__(self) -> None:
        self._before = 0.0

    def seen(self, numbers: Numbers) -> str | None:
        if not {"drift/mean", "drift/mean_error"} <= numbers.keys():
            return None
        now, least = numbers["drift/mean"], max(MEAN_SHIFTED, MEAN_ERRORS * numbers["drift/mean_error"])
        before, self._before = self._before, now
        if min(abs(before), abs(now)) < least or abs(now) < RECOVERING * abs(before):
            return None
        shifts = f"{before / GREY_LEVEL:+.0f} and {now / GREY_LEVEL:+.0f}"
        return f"in the last two draws the student's mean is {shifts} grey levels of 255 off the teacher's for the same noise"


class DiscriminatorWon:
    """Real and fake logits stay far apart, so that the student learns little from the discriminator."""

    remedy = "raise distiller.gan.r1, or lower distiller.gan.weight or the learning rate of the role that judges"

    def __init__(self) -> None:
        self._steps = 0

    def seen(self, numbers: Numbers) -> str | None:
        if not {"discriminate/real", "discriminate/fake"} <= numbers.keys():
            return None
        real, fake = numbers["discriminate/real"], numbers["discriminate/fake"]
        self._steps = self._steps + 1 if real - fake > LOGITS_APART else 0
        if self._steps < LOGITS_PATIENCE:
            return None
        return f"for {self._steps} steps the mean logits have been more than {LOGITS_APART:g} apart, real {real:.3g} and fake {fake:.3g} now"


class DeadExperts:
    """Some of a student's experts get no tokens any more, so that they learn nothing either."""

    remedy = (
        "raise student.moe.balance, or student.moe.router_std, which keeps tokens from all choosing the same experts at first; a run that begins "
        "with this student can remove them (student.moe.remove_dead)"
    )

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def seen(self, numbers: Numbers) -> str | None:
        for name, idle in numbers.items():
            if name.startswith("experts/") and name.endswith("/idle"):
                self._steps[name] = self._steps.get(name, 0) + 1 if idle >= IDLE else 0
                if self._steps[name] >= IDLE_PATIENCE:
                    whose = name.split("/")[1]
                    return f"for {IDLE_PATIENCE} steps at least {IDLE:.0%} of the experts of {whose} got no token of a batch, {idle:.0%} now"
        return None
