"""A diffusers transformer with mixtures of experts in place of feed-forward layers (Dense2MoE, arXiv:2510.09094), in plain PyTorch.

fastgen writes this file beside the weights of a student, with the name of the student's own class in place of SD3Transformer2DModel, so that
diffusers loads it with `trust_remote_code=True`. It needs torch and diffusers only. The configuration's `experts` describes each layer.

In a layer, shared(x) + sum over chosen experts of gate * expert(x): scores P are softmax probabilities in fp32 or wider, gates are scale * P,
scale the number of experts, of the first split where some were added or removed. Where tokens choose, each takes the `active` experts that it
scores highest; where experts choose, each takes, in each sample, the ceil(tokens * active / experts) tokens that score it highest. Equal scores
go to lower indices. Where there is a `capacity`, active follows the time that the network is told, linearly from noise to data.

Where blocks are in groups, each sample passes through those `kept` blocks of a group that its router scores highest, in order.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel as Dense
from torch import Tensor, nn

# In the configuration, for whatever loads the weights without the class below: it would leave layers without weights, but knows no such format.
GUARD = {"quant_method": "experts of fastgen: load the pipeline with trust_remote_code=True"}


class SD3Transformer2DModelWithExperts(Dense):
    _keep_in_fp32_modules = [*(getattr(Dense, "_keep_in_fp32_modules", None) or ()), "router", "selection_bias"]  # noqa: RUF012

    def __init__(self, *args: Any, experts: dict[str, Any], **options: Any) -> None:
        super().__init__(*args, **options)
        for layer in experts["layers"]:
            _put(self, layer)
        _slim(self, experts.get("modulation"))
        for group in experts.get("groups", ()):
            _group(self, group)
        self.capacity = experts.get("capacity")
        self.register_to_config(experts=experts)
        self.__module__ = Path(__file__).stem  # as which a pipeline that is saved again names this file

    @functools.wraps(Dense.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.capacity is not None:
            given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
            active = _active(self.capacity, given[self.capacity["argument"]])
            for module in self.modules():
                if isinstance(module, Experts):
                    module.active = active
        return super().forward(*args, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().load_config(*args, **kwargs)
        config: Any = found[0] if isinstance(found, tuple) else found
        config.pop("quantization_config", None)
        return found

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """With the guard, and this file beside it."""
        super().save_config(save_directory, *args, **kwargs)
        config = Path(save_directory) / "config.json"
        guarded = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": GUARD}
        config.write_text(json.dumps(guarded, indent=2) + "\n", encoding="utf-8")
        if (beside := Path(save_directory) / Path(__file__).name).resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, beside)


_options = inspect.signature(Dense.__init__)
SD3Transformer2DModelWithExperts.__init__.__signature__ = _options.replace(  # type: ignore[attr-defined]
    parameters=[*_options.parameters.values(), inspect.Parameter("experts", inspect.Parameter.KEYWORD_ONLY)]
)


def _active(capacity: dict[str, Any], time: Tensor) -> float | list[float]:
    """One number, or one for each sample where their times differ; rounded, so that a time of another precision comes to as many tokens."""
    times = time.double().reshape(len(time), -1).mean(1) if time.ndim else time.double()[None]
    at_noise, at_data, noise, data = (capacity[key] for key in ("at_noise", "at_data", "noise", "data"))
    share = [(value - data) / (noise - data) for value in times.tolist()]
    each = [round(at_data + (at_noise - at_data) * min(1.0, max(0.0, s)), 4) for s in share]
    return each[0] if len(set(each)) == 1 else each


def _put(network: nn.Module, layer: dict[str, Any]) -> None:
    experts, inside, beside = Experts(layer), layer.get("inside"), layer["beside"]
    if inside is None:
        network.set_submodule(layer["name"], experts)
        return
    # The block's own code stays: it finds tokens where it had hidden activations.
    block: Any = network.get_submodule(layer["name"])
    down = getattr(block, inside["down"])
    setattr(block, inside["down"], BesideAttention(beside, down.out_features, down.bias is not None, experts) if beside else experts)
    for name in inside["up"]:
        setattr(block, name, AboveTokens(getattr(block, name), inside["above"], inside["times"]))
    setattr(block, inside["act"], Ones() if inside["ones"] else nn.Identity())
    for name, width in inside["widths"].items():
        setattr(block, name, width)


class AboveTokens(nn.Module):
    """[attention's part of a layer; the tokens themselves, once or twice], of tokens (..., D)."""

    def __init__(self, both: nn.Linear, attention: int, times: int) -> None:
        super().__init__()
        self.attention = nn.Linear(both.in_features, attention, both.bias is not None) if attention else None
        self.in_features, self.times = both.in_features, times

    def forward(self, x: Tensor) -> Tensor:
        first = [] if self.attention is None else [self.attention(x)]
        parts = [*first, *[x.to(first[0].dtype) if first else x] * self.times]
        return torch.cat(parts, -1) if len(parts) > 1 else x


class Ones(nn.Module):
    """Of what the block multiplies values by, which are the tokens here."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class BesideAttention(nn.Module):
    """The last layer of a block, of [attention; tokens] (..., A + D)."""

    def __init__(self, attention: int, outputs: int, bias: bool, experts: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Linear(attention, outputs, bias)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        width = self.attention.in_features
        return self.attention(x[..., :width]) + self.experts(x[..., width:])


class Shared(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, layer: dict[str, Any]) -> None:
        super().__init__()
        self.activation = layer["activation"]
        self.up = nn.Linear(inputs, hidden * (1 + _is_gated(self.activation)), layer["bias"])
        self.down = nn.Linear(hidden, outputs, layer["out_bias"])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_activate(self.up(x), self.activation))


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """Tokens x (..., D), where experts choose (B, ..., D) with samples first."""

    selection_bias: Tensor

    def __init__(self, layer: dict[str, Any]) -> None:
        super().__init__()
        count, inputs, outputs, routed = (layer[key] for key in ("experts", "inputs", "outputs", "routed"))
        self.activation, self.choice = layer["activation"], layer["choice"]
        self.count, self.active, self.scale = count, layer["active"], layer.get("scale") or count
        self.shared = Shared(inputs, layer["shared"], outputs, layer)
        self.router = Router(inputs, count + layer.get("removed", 0), bias=False)
        rows = routed * (1 + _is_gated(self.activation))
        self.w1, self.w2 = nn.Parameter(torch.empty(count, rows, inputs)), nn.Parameter(torch.empty(count, outputs, routed))
        self.b1 = nn.Parameter(torch.empty(count, rows)) if layer["bias"] else None
        self.register_buffer("selection_bias", torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(x)
        if self.active == 0:
            return out
        probabilities = self.router(x).softmax(-1)[..., : self.count]
        tokens = x.flatten(0, -2)
        routed = self._by_token(tokens, probabilities.flatten(0, -2)) if self.choice == "token" else self._by_expert(tokens, probabilities)
        return out + routed.view(out.shape)

    def _by_token(self, x: Tensor, probabilities: Tensor) -> Tensor:
        ids = (probabilities + self.selection_bias).argsort(dim=-1, descending=True, stable=True)[:, : int(self.active)]
        gates = self.scale * probabilities.gather(-1, ids)
        parts = x.new_zeros(*ids.shape, self.w2.shape[1], dtype=self._compute_dtype(x))
        for e in range(self.count):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                parts[token, slot] = self._expert(e, x[token], gates[token, slot])
        return parts.sum(1)

    def _by_expert(self, x: Tensor, probabilities: Tensor) -> Tensor:
        probabilities = probabilities.flatten(1, -2)
        batch, num_tokens, _ = probabilities.shape
        active = self.active if isinstance(self.active, list) else [self.active] * batch
        each = [min(num_tokens, math.ceil(round(num_tokens * k / self.count, 6))) for k in active]
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        tokens = torch.cat([order[b, :count] + num_tokens * b for b, count in enumerate(each)])
        out = x.new_zeros(len(x), self.w2.shape[1], dtype=self._compute_dtype(x))
        for e, gates in enumerate(self.scale * probabilities.flatten(0, 1).T):
            out = out.index_add(0, tokens[:, e], self._expert(e, x[tokens[:, e]], gates[tokens[:, e]]))
        return out

    def _expert(self, e: int, x: Tensor, gates: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(dtype) @ self.w1[e].to(dtype).T
            h = h if self.b1 is None else h + self.b1[e].to(dtype)
            return (_activate(h, self.activation) * gates[:, None]).to(dtype) @ self.w2[e].to(dtype).T

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else x.dtype


def _slim(network: nn.Module, modulation: dict[str, Any] | None) -> None:
    if modulation is None:
        return
    common = Common()
    for each in modulation["layers"]:
        layer: Any = network.get_submodule(each["name"])
        has_bias, index, rank = layer.bias is not None, each["common"], modulation["rank"]
        if index is None:
            network.set_submodule(each["name"], LowRank(layer.in_features, layer.out_features, has_bias, rank))
            continue
        while len(common.layers) <= index:
            common.layers.append(nn.Linear(layer.in_features, layer.out_features, bias=False))
        network.set_submodule(each["name"], BesideCommon(common, index, has_bias, rank))
    if len(common.layers):
        network.common_modulation = common


class LowRank(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))


class Common(nn.Module):
    """Layers that blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()


class BesideCommon(nn.Module):
    """A shared layer and a block's own part."""

    def __init__(self, common: Common, index: int, bias: bool, rank: int) -> None:
        super().__init__()
        self.common = (common, index)  # in a tuple it is not a submodule of every block
        layer: Any = common.layers[index]
        self.own = LowRank(layer.in_features, layer.out_features, bias, rank) if rank else None
        self.bias = nn.Parameter(torch.zeros(layer.out_features)) if bias and not rank else None

    def forward(self, input: Tensor) -> Tensor:
        common, index = self.common
        out = common.layers[index](input)
        out = out if self.own is None else out + self.own(input)
        return out if self.bias is None else out + self.bias


def _group(network: nn.Module, group: dict[str, Any]) -> None:
    router = BlockRouter(group)
    for index, name in enumerate(group["blocks"]):
        block: Any = network.get_submodule(name)
        kind = type(block)
        block.__class__ = type(kind.__name__, (GroupedBlock, kind), {"__module__": kind.__module__})
        block.membership = (router, index)
        if index == 0:
            block.block_router = router


class BlockRouter(nn.Module):
    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__()
        self.kept, self.alpha, self.called = group["kept"], group["alpha"], group["called"]
        self.tokens, self.modulation = (Router(width, len(group["blocks"]), bias=False) for width in group["widths"])
        self.keep: Any = None

    def choose(self, block: Any, given: dict[str, Any]) -> None:
        """(B, m): which blocks each sample passes through, by pooled tokens and the modulation's vector."""
        called, image = self.called, given[self.called["outputs"][-1]]
        pooled = [_mean(image, given.get(called["mask"]))]
        if called["text"] is not None:
            pooled.append(_mean(given[called["text"][0]], given.get(called["text"][1])))
        vector = given[called["vector"]]
        if called["embeds"]:
            vector = block.norm1.emb(vector, given["class_labels"], hidden_dtype=image.dtype)
        vector = (vector.mean(1) if vector.ndim == 4 else vector)[: len(image)].flatten(1)
        scores = (self.alpha * self.tokens(torch.cat(pooled, -1)) + (1 - self.alpha) * self.modulation(vector)).softmax(-1)
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        self.keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


class GroupedBlock(nn.Module):
    """Mixed into a block's class: samples that skip the block keep their streams."""

    membership: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        router, index = self.membership
        given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        if index == 0:
            router.choose(self, given)
        keep = router.keep[:, index]
        out: list[Any] = [given[name] for name in router.called["outputs"]]
        if bool(keep.any()):
            after = super().forward(*args, **kwargs)
            after = after if isinstance(after, tuple) else (after,)
            out = [torch.where(keep.view(-1, *[1] * (new.ndim - 1)), new, old.to(new.dtype)) for old, new in zip(out, after, strict=False)]
        return tuple(out) if len(out) > 1 else out[0]


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Over tokens that a mask (B, N), or biases on scores (B, 1, N), does not hide."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.mean(1, dtype=wide)
    is_there = (mask > -1 if mask.is_floating_point() else mask.bool()).reshape(len(x), -1)[:, : x.shape[1]].to(wide)
    return (x.to(wide) * is_there[..., None]).sum(1) / is_there.sum(1, keepdim=True).clamp(min=1)


def _is_gated(activation: str) -> bool:
    return activation in ("geglu", "geglu-approximate", "swiglu")


def _activate(h: Tensor, activation: str) -> Tensor:
    value, gate = h.chunk(2, -1) if _is_gated(activation) else (None, h)  # values first
    form = "tanh" if activation.endswith("-approximate") else "none"
    out = F.silu(gate) if activation in ("silu", "swiglu") else F.gelu(gate, approximate=form)
    return out if value is None else value * out
