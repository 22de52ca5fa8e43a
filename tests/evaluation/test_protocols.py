from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pytest
import torch
from fastgen.evaluation.fid import FeatureStatistics, frechet_distance
from torch import Tensor

from fastgen.data import digits
from fastgen.errors import UserError
from fastgen.evaluation.diversity import mode_entropy, pairwise_distance, vendi_score
from fastgen.evaluation.protocols import Digits, load_protocol, quantise

N = 1797


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return digits.load_images()[1]


@pytest.fixture(scope="module")
def by_prompt(protocol: Digits, real: Tensor, labels: Tensor) -> Tensor:
    """Real images, permuted so that the parity half of `open` shows the parity that it asks for."""
    odd = labels % 2
    wanted = [text in digits.PARITY[1] for text in protocol.subsets["open"].prompts[899:]]
    pools = {value: torch.where(odd == value)[0].tolist() for value in (0, 1)}
    chosen = [pools[int(value)].pop() for value in wanted]
    rest = [i for pool in pools.values() for i in pool]
    return real[torch.tensor(rest + chosen)]


def test_prompts_follow_the_real_marginals(protocol: Digits, labels: Tensor):
    named, free = protocol.subsets["named"].prompts, protocol.subsets["open"].prompts
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


def test_seeds_are_disjoint_and_the_hash_is_fixed(protocol: Digits):
    named, free = protocol.subsets["named"], protocol.subsets["open"]
    assert named.seeds == tuple(range(N))
    assert free.seeds == tuple(range(10_000, 10_000 + N))
    assert protocol.hash() == Digits(protocol.classifier).hash()
    content = {"named": [list(named.prompts), list(named.seeds)], "open": [list(free.prompts), list(free.seeds)]}
    # What is generated for published numbers: a change of it is a new protocol and needs a new name.
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest().startswith("e8a5cf3837e25632")
    whole = json.dumps({"metrics": sorted(protocol.metrics), "subsets": content})
    assert protocol.hash() == hashlib.sha256(whole.encode()).hexdigest()


def test_results_of_fewer_metrics_are_cached_under_another_hash(protocol: Digits):
    class Older(Digits):
        metrics = Digits.metrics[:-2]

    class Reordered(Digits):
        metrics = Digits.metrics[::-1]

    assert Older(protocol.classifier).hash() != protocol.hash() == Reordered(protocol.classifier).hash()


def test_unknown_protocol_names_what_is_allowed():
    assert load_protocol("digits").name == "digits"
    with pytest.raises(UserError, match=r"'digit'.*evaluate\.protocol.*'digits'"):
        load_protocol("digit")


def test_quantise_is_a_saved_png():
    values = torch.linspace(0, 1, 3 * 8 * 8 * 50).reshape(50, 3, 8, 8)
    assert torch.equal(quantise(values), (values * 255).round().to(torch.uint8))
    levels = torch.arange(256.0).repeat(3).reshape(1, 3, 16, 16) / 255
    assert torch.equal(quantise(levels).flatten(), torch.arange(256).repeat(3).to(torch.uint8))


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "NaN"), (-1.0, "got values from -1"), (1.1, r"to 1\.1")])
def test_quantise_refuses_what_is_no_image(bad: float, message: str):
    images = torch.zeros(2, 3, 8, 8)
    images[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=message):
        quantise(images)


