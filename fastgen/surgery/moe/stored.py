"""A network of experts as its configuration describes it, and made again from that: the split itself lies in the weights.

An export writes the description into the network's config.json, beside the class's own options; `modeling.py` reads the same.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from fastgen_kernels.moe_ffn import Activation, is_gated
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen import records
from fastgen.errors import UserError
from fastgen.surgery.moe.blocks import Groups, block_routers, grouped_blocks, join
from fastgen.surgery.moe.capacity import Capacity, capacity_of, follow
from fastgen.surgery.moe.conversion import keep_routers_wide
from fastgen.surgery.moe.inside import Inside
from fastgen.surgery.moe.layer import ExpertLayer, expert_layers, set_rows
from fastgen.surgery.moe.modulation import slim_layers, slim_like
from fastgen.surgery.moe.split import Experts, Partition
from fastgen.surgery.moe.structures import walk

_Size = Annotated[int, Field(ge=1, le=2**22)]


_Name = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]


class InBlock(records.Schema):
    """How a layer lies in its block, as in `inside.Inside`."""

    up: Annotated[list[_Name], Field(min_length=1, max_length=2)]
    act: _Name
    down: _Name
    above: Annotated[int, Field(ge=0, le=2**22)]
    times: Annotated[int, Field(ge=1, le=2)]
    ones: bool
    widths: dict[_Name, _Size]


class Layer(records.Schema):
    """One layer of experts. name: of the module whose place it takes, or of the block that it lies in. shared, routed: hidden neurons of the shared
    and of each routed expert. bias, out_bias: whether its layers have biases. beside: how many inputs of its block's last layer are attention's,
    0 where there are none. inside: where it lies in a block, which fastgen knows by itself. scale, removed: where experts were added or removed, what
    gates are times their probability, and for how many experts that are gone the router still has rows."""

    name: str
    activation: Activation
    inputs: _Size
    outputs: _Size
    shared: _Size
    routed: _Size
    experts: Annotated[int, Field(ge=1, le=2**12)]
    active: Annotated[float, Field(ge=0, le=2**12)]
    choice: Literal["token", "expert"]
    bias: bool
    out_bias: bool
    beside: Annotated[int, Field(ge=0, le=2**22)] = 0
    inside: InBlock | None = None
    scale: Annotated[float, Field(gt=0, le=2**12)] | None = None
    removed: Annotated[int, Field(ge=0, le=2**12)] = 0


class SlimLayer(records.Schema):
    """A block's modulation layer. common: the number of the layer that it shares, None where it shares none."""

    name: str
    common: Annotated[int, Field(ge=0, le=1000)] | None


class Slimmed(records.Schema):
    """rank: of each block's own part."""

    rank: Annotated[int, Field(ge=0, le=2**22)]
    layers: Annotated[list[SlimLayer], Field(min_length=1, max_length=10000)]


class Called(records.Schema):
    """How blocks are called, as in `streams.Streams`. text: the argument with text and that of its mask; embeds: whether each block embeds the
    modulation's argument for itself."""

    outputs: Annotated[list[str], Field(min_length=1, max_length=2)]
    mask: str
    text: Annotated[list[str], Field(min_length=2, max_length=2)] | None
    vector: str
    embeds: bool


class Group(records.Schema):
    """blocks: their names, in order; widths: of what the router sees of tokens and of modulation."""

    blocks: Annotated[list[str], Field(min_length=1, max_length=1000)]
    kept: Annotated[int, Field(ge=1, le=1000)]
    alpha: Annotated[float, Field(ge=0, le=1)]
    widths: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    called: Called


class Following(records.Schema):
    """What the number of experts follows (`capacity.Capacity`)."""

    at_noise: Annotated[float, Field(ge=0, le=2**12)]
    at_data: Annotated[float, Field(ge=0, le=2**12)]
    argument: Literal["timestep", "timesteps", "t"]
    noise: Annotated[float, Field(allow_inf_nan=False)]
    data: Annotated[float, Field(allow_inf_nan=False)]


class Description(records.Schema):
    """dense: the diffusers class whose layers these were. modulation, groups: where it was slimmed, or its blocks were grouped. capacity: where
    experts choose, and take more tokens at some times than at others."""

    dense: Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9]*$")]
    layers: Annotated[list[Layer], Field(min_length=1, max_length=10000)]
    modulation: Slimmed | None = None
    groups: Annotated[list[Group], Field(max_length=1000)] = Field(default_factory=list)
    capacity: Following | None = None


