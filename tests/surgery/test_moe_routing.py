"""Who goes where: gates, both choices, statistics beside numbers worked out by hand, evening out, and what runs may change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from moe_networks import experts, largest, split, stir
from tangents import F64, normal
from torch import Tensor

from fastgen.surgery import moe
from fastgen.surgery.moe import routing
from fastgen.surgery.moe.layer import ExpertLayer
from fastgen.surgery.moe.split import Choice, Experts, deal
from fastgen.surgery.moe.structures import Dense


def layer_of(active: float, choice: Choice = "token", num: int = 4) -> ExpertLayer:
    """Eight wide, five out; four hidden neurons an expert; with a random router."""
    hidden = 4 * (num + 1)
    dense = Dense(normal(hidden, 8, seed=1), normal(hidden, seed=2), normal(5, hidden, seed=3), normal(5, seed=4))
    how = Experts(num, 1, 1, active, choice)
    layer = ExpertLayer("ff", dense, "gelu", deal(normal(hidden), how, "ff"), how)
    stir([layer])
    return layer


def by_hand(layer: ExpertLayer, x: Tensor) -> Tensor:
    """(T, E, 5): what each expert makes of each token, times its gate."""
    gates = layer.num_experts * (x @ layer.router.weight.T).softmax(-1)
    assert layer.b1 is not None
    a = torch.nn.functional.gelu(torch.einsum("td,ehd->teh", x, layer.w1) + layer.b1)
    return gates[..., None] * torch.einsum("teh,eoh->teo", a, layer.w2)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_tokens_take_their_best_experts_times_their_gates(active: int) -> None:
    layer, x = layer_of(active), normal(2, 7, 8, seed=9)
    each = by_hand(layer, x.flatten(0, 1))
    best = (x.flatten(0, 1) @ layer.router.weight.T).topk(active).indices
    expected = layer.shared(x) + each.gather(1, best[..., None].expand(-1, -1, 5)).sum(1).view(2, 7, 5)
    assert largest(layer(x), expected) <= 1e-13
    assert largest(layer(x[0]), expected[0]) <= 1e-13  # one sample's tokens, and no samples
    assert largest(layer(x[:, :, None]), expected[:, :, None]) <= 1e-13


def test_a_router_of_zeros_weighs_every_expert_by_one_and_takes_the_first_of_equals() -> None:
    probabilities = torch.full((3, 5), 0.2)
    ids, gates = routing.token_choice(probabilities, torch.zeros(5), 2)
    assert ids.tolist() == [[0, 1]] * 3 and largest(gates, 1.0 + torch.zeros(3, 2)) <= 1e-7


def test_selection_bias_moves_the_choice_and_no_gate() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    ids, gates = routing.token_choice(probabilities, torch.tensor([0.0, 0.0, 0.4]), 2)
    assert ids.tolist() == [[2, 0]] and largest(gates, torch.tensor([[0.6, 1.5]])) <= 1e-6


@pytest.mark.parametrize("active", [0.5, 1, 2, 4])
def test_experts_take_the_tokens_of_their_own_sample_that_want_them_most(active: float) -> None:
    layer, x = layer_of(active, "expert"), normal(3, 7, 8, seed=9)
    each = by_hand(layer, x.flatten(0, 1)).view(3, 7, 4, 5)
    taken = math.ceil(7 * active / 4)
    expected = layer.shared(x)
    for b in range(3):
        for e in range(4):
            for n in (x[b] @ layer.router.weight.T).softmax(-1)[:, e].topk(taken).indices.tolist():
                expected[b, n] += each[b, n, e]
    assert largest(layer(x), expected) <= 1e-13
    alone = torch.cat([layer(x[b : b + 1]) for b in range(3)])
    assert largest(alone, expected) <= 1e-13  # what else is in the batch does not count


def test_samples_may_have_as_many_experts_as_their_time_allows() -> None:
    layer, x = layer_of(2, "expert"), normal(3, 8, 8, seed=9)
    active = torch.tensor([1.0, 2.0, 3.0])
    moe.set_active(layer, active)
    expected = []
    for b, k in enumerate(active.tolist()):
        alone = copy.deepcopy(layer)
        moe.set_active(alone, k)
        expected.append(alone(x[b : b + 1]))
    assert largest(layer(x), torch.cat(expected)) <= 1e-13
    with pytest.raises(ValueError, match=r"^active: 3 numbers for 2 samples"):
        layer(x[:2])


def test_a_capacity_that_divides_is_not_rounded_up() -> None:
    assert routing.capacity(4096, 12 * 0.1, 12) == 410  # 409.6
    assert routing.capacity(30, 12 * 0.1, 12) == 3  # 30 x 1.2000000000000002 / 12
    assert routing.capacity(7, 4, 4) == 7 and routing.capacity(7, 0, 4) == 0


def routed(probabilities: Tensor, ids: list[list[int]]) -> routing.Routing:
    return routing.of_token_choice("ff", probabilities, torch.tensor(ids))


def test_load_entropy_and_balance_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.25, 0.0]], requires_grad=True)
    found = routed(probabilities, [[0, 1], [0, 1]])
    assert found.counts.tolist() == [2, 2, 0] and found.load.tolist() == [0.5, 0.5, 0] and found.dropped == 0
    each = [1.5 * math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert abs(float(found.entropy) - sum(each) / 2) <= 1e-6
    loss = moe.balance_loss([found])
    assert abs(float(loss.detach()) - 3 * (0.5 * 0.625 + 0.5 * 0.25)) <= 1e-6
    (grad,) = torch.autograd.grad(loss, probabilities)
    assert largest(grad, torch.tensor([[0.75, 0.75, 0.0]] * 2)) <= 1e-6  # E f_i / T: the load is a constant


def test_balance_is_one_where_even_and_the_number_of_experts_at_worst() -> None:
    even = routed(torch.full((4, 4), 0.25), [[0], [1], [2], [3]])
    worst = routed(torch.eye(4)[:1].repeat(4, 1), [[0]] * 4)
    assert float(moe.balance_loss([even])) == 1 and float(moe.balance_loss([worst])) == 4
    assert float(moe.balance_loss([even, worst])) == 2.5
    with pytest.raises(ValueError, match=r"^routings: none"):
        moe.balance_loss([])


def test_tokens_that_no_expert_took_are_counted() -> None:
    probabilities = torch.full((6, 3), 1 / 3)
    found = routing.of_expert_choice("ff", probabilities, torch.tensor([[0, 1], [1, 2], [0, 2]]))
    assert found.counts.tolist() == [2, 2, 2] and float(found.dropped) == 0.5
    assert float(moe.balance_loss([found])) == pytest.approx(1)


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_passes_are_recorded_inside_the_context_alone(choice: Choice) -> None:
    (network, call, x, t), layers = split("flux", 2, choice)
    stir(layers)
    network.requires_grad_(True)
    with moe.recording(network) as routings:
        call(x, t)
        call(x, t)
    call(x, t)
    assert [found.layer for found in routings] == [layer.name for layer in layers] * 2
    counts = moe.counts(routings)
    assert counts["transformer_blocks.0.ff"].sum() == 2 * 2 * 16 * 2  # passes, samples, tokens, experts
    assert counts["single_transformer_blocks.0"].sum() == 2 * 2 * 48 * 2  # and text
    grads = torch.autograd.grad(moe.balance_loss(routings), [layer.router.weight for layer in layers])
    assert all(grad.any() for grad in grads) or choice == "expert"  # there the load is even, and the loss 1 whatever the router says


def test_evening_out_moves_load_and_leaves_gates_alone() -> None:
    layer, x = layer_of(1), normal(1, 500, 8, seed=9)
    before = layer.router.weight.clone()

    def spread() -> float:
        with moe.recording(layer) as routings, torch.no_grad():
            layer(x)
        moe.even_out(layer, moe.counts(routings), rate=0.02)
        return float((routings[0].load - 0.25).abs().max())

    first = spread()
    for _ in range(60):
        last = spread()
    assert first > 0.06 and last < 0.03
    assert torch.equal(layer.router.weight, before) and layer.selection_bias.any()
    moe.even_out(layer, {"another": torch.ones(4)})


def test_how_many_are_active_changes_at_run_time() -> None:
    (network, call, x, t), layers = split("sd3", 4)
    stir(layers)
    outs = []
    for active in (0, 1, 4):
        moe.set_active(network, active)
        outs.append(call(x, t))
    assert largest(outs[0], outs[1]) > 1e-4 and largest(outs[1], outs[2]) > 1e-4
    for wrong in (5, -1, 1.5, [1, 2]):
        with pytest.raises(ValueError, match=rf"^active: {str(wrong).replace('[', '.').replace(']', '.')}; "):
            moe.set_active(network, wrong)
    assert largest(call(x, t), outs[2]) == 0


def test_a_layer_is_copied_and_printed_like_any_other() -> None:
    layer = layer_of(2)
    with moe.recording(layer):
        layer(normal(1, 3, 8))
    assert torch.equal(copy.deepcopy(layer)(normal(1, 3, 8)), layer(normal(1, 3, 8)))
    assert "4 experts of 4 neurons, 2 active, token choice, gelu" in repr(layer)


def test_routers_stay_in_fp32_beside_bf16_weights() -> None:
    _, layers = split("sd3", 2, dtype=torch.bfloat16)
    assert {layer.router.weight.dtype for layer in layers} == {torch.float32} and {layer.w1.dtype for layer in layers} == {torch.bfloat16}
    out = layers[0](normal(1, 4, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert layer_of(2).router.weight.dtype == F64
    assert experts("sd3", 2).choice == "token"


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_what_routers_do_by_noise_level_is_that_of_the_samples_there(choice: Choice) -> None:
    x, fraction = normal(5, 6, 8, seed=2), torch.tensor([0.1, 0.9, 0.2, 1.0, 0.6])
    layer = layer_of(1, choice)
    with moe.recording(layer) as all_of_them:
        layer(x)
    told = moe.by_time(all_of_them, fraction)
    assert told.keys() == {f"{name}_t{i}" for name in ("busiest", "entropy", "dropped") for i in range(4)}
    for part, samples in ((0, [0, 2]), (1, []), (2, [4]), (3, [1, 3])):
        if not samples:
            assert all(torch.isnan(told[f"{name}_t{part}"]) for name in ("busiest", "entropy", "dropped"))
            continue
        with moe.recording(layer) as alone:
            layer(x[samples])
        assert told[f"busiest_t{part}"].item() == pytest.approx((4 * alone[0].load.max()).item())
        assert told[f"entropy_t{part}"].item() == pytest.approx((alone[0].entropy / math.log(4)).item(), rel=1e-5)
        assert told[f"dropped_t{part}"].item() == pytest.approx(alone[0].dropped.item(), abs=1e-6)