def test_real_images_score_zero_distance_and_the_classifiers_accuracy(protocol: Digits, real: Tensor, by_prompt: Tensor, labels: Tensor):
    values = protocol.measure({"named": real, "open": by_prompt})
    assert tuple(values) == protocol.metrics
    predicted = protocol.classifier(real * 2 - 1).argmax(1)
    assert values["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert values["fd_digits_named"] == pytest.approx(0, abs=1e-6)
    assert values["fd_digits_pixel"] == pytest.approx(0, abs=1e-6)
    assert values["prompt_accuracy"] == pytest.approx(float((predicted == labels).double().mean()), abs=2 / N)  # 8 bits
    shown = protocol.classifier(by_prompt * 2 - 1).argmax(1)[899:]
    wanted = torch.tensor([text in digits.PARITY[1] for text in protocol.subsets["open"].prompts[899:]])
    assert values["parity_accuracy"] == pytest.approx(float((shown % 2 == wanted).double().mean()), abs=2 / 898)
    assert 0.8 < values["prompt_accuracy"] < 1
    assert 0.8 < values["parity_accuracy"] < 1


def test_values_are_those_of_the_quantised_images(protocol: Digits, real: Tensor):
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    named, free = ((real + scale * noise).clamp(0, 1) for scale in (0.05, 0.1))
    values = protocol.measure({"named": named, "open": free})
    seen = [(x * 255).round() / 255 * 2 - 1 for x in (named, free, real)]
    features = [protocol.classifier.features(x) for x in seen]
    of_named, of_free, of_real = (FeatureStatistics.from_features(x) for x in features)
    pixels, real_pixels = (FeatureStatistics.from_features(x.mean(1).flatten(1)) for x in seen[1:])
    assert values["fd_digits"] == pytest.approx(frechet_distance(of_free, of_real), rel=1e-5)
    assert values["fd_digits_named"] == pytest.approx(frechet_distance(of_named, of_real), rel=1e-5)
    assert values["fd_digits_pixel"] == pytest.approx(frechet_distance(pixels, real_pixels), rel=1e-5)
    texts = protocol.subsets["open"].prompts
    assert values["diversity"] == pytest.approx(pairwise_distance(features[1], texts), rel=1e-5)
    assert values["vendi"] == pytest.approx(vendi_score(features[1], texts), rel=1e-5)
    shown = protocol.classifier(seen[1]).argmax(1)
    assert values["mode_entropy"] == pytest.approx(mode_entropy(shown[:899], texts[:899]), rel=1e-5)


def test_a_wrong_parity_is_no_mode(protocol: Digits, real: Tensor, by_prompt: Tensor):
    """Generic prompts alone count, where no digit is wrong."""
    wrong = by_prompt.clone()
    wrong[899:] = wrong[899:].flip(0)
    before, after = (protocol.measure({"named": real, "open": free}) for free in (by_prompt, wrong))
    assert after["parity_accuracy"] < 0.5 < before["parity_accuracy"]
    assert after["mode_entropy"] == before["mode_entropy"]
    threes = by_prompt.clone()
    threes[:899] = real[digits.load_images()[1] == 3][0]
    assert protocol.measure({"named": real, "open": threes})["mode_entropy"] == 1


def test_noise_is_far_and_guesses(protocol: Digits):
    noise = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = protocol.measure({"named": noise, "open": noise})
    assert values["fd_digits"] > 10
    assert values["fd_digits_pixel"] > 5
    assert values["prompt_accuracy"] < 0.2
    assert 0.4 < values["parity_accuracy"] < 0.6


def test_shuffling_loses_accuracy_and_no_distance(protocol: Digits, real: Tensor, by_prompt: Tensor):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    before = protocol.measure({"named": real, "open": by_prompt})
    after = protocol.measure({"named": real[order], "open": by_prompt[order]})
    assert after["prompt_accuracy"] < 0.2 < 0.8 < before["prompt_accuracy"]
    assert after["parity_accuracy"] < 0.6 < 0.8 < before["parity_accuracy"]
    for name in ("fd_digits", "fd_digits_named", "fd_digits_pixel"):
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_one_image_per_prompt_has_no_diversity(protocol: Digits, real: Tensor):
    texts = sorted(set(protocol.subsets["open"].prompts))
    collapsed = real[torch.tensor([texts.index(text) for text in protocol.subsets["open"].prompts])]
    values = protocol.measure({"named": real, "open": collapsed})
    assert values["diversity"] == pytest.approx(0, abs=1e-4)  # equal pictures at other places of a batch; 12 for real ones
    assert values["vendi"] == pytest.approx(1, abs=1e-9)
    assert values["mode_entropy"] == 1
    assert values["fd_digits"] > 1


def real_samples(protocol: Digits, real: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """What `measure` says of real images in place of generated ones, drawn independently of `floors`: none twice for one text."""
    everything = range(N)
    allowed = {text: [i for i in everything if labels[i] % 2 == p] for p in (0, 1) for text in digits.PARITY[p]}
    samples = []
    for seed in range(100, 116):
        draw = random.Random(seed)
        decks = {text: draw.sample(allowed.get(text, everything), 400) for text in sorted(set(protocol.subsets["open"].prompts))}
        shown = torch.tensor([decks[text].pop() for text in protocol.subsets["open"].prompts])
        samples.append(protocol.measure({"named": real, "open": real[shown]}))
    return samples


def test_floors_are_small_and_real_diversity_is_that_of_the_described_images(protocol: Digits, real: Tensor, labels: Tensor):
    rows = protocol.floors()
    assert {row["model"] for row in rows} == {"real"}
    floors = {(row["name"], row.get("floor")): row for row in rows}
    noise = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    far = protocol.measure({"named": noise, "open": noise})
    for name in ("fd_digits", "fd_digits_pixel"):
        bootstrap, half = floors[name, "bootstrap"], floors[name, "half"]
        assert 0 < bootstrap["value"] < half["value"] < far[name] / 10
        assert (bootstrap["n"], half["n"], bootstrap.get("std_over"), half.get("std_over")) == (1797, 898, "bootstrap", "seeds")
        assert 0 < bootstrap.get("std", 0) < bootstrap["value"]
    features = protocol.classifier.features((real * 255).round() / 255 * 2 - 1).double()
    everything, even, odd = (torch.pdist(features[rows]).mean() for rows in (labels >= 0, labels % 2 == 0, labels % 2 == 1))
    assert floors["diversity", None]["value"] == pytest.approx(float(3 * everything + 2 * even + 2 * odd) / 7, rel=1e-6)
    samples = real_samples(protocol, real, labels)
    for name, n in (("vendi", 1797), ("mode_entropy", 899)):
        row, over = floors[name, None], torch.tensor([values[name] for values in samples], dtype=torch.float64)
        assert (row["n"], row.get("std_over")) == (n, "seeds")
        assert abs(row["value"] - float(over.mean())) < float(over.std())  # four standard errors of 16 draws' mean
        assert row.get("std", 0) == pytest.approx(float(over.std()), rel=0.8)
    assert 9 < floors["mode_entropy", None]["value"] < 10
    accuracy = floors["prompt_accuracy", None]
    assert accuracy["value"] == protocol.measure({"named": real, "open": real})["prompt_accuracy"]
    assert accuracy["n"] == N


def test_incomplete_or_wrong_images_are_refused(protocol: Digits, real: Tensor):
    with pytest.raises(ValueError, match="'open' needs 1797 images, got 0"):
        protocol.measure({"named": real})
    with pytest.raises(ValueError, match="'named' needs 1797 images, got 5"):
        protocol.measure({"named": real[:5], "open": real})
    with pytest.raises(UserError, match=r"\(3, 8, 8\), the model makes \(3, 16, 16\)"):
        protocol.measure({"named": real.repeat(1, 1, 2, 2), "open": real})


def test_the_extractor_hash_follows_the_weights(protocol: Digits):
    class Scaled:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def features(self, images: Tensor) -> Tensor:
            return images.flatten(1) * self.weight

        def __call__(self, images: Tensor) -> Tensor:
            return self.features(images)

        def state_dict(self) -> dict[str, Tensor]:
            return {"weight": self.weight}

    one, same, two = (Digits(Scaled(torch.tensor(w))).extractor_hash() for w in (1.0, 1.0, 2.0))
    assert one == same != two
    assert one == hashlib.sha256(b"weight ()" + torch.tensor(1.0).numpy().tobytes()).hexdigest()


def test_the_bundled_classifier_measures_real_images(real: Tensor, by_prompt: Tensor):
    pytest.importorskip("fastgen.assets.classifier")
    values = load_protocol("digits").measure({"named": real, "open": by_prompt})
    assert values["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert values["fd_digits_pixel"] == pytest.approx(0, abs=1e-6)
    assert values["prompt_accuracy"] > 0.99
    assert values["parity_accuracy"] > 0.99
