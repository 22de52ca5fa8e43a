"""Dense feed-forward layers to experts, in a network that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fastgen.errors import UserError
from fastgen.surgery.moe.importance import Importance
from fastgen.surgery.moe.layer import ExpertLayer, expert_layers
from fastgen.surgery.moe.split import Experts, deal, sizes
from fastgen.surgery.moe.structures import KEY, Structure, find


def to_convert(network: nn.Module, blocks: Iterable[nn.Module], experts: Experts, leave: Sequence[str] = ()) -> list[Structure]:
    """The layers that `convert` would replace, so that their importance can be measured; UserError, which names the module, where one cannot
    be, and for a network that has been converted before."""
    for layer in expert_layers(network):
        raise UserError(f"{KEY}: {layer.name} of {type(network).__name__} is split into experts already; split the dense network")
    layers = find(network, blocks, leave)
    for layer in layers:
        sizes(layer.hidden, experts, layer.name)
    return layers


def convert(
    network: nn.Module, blocks: Iterable[nn.Module], experts: Experts, importance: Importance, leave: Sequence[str] = ()
) -> list[ExpertLayer]:
    """Replace the network's feed-forward layers, for good, and return what took their place; importance: of each layer of `to_convert`.

    Nothing of the split is lost in the new weights, so a converted network is built again by converting another with any importance, and
    loading them. Frozen weights stay frozen, their router too; a network of the meta device may be converted as well.
    """
    layers = to_convert(network, blocks, experts, leave)
    return [_replaced(layer, experts, importance) for layer in layers]


def _replaced(structure: Structure, experts: Experts, importance: Importance) -> ExpertLayer:
    partition = deal(importance[structure.name], experts, structure.name)
    layer = ExpertLayer(structure.name, structure.dense(), structure.activation, partition, experts)
    layer.inside = structure.inside
    layer.requires_grad_(structure.down.weight.requires_grad)
    layer.train(structure.down.training)
    structure.place(layer)
    return layer
