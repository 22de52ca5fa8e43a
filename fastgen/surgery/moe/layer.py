"""The module that takes a feed-forward layer's place: a shared expert, a router and routed experts (Dense2MoE, arXiv:2510.09094)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from fastgen_kernels.moe_ffn import Activation, activate, is_gated, moe_ffn, moe_ffn_by_expert
from torch import Tensor, nn

from fastgen import shards
from fastgen.surgery.moe import routing
from fastgen.surgery.moe.inside import Inside
from fastgen.surgery.moe.routing import Routing
from fastgen.surgery.moe.split import Experts, Partition, select
from fastgen.surgery.moe.structures import Dense

if TYPE_CHECKING:
    from fastgen.surgery.moe.capacity import Capacity
    from fastgen.surgery.moe.held import Held

Active = float | Sequence[float]
Part = Literal["shared", "experts", "blocks"]


class Shared(nn.Module):
    """The dense layer of the shared expert's neurons, with the whole layer's output bias."""

    def __init__(self, dense: Dense, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up, self.down = _linear(dense.w1, dense.b1), _linear(dense.w2, dense.b2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


class Router(nn.Linear):
    """Logits in fp32 or wider whatever the network computes in; zeros at first."""

    def __init__(self, width: int, num_experts: int, like: Tensor) -> None:
        super().__init__(width, num_experts, bias=False, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):  # there is none on meta
            return F.linear(input.to(wide), self.weight.to(wide))


class ExpertLayer(nn.Module):
    """shared(x) + sum over chosen experts of gate * expert(x), tokens x (…, D) or, where experts choose, (B, …, D) with samples first.

    With a router of zeros and all experts active it is the dense layer; with none, that layer without the routed experts' neurons. Tokens see
    nothing of each other where they choose; where experts choose, those of one sample compete.

    active: experts that a token uses, changed at run time by `set_active`. records: where the layer's passes leave what they chose, or None.
    capacity: what the number follows in place of `active`, its mean; now: how many these are in the pass that goes on, None for `active`.
    held: choices of another pass that are made again (held.py), or None.
    selection_bias: (E,), added to probabilities for the choice alone; `even_out` changes it, no gradient does.
    gate_scale: what gates are times their probability, the number of experts that the layer was split into; it stays when experts are added or
    removed (operators.py). The router may have rows for more than there are, which come last: removed ones keep their share of the softmax.
    inside: how it lies in its block, where the block's own code stays (inside.py).
    """

    records: list[Routing] | None
    selection_bias: Tensor

    def __init__(self, name: str, dense: Dense, activation: Activation, partition: Partition, experts: Experts) -> None:
        super().__init__()
        self.name, self.choice, self.num_experts = name, experts.choice, experts.num
        self.activation: Activation = activation
        self.active: Active = experts.active
        self.capacity: Capacity | None = None
        self.now: Active | None = None
        self.gate_scale = float(experts.num)
        self.records = None
        self.held: Held | None = None
        self.inside: Inside | None = None
        gated = is_gated(activation)
        self.shared = Shared(select(dense, partition.shared, gated=gated)._replace(b2=dense.b2), activation)
        self.router = Router(dense.w1.shape[1], experts.num, dense.w1)
        routed = select(dense, partition.routed, gated=gated)
        self.w1, self.w2 = nn.Parameter(routed.w1.contiguous()), nn.Parameter(routed.w2.contiguous())
        self.b1 = None if routed.b1 is None else nn.Parameter(routed.b1.contiguous())
        self.register_buffer("selection_bias", self.router.weight.new_zeros(experts.num))  # FSDP2 wants one dtype of what it cuts together

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        if self.in_use == 0:
            return out
        probabilities = self.router(x).softmax(-1)[..., : self.num_experts]
        routed = self._by_token(x, probabilities) if self.choice == "token" else self._by_expert(x, probabilities)
        return out + routed.view(out.shape)

    @property
    def in_use(self) -> Active:
        """How many experts a token uses in the pass that goes on."""
        return self.active if self.now is None else self.now

    def _by_token(self, x: Tensor, probabilities: Tensor) -> Tensor:
        assert isinstance(self.active, int | float)
        probabilities = probabilities.flatten(0, -2)
        ids, gates = routing.token_choice(probabilities, self.selection_bias, int(self.active), self.gate_scale)
        if self.held is not None:
            ids = self.held.choice(self, ids)
            gates = routing.token_gates(probabilities, ids, self.gate_scale)
        if self.records is not None:
            self.records.append(routing.of_token_choice(self.name, self._of_those_left(probabilities), ids))
        return moe_ffn(x.flatten(0, -2), ids, gates, self.w1, self.b1, self.w2, activation=self.activation)

    def _by_expert(self, x: Tensor, probabilities: Tensor) -> Tensor:
        each = probabilities.flatten(1, -2)
        tokens, gates = routing.expert_choice(each, self.in_use, self.gate_scale)
        if self.held is not None:
            tokens = self.held.choice(self, tokens)
            gates = routing.expert_gates(each, tokens, self.gate_scale)
        if self.records is not None:
            self.records.append(routing.of_expert_choice(self.name, self._of_those_left(probabilities).flatten(0, -2), tokens))
        return moe_ffn_by_expert(x.flatten(0, -2), tokens, gates, self.w1, self.b1, self.w2, activation=self.activation)

    def _of_those_left(self, probabilities: Tensor) -> Tensor:
        """Summing to 1 again where experts were removed: else a router would balance its load by preferring those."""
        return probabilities if self.router.out_features == self.num_experts else probabilities / probabilities.sum(-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts of {self.w2.shape[-1]} neurons, {self.active} active, {self.choice} choice, {self.activation}"


def part(name: str) -> Part | None:
    """Whether a parameter, by its name in a network, is a shared expert's, a routed one's or its router's, or a router's of blocks; None for
    what else there is."""
    if re.search(r"(^|\.)block_router\.(tokens|modulation)\.weight$", name):
        return "blocks"
    if re.search(r"(^|\.)shared\.(up|down)\.(weight|bias)$", name):
        return "shared"
    return "experts" if re.search(r"(^|\.)(w1|b1|w2|selection_bias|router\.weight)$", name) else None


def is_router(name: str) -> bool:
    """Whether a parameter, by its name in a network, decides which experts or blocks run."""
    return re.search(r"(^|\.)(router\.weight|selection_bias|block_router\.(tokens|modulation)\.weight)$", name) is not None


def round_experts(network: nn.Module, dtype: Literal["auto", "bf16", "fp32"]) -> None:
    """Keep routed experts' weights, which nothing trains, in bf16 where that is asked for; they compute in whatever they meet."""
    for layer in expert_layers(network) if dtype == "bf16" else ():
        for weight in (layer.w1, layer.w2):
            weight.data = weight.data.to(torch.bfloat16)


