"""The file that an export brings: plain PyTorch, for every class, computes what fastgen's own layers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers_zoo
import pytest
import torch
from moe_networks import SPLIT, largest, split, stir
from torch import Tensor

from fastgen import records
from fastgen.errors import UserError
from fastgen.surgery.moe import stored
from fastgen.surgery.moe.split import Choice


def plain_class(dense: str) -> Any:
    """The class of the file for networks of class `dense`, whose code must not need fastgen."""
    names: dict[str, Any] = {}
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