def describe(network: nn.Module) -> dict[str, Any]:
    """A `Description` of a network of experts, as JSON has it."""
    layers = [_layer(layer) for layer in expert_layers(network)]
    slimmed, groups = _slimmed(network), _groups(network)
    more: dict[str, Any] = {**({"modulation": slimmed} if slimmed else {}), **({"groups": groups} if groups else {})}
    if (capacity := capacity_of(network)) is not None:
        more["capacity"] = asdict(capacity)
    return {"dense": type(network).__name__, "layers": layers, **more}


def _slimmed(network: nn.Module) -> dict[str, Any] | None:
    found = slim_layers(network)
    return {"rank": found[0][2], "layers": [{"name": name, "common": common} for name, common, _ in found]} if found else None


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    names = {id(module): name for name, module in network.named_modules()}
    members = grouped_blocks(network)
    return [
        {
            "blocks": [names[id(block)] for block, own in members if own is router],
            "kept": router.kept,
            "alpha": router.alpha,
            "widths": [router.tokens.in_features, router.modulation.in_features],
            "called": next(block for block, own in members if own is router).membership.streams.described(),
        }
        for router in block_routers(network)
    ]


def _layer(layer: ExpertLayer) -> dict[str, Any]:
    assert isinstance(layer.active, int | float), "an active number for each sample is a call's, not a network's"
    return {
        "name": layer.name,
        "activation": layer.activation,
        "inputs": layer.shared.up.in_features,
        "outputs": layer.w2.shape[1],
        "shared": layer.shared.down.in_features,
        "routed": layer.w2.shape[2],
        "experts": layer.num_experts,
        "active": float(layer.active),
        "choice": layer.choice,
        "bias": layer.b1 is not None,
        "out_bias": layer.shared.down.bias is not None,
        "beside": 0 if layer.inside is None else layer.inside.beside,
        **({} if layer.inside is None else {"inside": _in_block(layer.inside)}),
        **({"scale": layer.gate_scale} if layer.gate_scale != layer.num_experts else {}),
        **({"removed": removed} if (removed := layer.router.out_features - layer.num_experts) else {}),
    }


def _in_block(inside: Inside) -> dict[str, Any]:
    found = asdict(inside)
    found.pop("beside")
    return found | {"up": list(inside.up)}


@torch.no_grad()
def rebuild(dense: nn.Module, description: Mapping[str, Any], where: str) -> nn.Module:
    """`dense` itself, its layers replaced as a description says, which has been checked as a `Description`; weights are to be loaded into it.
    where: what messages call its source. UserError for a layer that is not there or has other sizes."""
    structures = {structure.name: structure for structure, _ in walk(dense, [dense], strict=False) if structure is not None}
    for each in description["layers"]:
        structure, name = structures.get(each["name"]), each["name"]
        if structure is None:
            raise UserError(f"{where}: its experts are of {name}, and a {type(dense).__name__} has no such feed-forward layer")
        hidden = each["shared"] + each["experts"] * each["routed"]
        weights = structure.dense()
        rows = (1 + is_gated(structure.activation)) * hidden
        # A layer that was pruned or upcycled has another number of neurons than the dense one.
        w1, w2 = weights.w1.new_empty(rows, weights.w1.shape[1]), weights.w2.new_empty(weights.w2.shape[0], hidden)
        b1 = None if weights.b1 is None else weights.b1.new_empty(rows)
        order = torch.arange(hidden)
        parts = Partition(order[: each["shared"]], order[each["shared"] :].view(each["experts"], -1))
        experts = Experts(each["experts"], float(each["shared"]), float(each["routed"]), each["active"], each["choice"])
        layer = ExpertLayer(name, weights._replace(w1=w1, b1=b1, w2=w2), structure.activation, parts, experts)
        layer.gate_scale = each.get("scale") or float(each["experts"])
        set_rows(layer, each["experts"] + each.get("removed", 0))
        layer.inside = structure.inside
        found = _layer(layer)
        # Descriptions of before there were several ways to lie in a block do not say which.
        if wrong := [key for key in found if key != "active" and found[key] != each.get(key, found[key] if key == "inside" else 0)]:
            raise UserError(f"{where}: {name} has {wrong[0]} {each.get(wrong[0])!r}, and this fastgen makes {found[wrong[0]]!r} of it")
        structure.place(layer.train(structure.down.training))
    _rebuild_modulation(dense, description.get("modulation"), where)
    _rebuild_groups(dense, description.get("groups", ()), where)
    _rebuild_capacity(dense, description.get("capacity"), where)
    keep_routers_wide(dense)
    return dense


