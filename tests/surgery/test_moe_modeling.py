"""The file that an export brings: plain PyTorch, for every class, computes what fastgen's own layers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers_zoo
import pytest
import torch
from moe_networks import DEEP, SPLIT, blocks, experts, grouped, largest, split, stir
from torch import Tensor

from fastgen import records
from fastgen.errors import UserError
from fastgen.surgery import moe
from fastgen.surgery.moe import stored
from fastgen.surgery.moe.split import Choice


def plain_class(dense: str) -> Any:
    """The class of the file for networks of class `dense`, whose code must not need fastgen."""
    names: dict[str, Any] = {"__file__": f"{stored.module_name(dense)}.py"}
    text = stored.code(dense)
    assert "import fastgen" not in text
    assert "from fastgen" not in text
    exec(compile(text, "modeling", "exec"), names)
    return names[stored.class_name(dense)]


def options(network: Any) -> dict[str, Any]:
    return {key: value for key, value in network.config.items() if key != "_use_default_values"}


def drawn(name: str, network: Any, like: diffusers_zoo.Denoiser) -> Tensor:
    """What another network of the zoo's class gives for the inputs of `like`."""

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).double()

    return diffusers_zoo.BUILDERS[name]()[3](network, like.x, like.t, random)


@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_it_computes_what_our_layers_compute(name: str, choice: Choice) -> None:
    ours, layers = split(name, 1.5 if choice == "expert" else 2, choice)
    stir(layers)
    for layer in layers:
        layer.selection_bias.copy_(torch.linspace(0, 0.1, layer.num_experts))
    network: Any = ours.network
    description = json.loads(json.dumps(stored.describe(network)))
    records.checked(description, stored.Description)
    plain = plain_class(type(network).__name__)(**options(network), experts=description).double().eval()
    assert plain.config["experts"] == description
    plain.load_state_dict(network.state_dict())
    expected = ours.call(ours.x, ours.t)
    dense, _ = split(name)
    assert largest(dense.call(dense.x, dense.t), expected) > 1e-6  # which the experts decide
    assert largest(drawn(name, plain, ours), expected) <= 1e-12


@pytest.mark.parametrize("name", SPLIT)
@torch.no_grad()
def test_a_network_is_made_again_from_its_description(name: str) -> None:
    ours, layers = split(name, 2)
    stir(layers)
    network: Any = ours.network
    again = stored.rebuild(type(network)(**options(network)).double().eval(), stored.describe(network), "config.json")
    again.load_state_dict(network.state_dict())
    assert stored.describe(again) == stored.describe(network)
    assert torch.equal(drawn(name, again, ours), ours.call(ours.x, ours.t))


def test_a_description_of_another_network_is_refused() -> None:
    ours, _ = split("sd3", 2)
    network: Any = ours.network
    description = stored.describe(network)
    for key, value, message in [
        ("name", "transformer_blocks.9.ff", "its experts are of transformer_blocks.9.ff, and a SD3Transformer2DModel has no such feed-forward layer"),
        ("activation", "swiglu", "transformer_blocks.0.ff has activation 'swiglu', and this fastgen makes 'gelu-approximate' of it"),
        ("inputs", 3, "transformer_blocks.0.ff has inputs 3, and this fastgen makes"),
    ]:
        changed = {**description, "layers": [{**description["layers"][0], key: value}]}
        with pytest.raises(UserError) as caught:
            stored.rebuild(type(network)(**options(network)), changed, "'config.json'")
        assert str(caught.value).startswith(f"'config.json': {message}")


@torch.no_grad()
def test_where_a_layer_lies_in_its_block_need_not_be_described_but_not_otherwise() -> None:
    """Descriptions of before there was more than one way do not say."""
    ours, layers = split("flux", 2)
    stir(layers)
    network: Any = ours.network
    description = stored.describe(network)
    old = {**description, "layers": [{key: value for key, value in each.items() if key != "inside"} for each in description["layers"]]}
    again = stored.rebuild(type(network)(**options(network)).double().eval(), old, "config.json")
    again.load_state_dict(network.state_dict())
    assert torch.equal(drawn("flux", again, ours), ours.call(ours.x, ours.t)) and stored.describe(again) == description
    (single,) = [each for each in description["layers"] if each.get("inside")]
    assert single["inside"] == {"up": ["proj_mlp"], "act": "act_mlp", "down": "proj_out", "above": 0, "times": 1, "ones": False, "widths": {}}
    changed = {**description, "layers": [{**single, "inside": {**single["inside"], "act": "attn"}}]}
    with pytest.raises(UserError, match=r"^config.json: single_transformer_blocks.0 has inside \{'up': .*'attn'"):
        stored.rebuild(type(network)(**options(network)), changed, "config.json")


