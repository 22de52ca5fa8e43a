"""What is measured on the bundled scenes: what a classifier sees of what was asked for, distance from real scenes, and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.data import scenes
from fastgen.errors import UserError
from fastgen.evaluation.diversity import mode_entropy, vendi_score
from fastgen.evaluation.extractors import find_extractor
from fastgen.evaluation.extractors.base import Pictures
from fastgen.evaluation.frechet import FeatureStatistics, frechet_distance, table_statistics
from fastgen.evaluation.metrics.base import Heading, Measured, Metric, Needs, Options, Resources, Row, Unavailable, Value, feature
from fastgen.evaluation.preparation import quantised
from fastgen.evaluation.worlds import scenes as world

FLOOR_SEEDS = range(2, 5)  # of further real scenes; the reference has 1
ABSENT = 10  # what the classifier calls a colour that shows no digit
LAYERS = ("features", "shown", "moments")
FEATURES, SHOWN, MOMENTS = (feature("scenes_classifier", layer) for layer in LAYERS)
OTHER_PROMPTS = "needs the prompts fastgen:scenes/full and fastgen:scenes/open in sets full and open"


class Scenes(Metric):
    """Accuracies of the set `full`, everything else of `open`.

    fd_scenes: Fréchet distance of classifier features (128-d) to 5,000 real scenes of digits that neither the teacher nor the classifier has
    seen. Accuracies are fractions of pictures: colour, that exactly the two colours that were asked for show a digit; digit, that those digits
    are there, in whatever colours; relation, that the centres of the two colours lie so; scene, that each colour shows its own digit, the
    relation holds, and nothing else is there. vendi and mode_entropy are of the prompt that leaves everything open ("two digits"): the Vendi
    score of the features, and the effective number of combinations of colours, digits and relation, of 2,400; pictures of one colour, or of
    more than two, are one mode together. Both grow with the number of pictures: compare equal numbers.
    """

    class Config(Options):
        set: None = None

    shows = {  # noqa: RUF012
        "scene_accuracy": Heading("scene accuracy", "↑", 3),
        "colour_accuracy": Heading("colour accuracy", "↑", 3),
        "digit_accuracy": Heading("digit accuracy", "↑", 3),
        "relation_accuracy": Heading("relation accuracy", "↑", 3),
        "fd_scenes": Heading("FD-scenes", "↓"),
        "vendi": Heading("Vendi"),
        "mode_entropy": Heading("modes"),
    }

    def __init__(self, config: Any, sets: Sequence[str], resources: Resources = Resources()) -> None:  # noqa: B008
        if lacking := sorted({"full", "open"} - set(sets)):
            raise UserError(f"metrics.scenes: needs sets full and open; {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not there")
        super().__init__(config, sets, resources)

    def needs(self) -> Needs:
        return Needs({"full": (SHOWN, MOMENTS), "open": (FEATURES, SHOWN, MOMENTS)})

    def measure(self, measured: Measured) -> list[Value]:
        full, free = measured.sets["full"], measured.sets["open"]
        if not (set(world.full()).issuperset(full.prompts) and set(world.open_prompts()).issuperset(free.prompts)):
            raise Unavailable(OTHER_PROMPTS)
        undecided = torch.tensor([index for index, prompt in enumerate(free.prompts) if prompt == scenes.TWO])
        if len(undecided) < 2:
            raise Unavailable(f"needs two pictures of the prompt {scenes.TWO!r}; {len(free)} were drawn of set open")
        shown, moments = (measured.tables["full", of].read() for of in (SHOWN, MOMENTS))
        right = accuracies(shown, moments, full.prompts)
        table = measured.tables["open", FEATURES]
        of_two = [measured.tables["open", of].take(undecided) for of in (FEATURES, SHOWN, MOMENTS)]
        return [
            *(Value(name, value, len(full)) for name, value in right.items()),
            Value("fd_scenes", frechet_distance(table_statistics(table), self._reference), len(free)),
            *(Value(name, value, len(undecided)) for name, value in diversity(*of_two).items()),
        ]

    def floors(self) -> list[Row]:
        """Other scenes of the held-out digits, over seeds, and accuracy of the reference's own; floor `training`: scenes of the data set, which
        is the distance of a model that knows nothing but its training digits."""
        reference, n = self._real(world.reference()), world.NUM_FULL
        right = accuracies(reference["shown"][:n], reference["moments"][:n], world.full())
        rows = [Row(name=name, model="real", value=value, n=n) for name, value in right.items()]
        others = [self._real(world.held_out(seed)) for seed in FLOOR_SEEDS]
        distances = [self._distance(other["features"]) for other in others]
        rows.append(_over_seeds("fd_scenes", distances, world.NUM_OPEN))
        count = world.open_prompts().count(scenes.TWO)
        scores = [diversity(*(other[layer][:count] for layer in LAYERS)) for other in others]
        rows += [_over_seeds(name, [score[name] for score in scores], count) for name in scores[0]]
        known = self._real(scenes.training(), world.NUM_OPEN)["features"]
        return [*rows, Row(name="fd_scenes", model="real", value=self._distance(known), n=len(known), floor="training")]

    @cached_property
    def _reference(self) -> FeatureStatistics:
        return FeatureStatistics.from_features(self._real(world.reference())["features"])

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(FeatureStatistics.from_features(features), self._reference)

    def _real(self, of: scenes.Scenes, count: int | None = None) -> dict[str, Tensor]:
        """Layers of real scenes, quantised as generated ones are."""
        kind = find_extractor("scenes_classifier")
        extractor, pixels = kind(kind.Config(), self.resources), quantised((of.images[:count] + 1) / 2, "edm")
        parts = [extractor(Pictures(batch, ("",) * len(batch)), LAYERS) for batch in pixels.split(500)]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in LAYERS}


def accuracies(shown: Tensor, moments: Tensor, prompts: tuple[str, ...]) -> dict[str, float]:
    """Of pictures of prompts of `full`, as `Scenes` says. shown: (N, 4); moments: (N, 12)."""
    colours, wanted, related = world.meant(prompts)
    found = shown.long()
    there = torch.zeros(found.shape, dtype=torch.bool).scatter(1, colours, True)
    colour = ((found != ABSENT) == there).all(1)
    in_place = found.gather(1, colours)
    counts = [torch.nn.functional.one_hot(digits, ABSENT + 1)[..., :ABSENT].sum(1) for digits in (found, wanted)]
    centre = scenes.centres(moments.unflatten(1, (-1, 3)))
    one, other = (centre[torch.arange(len(centre)), colours[:, place]] for place in (0, 1))
    relation = scenes.relation(one, other) == related
    right = {
        "scene_accuracy": colour & (in_place == wanted).all(1) & relation,
        "colour_accuracy": colour,
        "digit_accuracy": (counts[0] == counts[1]).all(1),
        "relation_accuracy": relation,
    }
    return {name: float(each.double().mean()) for name, each in right.items()}


def diversity(features: Tensor, shown: Tensor, moments: Tensor) -> dict[str, float]:
    """Of pictures of one prompt, as `Scenes` says."""
    one_prompt = [""] * len(shown)
    return {"vendi": vendi_score(features, one_prompt), "mode_entropy": mode_entropy(modes(shown, moments), one_prompt)}


def modes(shown: Tensor, moments: Tensor) -> Tensor:
    """(N,) numbers of what pictures show: which digit in which colour, and how the two lie; -1 where there are not two."""
    found = shown.long()
    there = found != ABSENT
    pair = there.double().topk(2, sorted=False).indices.sort(1).values
    centre = scenes.centres(moments.unflatten(1, (-1, 3)))
    one, other = (centre[torch.arange(len(centre)), pair[:, place]] for place in (0, 1))
    number = found @ (ABSENT + 1) ** torch.arange(found.shape[1])
    return torch.where(there.sum(1) == 2, number * (len(scenes.RELATIONS) + 1) + scenes.relation(one, other) + 1, -1)


def _over_seeds(name: str, values: Sequence[float], n: int) -> Row:
    spread = torch.tensor(values, dtype=torch.float64)
    return Row(name=name, model="real", value=float(spread.mean()), n=n, std=float(spread.std()), std_over="seeds")
