from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.surgery.heads import Heads, choose_taps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(heads: Heads) -> Heads:
    """With outputs off zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return heads


@pytest.mark.parametrize(("blocks", "want"), [(24, (6, 12, 18)), (30, (7, 15, 22)), (3, (0, 1, 2)), (2, (0, 1)), (1, (0,))])
def test_auto_taps_are_the_quarters(blocks: int, want: tuple[int, ...]) -> None:
    assert choose_taps("auto", blocks) == want


def test_given_taps_are_taken_in_their_order() -> None:
    assert choose_taps((5, 0, 3), 6) == (5, 0, 3)


@pytest.mark.parametrize(("taps", "wrong"), [((0, 6), 6), ((-1,), -1), ((7, 0), 7)])
def test_taps_out_of_range_are_refused(taps: tuple[int, ...], wrong: int) -> None:
    with pytest.raises(UserError) as caught:
        choose_taps(taps, 6)
    assert str(caught.value) == f"recipe key distiller.gan.taps: no block {wrong}; this network has blocks 0 to 5"


def test_untrained_heads_say_nothing_but_can_learn() -> None:
    heads = Heads((1, 4), (6, 10), seed="discriminator")
    features = [normal(3, 7, 6), normal(3, 7, 10, seed=1)]
    logits = heads(features)
    assert torch.equal(logits, torch.zeros(3, 2))
    gradients = torch.autograd.grad(logits.sum(), [head["out"].weight for head in heads.heads])  # type: ignore[index]
    assert min(gradient.abs().max().item() for gradient in gradients) > 1e-3


def test_a_head_is_a_perceptron_on_each_token_and_a_mean() -> None:
    heads, feature = trained(Heads((0,), (6,), seed=0)), normal(2, 5, 6)
    first, second = (layer for layer in heads.modules() if isinstance(layer, nn.Linear) and layer.out_features == 128)
    (norm,), (out,) = (
        [m for m in heads.modules() if isinstance(m, nn.LayerNorm)],
        [m for m in heads.modules() if getattr(m, "out_features", 0) == 1],
    )
    tokens = []
    for token in feature.unbind(1):
        z = (token - token.mean(1, keepdim=True)) / (token.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
        for layer in (first, second):
            z = z @ layer.weight.T + layer.bias
            z = z * torch.sigmoid(z)
        tokens.append(z)
    want = sum(tokens) / 5 @ out.weight.T + out.bias  # type: ignore[operator]
    torch.testing.assert_close(heads([feature]), want, rtol=1e-4, atol=1e-5)
    assert want.abs().min() > 1e-2


def test_each_head_listens_to_its_own_feature() -> None:
    """Tokens in any order and number, and vectors as one token."""
    heads = trained(Heads((2, 0), (6, 6), seed=0))
    one, other = normal(3, 8, 6), normal(3, 4, 6, seed=1)
    whole = heads([one, other])
    torch.testing.assert_close(heads([one[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))], other]), whole, rtol=1e-5, atol=1e-6)
    changed = heads([one, other + 1.5 * normal(3, 4, 6, seed=2)])
    assert torch.equal(changed[:, 0], whole[:, 0])
    assert bool((changed[:, 1] != whole[:, 1]).all())
    torch.testing.assert_close(heads([one[:, 0], other])[:, 0], heads([one[:, :1], other])[:, 0], rtol=1e-5, atol=1e-6)


def test_half_features_are_judged_in_full_precision() -> None:
    heads, feature = trained(Heads((0,), (6,), seed=0)), normal(2, 5, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads([feature])
    assert logits.dtype == torch.float32
    assert torch.equal(logits, heads([feature.float()]))


def test_heads_start_from_their_seed_alone() -> None:
    def start(seed: str, ambient: int) -> list[Tensor]:
        torch.manual_seed(ambient)
        return [p.detach() for p in Heads((0,), (6,), seed=seed).parameters()]

    state = torch.get_rng_state()
    one, same, other = start("discriminator", 1), start("discriminator", 2), start("fake_score", 1)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