def test_only_the_file_that_we_write_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"experts": {"dense": "FluxTransformer2DModel"}}), encoding="utf-8")
    file = folder / "modeling_fluxtransformer2dmodel_experts.py"
    file.write_text(stored.code("FluxTransformer2DModel"), encoding="utf-8")
    stored.check_code(tmp_path)
    for other, text in [(file, file.read_text(encoding="utf-8") + "\n"), (folder / "modeling_other.py", "")]:
        kept = other.read_text(encoding="utf-8") if other.exists() else None
        other.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"is not what this fastgen writes beside experts, and it is not run"):
            stored.check_code(tmp_path)
        other.unlink() if kept is None else other.write_text(kept, encoding="utf-8")
    stored.check_code(tmp_path)


def both_ways(name: str, ours: diffusers_zoo.Denoiser) -> tuple[Tensor, Tensor]:
    """What plain code and what fastgen make of the description and the weights of `ours`."""
    network: Any = ours.network
    description = json.loads(json.dumps(stored.describe(network)))
    records.checked(description, stored.Description)
    plain = plain_class(type(network).__name__)(**options(network), experts=description).double().eval()
    again = stored.rebuild(type(network)(**options(network)).double().eval(), description, "config.json")
    assert json.loads(json.dumps(stored.describe(again))) == description
    for other in (plain, again):
        other.load_state_dict(network.state_dict())
    return drawn(name, plain, ours), drawn(name, again, ours)


@pytest.mark.parametrize("name", [name for name in SPLIT if name in DEEP and name != "zimage"])
@torch.no_grad()
def test_blocks_in_groups_too(name: str) -> None:
    ours, routers = grouped(name, 1)
    how, inside = experts(name, 2), blocks(name, ours.network)
    stir(moe.convert(ours.network, inside, how, moe.random(moe.to_convert(ours.network, inside, how), seed=0)))
    expected = ours.call(ours.x, ours.t)
    moe.set_kept(ours.network, 2)
    assert largest(ours.call(ours.x, ours.t), expected) > 1e-6  # for blocks were skipped
    moe.set_kept(ours.network, 1)
    plain, again = both_ways(name, ours)
    assert largest(plain, expected) <= 1e-12
    assert largest(again, expected) <= 1e-12
    assert len(routers) == len(stored.describe(ours.network)["groups"])


@pytest.mark.parametrize("how", [moe.Slim(2), moe.Slim(2, shared=True), moe.Slim(0, shared=True)])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "qwen", "zimage"])
@torch.no_grad()
def test_slim_modulation_too(name: str, how: moe.Slim) -> None:
    ours, layers = split(name, 2)
    stir(layers)
    modulated = [block for block in blocks(name, ours.network) if getattr(block, "modulation", True)]
    moe.slim(ours.network, modulated, how)
    expected = ours.call(ours.x, ours.t)
    plain, again = both_ways(name, ours)
    assert largest(plain, expected) <= 1e-12
    assert largest(again, expected) <= 1e-12


@pytest.mark.parametrize("choice", ["token", "expert"])
@torch.no_grad()
def test_experts_that_were_added_and_removed_too(choice: Choice) -> None:
    ours, layers = split("sd3", 2, choice)
    stir(layers)
    moe.upcycle(ours.network, moe.weight_utility(ours.network), factor=2, noise=0.1)
    load = {layer.name: torch.tensor([0.0, 5, 5, 0, 5, 5, 5, 5]) for layer in layers}
    assert moe.remove(ours.network, load).values()
    assert {(layer.num_experts, layer.router.out_features, layer.gate_scale) for layer in layers} == {(6, 8, 4.0)}
    expected = ours.call(ours.x, ours.t)
    plain, again = both_ways("sd3", ours)
    assert largest(plain, expected) <= 1e-12
    assert largest(again, expected) <= 1e-12


def test_blocks_and_layers_that_are_not_there_are_refused() -> None:
    ours, _ = split("sd3", 2)
    network: Any = ours.network
    called = {"outputs": ["hidden_states"], "mask": "", "text": None, "vector": "temb", "embeds": False}
    group = {"blocks": ["transformer_blocks.9"], "kept": 1, "alpha": 0.5, "widths": [1, 1], "called": called}
    slimmed = {"rank": 1, "layers": [{"name": "transformer_blocks.0.attn", "common": None}]}
    for more, message in [
        ({"groups": [group]}, "its groups of blocks have transformer_blocks.9, and a SD3Transformer2DModel has no such block"),
        ({"groups": [{**group, "blocks": ["transformer_blocks.0"], "kept": 2}]}, "of 1 blocks from transformer_blocks.0 it keeps 2"),
        ({"modulation": slimmed}, "its slim modulation is of transformer_blocks.0.attn, and a SD3Transformer2DModel has no such linear layer"),
    ]:
        with pytest.raises(UserError) as caught:
            stored.rebuild(type(network)(**options(network)), {**stored.describe(network), **more}, "'config.json'")
        assert str(caught.value) == f"'config.json': {message}"
