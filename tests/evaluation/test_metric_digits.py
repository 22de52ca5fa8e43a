"""Protocol digits: its prompts and seeds, and its metric on pictures whose values are known."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest
import torch
from linear_classifier import LinearClassifier
from measuring import measure, values
from torch import Tensor, nn

from fastgen.assets import classifier as bundled
from fastgen.data import digits
from fastgen.errors import UserError
from fastgen.evaluation.diversity import mode_entropy, pairwise_distance, vendi_score
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.extractors.digits_classifier import DigitsClassifier
from fastgen.evaluation.frechet import FeatureStatistics, frechet_distance
from fastgen.evaluation.metrics.digits import Digits
from fastgen.evaluation.protocol import Protocol, load_protocol, protocol_from
from fastgen.evaluation.weights import Unavailable

N = 1797
METRICS = ("fd_digits", "fd_digits_named", "fd_digits_pixel", "prompt_accuracy", "parity_accuracy", "diversity", "vendi", "mode_entropy")


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return digits.load_images()[1]


@pytest.fixture(scope="module")
def by_prompt(real: Tensor, labels: Tensor) -> Tensor:
    """Real images, permuted so that the parity half of `open` shows the parity that it asks for."""
    odd = labels % 2
    wanted = [text in digits.PARITY[1] for text in load_protocol("digits").sets["open"].prompts[899:]]
    pools = {value: torch.where(odd == value)[0].tolist() for value in (0, 1)}
    chosen = [pools[int(value)].pop() for value in wanted]
    rest = [i for pool in pools.values() for i in pool]
    return real[torch.tensor(rest + chosen)]


def test_prompts_follow_the_real_marginals(protocol: Protocol, labels: Tensor):
    named, free = protocol.sets["named"].prompts, protocol.sets["open"].prompts
    assert len(named) == len(free) == N
    for i in (0, 1, 2, 500, 1796):
        assert named[i] == digits.NAMED[i % 3].format(digits.WORDS[int(labels[i])])
    words = Counter(prompt.split()[-1] for prompt in named)
    assert [words[word] for word in digits.WORDS] == torch.bincount(labels).tolist()
    texts = Counter(free)
    assert [texts[text] for text in digits.GENERIC] == [300, 300, 299]
    assert set(free[:899]) == set(digits.GENERIC)
    even, odd = (sum(texts[text] for text in digits.PARITY[p]) for p in (0, 1))
    assert (even, odd) == (445, 453)
    assert abs(even / 898 - float((labels % 2 == 0).double().mean())) < 1 / 898
    assert all(abs(texts[a] - texts[b]) <= 1 for a, b in digits.PARITY)


def test_seeds_are_disjoint_and_the_hash_is_fixed(protocol: Protocol):
    named, free = protocol.sets["named"], protocol.sets["open"]
    assert named.seeds == tuple(range(N))
    assert free.seeds == tuple(range(10_000, 10_000 + N))
    assert protocol.hash() == load_protocol("digits").hash()
    content = {"named": [list(named.prompts), list(named.seeds)], "open": [list(free.prompts), list(free.seeds)]}
    # What is generated for published numbers: a change of it is a new protocol and needs a new name.
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest().startswith("e8a5cf3837e25632")


def test_unknown_protocol_names_what_is_allowed():
    assert load_protocol("digits").name == "digits"
    with pytest.raises(UserError, match=r"'digit'.*evaluate\.protocol.*'digits'"):
        load_protocol("digit")


def test_real_images_score_zero_distance_and_the_classifiers_accuracy(
    protocol: Protocol, classifier: LinearClassifier, real: Tensor, by_prompt: Tensor, labels: Tensor
):
    found = measure(protocol, {"named": real, "open": by_prompt})
    assert tuple(found) == METRICS
    predicted = classifier(real * 2 - 1).argmax(1)
    assert found["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert found["fd_digits_named"] == pytest.approx(0, abs=1e-6)
    assert found["fd_digits_pixel"] == pytest.approx(0, abs=1e-6)
    assert found["prompt_accuracy"] == pytest.approx(float((predicted == labels).double().mean()), abs=2 / N)  # 8 bits
    shown = classifier(by_prompt * 2 - 1).argmax(1)[899:]
    wanted = torch.tensor([text in digits.PARITY[1] for text in protocol.sets["open"].prompts[899:]])
    assert found["parity_accuracy"] == pytest.approx(float((shown % 2 == wanted).double().mean()), abs=2 / 898)
    assert 0.8 < found["prompt_accuracy"] < 1
    assert 0.8 < found["parity_accuracy"] < 1


def test_values_are_those_of_the_quantised_images(protocol: Protocol, classifier: LinearClassifier, real: Tensor):
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    named, free = ((real + scale * noise).clamp(0, 1) for scale in (0.05, 0.1))
    found = measure(protocol, {"named": named, "open": free})
    seen = [(x * 255).round() / 255 * 2 - 1 for x in (named, free, real)]
    features = [classifier.features(x) for x in seen]
    of_named, of_free, of_real = (FeatureStatistics.from_features(x) for x in features)
    pixels, real_pixels = (FeatureStatistics.from_features(x.mean(1).flatten(1)) for x in seen[1:])
    assert found["fd_digits"] == pytest.approx(frechet_distance(of_free, of_real), rel=1e-5)
    assert found["fd_digits_named"] == pytest.approx(frechet_distance(of_named, of_real), rel=1e-5)
    assert found["fd_digits_pixel"] == pytest.approx(frechet_distance(pixels, real_pixels), rel=1e-5)
    texts = protocol.sets["open"].prompts
    assert found["diversity"] == pytest.approx(pairwise_distance(features[1], texts), rel=1e-5)
    assert found["vendi"] == pytest.approx(vendi_score(features[1], texts), rel=1e-5)
    shown = classifier(seen[1]).argmax(1)
    assert found["mode_entropy"] == pytest.approx(mode_entropy(shown[:899], texts[:899]), rel=1e-5)


def test_a_wrong_parity_is_no_mode(protocol: Protocol, real: Tensor, by_prompt: Tensor):
    """Generic prompts alone count, where no digit is wrong."""
    wrong = by_prompt.clone()
    wrong[899:] = wrong[899:].flip(0)
    before, after = (measure(protocol, {"named": real, "open": free}) for free in (by_prompt, wrong))
    assert after["parity_accuracy"] < 0.5 < before["parity_accuracy"]
    assert after["mode_entropy"] == before["mode_entropy"]
    threes = by_prompt.clone()
    threes[:899] = real[digits.load_images()[1] == 3][0]
    assert measure(protocol, {"named": real, "open": threes})["mode_entropy"] == 1


def test_noise_is_far_and_guesses(protocol: Protocol):
    noise = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = measure(protocol, {"named": noise, "open": noise})
    assert found["fd_digits"] > 10
    assert found["fd_digits_pixel"] > 5
    assert found["prompt_accuracy"] < 0.2
    assert 0.4 < found["parity_accuracy"] < 0.6


def test_shuffling_loses_accuracy_and_no_distance(protocol: Protocol, real: Tensor, by_prompt: Tensor):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    before = measure(protocol, {"named": real, "open": by_prompt})
    after = measure(protocol, {"named": real[order], "open": by_prompt[order]})
    assert after["prompt_accuracy"] < 0.2 < 0.8 < before["prompt_accuracy"]
    assert after["parity_accuracy"] < 0.6 < 0.8 < before["parity_accuracy"]
    for name in ("fd_digits", "fd_digits_named", "fd_digits_pixel"):
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_one_image_per_prompt_has_no_diversity(protocol: Protocol, real: Tensor):
    texts = sorted(set(protocol.sets["open"].prompts))
    collapsed = real[torch.tensor([texts.index(text) for text in protocol.sets["open"].prompts])]
    found = measure(protocol, {"named": real, "open": collapsed})
    assert found["diversity"] == pytest.approx(0, abs=1e-4)  # equal pictures at other places of a batch; 12 for real ones
    assert found["vendi"] == pytest.approx(1, abs=1e-9)
    assert found["mode_entropy"] == 1
    assert found["fd_digits"] > 1


def real_samples(protocol: Protocol, real: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """What `measure` says of real images in place of generated ones, drawn independently of `floors`: none twice for one text."""
    everything = range(N)
    allowed = {text: [i for i in everything if labels[i] % 2 == p] for p in (0, 1) for text in digits.PARITY[p]}
    samples = []
    for seed in range(100, 116):
        draw = random.Random(seed)
        decks = {text: draw.sample(allowed.get(text, everything), 400) for text in sorted(set(protocol.sets["open"].prompts))}
        shown = torch.tensor([decks[text].pop() for text in protocol.sets["open"].prompts])
        samples.append(measure(protocol, {"named": real, "open": real[shown]}))
    return samples


def test_floors_are_small_and_real_diversity_is_that_of_the_described_images(
    protocol: Protocol, classifier: LinearClassifier, real: Tensor, labels: Tensor
):
    rows = protocol.metrics(Resources())["digits"].floors()
    assert {row["model"] for row in rows} == {"real"}
    floors = {(row["name"], row.get("floor")): row for row in rows}
    noise = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    far = measure(protocol, {"named": noise, "open": noise})
    for name in ("fd_digits", "fd_digits_pixel"):
        bootstrap, half = floors[name, "bootstrap"], floors[name, "half"]
        assert 0 < bootstrap["value"] < half["value"] < far[name] / 10
        assert (bootstrap["n"], half["n"], bootstrap.get("std_over"), half.get("std_over")) == (1797, 898, "bootstrap", "seeds")
        assert 0 < bootstrap.get("std", 0) < bootstrap["value"]
    features = classifier.features((real * 255).round() / 255 * 2 - 1).double()
    everything, even, odd = (torch.pdist(features[rows]).mean() for rows in (labels >= 0, labels % 2 == 0, labels % 2 == 1))
    assert floors["diversity", None]["value"] == pytest.approx(float(3 * everything + 2 * even + 2 * odd) / 7, rel=1e-6)
    samples = real_samples(protocol, real, labels)
    for name, n in (("vendi", 1797), ("mode_entropy", 899)):
        row, over = floors[name, None], torch.tensor([sample[name] for sample in samples], dtype=torch.float64)
        assert (row["n"], row.get("std_over")) == (n, "seeds")
        assert abs(row["value"] - float(over.mean())) < float(over.std())  # four standard errors of 16 draws' mean
        assert row.get("std", 0) == pytest.approx(float(over.std()), rel=0.8)
    assert 9 < floors["mode_entropy", None]["value"] < 10
    accuracy = floors["prompt_accuracy", None]
    assert accuracy["value"] == measure(protocol, {"named": real, "open": real})["prompt_accuracy"]
    assert accuracy["n"] == N


def test_each_value_counts_the_pictures_it_is_of(protocol: Protocol, real: Tensor):
    counts = {name: value.n for name, value in values(protocol, {"named": real, "open": real}).items()}
    assert counts == dict.fromkeys(METRICS, N) | {"parity_accuracy": 898, "mode_entropy": 899}
    assert set(Digits.shows) == set(METRICS)


def test_the_extractor_hash_follows_the_weights(monkeypatch: pytest.MonkeyPatch):
    def hash_of(weight: float) -> str:
        module = nn.Module()
        module.register_buffer("weight", torch.tensor(weight))
        monkeypatch.setattr(bundled, "load_classifier", lambda: module)
        return DigitsClassifier(DigitsClassifier.Config(), Resources()).hash

    one, same, two = map(hash_of, (1.0, 1.0, 2.0))
    assert one == same != two
    assert one == hashlib.sha256(b"weight ()" + torch.tensor(1.0).numpy().tobytes()).hexdigest()


def test_the_bundled_classifier_measures_real_images(real: Tensor, by_prompt: Tensor):
    found = measure(load_protocol("digits"), {"named": real, "open": by_prompt})
    assert found["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert found["fd_digits_pixel"] == pytest.approx(0, abs=1e-6)
    assert found["prompt_accuracy"] > 0.99
    assert found["parity_accuracy"] > 0.99


def test_published_numbers_keep_their_meaning(real: Tensor):
    """What fastgen said of these pictures before protocols were files; on the machine that it said so, to the last digit."""
    protocol, noise = load_protocol("digits"), torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    named, free = ((real + scale * noise).clamp(0, 1) for scale in (0.05, 0.1))
    found = measure(protocol, {"named": named, "open": free})
    assert found == pytest.approx(
        {
            "fd_digits": 0.7711782977327744,
            "fd_digits_named": 0.17286712078234245,
            "fd_digits_pixel": 0.26347952957338805,
            "prompt_accuracy": 0.9988870339454646,
            "parity_accuracy": 0.5,
            "diversity": 12.583673325617882,
            "vendi": 7.5832761117395435,
            "mode_entropy": 9.978753335504392,
        },
        rel=1e-5,
    )
    floors = {(row["name"], row.get("floor")): (row["value"], row.get("std")) for row in protocol.metrics(Resources())["digits"].floors()}
    assert floors.pop(("diversity", None)) == (pytest.approx(12.93182746916612, rel=1e-5), None)
    assert floors.pop(("prompt_accuracy", None)) == (pytest.approx(0.9988870339454646, rel=1e-5), None)
    assert floors == {
        ("fd_digits", "bootstrap"): pytest.approx((0.21883470605800853, 0.06970914723436632), rel=1e-5),
        ("fd_digits", "half"): pytest.approx((0.8105817691139535, 0.26501560637955146), rel=1e-5),
        ("fd_digits_pixel", "bootstrap"): pytest.approx((0.0766295710158488, 0.00894365633464859), rel=1e-5),
        ("fd_digits_pixel", "half"): pytest.approx((0.28882758920793244, 0.03206218325644949), rel=1e-5),
        ("vendi", None): pytest.approx((6.161242492728388, 0.02326458238044223), rel=1e-5),
        ("mode_entropy", None): pytest.approx((9.877978695440715, 0.025700186128794773), rel=1e-5),
    }


def test_a_quick_look_measures_what_it_can(protocol: Protocol, real: Tensor):
    """64 of each set: generic prompts alone, so no parity; what is compared are those of the whole set's first pictures."""
    sets = {name: each.head(64) for name, each in protocol.sets.items()}
    protocol.sets.update(sets)
    found = values(protocol, dict.fromkeys(sets, real[:64]))
    assert tuple(found) == tuple(name for name in METRICS if name != "parity_accuracy")
    assert {value.n for value in found.values()} == {64}
    assert found["prompt_accuracy"].value > 0.8


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_pictures_are_refused_in_one_line(protocol: Protocol, real: Tensor, count: int):
    protocol.sets.update({name: each.head(count) for name, each in protocol.sets.items()})
    with pytest.raises(Unavailable, match=f"needs two pictures of one prompt: {count} were drawn"):
        measure(protocol, dict.fromkeys(protocol.sets, real[:count]))


def test_a_protocol_of_ones_own_without_its_sets_is_refused():
    with pytest.raises(UserError, match=r"^protocol mine: metrics\.digits: needs sets named and open; open is not there$"):
        protocol_from({"name": "mine", "sets": {"named": {"prompts": "fastgen:digits/named"}}, "metrics": {"digits": None}})


def test_other_prompts_are_not_measured_by_the_labels_of_these(real: Tensor):
    sets = {name: {"prompts": "fastgen:digits/open", "count": 8} for name in ("named", "open")}
    protocol = protocol_from({"name": "mine", "sets": sets, "metrics": {"digits": None}})
    with pytest.raises(Unavailable, match="needs the prompts fastgen:digits/named and fastgen:digits/open in sets named and open"):
        measure(protocol, dict.fromkeys(sets, real[:8]))
