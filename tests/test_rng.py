from __future__ import annotations

import hashlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.rng import SampleRng, derive_seed

SHAPE = (2, 3, 5)


def rng(*ids: int, seed: int = 0, scope: tuple[object, ...] = (4, 1)) -> SampleRng:
    return SampleRng(seed, scope, ids)


@settings(max_examples=20)
@given(ids=st.lists(st.integers(0, 2**40), min_size=2, max_size=6), cut=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_numbers_do_not_depend_on_the_cut_or_order_of_the_batch(ids: list[int], cut: int, seed: int) -> None:
    for draw in (lambda r: r.normal("noise", SHAPE), lambda r: r.uniform("time")):
        whole = draw(rng(*ids, seed=seed))
        parts = [draw(rng(*part, seed=seed)) for part in (ids[:cut], ids[cut:]) if part]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(draw(rng(*ids[::-1], seed=seed)), whole.flip(0))


def test_eight_samples_are_two_batches_of_four() -> None:
    whole = rng(*range(8)).normal("noise", SHAPE)
    assert torch.equal(whole, torch.cat([rng(0, 1, 2, 3).normal("noise", SHAPE), rng(4, 5, 6, 7).normal("noise", SHAPE)]))
    assert torch.equal(whole, rng(*range(8)).normal("noise", SHAPE))
    assert len(whole.flatten().unique()) == whole.numel()


def test_numbers_do_not_touch_or_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = rng(3).normal("noise", SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(rng(3).normal("noise", SHAPE), first)


def test_streams_scopes_and_seeds_differ() -> None:
    base = rng(0, 1)
    draws = [
        base.normal("noise", SHAPE),
        base.normal("match_noise", SHAPE),
        base.at("critic").normal("noise", SHAPE),
        base.at("match").normal("noise", SHAPE),
        rng(0, 1, scope=(4, 2)).normal("noise", SHAPE),
        rng(0, 1, scope=(5, 1)).normal("noise", SHAPE),
        rng(0, 1, seed=1).normal("noise", SHAPE),
        rng(2, 3).normal("noise", SHAPE),
    ]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert not (first == second).any()
    assert torch.equal(base.at("a", "b").uniform("u"), base.at("a").at("b").uniform("u"))


def test_no_two_samples_of_a_large_stream_are_alike() -> None:
    # The first seeds of 64 bits whose lower halves, all that torch's CPU generator takes, are equal.
    pair = (100_558, 134_251)
    assert derive_seed(0, 4, 1, "noise", pair[0]) % 2**32 == derive_seed(0, 4, 1, "noise", pair[1]) % 2**32
    assert not (rng(pair[0]).normal("noise", SHAPE) == rng(pair[1]).normal("noise", SHAPE)).any()
    many = rng(*range(200_064)).normal("noise", (3,)).numpy()
    assert len({row.tobytes() for row in many}) == len(many)


def test_the_stream_is_numpys_philox() -> None:
    # A counter per sample: the same stream, another sample, and nothing between them to advance.
    def numbers(sample: int) -> np.ndarray:
        key = int.from_bytes(hashlib.blake2b(b"7/4/1/noise", digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, sample], np.uint64))).standard_normal(30, dtype=np.float32)

    drawn = rng(5, 2**63 + 1, seed=7).normal("noise", SHAPE)
    assert np.array_equal(drawn.flatten(1).numpy(), np.stack([numbers(5), numbers(2**63 + 1)]))


def test_shared_uniform_numbers_are_no_samples() -> None:
    shared = rng(0, 1, 2).shared_uniform("times", 3)
    assert torch.equal(shared, rng(9).shared_uniform("times", 3))
    assert not (shared == rng(0, 1, 2).uniform("times", (3,))).any()
    assert shared.min() >= 0 and shared.max() < 1


def test_moments() -> None:
    many = rng(*range(500))
    normal, uniform = many.normal("noise", (40,)).double(), many.uniform("time", (40,)).double()
    bound = 4.5 / 20_000**0.5  # of a standard error
    assert abs(normal.mean()) < bound
    assert abs(normal.var() - 1) < bound * 2**0.5
    assert abs(normal.pow(4).mean() - 3) < bound * 96**0.5
    assert abs(uniform.mean() - 1 / 2) < bound / 12**0.5
    assert abs(uniform.var() - 1 / 12) < bound / 180**0.5
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # neighbouring samples, and one sample's neighbouring numbers, are uncorrelated
    assert abs((normal[1:] * normal[:-1]).mean()) < bound
    assert abs((normal[:, 1:] * normal[:, :-1]).mean()) < bound


def test_shared_index_ignores_the_samples() -> None:
    for scope in range(20):
        values = {SampleRng(3, (scope,), ids).shared_index("exit", 4) for ids in ([0], [7, 8], list(range(50)))}
        assert len(values) == 1


def test_shared_index_is_roughly_uniform_over_scopes() -> None:
    draws = torch.tensor([SampleRng(0, (step, 0), [0]).shared_index("exit", 4) for step in range(4000)])
    counts = torch.bincount(draws, minlength=4)
    assert len(counts) == 4
    assert (counts.double() - 1000).square().sum() / 1000 < 16.3  # chi-square, 3 degrees of freedom, p = .001
    repeats = (draws[1:] == draws[:-1]).double().mean()
    assert abs(repeats - 0.25) < 0.03
    assert {SampleRng(0, (step,), [0]).shared_index("exit", 1) for step in range(10)} == {0}


def test_seeds_are_stable_across_versions() -> None:
    # Pinned: a resumed or repeated run must draw the same numbers.
    assert derive_seed(0, "noise", 1) == 6545564728581758268
    assert 0 <= derive_seed("a") < 2**63
    assert derive_seed(1, 23) != derive_seed(12, 3)