def expert_layers(network: nn.Module) -> list[ExpertLayer]:
    return [module for module in network.modules() if isinstance(module, ExpertLayer)]


def set_rows(layer: ExpertLayer, rows: int) -> None:
    """Give its router so many rows, of zeros, in place of those that it has; as many keep what they hold."""
    if rows != layer.router.out_features:
        like = layer.router.weight
        layer.router = Router(layer.router.in_features, rows, like).requires_grad_(like.requires_grad).train(layer.training)


def set_active(network: nn.Module, active: Active | Tensor) -> None:
    """How many experts tokens use from now on, in every layer, at any time; with expert choice also one number for each sample of the batch.
    Blocks that are computed again in a backward pass use what they used in their forward pass.

    ValueError for what a layer cannot do.
    """
    value = active.tolist() if isinstance(active, Tensor) else active
    for layer in expert_layers(network):
        numbers = [value] if isinstance(value, int | float) else list(value)
        if not all(0 <= k <= layer.num_experts for k in numbers):
            raise ValueError(f"active: {value}; {layer.name} has {layer.num_experts} experts")
        if layer.choice == "token" and not (isinstance(value, int | float) and value == int(value)):
            raise ValueError(f"active: {value}; in {layer.name} tokens choose, so it is one whole number")
        layer.active, layer.capacity = value, None


@contextmanager
def using(network: nn.Module, active: float | None) -> Iterator[None]:
    """Inside, tokens use so many experts in every layer; None: as many as they do."""
    if active is None:
        yield
        return
    layers = expert_layers(network)
    before = [(layer.active, layer.capacity) for layer in layers]
    set_active(network, active)
    try:
        yield
    finally:
        for layer, (old, capacity) in zip(layers, before, strict=True):
            layer.active, layer.capacity = old, capacity


@contextmanager
def recording(network: nn.Module) -> Iterator[list[Routing]]:
    """Inside, each pass through an expert layer appends what it chose, with the graph of its probabilities: for `balance_loss`, statistics,
    `even_out`. Nothing is kept otherwise. Blocks that are computed again record nothing."""
    records: list[Routing] = []
    layers = expert_layers(network)
    before = [layer.records for layer in layers]
    for layer in layers:
        layer.records = records
    try:
        yield records  # nothing without layers
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.records = old


def remembered(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What opens a context in which experts in `module` are as active as at this call; from the second time on they record nothing, for then
    the module computes a pass again."""
    layers = expert_layers(module)
    then = [(layer.active, layer.now) for layer in layers]
    is_again = False

    @contextmanager
    def again() -> Iterator[None]:
        nonlocal is_again
        before = [(layer.active, layer.now, layer.records) for layer in layers]
        for layer, (active, now) in zip(layers, then, strict=True):
            layer.active, layer.now, layer.records = active, now, None if is_again else layer.records
        is_again = True
        try:
            yield
        finally:
            for layer, (active, now, records) in zip(layers, before, strict=True):
                layer.active, layer.now, layer.records = active, now, records

    return again


@torch.no_grad()
def even_out(network: nn.Module, counts: Mapping[str, Tensor], rate: float = 1e-3) -> None:
    """Raise the selection bias of experts with less than the mean load by `rate`, and lower that of the others (Wang et al. 2024,
    arXiv:2408.15664); gates, hence outputs of the same choice, stay. counts: of layers by name, over all processes, of which each may hold a part
    of the bias.

    Between updates: a pass whose gradient is still to come may have to choose again as it did."""
    for layer in expert_layers(network):
        if layer.name in counts:
            own = shards.own(layer.selection_bias)
            load = counts[layer.name].to(own)
            own += shards.part_of(rate * (load.mean() - load).sign(), layer.selection_bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