def _rebuild_modulation(network: nn.Module, described: Mapping[str, Any] | None, where: str) -> None:
    if described is None:
        return
    modules = dict(network.named_modules())
    for each in described["layers"]:
        if type(modules.get(each["name"])) is not nn.Linear:
            raise UserError(f"{where}: its slim modulation is of {each['name']}, and a {type(network).__name__} has no such linear layer")
    slim_like(network, [(each["name"], each["common"], described["rank"]) for each in described["layers"]])


def _rebuild_capacity(network: nn.Module, described: Mapping[str, Any] | None, where: str) -> None:
    if described is None:
        return
    if described["noise"] == described["data"] or any(layer.choice == "token" for layer in expert_layers(network)):
        raise UserError(f"{where}: its number of experts follows the time, for which experts choose and both ends of it differ")
    if described["argument"] not in inspect.signature(network.forward).parameters:
        raise UserError(f"{where}: its number of experts follows {described['argument']}, which a {type(network).__name__} is not given")
    follow(network, Capacity(**described))


def _rebuild_groups(network: nn.Module, described: Sequence[Mapping[str, Any]], where: str) -> None:
    modules = dict(network.named_modules())
    for each in described:
        if missing := [name for name in each["blocks"] if name not in modules]:
            raise UserError(f"{where}: its groups of blocks have {missing[0]}, and a {type(network).__name__} has no such block")
        if each["kept"] > len(each["blocks"]):
            raise UserError(f"{where}: of {len(each['blocks'])} blocks from {each['blocks'][0]} it keeps {each['kept']}")
        join([(name, modules[name]) for name in each["blocks"]], Groups(len(each["blocks"]), each["kept"], each["alpha"]))


# Written into the network's configuration, under a key that every loader obeys: one that knows no such format refuses the weights by this name,
# where it would leave layers without weights. The class in the folder's own file takes it away.
GUARD = {"quant_method": "experts of fastgen: load the pipeline with trust_remote_code=True"}


def class_name(dense: str) -> str:
    """The class in the file that comes with a network of experts."""
    return f"{dense}WithExperts"


def module_name(dense: str) -> str:
    """That file, without its ending: one for each class, because diffusers keeps the files of all folders in one place."""
    return f"modeling_{dense.lower()}_experts"


def code(dense: str) -> str:
    """What is in that file: depends on the class alone."""
    template = (Path(__file__).parent / "modeling.py").read_text(encoding="utf-8")
    return template.replace("SD3Transformer2DModel", dense)


def write_beside(folder: Path, network: nn.Module, *, index: Path | None) -> None:
    """Make the saved network of experts in `folder` one that diffusers loads with a class of its own; index: the pipeline's model_index.json, where
    the network is one of its components."""
    dense = type(network).__name__
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"_class_name": class_name(dense), "experts": describe(network), "quantization_config": GUARD}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if index is not None:
        (folder / f"{module_name(dense)}.py").write_text(code(dense), encoding="utf-8")
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries[folder.name] = entry(dense)
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def entry(dense: str) -> list[str]:
    """What a pipeline's model_index.json says of a network of experts."""
    return [module_name(dense), class_name(dense)]


def check_code(folder: Path) -> None:
    """UserError unless the Python files in a student's folder are those that this fastgen writes: for whoever is about to run them."""
    for file in sorted(folder.rglob("*.py")):
        dense = {module_name(name): name for name in _classes(file.parent / "config.json")}.get(file.stem)
        if dense is None or file.read_text(encoding="utf-8", errors="replace") != code(dense):
            raise UserError(f"{str(file)!r} is not what this fastgen writes beside experts, and it is not run; export the student again")


def _classes(config: Path) -> list[str]:
    """The dense class that a network's configuration names, if any."""
    experts = records.read(config).get("experts") if config.is_file() else None
    dense = experts.get("dense") if isinstance(experts, dict) else None
    return [dense] if isinstance(dense, str) and dense.isidentifier() else []


def load_weights(network: nn.Module, folder: Path) -> None:
    """Into a network of experts, from a folder's safetensors, which may be in parts. ValueError where they do not fit."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    parts = set(records.read(index)["weight_map"].values()) if index.is_file() else {"diffusion_pytorch_model.safetensors"}
    state: dict[str, Tensor] = {}
    for part in sorted(parts):
        state |= load_file(folder / Path(part).name)
    own = network.state_dict()
    if wrong := sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]:
        raise ValueError(f"its weights do not fit its configuration: {wrong[0]}")
    network.load_state_dict(state, assign=True)
